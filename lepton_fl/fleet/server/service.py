"""`Fleet` on the wire: one stream for each agent; every call and every open stream is checked."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, cast

import grpc
import grpc.aio

from lepton_fl import __version__
from lepton_fl.errors import IdentityRefused, LeptonError, ProtocolError
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.methods import PROTOCOL
from lepton_fl.fleet.protocol.transfer import Outbox
from lepton_fl.fleet.server.hub import Hub, Session

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[pb.FromAgent, pb.ToAgent]
RenewContext = grpc.aio.ServicerContext[pb.RenewRequest, pb.RenewReply]

HELLO_S = 10.0
"""How long a caller with a certificate may be silent before its first word."""
CHECK_S = 1.0
"""How often an open stream's certificate is looked at again."""
MISSED = 3
"""Heartbeats after which a silent agent is gone."""


class Admission(Protocol):
    """What a caller's certificate proves."""

    @property
    def party(self) -> int: ...
    @property
    def site(self) -> str: ...


class Gate(Protocol):
    """Who may be here. Asked on every call, and again and again while a stream is open."""

    def admit(self, pem: bytes) -> Admission:
        """The site that the certificate of a TLS connection proves, now. Empty: there is none.

        Raises:
            IdentityRefused: absent, expired, of no use here, revoked, or of nobody we know.
        """

    def check(self, admission: Admission) -> None:
        """Does it still hold? Cheap: asked once a second of every open stream.

        Raises:
            IdentityRefused: expired or revoked since.
        """

    def renew(self, csr: bytes, site: str) -> tuple[bytes, bytes]:
        """A new certificate for `site` and its chain, both PEM."""


class FleetService:
    """The servicer of `Fleet`."""

    def __init__(
        self,
        hub: Hub,
        gate: Gate,
        *,
        heartbeat: float,
        insecure_demo: bool,
        answered: Callable[[Session, pb.Answer], None],
        entered: Callable[[Session, pb.Hello], None],
    ) -> None:
        """`entered` may put more into a new session's outbox; `answered` hears what sites say to studies."""
        self._hub = hub
        self._gate = gate
        self._heartbeat = heartbeat
        self._insecure_demo = insecure_demo
        self._answered = answered
        self._entered = entered
        self._admissions: dict[Session, Admission] = {}

    async def renew(self, request: pb.RenewRequest, context: RenewContext) -> pb.RenewReply:
        """A new certificate for the site that calls."""
        try:
            site = self._gate.admit(_certificate(context)).site
            certificate, chain = self._gate.renew(request.csr, site)
        except LeptonError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, error.message)
        return pb.RenewReply(certificate=certificate, chain=chain)

    async def connect(self, requests: AsyncIterator[pb.FromAgent], context: Context) -> None:
        """One agent, from its hello to its goodbye."""
        try:
            admission = self._gate.admit(_certificate(context))
        except IdentityRefused as error:
            log.warning("a caller was refused: %s", error.message)
            await _end(context, pb.Goodbye.REFUSED, error.message)
            return
        site = admission.site
        try:
            first = await asyncio.wait_for(anext(requests), HELLO_S)
            hello = self._check_hello(first, site)
        except (TimeoutError, StopAsyncIteration):
            return
        except ProtocolError as error:
            log.warning("site %s: %s", site, error.message)
            await _end(context, pb.Goodbye.REFUSED, error.message)
            return
        wake = asyncio.Event()
        session = Session(
            party=admission.party,
            site=site,
            instance=hello.instance,
            release=hello.release,
            device=hello.device,
            insecure_seed=hello.insecure_seed,
            outbox=Outbox(wake.set),
        )
        welcome = pb.Welcome(
            protocol=PROTOCOL,
            release=__version__,
            heartbeat_s=self._heartbeat,
            party=admission.party,
            open=self._hub.open_for(admission.party),
        )
        session.outbox.put(pb.ToAgent(welcome=welcome))
        self._entered(session, hello)
        self._hub.enter(session)
        self._admissions[session] = admission
        log.info("site %s connected: release %s, device %s", site, hello.release, hello.device)
        tasks = [
            asyncio.create_task(self._send(session, context, wake)),
            asyncio.create_task(self._receive(session, requests)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                failure = task.exception()
                if failure is not None and not isinstance(failure, grpc.aio.BaseError):
                    log.error("site %s: stream failed: %r", site, failure)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            del self._admissions[session]
            self._hub.leave(session)
            log.info("site %s disconnected", site)

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
                message = pb.ToAgent(chunk=message)
            await context.write(cast("pb.ToAgent", message))

    async def _receive(self, session: Session, requests: AsyncIterator[pb.FromAgent]) -> None:
        try:
            async for message in requests:
                session.heard = time.monotonic()
                if not self._take(session, message):
                    break
        except ProtocolError as error:
            log.warning("site %s broke the protocol: %s", session.site, error.message)
            session.close(pb.Goodbye.FAULT, error.message)
            await asyncio.sleep(self._heartbeat)

    def _take(self, session: Session, message: pb.FromAgent) -> bool:
        kind = message.WhichOneof("kind")
        match kind:
            case "heartbeat":
                session.state = message.heartbeat.state[:32]
            case "accept":
                self._hub.accept(session, message.accept)
            case "result":
                self._hub.result(session, message.result)
            case "chunk":
                self._hub.chunk(session, message.chunk)
            case "ack":
                pass
            case "answer":
                self._answered(session, message.answer)
            case "goodbye":
                return False
            case _:
                raise ProtocolError(f"a message of kind {kind!r} is not expected here")
        return True

    async def watch(self) -> None:
        """For ever: end the streams of sites that are no longer let in, or that have fallen silent."""
        while True:
            await asyncio.sleep(CHECK_S)
            for session, admission in list(self._admissions.items()):
                try:
                    self._gate.check(admission)
                except IdentityRefused as error:
                    log.warning("site %s: %s", session.site, error.message)
                    session.close(pb.Goodbye.REFUSED, error.message)
                if time.monotonic() - session.heard > MISSED * self._heartbeat:
                    log.warning("site %s: silent for %d heartbeats", session.site, MISSED)
                    session.drop()


def _certificate(context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    """The caller's certificate, PEM; empty if it showed none."""
    return next(iter(context.auth_context().get("x509_pem_cert", ())), b"")


async def _end(context: Context, code: pb.Goodbye.Code, reason: str) -> None:
    await context.write(pb.ToAgent(goodbye=pb.Goodbye(code=code, reason=reason)))
