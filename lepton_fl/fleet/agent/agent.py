"""A site's agent: connects, is asked, answers. What it may answer is decided by the site's own app.

It runs the ClientApp of this installation and nothing that a server sends. One event loop talks; the work
is done in a thread beside it (exchanges.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import grpc.aio

from lepton_fl import __version__
from lepton_fl.errors import (
    ConfigError,
    ConnectionFailed,
    IdentityRefused,
    LeptonError,
    VerificationFailed,
)
from lepton_fl.fleet.agent.exchanges import Exchanges
from lepton_fl.fleet.agent.ledger import StatedLedger
from lepton_fl.fleet.agent.member import EnrolledSite
from lepton_fl.fleet.agent.offers import MAX_OFFERS, Offered, Offers
from lepton_fl.fleet.agent.peer import check_clock, check_release, explain, obey
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.limits import MISSED, MOST_STATED, printable
from lepton_fl.fleet.protocol.methods import PROTOCOL, connect_method
from lepton_fl.fleet.protocol.transfer import Outbox
from lepton_fl.site import SiteApp, Surroundings, client_app
from lepton_fl.site.policy import Policy, load_policy
from lepton_fl.study import Study

log = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds between attempts to connect: doubled each time, and drawn at random between half of it and it."""
LASTED_S = 10.0
"""A connection that held so long was a good one: the next attempt waits as briefly as the first."""
_LOOK_S = 1.0
"""How often the site's own files are looked at."""
_RENEWAL_S = 60.0
_MAX_WAITING = 256
"""Messages that a server may leave unread before it counts as one that does not read."""
_OFFERS_READ = 4 * MAX_OFFERS
"""Offers in one connection."""
_LEDGERS_UNREAD = 32
"""Messages about ledgers that wait while the site trains; of more the oldest go: later ones say more."""
_GOODBYE_S = 2.0
_STOP_S = 20.0
"""How long an end waits for the server to take the answer to what was asked before."""

_NO_FILE = (0, 0, 0)
_STATES = {"waiting": pb.Answer.WAITING, "approved": pb.Answer.APPROVED, "refused": pb.Answer.REFUSED}
Stream = grpc.aio.StreamStreamCall[pb.FromAgent, pb.ToAgent]


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
        member: EnrolledSite | None = None,
        give_up_after: float | None = None,
    ) -> None:
        """An agent for `app`, to be `run` once.

        Args:
            app: The site's own; its policy and approvals are read again whenever their files change.
            connect: Opens a channel with the site's certificate of the day.
            state: The site's folder, mode 0700.
            device: Where the model is trained, to be shown at the server.
            insecure_seed: The site's noise comes from a known seed: a demonstration.
            member: What renews the certificate; None where something else does.
            give_up_after: Seconds without a connection after which `run` ends; None for never.
        """
        self._app = app
        self._connect = connect
        self._device = device
        self._insecure_seed = insecure_seed
        self._member = member
        self._give_up_after = give_up_after
        self._instance = os.urandom(16)
        self._paused_file = state / "paused"
        self._policy_error = ""
        self._ledger = StatedLedger(app.site, member, state)
        self._ledger_error: LeptonError | None = None
        self._behind = asyncio.Event()
        """Set: the ledger is not what others have seen of it, as `_ledger_error` says."""
        self._server_witness = b""
        self._unread: deque[tuple[pb.ToAgent, bytes, Outbox]] = deque(maxlen=_LEDGERS_UNREAD)
        """What a server has said of ledgers, that server's key as a witness, and its connection."""
        self._to_be_read = False
        """The worker will come to them."""
        self._given: deque[tuple[list[bytes], Outbox]] = deque(maxlen=_LEDGERS_UNREAD)
        """Receipts for peers, to be sent to who asked."""
        self._exchanges = Exchanges(app, state, self._ledger, barred=self._barred)
        self._offers = Offers(
            state / "studies",
            approvals=app.site.approvals,
            policy=self._policy,
            policy_file=app.site.policy_file,
            admit=app.site.surroundings.admit,
        )
        self._offered: dict[str, Study] = {}
        """By this connection."""
        self._said: dict[str, Offered] = {}
        self._offers_read = 0
        self._outbox: Outbox | None = None
        self._stopping = asyncio.Event()
        self._welcomed = 0.0
        self._heard = 0.0
        self._heartbeat = 10.0
        self._renewed = False
        self._why_not = "not tried yet"
        self._server_release = ""
        self._clock_offset = 0.0

    # For those who run it

    async def run(self) -> None:
        """Connect, answer, and connect again, until `stop`.

        Raises:
            IdentityRefused: the server says that this site is not to come back, or this site's certificate
                is not in force.
            ProtocolError: the server is of a release that this one does not understand.
            ConnectionFailed: no connection for as long as `give_up_after`.
            VerificationFailed: others have seen of the ledger what it does not have.
        """
        tasks = [
            asyncio.create_task(self._keep_connected()),
            asyncio.create_task(self._look_after_files()),
            asyncio.create_task(self._compare_ledger()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                # Of every one: an agent that obeys its people's files no more must not go on.
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(self._exchanges.close)
            self._ledger.close()
            log.info("ended")

    def stop(self) -> None:
        """Take nothing new, hand over what is being worked on, say goodbye, and end."""
        if not self._stopping.is_set():
            log.info("stopping", extra={"open": len(self._exchanges)})
        self._stopping.set()

    def pause(self) -> None:
        """Take part in nothing new, until `resume`: also after a restart."""
        self._paused_file.touch(mode=0o600)
        log.info("paused")
        self._beat()

    def resume(self) -> None:
        """Take part again."""
        self._paused_file.unlink(missing_ok=True)
        log.info("resumed")
        self._beat()

    @property
    def paused(self) -> bool:
        return self._paused_file.exists()

    @property
    def connected(self) -> bool:
        return self._outbox is not None

    @property
    def state(self) -> str:
        """idle, working or paused."""
        return "paused" if self.paused else "working" if self._exchanges.working else "idle"

    def status(self) -> dict[str, object]:
        """What there is to tell the site's own people."""
        return {
            "site": self._app.site.name,
            "release": __version__,
            "pid": os.getpid(),
            "connected": self.connected,
            "not_connected_because": "" if self.connected else self._why_not,
            "server_release": self._server_release,
            "clock_offset_s": round(self._clock_offset, 1),
            "state": self.state,
            "barred": self._barred(),
            "device": self._device,
            "open": len(self._exchanges),
            "answered": self._exchanges.answered,
            "refused": self._exchanges.refused,
            "studies": [
                {
                    "study": said.study.id,
                    "name": said.study.study.name,
                    "state": said.state,
                    "reason": said.reason,
                }
                for said in self._said.values()
            ],
        }

    def _barred(self) -> str:
        if self._stopping.is_set():
            return "the site's agent is stopping"
        if self._ledger_error is not None:
            return "the site's ledger must be recovered"
        return self._policy_error or ("the site is paused" if self.paused else "")

    # Connections

    async def _keep_connected(self) -> None:
        wait, last = FIRST_WAIT, time.monotonic()
        while not self._stopping.is_set():
            self._welcomed, self._renewed = 0.0, False
            why = "the connection ended"
            try:
                await self._session()
            except IdentityRefused:
                raise
            except ConnectionFailed as error:
                why = error.message
            now = time.monotonic()
            if self._welcomed:
                last = now
            if self._renewed:
                continue
            if why != self._why_not and not self._stopping.is_set():
                # Once: what has not changed is no news.
                log.warning("not connected", extra={"reason": why})
            self._why_not = why
            if self._give_up_after is not None and now - last >= self._give_up_after:
                raise ConnectionFailed(f"no connection for {now - last:.0f} s: {why}")
            if self._welcomed and now - self._welcomed >= LASTED_S:
                wait = FIRST_WAIT
            pause = wait * (0.5 + secrets.randbelow(1000) / 2000)
            if self._give_up_after is not None:
                pause = min(pause, max(0.0, last + self._give_up_after - now))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
            wait = min(2 * wait, LONGEST_WAIT)

    async def _session(self) -> None:
        """One connection, from hello to its end."""
        wake = asyncio.Event()
        outbox = Outbox(wake.set)
        # In a thread: who is charging has the ledger for as long as it takes.
        outbox.put(pb.FromAgent(hello=await asyncio.to_thread(self._hello)))
        self._offered, self._said, self._offers_read = {}, {}, 0
        async with self._connect() as channel:
            stream = connect_method(channel)()
            self._heard, self._heartbeat = time.monotonic(), 10.0
            receiving = asyncio.create_task(self._receive(stream, outbox))
            sending = asyncio.create_task(self._send(stream, outbox, wake))
            tasks = [
                receiving,
                sending,
                asyncio.create_task(self._watch()),
                asyncio.create_task(self._say_goodbye(outbox)),
                asyncio.create_task(self._renew(channel)),
            ]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if sending in done:
                    # Ours was the last word, and is to arrive; or it could not be sent: theirs says why.
                    await asyncio.wait([receiving], timeout=_GOODBYE_S)
                for task in tasks:
                    if task.done():
                        task.result()
            except grpc.aio.AioRpcError as error:
                raise ConnectionFailed(explain(error)) from None
            except OSError as error:
                raise ConnectionFailed(f"a reply cannot be read: {error.strerror}") from None
            except LeptonError:
                raise
            except Exception:
                # Whatever a server sends, it does not end the agent.
                log.exception("internal error in the connection")
                raise ConnectionFailed("internal error in the connection") from None
            finally:
                self._outbox = None
                self._exchanges.disconnected()
                stream.cancel()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                # What was being sent is closed now, not when somebody collects it.
                outbox.clear()

    def _hello(self) -> pb.Hello:
        return pb.Hello(
            protocol=PROTOCOL,
            release=__version__,
            site=self._app.site.name,
            instance=self._instance,
            roster_version=0 if self._member is None else self._member.roster_version,
            insecure_seed=self._insecure_seed,
            device=self._device,
            statement=self._ledger.state(self._app.site.budget.data_set).signed,
        )

    async def _send(self, stream: Stream, outbox: Outbox, wake: asyncio.Event) -> None:
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

    async def _receive(self, stream: Stream, outbox: Outbox) -> None:
        async for message in stream:
            self._heard = time.monotonic()
            self._take(message, outbox)
            if len(outbox) > _MAX_WAITING:
                raise ConnectionFailed("the server does not read what it asks for")
        raise ConnectionFailed("the server ended the connection")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._heartbeat))
            if time.monotonic() - self._heard > MISSED * self._heartbeat:
                raise ConnectionFailed("the server is silent")

    async def _say_goodbye(self, outbox: Outbox) -> None:
        """Once we are to stop: when the server has what it asked for, or does not come for it."""
        await self._stopping.wait()
        if not self.connected:
            return
        until = time.monotonic() + _STOP_S
        while len(self._exchanges) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        outbox.put(pb.FromAgent(goodbye=pb.Goodbye(code=pb.Goodbye.LEAVING)))
        await asyncio.Event().wait()

    async def _renew(self, channel: grpc.aio.Channel) -> None:
        """Renew the certificate when it is time; then end the connection at an idle moment."""
        while self._member is not None and not self._renewed:
            if self.connected and self._member.renewal_due():
                try:
                    await self._member.renew(channel)
                    self._renewed = True
                    break
                except IdentityRefused:
                    raise
                except LeptonError as error:
                    log.warning("certificate not renewed", extra={"reason": error.message})
            await asyncio.sleep(_RENEWAL_S if self.connected else 0.2)
        while self._member is None or len(self._exchanges):
            await asyncio.sleep(0.2 if self._member is not None else _RENEWAL_S)
        log.info("certificate renewed")

    # What the server says

    def _take(self, message: pb.ToAgent, outbox: Outbox) -> None:
        kind = message.WhichOneof("kind")
        if kind == "goodbye":
            obey(message.goodbye)
        elif kind == "welcome":
            self._welcome(message.welcome, outbox)
        elif not self.connected:
            raise ConnectionFailed("the server's first word is not welcome")
        match kind:
            case "assign":
                self._exchanges.assign(message.assign)
            case "chunk":
                self._exchanges.chunk(message.chunk)
            case "proceed":
                self._exchanges.proceed(message.proceed)
            case "ack":
                self._exchanges.forget(message.ack.exchange)
            case "cancel":
                self._exchanges.forget(message.cancel.exchange)
            case "offer":
                self._offer(message.offer, outbox)
            case "roster":
                self._roster(message.roster)
            case "receipts" | "statements":
                self._hear_of_ledgers(message, outbox)
            case _:
                pass  # A heartbeat, or what a later release may say.

    def _welcome(self, welcome: pb.Welcome, outbox: Outbox) -> None:
        if self.connected:
            raise ConnectionFailed("the server says welcome twice")
        check_release(welcome.release)
        self._clock_offset = check_clock(welcome.time)
        # In this order: what is no number is the shortest, and a timer of no length would stop all others.
        self._heartbeat = min(max(0.1, welcome.heartbeat_s), 300.0)
        self._outbox, self._welcomed = outbox, time.monotonic()
        self._server_release, self._server_witness, self._why_not = welcome.release, welcome.witness, ""
        self._exchanges.connected(outbox, set(welcome.open))
        # The sender may be waiting by the heartbeat of before.
        self._beat()
        log.info("connected", extra={"server_release": welcome.release, "party": welcome.party})

    def _roster(self, roster: pb.Roster) -> None:
        # In turn: what the server asked before it told us of this one goes by the one before.
        if self._member is not None:
            self._exchanges.in_turn(partial(self._take_roster, self._member, roster.signed))

    @staticmethod
    def _take_roster(member: EnrolledSite, signed: bytes) -> None:
        try:
            member.take_roster(signed)
        except (LeptonError, OSError) as error:
            log.warning("roster not taken", extra={"reason": str(error)})

    # The ledgers; in the worker, in turn with what is asked: nothing is charged before the receipts are read

    def _hear_of_ledgers(self, message: pb.ToAgent, outbox: Outbox) -> None:
        self._unread.append((message, self._server_witness, outbox))
        if not self._to_be_read:
            self._to_be_read = True
            self._exchanges.in_turn(self._read, self._read_on)

    def _read(self) -> None:
        # First: what comes from now on is read in its own turn, before what is asked after it.
        self._to_be_read = False
        for _ in range(_LEDGERS_UNREAD):
            # No more in one turn: what comes as fast as it is read must not keep the site from its work.
            if not self._unread or self._ledger_error is not None:
                break
            message, server, outbox = self._unread.popleft()
            try:
                self._ledger.take(message.receipts.signed, server)
            except VerificationFailed as error:
                # At once: what was asked after this is not to be worked on.
                self._ledger_error = error
            except LeptonError as error:
                log.warning("receipt not kept", extra={"reason": error.message})
            if given := self._ledger.witness(message.statements.signed):
                self._given.append((given[-MOST_STATED:], outbox))

    def _read_on(self) -> None:
        if self._ledger_error is not None:
            self._behind.set()
        # One message for each that asked, as the server counts them; the worker may be adding to them.
        while self._given:
            given, outbox = self._given.popleft()
            if outbox is self._outbox:
                outbox.put(pb.FromAgent(receipts=pb.Receipts(signed=given)))

    async def _compare_ledger(self) -> None:
        """Wait until the ledger is not what others have seen of it; then the agent must end.

        Raises:
            VerificationFailed: what is wrong, and how to mend it.
        """
        await self._behind.wait()
        if self._ledger_error is not None:
            log.error("the ledger must be recovered", extra={"reason": str(self._ledger_error)})
            raise self._ledger_error

    def _beat(self) -> None:
        """Say at once what our state is now."""
        if self._outbox is not None:
            self._outbox.put(pb.FromAgent(heartbeat=pb.Heartbeat(state=self.state)))

    # Studies, and the site's own files

    def _offer(self, offer: pb.Offer, outbox: Outbox) -> None:
        self._offers_read += 1
        if self._offers_read > _OFFERS_READ:
            raise ConnectionFailed("the server offers studies without end")
        if offer.study_id in self._offered and not offer.signature:
            return
        try:
            study = self._offers.take(
                offer.canonical, offer.study_id, current=self._offered, signature=offer.signature
            )
        except LeptonError as error:
            log.warning("offer refused", extra={"reason": error.message})
            answer = pb.Answer(
                study_id=offer.study_id[:64], state=pb.Answer.REFUSED, reason=printable(error.public)
            )
            outbox.put(pb.FromAgent(answer=answer))
            return
        except OSError as error:
            log.exception("offer not kept", extra={"reason": error.strerror})
            return
        self._offered[study.id] = study
        self._say(study, outbox)

    def _say(self, study: Study, outbox: Outbox) -> None:
        """Tell the server what this site says to a study, unless it has been told."""
        said, before = self._offers.judge(study), self._said.get(study.id)
        self._said[study.id] = said
        if said == before:
            return
        # A person's own words may be no text that can be sent.
        answer = pb.Answer(study_id=study.id, state=_STATES[said.state], reason=printable(said.public))
        outbox.put(pb.FromAgent(answer=answer))
        log.info(
            "study %s",
            said.state,
            extra={"study": study.id, "study_name": study.study.name, "reason": said.reason},
        )
        if said.state == "approved":
            self._exchanges.prepare(study)

    def _policy(self) -> Policy:
        if self._policy_error:
            raise ConfigError("policy.toml cannot be read", public=self._policy_error)
        return self._app.site.policy

    async def _look_after_files(self) -> None:
        """Obey what the site's people write, within seconds and without a restart."""
        policy_file, approvals = Path(self._app.site.policy_file), self._app.site.approvals.path
        # The policy may have changed, or gone, since the site was opened.
        policy_seen: tuple[int, int, int] | None = None
        approvals_seen = _signature(approvals)
        while True:
            await asyncio.sleep(_LOOK_S)
            changed = False
            if (found := _signature(policy_file)) != policy_seen:
                policy_seen, changed = found, True
                self._read_policy(policy_file)
            if (found := _signature(approvals)) != approvals_seen:
                approvals_seen, changed = found, True
            if changed and self._outbox is not None:
                for study in self._offered.values():
                    self._say(study, self._outbox)

    def _read_policy(self, file: Path) -> None:
        try:
            policy = load_policy(file)
        except ConfigError as error:
            # No policy: no work.
            self._policy_error = "the site's policy cannot be read"
            log.exception("policy cannot be read: nothing is answered", extra={"reason": error.message})
            return
        if policy == self._app.site.policy and not self._policy_error:
            return
        self._policy_error = ""
        self._app = client_app(replace(self._app.site, policy=policy))
        self._exchanges.app = self._app
        log.info("policy read again", extra={"file": str(file)})


def _signature(file: Path) -> tuple[int, int, int]:
    """Another after the file has been written or replaced."""
    try:
        found = file.stat()
    except OSError:
        return _NO_FILE
    return (found.st_mtime_ns, found.st_size, found.st_ino)
