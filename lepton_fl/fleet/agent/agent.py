"""A site's agent: connects, is asked, answers. What it may answer is decided by the site's own app.

One event loop talks; one thread works, so that a heartbeat never waits for a training step. It runs the
ClientApp of this installation and nothing that a server sends.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
from flwr.app import Context, Message, RecordDict

from lepton_fl import __version__
from lepton_fl.errors import ConnectionFailed, IdentityRefused, LeptonError, ProtocolError
from lepton_fl.fleet.agent.cache import Reply, ReplyCache
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.methods import PROTOCOL, connect_method
from lepton_fl.fleet.protocol.payload import Payload
from lepton_fl.fleet.protocol.records import pack, unpack
from lepton_fl.fleet.protocol.transfer import Incoming, Outbox
from lepton_fl.messages import RUN_ID, SITS_OUT, incoming
from lepton_fl.site import SiteApp, Surroundings

log = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds between attempts to connect: doubled each time, and drawn at random between half of it and it."""
MISSED = 3
MAX_REQUEST = 16 << 30
"""Bytes of one request."""


@dataclass(kw_only=True)
class _Job:
    """One exchange at the site."""

    request: pb.Assign
    incoming: Incoming | None = None
    payload: Payload | None = None
    reply: Reply | None = None
    cancelled: bool = False

    @property
    def key(self) -> str:
        """Of the request: what is asked again is the same in all of this."""
        asked = (self.request.run, self.request.round, self.request.type, self.request.sha256.hex())
        return hashlib.sha256("|".join(map(str, asked)).encode()).hexdigest()


class Agent:
    """One site's agent."""

    def __init__(
        self,
        app: SiteApp[Surroundings],
        connect: Callable[[], grpc.aio.Channel],
        state: Path,
        *,
        device: str = "cpu",
        insecure_seed: bool = False,
    ) -> None:
        """`connect` opens a channel with the site's certificate of the day; `state` is the site's folder."""
        self._app = app
        self._connect = connect
        self._device = device
        self._insecure_seed = insecure_seed
        self._instance = os.urandom(16)
        self._spool = state / "spool"
        self._spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in self._spool.iterdir():
            left.unlink()
        self._cache = ReplyCache(state / "replies")
        self._jobs: dict[bytes, _Job] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="site")
        self._outbox: Outbox | None = None
        self._stopping = asyncio.Event()
        self.paused = False
        self.connected = False
        self.working = False

    async def run(self) -> None:
        """Connect, answer, and connect again, until `stop`.

        Raises:
            IdentityRefused: the server says that this site is not to come back.
        """
        wait = FIRST_WAIT
        while not self._stopping.is_set():
            try:
                await self._session()
                wait = FIRST_WAIT
            except ConnectionFailed as error:
                if isinstance(error, IdentityRefused):
                    raise
                log.warning("not connected: %s", error)
            if self._stopping.is_set():
                break
            pause = wait * (0.5 + secrets.randbelow(1000) / 2000)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
            wait = min(2 * wait, LONGEST_WAIT)
        self._worker.shutdown(wait=True)

    def stop(self) -> None:
        """End after what is being worked on."""
        self._stopping.set()
        if self._outbox is not None:
            self._outbox.put(pb.FromAgent(goodbye=pb.Goodbye(code=pb.Goodbye.LEAVING)))

    async def _session(self) -> None:
        """One connection, from hello to its end."""
        wake = asyncio.Event()
        outbox = Outbox(wake.set)
        hello = pb.Hello(
            protocol=PROTOCOL,
            release=__version__,
            site=self._app.site.name,
            instance=self._instance,
            insecure_seed=self._insecure_seed,
            device=self._device,
        )
        outbox.put(pb.FromAgent(hello=hello))
        async with self._connect() as channel:
            stream = connect_method(channel)()
            self._heard, self._heartbeat = time.monotonic(), 10.0
            tasks = [
                asyncio.create_task(self._send(stream, outbox, wake)),
                asyncio.create_task(self._receive(stream, outbox)),
                asyncio.create_task(self._watch()),
            ]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            except grpc.aio.AioRpcError as error:
                raise ConnectionFailed(f"{error.code().name.lower()}: {error.details()}") from None
            finally:
                self._outbox, self.connected = None, False
                stream.cancel()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(
        self, stream: grpc.aio.StreamStreamCall[pb.FromAgent, pb.ToAgent], outbox: Outbox, wake: asyncio.Event
    ) -> None:
        number = 0
        while True:
            message = outbox.next()
            if message is None:
                wake.clear()
                try:
                    await asyncio.wait_for(wake.wait(), self._heartbeat)
                except TimeoutError:
                    number += 1
                    beat = pb.Heartbeat(number=number, state=self.state)
                    outbox.put(pb.FromAgent(heartbeat=beat))
                continue
            if isinstance(message, pb.Chunk):
                message = pb.FromAgent(chunk=message)
            if not isinstance(message, pb.FromAgent):
                raise TypeError("not a message of an agent")
            await stream.write(message)
            if message.HasField("goodbye"):
                await stream.done_writing()
                return

    async def _receive(
        self, stream: grpc.aio.StreamStreamCall[pb.FromAgent, pb.ToAgent], outbox: Outbox
    ) -> None:
        async for message in stream:
            self._heard = time.monotonic()
            self._take(message, outbox)
        if not self._stopping.is_set():
            raise ConnectionFailed("the server ended the connection")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            if time.monotonic() - self._heard > MISSED * self._heartbeat:
                raise ConnectionFailed("the server is silent")

    @property
    def state(self) -> str:
        """idle, working or paused."""
        return "paused" if self.paused else "working" if self.working else "idle"

    def _take(self, message: pb.ToAgent, outbox: Outbox) -> None:
        match message.WhichOneof("kind"):
            case "welcome":
                self._welcome(message.welcome, outbox)
            case "assign":
                self._assign(message.assign, outbox)
            case "chunk":
                self._chunk(message.chunk, outbox)
            case "proceed":
                self._proceed(message.proceed, outbox)
            case "ack":
                self._forget(message.ack.exchange, outbox)
            case "cancel":
                self._forget(message.cancel.exchange, outbox)
            case "goodbye":
                said = message.goodbye
                if said.code in (pb.Goodbye.REFUSED, pb.Goodbye.REPLACED):
                    raise IdentityRefused(f"the server refuses this site: {said.reason[:300]}")
                raise ConnectionFailed(f"the server says goodbye: {said.reason[:300]}")
            case _:
                pass

    def _welcome(self, welcome: pb.Welcome, outbox: Outbox) -> None:
        self._heartbeat = min(max(welcome.heartbeat_s, 0.1), 300.0)
        self._outbox, self.connected = outbox, True
        still = set(welcome.open)
        for exchange in [name for name in self._jobs if name not in still]:
            self._forget(exchange, outbox)
        log.info("connected: server release %s", welcome.release)

    def _assign(self, request: pb.Assign, outbox: Outbox) -> None:
        job = self._jobs.get(request.exchange)
        if job is not None:
            if job.reply is not None:
                self._announce(job, outbox)
            elif job.incoming is not None:
                self._accept(job, outbox)
            return
        _check(request)
        job = self._jobs[request.exchange] = _Job(request=request)
        if self.paused:
            job.reply = Reply(error_code=SITS_OUT, error_reason="the site is paused")
            self._announce(job, outbox)
            return
        cached = self._cache.get(request.run, job.key)
        if cached is not None:
            job.reply = Reply(payload=cached)
            self._announce(job, outbox)
        elif request.inline:
            job.payload = Payload.of(request.inline)
            if job.payload.sha256 != request.sha256:
                raise ConnectionFailed("a request does not have the digest it was announced with")
            self._start(job)
        else:
            path = self._spool / f"{request.exchange.hex()}.in"
            job.incoming = Incoming(path, size=request.size, sha256=request.sha256)
            self._accept(job, outbox)

    def _accept(self, job: _Job, outbox: Outbox) -> None:
        offset = 0 if job.incoming is None else job.incoming.received
        outbox.put(pb.FromAgent(accept=pb.Accept(exchange=job.request.exchange, offset=offset)))

    def _chunk(self, chunk: pb.Chunk, outbox: Outbox) -> None:
        job = self._jobs.get(chunk.exchange)
        if job is None or job.incoming is None:
            return
        try:
            if not job.incoming.take(chunk):
                return
        except ProtocolError as error:
            raise ConnectionFailed(error.message) from None
        job.payload = job.incoming.finish()
        if job.payload is None:
            self._accept(job, outbox)
            return
        job.incoming = None
        self._start(job)

    def _start(self, job: _Job) -> None:
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._worker, self._work, job)
        future.add_done_callback(lambda done: self._worked(job, done))

    def _work(self, job: _Job) -> Reply:
        """In the worker's thread: the site's own app answers."""
        request, payload = job.request, job.payload
        if job.cancelled or payload is None:
            return Reply(error_code=SITS_OUT, error_reason="cancelled")
        self.working = True
        try:
            message = incoming(
                unpack(payload.open()), kind=request.type, run=request.run, message_id=request.exchange.hex()
            )
            context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={})
            reply: Message = self._app(message, context)
            if reply.has_error():
                return Reply(error_code=reply.error.code, error_reason=reply.error.reason or "")
            made = pack(reply.content, self._cache.path(request.run, job.key))
            return Reply(payload=self._cache.put(request.run, job.key, made))
        finally:
            self.working = False

    def _worked(self, job: _Job, done: asyncio.Future[Reply]) -> None:
        try:
            job.reply = done.result()
        except LeptonError as error:
            log.warning("exchange %s: %s", job.request.exchange.hex(), error)
            job.reply = Reply(error_code=SITS_OUT, error_reason=error.public)
        except Exception:
            # Its text may quote a record: it stays in the site's own log.
            log.exception("exchange %s: internal error", job.request.exchange.hex())
            job.reply = Reply(error_code=SITS_OUT, error_reason="internal error at the site")
        self._clear(job)
        if self._outbox is not None and self._jobs.get(job.request.exchange) is job:
            self._announce(job, self._outbox)

    def _announce(self, job: _Job, outbox: Outbox) -> None:
        reply, exchange = job.reply, job.request.exchange
        if reply is None:
            return
        if reply.payload is None:
            result = pb.Result(
                exchange=exchange, error_code=reply.error_code, error_reason=reply.error_reason
            )
        else:
            payload = reply.payload
            result = pb.Result(
                exchange=exchange, size=payload.size, sha256=payload.sha256, inline=payload.inline
            )
        outbox.put(pb.FromAgent(result=result))

    def _proceed(self, said: pb.Proceed, outbox: Outbox) -> None:
        job = self._jobs.get(said.exchange)
        if job is not None and job.reply is not None and job.reply.payload is not None:
            outbox.transfer(said.exchange, job.reply.payload, said.offset)

    def _forget(self, exchange: bytes, outbox: Outbox) -> None:
        outbox.drop(exchange)
        job = self._jobs.pop(exchange, None)
        if job is not None:
            job.cancelled = True
            if job.incoming is not None:
                job.incoming.discard()

    def _clear(self, job: _Job) -> None:
        if job.payload is not None and job.payload.path is not None:
            job.payload.path.unlink(missing_ok=True)
        job.payload = None


def _check(request: pb.Assign) -> None:
    """Refuse what no honest server asks. Its run becomes the name of a folder here.

    Raises:
        ConnectionFailed: then the connection ends, as with any server that breaks the protocol.
    """
    whole = len(request.exchange) == 16 and len(request.sha256) == 32
    if not whole or RUN_ID.fullmatch(request.run) is None or request.size > MAX_REQUEST:
        raise ConnectionFailed("a request is malformed")
