"""The site's own record of privacy spent on its data: append-only, signed, across runs and restarts.

Events are stored as data (a mechanism and its parameters), never as sums, so that any accountant can read
them and all studies on a data set compose. A charge is on disk before the first row is read for the round
and long before anything leaves: a crash wastes budget, it never leaks any. docs/ledger.md tells the whole.
"""

from lepton_fl.privacy.ledger.book import Budget, Spent
from lepton_fl.privacy.ledger.disk import Ledger, Recovered, recover
from lepton_fl.privacy.ledger.entries import Charge, Renewal
from lepton_fl.privacy.ledger.ledger import AnyLedger, RehearsalLedger
from lepton_fl.privacy.ledger.receipts import Head, Receipt, Statement, advance
from lepton_fl.privacy.ledger.witness import Witness

__all__ = [
    "AnyLedger",
    "Budget",
    "Charge",
    "Head",
    "Ledger",
    "Receipt",
    "Recovered",
    "RehearsalLedger",
    "Renewal",
    "Spent",
    "Statement",
    "Witness",
    "advance",
    "recover",
]
