"""Who is connected, what is asked of whom, and what has come back. One event loop owns all of it.

An *exchange* is one request to one site. It stays open until its reply is here, its deadline has passed, or
the site has been away for longer than the grace period; it outlives the connections that carry it. Nothing
here knows what a payload says.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lepton_fl.errors import ProtocolError
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.limits import OF_A_PROCESS, TRANSFERS, printable
from lepton_fl.fleet.protocol.payload import Payload
from lepton_fl.fleet.protocol.transfer import Incoming, Outbox

log = logging.getLogger(__name__)

SERVER_FAULT = 1
"""Error code where it was not the site that failed."""
FAREWELL_S = 2.0
"""How long an agent has to hear why it is sent away."""
_LOST_TRANSFER = "the result did not arrive as it was announced"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """How an exchange ended."""

    exchange: bytes
    payload: Payload | None = None
    error_code: int = 0
    error_reason: str = ""

    @property
    def lost(self) -> bool:
        """Whether there is none, and will be none."""
        return self.payload is None and not self.error_code


Arrived = Callable[[Reply], None]


@dataclass(kw_only=True)
class Exchange:
    """One request to one site, open."""

    id: bytes
    party: int
    request: pb.Assign
    payload: Payload
    until: float
    """On the loop's clock."""
    spool: Path
    arrived: Arrived
    incoming: Incoming | None = None
    transfers: int = 0
    timer: asyncio.TimerHandle | None = None
    """Of the deadline."""
    grace: asyncio.TimerHandle | None = None
    """Of the site's absence."""


@dataclass(kw_only=True, eq=False)
class Session:
    """One connected agent."""

    party: int
    site: str
    instance: bytes
    release: str
    device: str
    insecure_seed: bool
    outbox: Outbox
    since: float = field(default_factory=time.time)
    heard: float = field(default_factory=time.monotonic)
    state: str = "idle"
    received: int = 0
    """Bytes of payloads."""
    sent: int = 0
    counted: tuple[int, int] = (0, 0)
    """What of `received` and `sent` the telemetry knows."""
    over: bool = False
    """The stream is to end, after what is in the outbox; nothing more is heard of it."""
    parted: bool = False
    """The agent has said goodbye."""
    refused: bool = False
    """The site is let in no more."""
    gone: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done: the stream is to end now."""

    def close(self, code: pb.Goodbye.Code, reason: str) -> None:
        """Say goodbye, and end, also where it is not heard."""
        self.over = True
        self.outbox.put(pb.ToAgent(goodbye=pb.Goodbye(code=code, reason=reason)))
        asyncio.get_running_loop().call_later(FAREWELL_S, self.drop)

    def drop(self) -> None:
        """End without a word."""
        self.over = True
        if not self.gone.done():
            self.gone.set_result(None)


class Hub:
    """All sessions and all open exchanges."""

    def __init__(self, *, grace: float, payload_limit: int) -> None:
        """`grace` in seconds; `payload_limit` bytes of one site's reply."""
        self._grace = grace
        self._limit = payload_limit
        self.sessions: dict[int, Session] = {}
        self._exchanges: dict[bytes, Exchange] = {}
        self._of_party: dict[int, dict[bytes, Exchange]] = {}
        self._gone: dict[int, float] = {}
        """When a site was last connected."""
        self.watchers: list[Callable[[], None]] = []
        """Called whenever a site comes or goes."""

    # Sessions

    def enter(self, session: Session) -> None:
        """A site's agent is here: what is still open for it is asked again."""
        before = self.sessions.get(session.party)
        self.sessions[session.party] = session
        if before is not None:
            if not hmac.compare_digest(before.instance, session.instance):
                log.warning(
                    "another agent has connected in place of the one before", extra={"site": session.site}
                )
                before.close(
                    pb.Goodbye.REPLACED, "another agent of this site has connected; only one may run"
                )
            else:
                # The same agent: nobody is left at the other end of its old connection.
                before.drop()
        self._gone.pop(session.party, None)
        for exchange in self._of_party.get(session.party, {}).values():
            if exchange.grace is not None:
                exchange.grace.cancel()
                exchange.grace = None
            self._assign(session, exchange)
        self._changed()

    def leave(self, session: Session) -> None:
        """A stream has ended. Its exchanges wait for the site's return, as long as the grace period.

        Not those that nobody would answer then.
        """
        if self.sessions.get(session.party) is not session:
            return
        del self.sessions[session.party]
        self._gone[session.party] = -math.inf if session.refused else asyncio.get_running_loop().time()
        for exchange in list(self._of_party.get(session.party, {}).values()):
            if session.parted and exchange.request.type.startswith(OF_A_PROCESS):
                self._end(exchange, Reply(exchange=exchange.id))
            else:
                self._await_return(exchange)
        self._changed()

    def open_for(self, party: int) -> list[bytes]:
        """The exchanges that still await a site."""
        return list(self._of_party.get(party, {}))

    def _changed(self) -> None:
        for watcher in self.watchers:
            watcher()

    # What runs ask

    def send(
        self, request: pb.Assign, payload: Payload, *, party: int, spool: Path, arrived: Arrived
    ) -> None:
        """Open an exchange: `request` says which, of what run and for how long. `arrived` is called once."""
        loop = asyncio.get_running_loop()
        exchange = Exchange(
            id=request.exchange,
            party=party,
            request=request,
            payload=payload,
            until=loop.time() + request.deadline_s,
            spool=spool,
            arrived=arrived,
        )
        self._exchanges[exchange.id] = exchange
        self._of_party.setdefault(party, {})[exchange.id] = exchange
        exchange.timer = loop.call_at(exchange.until, self._end, exchange, Reply(exchange=exchange.id))
        session = self.sessions.get(party)
        if session is None:
            self._await_return(exchange)
        else:
            self._assign(session, exchange)

    def cancel(self, exchange_id: bytes) -> None:
        """A run needs a reply no longer."""
        exchange = self._exchanges.get(exchange_id)
        if exchange is None:
            return
        session = self.sessions.get(exchange.party)
        self._close(exchange)
        if session is not None:
            session.outbox.put(pb.ToAgent(cancel=pb.Cancel(exchange=exchange_id)))

    def _assign(self, session: Session, exchange: Exchange) -> None:
        request = pb.Assign()
        request.CopyFrom(exchange.request)
        request.deadline_s = max(0.0, exchange.until - asyncio.get_running_loop().time())
        session.outbox.put(pb.ToAgent(assign=request))

    def _await_return(self, exchange: Exchange) -> None:
        loop = asyncio.get_running_loop()
        until = self._gone.get(exchange.party, -self._grace) + self._grace
        exchange.grace = loop.call_at(
            max(until, loop.time()), self._end, exchange, Reply(exchange=exchange.id)
        )

    # What agents say

    def accept(self, session: Session, said: pb.Accept) -> None:
        """The site asks for the bytes of a request."""
        exchange = self._mine(session, said.exchange)
        if exchange is not None:
            session.outbox.transfer(exchange.id, exchange.payload, said.offset)

    def asked(self, session: Session, exchange_id: bytes) -> pb.Assign | None:
        """The request that a site's reply would be to; None where nobody awaits it."""
        exchange = self._mine(session, exchange_id)
        return None if exchange is None else exchange.request

    def refuse(self, session: Session, exchange_id: bytes, code: int, reason: str) -> None:
        """Take no reply to this request: the run is told so in the place of the site."""
        exchange = self._mine(session, exchange_id)
        if exchange is not None:
            self._give_up(session, exchange, code, printable(reason))

    def result(self, session: Session, said: pb.Result) -> None:
        """The site announces its reply. One that was counted already is acknowledged, and ignored.

        Raises:
            ProtocolError: it is larger than any may be, or malformed.
        """
        if len(said.exchange) != 16:
            raise ProtocolError("result: an exchange is named by 16 bytes")
        exchange = self._mine(session, said.exchange)
        if exchange is None:
            session.outbox.put(pb.ToAgent(ack=pb.Ack(exchange=said.exchange)))
            return
        session.outbox.drop(exchange.id)
        if said.error_code:
            if not 0 < said.error_code < 1 << 31:
                raise ProtocolError(f"result: error code {said.error_code}")
            reason = printable(said.error_reason)
            self._give_up(session, exchange, said.error_code, reason)
            return
        if not 0 < said.size <= self._limit:
            raise ProtocolError(f"result: {said.size} bytes, 1 to {self._limit} are taken")
        if len(said.sha256) != 32:
            raise ProtocolError("result: a SHA-256 is 32 bytes")
        if said.inline:
            payload = Payload.of(said.inline)
            if payload.size != said.size or not hmac.compare_digest(payload.sha256, said.sha256):
                raise ProtocolError("result: its bytes are not those it announces")
            self._complete(session, exchange, payload)
            return
        held = exchange.incoming
        if held is not None and (held.sha256 != said.sha256 or held.size != said.size):
            held.discard()
            held = None
        if held is None:
            path = exchange.spool / f"{exchange.id.hex()}.in"
            try:
                held = exchange.incoming = Incoming(path, size=said.size, sha256=said.sha256)
            except OSError as error:
                self._cannot_store(session, exchange, error)
                return
        session.outbox.put(pb.ToAgent(proceed=pb.Proceed(exchange=exchange.id, offset=held.received)))

    def chunk(self, session: Session, said: pb.Chunk) -> None:
        """The next bytes of a result.

        Raises:
            ProtocolError: nobody asked for them, or they are not the next ones.
        """
        exchange = self._mine(session, said.exchange)
        if exchange is None:
            return  # Under way when the exchange ended.
        if exchange.incoming is None:
            raise ProtocolError("chunk: of a result that was not announced")
        try:
            payload = exchange.incoming.finish() if exchange.incoming.take(said) else None
        except OSError as error:
            self._cannot_store(session, exchange, error)
            return
        if payload is not None:
            exchange.incoming = None
            self._complete(session, exchange, payload)
        elif exchange.incoming.received == 0:
            # All of it was here, and was not what had been announced.
            self._again(session, exchange)

    def _again(self, session: Session, exchange: Exchange) -> None:
        exchange.transfers += 1
        log.warning("a result does not have the digest it was announced with", extra={"site": session.site})
        if exchange.transfers >= TRANSFERS:
            self._give_up(session, exchange, SERVER_FAULT, _LOST_TRANSFER)
        else:
            session.outbox.put(pb.ToAgent(proceed=pb.Proceed(exchange=exchange.id, offset=0)))

    def _cannot_store(self, session: Session, exchange: Exchange, error: OSError) -> None:
        log.error("a result cannot be stored: %s", error.strerror, extra={"site": session.site})
        self._give_up(session, exchange, SERVER_FAULT, f"the server cannot store it: {error.strerror}")

    def _give_up(self, session: Session, exchange: Exchange, code: int, reason: str) -> None:
        self._end(exchange, Reply(exchange=exchange.id, error_code=code, error_reason=reason))
        session.outbox.put(pb.ToAgent(ack=pb.Ack(exchange=exchange.id)))

    def _complete(self, session: Session, exchange: Exchange, payload: Payload) -> None:
        self._end(exchange, Reply(exchange=exchange.id, payload=payload))
        session.outbox.put(pb.ToAgent(ack=pb.Ack(exchange=exchange.id)))

    def _mine(self, session: Session, exchange_id: bytes) -> Exchange | None:
        """The open exchange of that id, if it is this site's: nobody answers for another."""
        return self._of_party.get(session.party, {}).get(exchange_id)

    def _end(self, exchange: Exchange, reply: Reply) -> None:
        if exchange.id in self._exchanges:
            session = self.sessions.get(exchange.party)
            if reply.lost and session is not None:
                session.outbox.put(pb.ToAgent(cancel=pb.Cancel(exchange=exchange.id)))
            self._close(exchange)
            exchange.arrived(reply)

    def _close(self, exchange: Exchange) -> None:
        del self._exchanges[exchange.id]
        of_party = self._of_party[exchange.party]
        del of_party[exchange.id]
        if not of_party:
            del self._of_party[exchange.party]
        for timer in (exchange.timer, exchange.grace):
            if timer is not None:
                timer.cancel()
        if exchange.incoming is not None:
            exchange.incoming.discard()
        session = self.sessions.get(exchange.party)
        if session is not None:
            session.outbox.drop(exchange.id)

    def __len__(self) -> int:
        """Open exchanges."""
        return len(self._exchanges)
