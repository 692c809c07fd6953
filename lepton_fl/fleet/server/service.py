"""`Fleet` on the wire: one stream for each agent; every call and every open stream is checked."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, Generic, Protocol, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from lepton_fl import __version__
from lepton_fl.errors import IdentityRefused, LeptonError, ProtocolError, VerificationFailed
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.limits import MISSED, is_stated, printable
from lepton_fl.fleet.protocol.methods import PROTOCOL
from lepton_fl.fleet.protocol.transfer import Outbox
from lepton_fl.fleet.server.hub import SERVER_FAULT, Hub, Session
from lepton_fl.fleet.server.ledgers import Ledgers

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[pb.FromAgent, pb.ToAgent]
RenewContext = grpc.aio.ServicerContext[pb.RenewRequest, pb.RenewReply]

HELLO_S = 10.0
"""How long a caller with a certificate may be silent before its first word."""
CHECK_S = 1.0
"""How often an open stream's certificate is looked at again."""
MAX_WORD = 40
"""Characters of an agent's release, device or state."""
MAX_UNREAD = 10_000
"""Control messages that wait for one agent."""
_LEDGER_REFUSED = 1000 + VerificationFailed.exit_code
"""What a run is told in the place of a site whose ledger has gone back: a refusal, for the whole run."""


class Admission(Protocol):
    """What a caller's certificate proves."""

    @property
    def party(self) -> int: ...
    @property
    def site(self) -> str: ...


A = TypeVar("A", bound=Admission)


class Gate(Protocol[A]):
    """Who may be here: `server/gate.py`."""

    def admit(self, pem: bytes) -> A: ...
    def check(self, admission: A) -> None: ...
    def renew(self, admission: A, request: pb.RenewRequest) -> pb.RenewReply: ...


class Listener(Protocol):
    """Hears who comes, what is said to studies, and who goes."""

    def entered(self, session: Session, hello: pb.Hello) -> None:
        """May put more into the new session's outbox."""

    def answered(self, session: Session, answer: pb.Answer) -> None: ...
    def left(self, session: Session) -> None: ...
    def refused(self, reason: str) -> None:
        """Somebody was not let in: `certificate`, `hello`, `silence` or `ledger`."""


class FleetService(Generic[A]):
    """The servicer of `Fleet`."""

    def __init__(
        self,
        hub: Hub,
        gate: Gate[A],
        listener: Listener,
        ledgers: Ledgers,
        *,
        heartbeat: float,
        insecure_demo: bool = False,
    ) -> None:
        self._hub = hub
        self._gate = gate
        self._listener = listener
        self._ledgers = ledgers
        self._heartbeat = heartbeat
        self._insecure_demo = insecure_demo
        self._admissions: dict[Session, A] = {}
        self._leaving = ""
        """Why nobody is let in any more."""

    async def renew(self, request: pb.RenewRequest, context: RenewContext) -> pb.RenewReply:
        """A new certificate for the site that calls."""
        try:
            return self._gate.renew(self._gate.admit(_certificate(context)), request)
        except IdentityRefused as error:
            self._listener.refused("certificate")
            log.warning("a renewal was refused: %s", error.message)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, error.message)
            raise  # Never reached: `abort` raises.
        except LeptonError as error:
            # Our own files: no word of them leaves, and the site is to try again.
            log.warning("a certificate cannot be renewed: %s", error.message)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server cannot renew certificates now")
            raise

    async def connect(self, requests: AsyncIterator[pb.FromAgent], context: Context) -> None:
        """One agent, from its hello to its goodbye."""
        try:
            admission = self._gate.admit(_certificate(context))
        except IdentityRefused as error:
            await self._refuse(context, "certificate", error)
            return
        try:
            first = await asyncio.wait_for(anext(requests), HELLO_S)
            hello = self._check_hello(first, admission.site)
            # Its first word may have waited until its certificate was no longer good.
            self._gate.check(admission)
        except (TimeoutError, StopAsyncIteration):
            self._listener.refused("silence")
            return
        except (ProtocolError, IdentityRefused) as error:
            await self._refuse(context, "hello", error, site=admission.site)
            return
        if self._leaving:
            goodbye = pb.Goodbye(code=pb.Goodbye.LEAVING, reason=self._leaving)
            await context.write(pb.ToAgent(goodbye=goodbye))
            return
        welcome = pb.Welcome(
            protocol=PROTOCOL,
            release=__version__,
            heartbeat_s=self._heartbeat,
            party=admission.party,
            open=self._hub.open_for(admission.party),
            time=time.time(),
            witness=self._ledgers.key,
        )
        if hello.probe:
            await context.write(pb.ToAgent(welcome=welcome))
            return
        # Before it takes the place of the agent that is here: it may be one on a copy of that one's ledger.
        try:
            self._ledgers.take(admission.site, hello.statement)
        except LeptonError as error:
            await context.write(pb.ToAgent(welcome=welcome))
            await context.write(self._ledgers.receipts(admission.site))
            await context.write(self._not_with_it(admission.site, error))
            return
        wake = asyncio.Event()
        session = Session(
            party=admission.party,
            site=admission.site,
            instance=hello.instance,
            release=printable(hello.release, MAX_WORD),
            device=printable(hello.device, MAX_WORD),
            insecure_seed=hello.insecure_seed,
            outbox=Outbox(wake.set),
        )
        session.outbox.put(pb.ToAgent(welcome=welcome))
        session.outbox.put(self._ledgers.receipts(session.site))
        self._listener.entered(session, hello)
        self._hub.enter(session)
        self._ledgers.entered(session)
        self._admissions[session] = admission
        tasks = [
            asyncio.create_task(self._send(session, context, wake)),
            asyncio.create_task(self._receive(session, requests)),
        ]
        try:
            await asyncio.wait([*tasks, session.gone], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for failure in await asyncio.gather(*tasks, return_exceptions=True):
                # A connection that breaks is no news; a fault of ours is.
                if isinstance(failure, Exception) and not isinstance(failure, grpc.aio.BaseError):
                    log.error("a stream has failed: %r", failure, extra={"site": session.site})
            # Of transfers that were not finished it has the files open.
            session.outbox.clear()
            del self._admissions[session]
            self._hub.leave(session)
            self._listener.left(session)

    async def _refuse(self, context: Context, what: str, error: LeptonError, site: str = "") -> None:
        self._listener.refused(what)
        log.warning("a caller was refused: %s", error.message, extra={"site": site, "peer": context.peer()})
        goodbye = pb.Goodbye(code=pb.Goodbye.REFUSED, reason=str(error))
        await context.write(pb.ToAgent(goodbye=goodbye))

    def _not_with_it(self, site: str, error: LeptonError) -> pb.ToAgent:
        """The goodbye to a site whose ledger is not taken. What our own disk is the cause of may pass."""
        log.warning("a ledger is not taken: %s", error.message, extra={"site": site})
        if not isinstance(error, VerificationFailed):
            return pb.ToAgent(goodbye=pb.Goodbye(code=pb.Goodbye.LEAVING, reason=error.public))
        self._listener.refused("ledger")
        return pb.ToAgent(goodbye=pb.Goodbye(code=pb.Goodbye.LEDGER, reason=printable(error.message)))

    def _check_hello(self, first: pb.FromAgent, site: str) -> pb.Hello:
        hello = first.hello
        if first.WhichOneof("kind") != "hello":
            raise ProtocolError("the first word is not hello")
        if hello.protocol != PROTOCOL:
            raise ProtocolError(f"protocol {hello.protocol}, this server speaks {PROTOCOL}")
        if hello.site != site:
            raise ProtocolError(f"says it is {hello.site!r}, its certificate says {site!r}")
        if len(hello.instance) != 16:
            raise ProtocolError("an instance is 16 bytes")
        if hello.insecure_seed and not self._insecure_demo:
            raise ProtocolError(
                "draws its noise from a known seed, which only a demonstration's server lets in"
            )
        return hello

    async def _send(self, session: Session, context: Context, wake: asyncio.Event) -> None:
        number = 0
        while True:
            message = session.outbox.next()
            if message is None:
                if session.over:
                    return
                wake.clear()
                try:
                    await asyncio.wait_for(wake.wait(), self._heartbeat)
                except TimeoutError:
                    number += 1
                    session.outbox.put(pb.ToAgent(heartbeat=pb.Heartbeat(number=number)))
                continue
            if isinstance(message, pb.Chunk):
                session.sent += len(message.data)
                message = pb.ToAgent(chunk=message)
            await context.write(cast("pb.ToAgent", message))

    async def _receive(self, session: Session, requests: AsyncIterator[pb.FromAgent]) -> None:
        try:
            async for message in requests:
                session.heard = time.monotonic()
                if not self._take(session, message):
                    break
        except (ProtocolError, DecodeError) as error:
            said = error.message if isinstance(error, ProtocolError) else "a message is not protobuf"
            log.warning("a site broke the protocol: %s", said, extra={"site": session.site})
            session.close(pb.Goodbye.FAULT, said)
            # Until `_send` has said so.
            await session.gone

    def _take(self, session: Session, message: pb.FromAgent) -> bool:
        """One message; False if it was the last."""
        if session.over:
            return True
        if len(session.outbox) > MAX_UNREAD:
            raise ProtocolError(f"does not read what it is sent: {MAX_UNREAD} messages wait")
        kind = message.WhichOneof("kind")
        match kind:
            case "heartbeat":
                session.state = printable(message.heartbeat.state, MAX_WORD)
            case "accept":
                self._hub.accept(session, message.accept)
            case "result":
                session.received += len(message.result.inline)
                if self._states(session, message.result):
                    self._hub.result(session, message.result)
            case "chunk":
                session.received += len(message.chunk.data)
                self._hub.chunk(session, message.chunk)
            case "ack":
                pass
            case "answer":
                self._listener.answered(session, message.answer)
            case "receipts":
                self._ledgers.carry(session, message.receipts.signed)
            case "goodbye":
                session.parted = True
                return False
            case _:
                raise ProtocolError(f"a message of kind {kind!r} is not expected here")
        return True

    def _states(self, session: Session, said: pb.Result) -> bool:
        """Whether a reply may be taken: with a ledger that has not gone back, where it is to state one."""
        request = self._hub.asked(session, said.exchange)
        if request is None or said.error_code or not is_stated(request.type):
            return True
        try:
            self._ledgers.take(session.site, said.statement, request)
            return True
        except VerificationFailed as error:
            self._hub.refuse(session, said.exchange, _LEDGER_REFUSED, error.message)
            session.refused = True
            session.outbox.put(self._ledgers.receipts(session.site))
            goodbye = self._not_with_it(session.site, error).goodbye
            session.close(goodbye.code, goodbye.reason)
        except LeptonError as error:
            log.warning("a ledger is not taken: %s", error.message, extra={"site": session.site})
            self._hub.refuse(session, said.exchange, SERVER_FAULT, error.public)
        return False

    def check(self) -> None:
        """End the streams of sites that are no longer let in, or that have fallen silent."""
        for session, admission in list(self._admissions.items()):
            if session.over:
                continue
            try:
                self._gate.check(admission)
            except IdentityRefused as error:
                log.warning("a site is refused from now on: %s", error.message, extra={"site": session.site})
                self._listener.refused("certificate")
                session.refused = True
                session.close(pb.Goodbye.REFUSED, str(error))
            if time.monotonic() - session.heard > MISSED * self._heartbeat:
                log.warning("a site is silent", extra={"site": session.site, "heartbeats": MISSED})
                session.drop()

    async def watch(self) -> None:
        """`check`, for ever."""
        while True:
            await asyncio.sleep(CHECK_S)
            self.check()

    async def farewell(self, reason: str) -> None:
        """Tell every agent that the server is leaving, and let it hear so; who comes now is told at once."""
        self._leaving = reason
        for session in list(self._admissions):
            session.close(pb.Goodbye.LEAVING, reason)
        # Each ends by itself, within `hub.FAREWELL_S`.
        while self._admissions:
            await asyncio.sleep(0.02)


def _certificate(context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    """The caller's certificate, PEM; empty if it showed none."""
    return next(iter(context.auth_context().get("x509_pem_cert", ())), b"")
