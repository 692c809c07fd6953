"""What the server asks of this site, from the request to its acknowledged answer.

An *exchange* is one request. It outlives the connections that carry it: after a reconnection its transfers
go on where they stopped, and a request that was answered before, by this process or by one that was killed,
gets the same bytes again. One thread works, so that a heartbeat never waits for a training step.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from lepton_fl.errors import BadRequest, ConnectionFailed, LeptonError, ProtocolError
from lepton_fl.fleet.agent.cache import Reply, ReplyCache
from lepton_fl.fleet.agent.ledger import StatedLedger
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.limits import TRANSFERS, is_stated
from lepton_fl.fleet.protocol.payload import Payload
from lepton_fl.fleet.protocol.records import pack, unpack
from lepton_fl.fleet.protocol.transfer import Incoming, Outbox
from lepton_fl.messages import JOIN, RUN_ID, SITS_OUT, error_reply, incoming, read_assignment
from lepton_fl.privacy.ledger import Statement
from lepton_fl.site import SiteApp, Surroundings
from lepton_fl.study import Study

log = logging.getLogger(__name__)

MAX_OPEN = 64
"""Exchanges at one time. A run has one with each site."""
MAX_REQUESTS = 16 << 30
"""Bytes of all requests that are here or on their way."""
DISK_RESERVE = 256 << 20
"""Bytes of the disk that no request may fill: the ledger and the replies need them."""


@dataclass(kw_only=True, eq=False)
class _Job:
    """One exchange at the site."""

    request: pb.Assign
    until: float
    """On the monotonic clock: nobody waits for an answer after it."""
    incoming: Incoming | None = None
    payload: Payload | None = None
    reply: Reply | None = None
    transfers: int = 0
    told: bool = False
    """This connection's server was told how far the exchange is."""
    cancelled: bool = False

    @property
    def key(self) -> str:
        """Of the request: what is asked again is the same in all of this."""
        request = self.request
        asked = (request.run, request.study_id, request.round, request.type, request.sha256.hex())
        return hashlib.sha256("|".join(map(str, asked)).encode()).hexdigest()


class Exchanges:
    """All exchanges of one site. Owned by the event loop; only `_work` and `_prepare` run in the worker."""

    def __init__(
        self, app: SiteApp[Surroundings], state: Path, ledger: StatedLedger, *, barred: Callable[[], str]
    ) -> None:
        """`barred` says, in public words, why nothing new is worked on now; empty text: it is."""
        self.app = app
        self._ledger = ledger
        self.working = False
        self.answered = 0
        self.refused = 0
        self._barred = barred
        self._spool = state / "spool"
        self._spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in self._spool.iterdir():
            left.unlink()
        self._cache = ReplyCache(state / "replies")
        self._jobs: dict[bytes, _Job] = {}
        self._queued = 0
        """With the worker, also those that nobody waits for any more: each holds its request."""
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="site")
        self._prepared: set[str] = set()
        self._outbox: Outbox | None = None
        self._last_run = ""

    def __len__(self) -> int:
        """Exchanges whose answer the server does not have yet."""
        return len(self._jobs)

    # Connections

    def connected(self, outbox: Outbox, still: Collection[bytes]) -> None:
        """A server is there, and awaits the exchanges in `still`; it will ask for each again."""
        self._outbox = outbox
        for exchange in [exchange for exchange in self._jobs if exchange not in still]:
            self.forget(exchange)
        for job in self._jobs.values():
            job.told = False

    def disconnected(self) -> None:
        """Nobody is there. What is being worked on goes on."""
        self._outbox = None

    def close(self) -> None:
        """Wait for what is being worked on: its reply is on disk then."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        for exchange in list(self._jobs):
            self.forget(exchange)

    # What the server says

    def assign(self, request: pb.Assign) -> None:
        """A request, for the first time or again.

        Raises:
            ConnectionFailed: it is not one that an honest server makes.
        """
        until = time.monotonic() + _check(request)
        job = self._jobs.get(request.exchange)
        if job is not None:
            job.until = until
            self._tell(job)
            return
        if max(len(self._jobs), self._queued) >= MAX_OPEN:
            raise ConnectionFailed(f"the server asks more than {MAX_OPEN} things at one time")
        job = self._jobs[request.exchange] = _Job(request=request, until=until)
        if request.run != self._last_run:
            self._last_run = request.run
            self._cache.prune({other.request.run for other in self._jobs.values()})
        if self._kept(job) is not None:
            # By the worker, in turn: the ledger is stated with it, for which the loop must not wait.
            self._start(job)
        elif barred := self._barred():
            self._answer(job, _sits_out(barred))
        elif request.inline:
            job.payload = Payload.of(request.inline)
            if job.payload.size != request.size or job.payload.sha256 != request.sha256:
                raise ConnectionFailed("a request does not have the digest it was announced with")
            self._start(job)
        else:
            self._receive(job)

    def _kept(self, job: _Job) -> Payload | None:
        """What was answered to this request before, by this process or another.

        Released and charged for already: the same bytes may leave again, paused or not. But whether the site
        takes part is its people's to say, each time that it is asked.
        """
        request = job.request
        return None if request.type == JOIN else self._cache.get(request.run, job.key)

    def chunk(self, chunk: pb.Chunk) -> None:
        """The next bytes of a request.

        Raises:
            ConnectionFailed: they are not, or never have the digest that was announced.
        """
        job = self._jobs.get(chunk.exchange)
        if job is None or job.incoming is None:
            return  # Under way when the exchange ended.
        try:
            if not job.incoming.take(chunk):
                return
            job.payload = job.incoming.finish()
        except ProtocolError as error:
            raise ConnectionFailed(error.message) from None
        except OSError as error:
            self._no_room(job, error)
            return
        if job.payload is not None:
            job.incoming = None
            self._start(job)
            return
        job.transfers += 1
        if job.transfers >= TRANSFERS:
            raise ConnectionFailed("a request never has the digest it was announced with")
        job.told = False
        self._tell(job)

    def proceed(self, said: pb.Proceed) -> None:
        """The server asks for the bytes of a reply."""
        job = self._jobs.get(said.exchange)
        if self._outbox is not None and job is not None and job.reply is not None:
            payload = job.reply.payload
            if payload is not None:
                self._outbox.transfer(said.exchange, payload, said.offset)

    def forget(self, exchange: bytes) -> None:
        """The server has the answer, or wants none."""
        if self._outbox is not None:
            self._outbox.drop(exchange)
        job = self._jobs.pop(exchange, None)
        if job is None:
            return
        job.cancelled = True
        if job.incoming is not None:
            job.incoming.discard()

    # The way of one

    def _receive(self, job: _Job) -> None:
        """Make room for a request's bytes, and ask for them."""
        request = job.request
        expected = sum(other.request.size for other in self._jobs.values() if other.reply is None)
        left = sum(
            other.incoming.size - other.incoming.received
            for other in self._jobs.values()
            if other.incoming is not None
        )
        try:
            free = shutil.disk_usage(self._spool).free - left - DISK_RESERVE
            if expected > MAX_REQUESTS or request.size > free:
                log.warning("a request is too large", extra={"bytes": request.size, "free": free})
                self._answer(job, _sits_out("no room at the site"))
                return
            path = self._spool / f"{request.exchange.hex()}.in"
            job.incoming = Incoming(path, size=request.size, sha256=request.sha256)
        except OSError as error:
            self._no_room(job, error)
            return
        self._tell(job)

    def _no_room(self, job: _Job, error: OSError) -> None:
        log.error("a request cannot be written", extra={"error": error.strerror})
        if job.incoming is not None:
            job.incoming.discard()
            job.incoming = None
        self._answer(job, _sits_out("no room at the site"))

    def _tell(self, job: _Job) -> None:
        """Say how far an exchange is: once a connection, or what is under way would be sent twice."""
        if self._outbox is None or job.told:
            return
        exchange = job.request.exchange
        if job.reply is not None:
            self._outbox.put(pb.FromAgent(result=self._result(exchange, job.reply)))
        elif job.incoming is not None:
            self._outbox.put(pb.FromAgent(accept=pb.Accept(exchange=exchange, offset=job.incoming.received)))
        else:
            return
        job.told = True

    def _result(self, exchange: bytes, reply: Reply) -> pb.Result:
        payload, told = reply.payload, reply.stated
        if payload is None:
            return pb.Result(exchange=exchange, error_code=reply.error_code, error_reason=reply.error_reason)
        return pb.Result(
            exchange=exchange,
            size=payload.size,
            sha256=payload.sha256,
            inline=payload.inline,
            statement=b"" if told is None else self._ledger.leaving(told),
        )

    def _answer(self, job: _Job, reply: Reply) -> None:
        job.reply, job.told = reply, False
        self._tell(job)

    def _start(self, job: _Job) -> None:
        self._queued += 1
        future = asyncio.get_running_loop().run_in_executor(self._worker, self._work, job)
        future.add_done_callback(lambda done: self._worked(job, done))

    def _worked(self, job: _Job, done: asyncio.Future[Reply]) -> None:
        self._queued -= 1
        if job.payload is not None and job.payload.path is not None:
            job.payload.path.unlink(missing_ok=True)
        job.payload = None
        if done.cancelled():
            return
        try:
            reply = done.result()
        except Exception:
            log.exception("internal error")
            reply = _sits_out("internal error at the site")
        if not job.cancelled:
            self._answer(job, reply)

    # In the worker's thread

    def _work(self, job: _Job) -> Reply:
        """The site's own app answers; what it gives is on disk before anybody hears of it."""
        request, payload, began = job.request, job.payload, time.monotonic()
        if kept := self._kept(job):
            # Asked a second time, as by a server that was killed, maybe while the first was being worked on.
            if self.app.site.approvals.refusal(request.study_id) is not None:
                return _sits_out("the site's people refuse the study")
            return Reply(payload=kept, stated=self._stated(request))
        if job.cancelled or payload is None or began > job.until:
            # Nobody waits for it, so nothing is spent on it.
            return _sits_out("no longer asked")
        if barred := self._barred():
            return _sits_out(barred)
        self.working = True
        try:
            reply = self._ask_app(request, payload)
            if reply.has_error():
                self.refused += 1
                found = Reply.refusing(reply)
            else:
                made = pack(reply.content, self._cache.path(request.run, job.key))
                kept = self._cache.put(request.run, job.key, made)
                found = Reply(payload=kept, stated=self._stated(request))
                self.answered += 1
        finally:
            self.working = False
        _log_work(request, found, time.monotonic() - began)
        return found

    def _stated(self, request: pb.Assign) -> Statement | None:
        """The ledger after what this reply was charged."""
        if not is_stated(request.type):
            return None
        data_set = self.app.site.budget.data_set
        return self._ledger.state(data_set, run=request.run, round=request.round)

    def _ask_app(self, request: pb.Assign, payload: Payload) -> Message:
        kind, run, name = request.type, request.run, request.exchange.hex()
        try:
            message = incoming(unpack(payload.open()), kind=kind, run=run, message_id=name)
            _check_same(request, message)
        except LeptonError as error:
            log.warning("refused", extra={"exchange": name, "reason": error.message})
            return error_reply(incoming(RecordDict(), kind=kind, run=run, message_id=name), error)
        context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={})
        return self.app(message, context)

    # In turn with what is asked

    def in_turn(self, action: Callable[[], None], then: Callable[[], None] = lambda: None) -> None:
        """Do `action` after what was asked before, and before what is asked from now on.

        In the worker; then `then`, in the loop.

        Raises:
            ConnectionFailed: so much waits already that no honest server makes it.
        """
        if self._queued >= MAX_OPEN:
            raise ConnectionFailed(f"the server asks more than {MAX_OPEN} things at one time")
        self._queued += 1
        future = asyncio.get_running_loop().run_in_executor(self._worker, action)
        future.add_done_callback(partial(self._acted, then))

    def _acted(self, then: Callable[[], None], done: asyncio.Future[None]) -> None:
        self._queued -= 1
        if done.cancelled():
            return
        if (error := done.exception()) is not None:
            log.error("internal error", exc_info=error)
        then()

    def prepare(self, study: Study) -> None:
        """Read the table and build the model of an approved study, so that its first round does not wait."""
        if study.id not in self._prepared:
            self._prepared.add(study.id)
            asyncio.get_running_loop().run_in_executor(self._worker, self._prepare, study)

    def _prepare(self, study: Study) -> None:
        began = time.monotonic()
        try:
            with self.app.site.lock:
                self.app.site.bench(study)
        except LeptonError as error:
            # The run's own requests will be refused for the same reason.
            log.warning("study cannot be prepared", extra={"study": study.id, "reason": error.message})
            return
        except Exception:
            log.exception("study cannot be prepared")
            return
        seconds = round(time.monotonic() - began, 3)
        log.info(
            "study prepared", extra={"study": study.id, "study_name": study.study.name, "seconds": seconds}
        )


def _check(request: pb.Assign) -> float:
    """Refuse what no honest server asks; its run becomes the name of a folder here. The seconds it may take.

    Raises:
        ConnectionFailed: then the connection ends, as with any server that breaks the protocol.
    """
    whole = (
        len(request.exchange) == 16
        and len(request.sha256) == 32
        and len(request.type) <= 64
        and len(request.study_id) == 64
        and request.round < 1 << 32
        and 0 < request.size <= MAX_REQUESTS
        and math.isfinite(request.deadline_s)
    )
    if not whole or RUN_ID.fullmatch(request.run) is None:
        raise ConnectionFailed("a request is malformed")
    return request.deadline_s


def _check_same(request: pb.Assign, message: Message) -> None:
    """What the message says must be what the server asks for in its name.

    Raises:
        BadRequest: it is of another run, study or round.
    """
    asks = read_assignment(message)
    if (asks.run, asks.study.id, asks.round) != (request.run, request.study_id, request.round):
        raise BadRequest("message: of another run, study or round than its assignment")


def _sits_out(reason: str) -> Reply:
    return Reply(error_code=SITS_OUT, error_reason=reason)


def _log_work(request: pb.Assign, reply: Reply, seconds: float) -> None:
    about: dict[str, Any] = {
        "run": request.run,
        "round": request.round,
        "type": request.type,
        "seconds": round(seconds, 3),
    }
    if reply.payload is None:
        log.info("refused", extra={**about, "code": reply.error_code, "reason": reply.error_reason})
    else:
        sha256 = reply.payload.sha256.hex()
        log.info("answered", extra={**about, "bytes": reply.payload.size, "sha256": sha256})
