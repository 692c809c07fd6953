"""Who is connected, what is asked of whom, and what has come back. One event loop owns all of it.

An *exchange* is one request to one site. It stays open until its answer is here, its deadline has passed, or
the site has been away for longer than the grace period; it outlives the connections that carry it. Nothing
here knows what a payload says.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lepton_fl.errors import ProtocolError
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.payload import Payload
from lepton_fl.fleet.protocol.transfer import Incoming, Outbox

log = logging.getLogger(__name__)

_ATTEMPTS = 3
"""Transfers of one result whose digest may be wrong before the exchange is given up."""
_LOST_TRANSFER = "the result did not arrive as it was announced"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How an exchange ended."""

    exchange: bytes
    payload: Payload | None = None
    error_code: int = 0
    error_reason: str = ""

    @property
    def lost(self) -> bool:
        """Whether there is no answer and will be none."""
        return self.payload is None and not self.error_code


Arrived = Callable[[Answer], None]


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
    attempts: int = 0
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
    over: bool = False
    """The stream is to end, after what is in the outbox."""

    def close(self, code: pb.Goodbye.Code, reason: str) -> None:
        """Say goodbye, and end."""
        self.over = True
        self.outbox.put(pb.ToAgent(goodbye=pb.Goodbye(code=code, reason=reason)))

    def drop(self) -> None:
        """End without a word: nobody listens."""
        self.over = True
        self.outbox.clear()


class Hub:
    """All sessions and all open exchanges."""

    def __init__(self, *, grace: float, payload_limit: int) -> None:
        """`grace` in seconds; `payload_limit` bytes of one site's answer."""
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
                log.warning("site %s: another agent has connected in place of the one before", session.site)
            before.close(pb.Goodbye.REPLACED, "another agent of this site has connected; only one may run")
        self._gone.pop(session.party, None)
        for exchange in self._of_party.get(session.party, {}).values():
            if exchange.grace is not None:
                exchange.grace.cancel()
                exchange.grace = None
            self._assign(session, exchange)
        self._changed()

    def leave(self, session: Session) -> None:
        """A stream has ended. Its exchanges wait for the site's return, as long as the grace period."""
        if self.sessions.get(session.party) is not session:
            return
        del self.sessions[session.party]
        self._gone[session.party] = asyncio.get_running_loop().time()
        for exchange in list(self._of_party.get(session.party, {}).values()):
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
        exchange.timer = loop.call_at(exchange.until, self._end, exchange, Answer(exchange=exchange.id))
        session = self.sessions.get(party)
        if session is None:
            self._await_return(exchange)
        else:
            self._assign(session, exchange)

    def cancel(self, exchange_id: bytes) -> None:
        """A run needs an answer no longer."""
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
            max(until, loop.time()), self._end, exchange, Answer(exchange=exchange.id)
        )

    # What agents say

    def accept(self, session: Session, said: pb.Accept) -> None:
        """The site asks for the bytes of a request."""
        exchange = self._mine(session, said.exchange)
        if exchange is not None:
            session.outbox.transfer(exchange.id, exchange.payload, said.offset)

    def result(self, session: Session, said: pb.Result) -> None:
        """The site announces its answer. One that was counted already is acknowledged, and ignored.

        Raises:
            ProtocolError: it is larger than any may be.
        """
        exchange = self._mine(session, said.exchange)
        if exchange is None:
            session.outbox.put(pb.ToAgent(ack=pb.Ack(exchange=said.exchange)))
            return
        session.outbox.drop(exchange.id)
        if said.error_code:
            self._end(
                exchange,
                Answer(exchange=exchange.id, error_code=said.error_code, error_reason=said.error_reason),
            )
            session.outbox.put(pb.ToAgent(ack=pb.Ack(exchange=said.exchange)))
            return
        if said.size > self._limit:
            raise ProtocolError(f"result: {said.size} bytes, at most {self._limit} are taken")
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
            held = exchange.incoming = Incoming(path, size=said.size, sha256=said.sha256)
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
        if not exchange.incoming.take(said):
            return
        payload = exchange.incoming.finish()
        if payload is not None:
            exchange.incoming = None
            self._complete(session, exchange, payload)
            return
        exchange.attempts += 1
        log.warning("site %s: a result does not have the digest it was announced with", session.site)
        if exchange.attempts >= _ATTEMPTS:
            self._end(exchange, Answer(exchange=exchange.id, error_code=1, error_reason=_LOST_TRANSFER))
            session.outbox.put(pb.ToAgent(ack=pb.Ack(exchange=exchange.id)))
        else:
            session.outbox.put(pb.ToAgent(proceed=pb.Proceed(exchange=exchange.id, offset=0)))

    def _complete(self, session: Session, exchange: Exchange, payload: Payload) -> None:
        self._end(exchange, Answer(exchange=exchange.id, payload=payload))
        session.outbox.put(pb.ToAgent(ack=pb.Ack(exchange=exchange.id)))

    def _mine(self, session: Session, exchange_id: bytes) -> Exchange | None:
        """The open exchange of that id, if it is this site's: nobody answers for another."""
        return self._of_party.get(session.party, {}).get(exchange_id)

    def _end(self, exchange: Exchange, answer: Answer) -> None:
        if exchange.id in self._exchanges:
            session = self.sessions.get(exchange.party)
            if answer.lost and session is not None:
                session.outbox.put(pb.ToAgent(cancel=pb.Cancel(exchange=exchange.id)))
            self._close(exchange)
            exchange.arrived(answer)

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

    def stats(self) -> Mapping[str, int]:
        """Counts, for those who watch."""
        return {"sessions": len(self.sessions), "exchanges": len(self._exchanges)}
