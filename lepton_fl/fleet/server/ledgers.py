"""The sites' ledgers as the server sees them: it judges what they state, and has peers countersign it.

Owned by the event loop. A receipt is durable before it leaves: one commit for all that were seen meanwhile.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from lepton_fl.errors import ConfigError, LeptonError, ProtocolError, VerificationFailed
from lepton_fl.files import write_atomic
from lepton_fl.fleet.pki.authority import SECRET, read_secret
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.limits import MOST_STATED, SERVER
from lepton_fl.fleet.server.config import ServerFiles
from lepton_fl.fleet.server.hub import Hub, Session
from lepton_fl.privacy.ledger import Receipt, Statement, Witness
from lepton_fl.secagg.identity import IdentityKey, key_digest

log = logging.getLogger(__name__)

PEERS = 4
"""Sites that countersign for one: with n sites 4 n signatures a time, and not n^2."""
EVERY = 10
"""Rounds after which they do, and at the end of a run."""
_ROUNDS = 2 * EVERY
"""Charges that they are told of: one time may have been missed."""
_AGAIN_S = 1.0
"""A site that connects more often is told of once: its peers verify what it states, beside their work."""
_SOON_S = 0.2
"""So that a disk is waited for five times a second at most, however quick the rounds are."""


class Ledgers:
    """The server as a witness, and as the messenger between witnesses."""

    def __init__(self, hub: Hub, witness: Witness, identity: Callable[[str], bytes | None]) -> None:
        """`identity` tells the digest of a member's identity key, by its name."""
        self._hub = hub
        self._witness = witness
        self._identity = identity
        self._soon: asyncio.TimerHandle | None = None
        self._told: dict[int, float] = {}
        """When peers were last asked because a site had connected."""
        self._asked: Counter[int] = Counter()
        """How often each peer may still answer: verifying costs more than sending."""

    @property
    def key(self) -> bytes:
        """The public key of the server's receipts."""
        return self._witness.key

    def close(self) -> None:
        """Give no more receipts."""
        if self._soon is not None:
            self._soon.cancel()
        self._witness.close()

    # What sites state of themselves

    def take(self, site: str, signed: bytes, request: pb.Assign | None = None) -> None:
        """Judge and remember what a site states, which TLS has proved to be `site`.

        In reply to a request or, where there is none, as it connects.

        Raises:
            VerificationFailed: it states nothing, something else, or a ledger that has gone back.
            Unwritable: it cannot be remembered.
        """
        if not signed:
            raise VerificationFailed(f"{site}: states nothing of its ledger, and a site's agent does")
        told = Statement.read(signed)
        about = ("", 0) if request is None else (request.run, told.round and request.round)
        if told.site != site or (told.run, told.round) != about:
            raise VerificationFailed(f"{site}: states the ledger of another site, run or round")
        self._witness.see(told)
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_later(_SOON_S, self._countersign)

    def receipts(self, site: str) -> pb.ToAgent:
        """The highest of a site, by which it sees for itself that it has gone back."""
        try:
            return _message(self._witness.highest(site)[-MOST_STATED:])
        except LeptonError as error:
            log.warning("no receipts: %s", error.message)
            return _message([])

    def _countersign(self) -> None:
        self._soon = None
        try:
            made = self._witness.countersign()
        except LeptonError as error:
            # With the next statement.
            log.warning("no receipts: %s", error.message)
            return
        self._deliver(made)

    def _deliver(self, receipts: Sequence[Receipt]) -> None:
        """Each to the site whose ledger it is of, if it is here."""
        here = {session.site: session for session in self._hub.sessions.values()}
        for receipt in receipts:
            if receipt.statement.site in here:
                here[receipt.statement.site].outbox.put(_message([receipt]))

    # Between sites

    def entered(self, session: Session) -> None:
        """Have its peers countersign for a site that has connected, and the site for its peers."""
        self._asked[session.party] = 0
        now = time.monotonic()
        if now - self._told.get(session.party, -_AGAIN_S) < _AGAIN_S:
            return
        self._told[session.party] = now
        here = sorted(self._hub.sessions)
        at, steps = here.index(session.party), range(1, min(PEERS, len(here) - 1) + 1)
        self._tell(session.party, [here[(at + step) % len(here)] for step in steps])
        for step in steps:
            self._tell(here[at - step], [session.party])

    def relay(self, parties: Collection[int]) -> None:
        """Have peers countersign the last charges of the sites of a run."""
        here = sorted(party for party in parties if party in self._hub.sessions)
        for at, party in enumerate(here):
            self._tell(party, [*here[at + 1 :], *here[:at]][:PEERS])

    def carry(self, session: Session, signed: Sequence[bytes]) -> None:
        """Pass on the receipts that a peer has given, and learn from them what was forgotten here.

        Raises:
            ProtocolError: they are not its own, malformed, or were not asked for.
        """
        if len(signed) > MOST_STATED:
            raise ProtocolError(f"receipts: {len(signed)} at a time, at most {MOST_STATED} are read")
        if not self._asked[session.party]:
            raise ProtocolError("receipts: nobody asked for them")
        self._asked[session.party] -= 1
        genuine = []
        for one in signed:
            try:
                receipt = Receipt.read(one)
            except VerificationFailed as error:
                raise ProtocolError(f"receipt: {error.message}") from None
            if receipt.witness != session.site or not self._is_of(session.site, receipt.key):
                raise ProtocolError("receipt: is another's")
            told = receipt.statement
            if not self._is_of(told.site, told.identity):
                continue  # Of one who is a member no more.
            try:
                # Where this server's own memory was lost, or is older.
                self._witness.see(told)
            except LeptonError as error:
                log.debug("a peer's receipt tells nothing new: %s", error.message)
            genuine.append(receipt)
        self._deliver(genuine)

    def _is_of(self, site: str, key: bytes) -> bool:
        known = self._identity(site)
        return known is not None and hmac.compare_digest(known, key_digest(key))

    def _tell(self, party: int, peers: Sequence[int]) -> None:
        try:
            told = self._witness.last(self._hub.sessions[party].site, rounds=_ROUNDS)
        except LeptonError as error:
            # No run is lost for it.
            log.warning("peers are told of no ledger: %s", error.message)
            return
        message = pb.ToAgent(statements=pb.Statements(signed=told[-MOST_STATED:]))
        for peer in peers if told else ():
            self._asked[peer] += 1
            self._hub.sessions[peer].outbox.put(message)


def open_witness(files: ServerFiles) -> Witness:
    """The server's own memory of the sites' ledgers, and its key, made at the first start.

    Raises:
        ConfigError: one cannot be used, or others may read the key; or the memory is there without it.
    """
    path = files.witness_key
    if not path.exists():
        if files.witness.exists():
            raise ConfigError(
                f"{path}: is gone, and signs the receipts of {files.witness.name}",
                fix=f"bring it back from the backup; or remove {files.witness}: the peers still know",
            )
        write_atomic(path, IdentityKey.generate().to_bytes(), mode=SECRET)
    return Witness(files.witness, name=SERVER, key=IdentityKey.read(read_secret(path)))


def _message(receipts: Sequence[Receipt]) -> pb.ToAgent:
    return pb.ToAgent(receipts=pb.Receipts(signed=[one.signed for one in receipts]))
