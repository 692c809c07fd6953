"""The site's ledger towards the server and the other sites, and theirs towards it.

What the site states, the receipts that it is given, and what it has seen of its peers.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Sequence
from pathlib import Path

from lepton_fl.errors import LeptonError, VerificationFailed
from lepton_fl.fleet.agent.member import EnrolledSite
from lepton_fl.fleet.protocol.limits import MOST_STATED, SERVER, printable
from lepton_fl.privacy import Ledger
from lepton_fl.privacy.ledger import Receipt, Statement, Witness
from lepton_fl.secagg.identity import IdentityKey, key_digest
from lepton_fl.site import Site, Surroundings

log = logging.getLogger(__name__)


class StatedLedger:
    """One site's ledger, as others are told of it. `take` and `witness` are for one thread."""

    def __init__(self, site: Site[Surroundings], member: EnrolledSite | None, state: Path) -> None:
        """`member`: who the site is among the sites; None: it states its ledger, and is no witness."""
        self._site = site.name
        self._ledger = site.ledger
        self._member = member
        self._witness = None if member is None else open_witness(member, state / "witness.db")

    def close(self) -> None:
        """Witness nothing more."""
        if self._witness is not None:
            self._witness.close()

    # What this site states

    def state(self, data_set: str, *, run: str = "", round: int = 0) -> Statement:
        """Where the ledger ends, with the charge of that round if there is one. Waits for who charges.

        Raises:
            VerificationFailed: the ledger is not what this process knows of it.
            ConfigError: it cannot be read.
        """
        charged = round and self._ledger.data_set(data_set).round(run, round) is not None
        return self._ledger.state(
            site=self._site,
            data_set=data_set,
            run=run,
            round=round if charged else 0,
            identity=self._identity,
        )

    def leaving(self, told: Statement) -> bytes:
        """`told` as it leaves, of the head of now; waits for nobody."""
        return self._ledger.restate(told, self._identity).signed

    @property
    def _identity(self) -> IdentityKey | None:
        return None if self._member is None else self._member.identity.identity_key

    # What others have seen of it

    def take(self, signed: Sequence[bytes], server: bytes) -> None:
        """Compare the ledger with receipts, of the server by its key, or of peers by the roster; keep them.

        Raises:
            VerificationFailed: the ledger does not have what one of them shows; the agent must not go on.
            ConfigError: they cannot be kept.
        """
        for one in signed[:MOST_STATED]:
            try:
                receipt = Receipt.read(one)
                self._check(receipt, server)
            except VerificationFailed as error:
                # A forgery, or another's: it says nothing of this ledger.
                log.warning("receipt not taken", extra={"reason": printable(error.message)})
                continue
            if isinstance(self._ledger, Ledger):
                self._ledger.keep(receipt)
            else:
                self._ledger.check([receipt])

    def _check(self, receipt: Receipt, server: bytes) -> None:
        """Whether a receipt is of a witness and of this site's ledger: else anybody could stop the site."""
        told = receipt.statement
        if told.site != self._site:
            raise VerificationFailed("receipt: of another site's ledger")
        by_server = bool(server) and hmac.compare_digest(receipt.key, server) and receipt.witness == SERVER
        if not by_server and not self._is_member(receipt.witness, receipt.key):
            raise VerificationFailed(f"receipt: by the key of no witness that is called {receipt.witness!r}")
        identity = self._identity
        # The server's too: it could invent ledgers without end, and have a recovery charge them.
        own = by_server if identity is None else hmac.compare_digest(told.identity, identity.public)
        if told.ledger != self._ledger.key and not own:
            raise VerificationFailed(f"receipt: {receipt.witness} shows a ledger that this site did not sign")

    # What this site has seen of others

    def witness(self, signed: Sequence[bytes]) -> list[bytes]:
        """Countersign the last of another site's statements, and remember all; receipts to be sent back.

        Of a ledger that has gone back they show how far it was.
        """
        if self._witness is None or not signed:
            return []
        try:
            told = self._of_a_peer(signed[:MOST_STATED])
        except VerificationFailed as error:
            log.warning("statements not countersigned", extra={"reason": printable(error.message)})
            return []
        *before, last = told
        try:
            self._witness.see(last, before=before)
            return [receipt.signed for receipt in self._witness.countersign()]
        except VerificationFailed as error:
            log.warning("a peer's ledger has gone back", extra={"reason": printable(error.message)})
            return [receipt.signed for receipt in self._witness.highest(last.site)][-MOST_STATED:]
        except LeptonError as error:
            log.warning("statements not countersigned", extra={"reason": error.message})
            return []

    def _of_a_peer(self, signed: Sequence[bytes]) -> list[Statement]:
        told = [Statement.read(one) for one in signed]
        for one in told:
            if one.site != told[0].site or one.site == self._site:
                raise VerificationFailed("statements: of this site, or of more than one")
            if not self._is_member(one.site, one.identity):
                raise VerificationFailed(f"statement: not signed by a peer that is called {one.site!r}")
        return told

    def _is_member(self, site: str, key: bytes) -> bool:
        if self._member is None:
            return False
        members = self._member.consortium().roster.members
        return any(
            member.name == site and hmac.compare_digest(member.key_digest, key_digest(key))
            for member in members
        )


def open_witness(member: EnrolledSite, path: Path) -> Witness:
    """What the site has seen of its peers' ledgers; its identity key signs its receipts.

    Raises:
        ConfigError: it cannot be used.
    """
    return Witness(path, name=member.identity.site, key=member.identity.identity_key)
