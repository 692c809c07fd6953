"""Privacy that the site owns: accounting, the ledger, and the promise in words. No torch, no flwr."""

from lepton_fl.privacy.accounting import Gaussian, calibrate, epsilon, epsilon_by_step
from lepton_fl.privacy.guarantee import Guarantee
from lepton_fl.privacy.ledger import AnyLedger, Charge, Ledger, RehearsalLedger

__all__ = [
    "AnyLedger",
    "Charge",
    "Gaussian",
    "Guarantee",
    "Ledger",
    "RehearsalLedger",
    "calibrate",
    "epsilon",
    "epsilon_by_step",
]
