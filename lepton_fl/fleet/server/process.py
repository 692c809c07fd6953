"""The server's process: it listens, polls the database for what the operator wants, and minds the runs.

It moves bytes and never looks into a payload: neither torch nor Flower is loaded here.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import signal
import socket
import sqlite3
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import grpc
import grpc.aio

from lepton_fl import __version__
from lepton_fl.errors import ConnectionFailed, LeptonError
from lepton_fl.files import write_atomic
from lepton_fl.fleet.logs import log_to
from lepton_fl.fleet.pki.authority import ServerIdentity, make_private, spoken
from lepton_fl.fleet.pki.credentials import enrolment_credentials, fleet_credentials
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.limits import printable
from lepton_fl.fleet.protocol.methods import OPTIONS, fleet_handlers
from lepton_fl.fleet.server import enrolment
from lepton_fl.fleet.server.config import OFF, ServerFiles
from lepton_fl.fleet.server.database import Database
from lepton_fl.fleet.server.gate import Gate
from lepton_fl.fleet.server.hub import Hub, Session
from lepton_fl.fleet.server.ledgers import Ledgers, open_witness
from lepton_fl.fleet.server.lock import Running, locked
from lepton_fl.fleet.server.register import Register
from lepton_fl.fleet.server.runs import Runs
from lepton_fl.fleet.server.service import FleetService
from lepton_fl.fleet.server.studies import SAYS, Answered, Journal, SessionRow, Studies
from lepton_fl.fleet.server.telemetry import StatusServer, Telemetry
from lepton_fl.secagg.identity import Roster

log = logging.getLogger(__name__)

POLL_S = 0.2
"""How soon a command of the operator's takes effect."""
HEARD_S = 10.0
"""How often it is written down when agents were last heard of."""
ENROLMENT_CONNECTIONS = 100
"""Open at once on the enrolment port, where nobody has a certificate, and each may cost 0.2 MiB."""
IDLE_S = 10.0
"""How long a connection may stay on which nothing is asked."""
ENROLMENT_S = 60.0
"""How long one on the enrolment port may stay at all: a site asks, hears, and goes."""
RENEW_S = 3600.0
"""How often the server looks whether its own certificate is to be renewed."""
_SAYS: dict[int, SAYS] = {
    pb.Answer.WAITING: "waiting",
    pb.Answer.APPROVED: "approved",
    pb.Answer.REFUSED: "refused",
}
SEEN = (
    "under a study with secure aggregation the server sees sums over the sites; under one without, EACH "
    "SITE'S UPDATE, and so does whoever has this machine"
)


def serve(files: ServerFiles, *, started: Callable[[Running, ServerIdentity, int], None]) -> None:
    """Run the server until SIGTERM or SIGINT. `started` is told once it listens, with the sites enrolled.

    Raises:
        ConfigError: a file is missing, malformed or open to others.
        ConnectionFailed: another server runs on this state folder, or a port is in use.
        IdentityRefused: the server's own certificate is not in force.
    """
    os.umask(0o077)
    # A connection is a file too, and the usual limit is for programs that have a few.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    make_private(files.state)
    with locked(files) as tell:
        log_to(files.log)
        asyncio.run(_Server(files).run(tell, started))


class _Server:
    """The whole of it, in one event loop."""

    def __init__(self, files: ServerFiles) -> None:
        config = files.config
        self._files = files
        self._identity = ServerIdentity.load(files.pki).renewed(datetime.now(UTC))
        # Nobody is served while it waits: what cannot be written now is written at the next poll.
        self._database = Database(files.database, patience=1.0)
        self._register = Register(self._database)
        self._studies = Studies(self._database)
        self._journal = Journal(self._studies)
        self._telemetry = Telemetry()
        self._gate = Gate(self._register, self._identity)
        self._hub = Hub(grace=config.runs.grace_s, payload_limit=config.limits.payload_mib << 20)
        self._ledgers = Ledgers(self._hub, open_witness(files), self._register.identity)
        self._service = FleetService(
            self._hub,
            self._gate,
            self,
            self._ledgers,
            heartbeat=config.runs.heartbeat_s,
            insecure_demo=config.server.insecure_demo,
        )
        self._runs = Runs(
            self._hub,
            files,
            self._studies,
            self._journal,
            self._telemetry,
            self._members,
            relay=self._ledgers.relay,
            roster_key=self._identity.consortium.roster_key,
        )
        self._offers: dict[str, pb.ToAgent] = {}
        self._submitted: frozenset[str] = frozenset()
        """Also what is offered no more: a site that refuses it is not counted on for another run."""
        self._roster: pb.ToAgent | None = None
        self._roster_version = 0

    async def run(
        self, tell: Callable[[Running], None], started: Callable[[Running, ServerIdentity, int], None]
    ) -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        for run in self._studies.recover():
            log.info("run goes on once its sites are back", extra={"run": run.id})
        self._look()
        listeners: list[_Listener] = []
        try:
            listeners.append(await self._listen_fleet())
            if self._files.config.listen.enrolment != OFF:
                listeners.append(await self._listen_enrolment(listeners[0].address))
            status = self._listen_status()
        except ConnectionFailed:
            # While the loop runs: gRPC cannot end a server once it is closed, and says so at length.
            for listener in listeners:
                await listener.server.stop(None)
            raise
        found = Running(
            pid=os.getpid(),
            since=time.time(),
            fleet=listeners[0].address,
            enrolment=listeners[1].address if len(listeners) > 1 else None,
            status=status.address if status is not None else None,
        )
        tell(found)
        sites = len(self._members())
        log.info("server started", extra={"release": __version__, "sites": sites, **asdict(found)})
        started(found, self._identity, sites)
        tasks = [asyncio.create_task(self._poll()), asyncio.create_task(self._service.watch())]
        try:
            # A poll that fails ends the server: it could no longer be told anything.
            await asyncio.wait(
                [*tasks, asyncio.create_task(stop.wait())], return_when=asyncio.FIRST_COMPLETED
            )
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            log.info("server is leaving")
            # A second signal finds Python's own handlers: whoever will not wait, need not.
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            await self._runs.leave(self._files.config.runs.leave_s)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._service.farewell("the server is leaving")
            for listener in listeners:
                await listener.server.stop(1.0)
            if status is not None:
                status.server.close()
            self._write()
            self._ledgers.close()
            self._database.close()
            log.info("server stopped")

    # What is listened to

    async def _listen_fleet(self) -> _Listener:
        options = [
            *OPTIONS,
            ("grpc.max_allowed_incoming_connections", self._files.config.limits.connections),
            # One stream for the agent, one for a renewal; a few more while it reconnects.
            ("grpc.max_concurrent_streams", 8),
            *self._limits(),
        ]
        server = grpc.aio.server(options=options)
        server.add_generic_rpc_handlers((fleet_handlers(self._service.connect, self._service.renew),))
        return await self._listen("fleet", server, fleet_credentials(self._identity))

    async def _listen_enrolment(self, fleet: str) -> _Listener:
        options = [
            ("grpc.max_receive_message_length", enrolment.MESSAGE_LIMIT),
            ("grpc.max_allowed_incoming_connections", ENROLMENT_CONNECTIONS),
            ("grpc.max_concurrent_streams", 4),
            ("grpc.max_connection_age_ms", round(1000 * ENROLMENT_S)),
            ("grpc.max_connection_age_grace_ms", round(1000 * IDLE_S)),
            *self._limits(),
        ]
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=64)
        public = self._files.config.listen.public or fleet
        server.add_generic_rpc_handlers(
            (enrolment.enrolment_service(self._register, self._files.pki, fleet_address=public),)
        )
        return await self._listen("enrolment", server, enrolment_credentials(self._identity))

    def _limits(self) -> list[tuple[str, int]]:
        limits, beat = self._files.config.limits, self._files.config.runs.heartbeat_s
        return [
            ("grpc.so_reuseport", 0),
            ("grpc.server_handshake_timeout_ms", round(1000 * limits.handshake_s)),
            ("grpc.max_metadata_size", 8 << 10),
            ("grpc.absolute_max_metadata_size", 16 << 10),
            # Each takes a place, which strangers could fill at no cost and keep.
            ("grpc.max_connection_idle_ms", round(1000 * IDLE_S)),
            # A connection whose other end is gone, or does not read.
            ("grpc.keepalive_time_ms", round(2000 * beat)),
            ("grpc.keepalive_timeout_ms", round(1000 * beat)),
        ]

    async def _listen(
        self, key: str, server: grpc.aio.Server, credentials: grpc.ServerCredentials
    ) -> _Listener:
        address = str(getattr(self._files.config.listen, key))
        host = address.rpartition(":")[0]
        try:
            port = server.add_secure_port(address, credentials)
        except RuntimeError:
            port = 0
        if not port:
            await server.stop(None)
            raise self._in_use(key, address)
        await server.start()
        return _Listener(server=server, address=f"{host}:{port}")

    def _listen_status(self) -> _Status | None:
        address = self._files.config.listen.status
        if address == OFF:
            return None
        host, _, port = address.rpartition(":")
        try:
            server = StatusServer(self._telemetry, host.strip("[]"), int(port))
        except OSError as error:
            raise self._in_use("status", address, error) from None
        return _Status(server=server, address=f"{host}:{server.port}")

    def _in_use(self, key: str, address: str, error: OSError | None = None) -> ConnectionFailed:
        why = _why_not(address) if error is None else error
        said = "is in use by another program" if why.errno == errno.EADDRINUSE else f"cannot be had: {why}"
        return ConnectionFailed(
            f"{self._files.path}: listen.{key}: {address} {said}", fix=f"set listen.{key} to another port"
        )

    # What is polled

    async def _poll(self) -> None:
        version, heard, renewal = self._database.version(), 0.0, time.monotonic() + RENEW_S
        while True:
            await asyncio.sleep(POLL_S)
            now = time.monotonic()
            if now > heard + HEARD_S:
                heard = now
                for session in self._hub.sessions.values():
                    self._telemetry.count(session)
                    self._journal.session(_row(session, connected=True))
            if now > renewal:
                renewal = now + RENEW_S
                self._renew()
            try:
                wrote = self._journal.flush()
                before, version = version, self._database.version()
                if version != before:
                    self._gate.changed()
                    self._look()
                if wrote or version != before:
                    self._runs.look()
                self._telemetry.trouble = ""
            except sqlite3.Error as error:
                # A full disk, say. What was heard is kept, and written once it can be.
                self._telemetry.trouble = f"the database cannot be written: {error}"
                log.warning(self._telemetry.trouble)
            self._measure()

    def _look(self) -> None:
        """Something was written by another process: what do sites have to be told?"""
        self._submitted = frozenset(study.id for study in self._studies.studies())
        signatures = self._studies.signatures()
        offers = {
            study.id: pb.ToAgent(
                offer=pb.Offer(
                    canonical=study.canonical, study_id=study.id, signature=signatures.get(study.id, b"")
                )
            )
            for study in self._studies.open()
        }
        for study_id, offer in offers.items():
            # Also one that was signed since.
            if offer != self._offers.get(study_id):
                for session in self._hub.sessions.values():
                    session.outbox.put(offer)
        self._offers = offers
        roster = self._register.roster(self._identity.consortium)
        if roster is not None and roster.version != self._roster_version:
            self._tell_roster(roster)

    def _tell_roster(self, roster: Roster) -> None:
        """Tell the agents first, and the runs then: what is asked by a roster comes to an agent after it."""
        self._roster = pb.ToAgent(roster=pb.Roster(signed=roster.signed))
        for session in self._hub.sessions.values():
            session.outbox.put(self._roster)
        try:
            write_atomic(self._files.roster, roster.signed, mode=0o600)
        except OSError as error:
            # The next look finds it untold.
            log.warning("the roster cannot be written for the runs: %s", error)
        else:
            self._roster_version = roster.version

    def _members(self) -> dict[int, str]:
        rows = self._register.sites(datetime.now(UTC))
        return {row.party: row.site for row in rows if row.state == "enrolled" and row.party is not None}

    def _renew(self) -> None:
        try:
            renewed = self._identity.renewed(datetime.now(UTC))
        except (LeptonError, OSError) as error:
            log.warning("the server's certificate cannot be renewed: %s", error)
            return
        if renewed is not self._identity:
            self._identity = renewed
            log.info("the server's certificate was renewed", extra={"until": renewed.not_after})

    def _measure(self) -> None:
        telemetry = self._telemetry
        telemetry.tick()
        telemetry.sites.set(len(self._hub.sessions))
        telemetry.exchanges.set(len(self._hub))

    def _write(self) -> None:
        for session in self._hub.sessions.values():
            self._journal.session(_row(session, connected=False))
        try:
            self._journal.flush()
        except sqlite3.Error as error:
            log.warning("the database cannot be written: %s", error)

    # What sites say

    def entered(self, session: Session, hello: pb.Hello) -> None:
        log.info(
            "site connected",
            extra={"site": session.site, "release": session.release, "device": session.device},
        )
        if session.insecure_seed:
            log.warning("a site draws its noise from a known seed", extra={"site": session.site})
        if self._roster is not None and hello.roster_version < self._roster_version:
            session.outbox.put(self._roster)
        for offer in self._offers.values():
            session.outbox.put(offer)
        self._journal.session(_row(session, connected=True))

    def answered(self, session: Session, answer: pb.Answer) -> None:
        if answer.study_id not in self._submitted or answer.state not in _SAYS:
            return
        state = _SAYS[answer.state]
        log.info("answer", extra={"site": session.site, "study": answer.study_id, "state": state})
        self._journal.answer(
            Answered(
                study=answer.study_id,
                party=session.party,
                site=session.site,
                state=state,
                reason=printable(answer.reason),
                at=time.time(),
            )
        )

    def left(self, session: Session) -> None:
        log.info("site disconnected", extra={"site": session.site})
        self._telemetry.count(session)
        if self._hub.sessions.get(session.party) is None:
            self._journal.session(_row(session, connected=False))

    def refused(self, reason: str) -> None:
        self._telemetry.refusals.labels(reason).inc()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listener:
    server: grpc.aio.Server
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Status:
    server: StatusServer
    address: str


def _row(session: Session, *, connected: bool) -> SessionRow:
    return SessionRow(
        party=session.party,
        site=session.site,
        connected=connected,
        since=session.since,
        heard=time.time() - (time.monotonic() - session.heard),
        release=session.release,
        device=session.device,
        state=session.state if connected else "",
        bytes_in=session.received,
        bytes_out=session.sent,
    )


def _why_not(address: str) -> OSError:
    """Why a port cannot be had: gRPC does not say."""
    host, _, port = address.rpartition(":")
    try:
        kind, _, _, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        return error
    return OSError("gRPC could not listen there")


def announce(files: ServerFiles, found: Running, identity: ServerIdentity, sites: int) -> list[str]:
    """What a person is told when the server has started."""
    fingerprint = identity.consortium.fingerprint
    status = "off" if found.status is None else f"http://{found.status}/metrics"
    lines = [
        f"lepton-fl {__version__}: the server of {files.config.server.name}, {sites} sites enrolled",
        f"agents: {found.fleet} (mutual TLS), enrolment: {found.enrolment or 'closed'}, status: {status}",
        f"fingerprint: {fingerprint.hex()} (short: {spoken(fingerprint)})",
        SEEN,
    ]
    if files.config.server.insecure_demo:
        lines.append("server.insecure_demo: noise may come from a known seed: for demonstrations only")
    return lines
