"""A fleet on loopback whose every part a test can break: certificates, server, agents, and the wire between.

The server's front, hub and agents are the real ones and run in the test's event loop; a run's process is a
process. A `Puppet` is an agent that says what the test says; a `Proxy` is the network on a bad day.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import lepton_fl.fleet  # noqa: F401 - before grpc: it sets what gRPC reads at import

# isort: split
import grpc
import grpc.aio
import numpy as np
import tomli_w
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from flwr.app import RecordDict

from lepton_fl import __version__
from lepton_fl.config import parse
from lepton_fl.data import Batch, Contract, Table, load_table
from lepton_fl.federation import Federation
from lepton_fl.fleet.agent.agent import Agent
from lepton_fl.fleet.agent.enrol import AgentIdentity
from lepton_fl.fleet.agent.member import EnrolledSite
from lepton_fl.fleet.agent.process import membership_of
from lepton_fl.fleet.pki import certificates
from lepton_fl.fleet.pki.authority import Authority, Issuing, ServerIdentity
from lepton_fl.fleet.pki.credentials import fleet_credentials
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.methods import OPTIONS, PROTOCOL, connect_method, fleet_handlers
from lepton_fl.fleet.protocol.records import pack, unpack
from lepton_fl.fleet.server.database import Database
from lepton_fl.fleet.server.gate import Gate
from lepton_fl.fleet.server.hub import Hub, Reply, Session
from lepton_fl.fleet.server.ledgers import SERVER, Ledgers
from lepton_fl.fleet.server.link import RunnerLink, RunSpec
from lepton_fl.fleet.server.register import Register, Request
from lepton_fl.fleet.server.service import FleetService
from lepton_fl.messages import CONFIG, Assignment, assignment_config, to_record
from lepton_fl.privacy import Ledger
from lepton_fl.privacy.ledger import Head, Statement, Witness
from lepton_fl.secagg.identity import IdentityKey, Roster
from lepton_fl.simulation import InProcessGrid
from lepton_fl.site import Simulated, Site, SiteApp, SiteData, client_app
from lepton_fl.site.approvals import Approvals
from lepton_fl.site.history import DiskHistory
from lepton_fl.site.policy import load_policy
from lepton_fl.site.secure import LSA1, Aggregation, NoAggregation
from lepton_fl.study import Study
from lepton_fl.tasks import Arrays, arrays_of, build_model
from lepton_fl.tasks.arrays import model_hash
from lepton_fl.training import SimulationNoise

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds after which whatever a test waits for is taken not to come: a bound, never a measurement."""
RUN = "0123456789abcdef" * 2
SITES = ("bank", "clinic", "ward")
PARTY = {name: 101 + number for number, name in enumerate((*SITES, "e", "f", "g", "h"))}
SEED = 7
SERVER_OPTIONS = [*OPTIONS, ("grpc.so_reuseport", 0)]

STUDY: dict[str, Any] = {
    "study": {"name": "faults"},
    "task": {"kind": "binary", "target": "ill"},
    "privacy": {"epsilon": 4.0, "delta": 1e-3},
    "secure_aggregation": {"enabled": False, "min_sites": 2},
    "train": {
        "rounds": 4,
        "spare_rounds": 4,
        "sample_rate": 0.2,
        "lr": 0.1,
        "expected_batch": 10.0,
        "deadline": 60.0,
    },
    "features": {"columns": {"x": {"type": "float", "range": [-1, 1], "identifier": "allow"}}},
}
POLICY: dict[str, Any] = {
    "budget": {"epsilon_total": 5.0, "epsilon_per_study": 5.0, "delta_total": 1e-2},
    "require": {"secure_aggregation": False, "approval": "auto", "min_sites": 2},
}
LARGE = {"name": "mlp", "hidden": [1024, 1024]}
"""A model of four chunks and a bit."""


def once(test: Callable[[], Awaitable[T]], *, patience: float = 2 * PATIENCE) -> T:
    """Run an asynchronous test to its end, or fail."""

    async def bounded() -> T:
        async with asyncio.timeout(patience):
            return await test()

    return asyncio.run(bounded())


async def until(happened: Callable[[], object]) -> None:
    """Wait until something is so, or fail."""
    async with asyncio.timeout(PATIENCE):
        while not happened():
            await asyncio.sleep(0.01)


# Studies and sites


def make_study(**changes: dict[str, Any]) -> Study:
    """The study with keys of these tables changed."""
    merged = {key: {**STUDY.get(key, {}), **changes.get(key, {})} for key in [*STUDY, *changes]}
    return parse(Study, merged, file="study.toml")


def make_table(study: Study, name: str) -> Table:
    """Sixty records of a site, always the same ones."""
    x_N = np.random.default_rng(PARTY[name]).uniform(-1, 1, 60)
    cells = {"x": [str(x) for x in x_N], "ill": [str(int(x > 0)) for x in x_N]}
    return load_table(Contract.of(study), [Batch(cells)], source=f"{name}.csv")


def make_site(name: str, folder: Path, member: EnrolledSite | None = None) -> Site[Simulated]:
    """A site with a ledger on disk, and noise that a second run of the same rounds repeats.

    As `member`, it takes part in secure rounds, and remembers them on disk.
    """

    def load(study: Study) -> SiteData:
        table = make_table(study, name)
        return SiteData(train=table, test=table)

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    policy = folder / "policy.toml"
    policy.write_text(tomli_w.dumps({"data": {"id": f"{name}-records"}, **POLICY}), encoding="utf-8")
    aggregation: Aggregation = NoAggregation()
    if member is not None:
        aggregation = LSA1(membership_of(member, DiskHistory(folder / "rounds.db")))
    ledger = Ledger(folder / "ledger.db")
    return Site(
        aggregation=aggregation,
        name=name,
        policy=load_policy(policy),
        policy_file=str(policy),
        approvals=Approvals(folder / "approvals.jsonl", key=ledger.key),
        load=load,
        surroundings=Simulated(noise=SimulationNoise(SEED, name), ledger=ledger),
    )


def close_site(site: Site[Any]) -> None:
    """Close the files that it keeps open."""
    site.ledger.close()
    if isinstance(site.aggregation, LSA1):
        history = site.aggregation._membership.history
        assert isinstance(history, DiskHistory)
        history.close()


def charged(site: Site[Any], run: str) -> list[int]:
    """The rounds of `run` in a site's ledger, in the order in which they were charged."""
    return [entry["round"] for entry in site.ledger.history(site.budget.data_set) if entry["run"] == run]


def first_model(study: Study) -> Arrays:
    """What a run's process begins with."""
    return arrays_of(build_model(study, Contract.of(study).width, torch.Generator()))


def request(
    study: Study, kind: str, *, number: int, run: str = RUN, model: Arrays | None = None
) -> RecordDict:
    """The content of a server's message to a site."""
    config = assignment_config(Assignment(study=study, run=run, round=number, cohort=SITES if number else ()))
    content = RecordDict({CONFIG: config})
    if kind != "query.join":
        content["arrays"] = to_record(first_model(study) if model is None else model)
    return content


# Certificates


@dataclass(frozen=True)
class Credentials:
    """A key and a certificate, PEM."""

    key: bytes
    certificate: bytes


class Consortium:
    """A consortium as the operator makes it, its sites enrolled; and forgeries under its own key."""

    def __init__(self, folder: Path) -> None:
        """In a folder that is laid out as server.toml says where it says nothing: `pki` and `state`."""
        now = dt.datetime.now(dt.UTC)
        pki = folder / "pki"
        self._authority = Authority.create(
            pki, name="faults", hosts=["127.0.0.1", "localhost"], passphrase="of a test only", now=now
        )
        self._issuing = Issuing.open(pki)
        self._database = Database(folder / "state" / "server.db")
        self.register = Register(self._database)
        self.identity = ServerIdentity.load(pki)
        self.root_pem = self._authority.consortium.root_pem
        self._identities: dict[str, tuple[IdentityKey, bytes]] = {}
        self._sites = {name: self.enrol(name) for name in PARTY}

    def close(self) -> None:
        self._database.close()

    def site(self, name: str) -> Credentials:
        """What one of the enrolled sites holds."""
        return self._sites[name]

    def enrol(self, name: str) -> Credentials:
        """A new site: invited, asking, approved."""
        key, identity, now = certificates.new_key(), IdentityKey.generate(), dt.datetime.now(dt.UTC)
        token = self.register.invite(
            name, consortium=self._authority.consortium, life=dt.timedelta(hours=1), now=now
        )
        request = Request(
            token_id=token.id,
            secret=token.secret,
            site=name,
            csr=certificates.make_csr(key),
            identity_key=identity.public,
        )
        self.register.request(request, self._issuing, now)
        self.register.approve(name, keys=self.register.requested(name), authority=self._authority, now=now)
        decision = self.register.request(request, self._issuing, now)
        self._identities[name] = identity, decision.identity_certificate
        return Credentials(certificates.key_pem(key), decision.tls_certificate)

    def revoke(self, name: str) -> None:
        self.register.revoke(name, dt.datetime.now(dt.UTC))

    def sign_roster(self) -> None:
        """Tell the other sites of those that were revoked."""
        self.register.sign_roster(self._authority)

    @property
    def roster(self) -> Roster:
        found = self.register.roster(self._authority.consortium)
        assert found is not None
        return found

    @property
    def roster_key(self) -> bytes:
        return self._authority.consortium.roster_key

    def member(self, name: str, folder: Path) -> EnrolledSite:
        """One of the sites as `enroll join` leaves it, with its files in `folder`."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        site, (identity, certified) = self.site(name), self._identities[name]
        chain = site.certificate + certificates.certificate_pem(self._issuing.certificate)
        files = {
            "site.pem": site.key + chain,
            "identity.pem": identity.to_bytes(),
            "identity.cert": certified,
            "consortium.bin": self._authority.consortium.encode(),
            "roster.bin": self.roster.signed,
            "fleet.txt": b"127.0.0.1:1",
        }
        for file, content in files.items():
            (folder / file).touch(mode=0o600)
            (folder / file).write_bytes(content)
        return EnrolledSite(AgentIdentity.load(folder), "127.0.0.1:1")

    def forge(
        self,
        name: str,
        *,
        start: dt.timedelta = dt.timedelta(hours=-1),
        end: dt.timedelta = dt.timedelta(days=1),
        usage: x509.ObjectIdentifier | None = ExtendedKeyUsageOID.CLIENT_AUTH,
        uri: str = "lepton-fl://site/{}",
        signed_by: Literal["issuing", "itself", "another"] = "issuing",
        ca: bool = False,
    ) -> Credentials:
        """A certificate that the register knows as the site's, and that is wrong in what is said."""
        key, other = certificates.new_key(), certificates.new_key()
        signer = {"issuing": self._issuing.key, "itself": key, "another": other}[signed_by]
        issuer = self._issuing.certificate.subject
        subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "lepton-fl")])
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if signed_by == "itself" else issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + start)
            .not_valid_after(now + end)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri.format(name))]),
                critical=False,
            )
        )
        if usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
        made = builder.sign(signer, hashes.SHA256())
        self._database.execute(
            "INSERT INTO tls_certificates SELECT ?, party, 1 << 40 FROM members"
            " WHERE site = ? AND revoked_at IS NULL",
            (f"{made.serial_number:x}", name),
        )
        return Credentials(certificates.key_pem(key), certificates.certificate_pem(made))


# The server


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.refusals: list[str] = []
        self.answers: list[tuple[str, pb.Answer]] = []

    def entered(self, session: Session, hello: pb.Hello) -> None: ...

    def answered(self, session: Session, answer: pb.Answer) -> None:
        self.answers.append((session.site, answer))

    def left(self, session: Session) -> None: ...

    def refused(self, reason: str) -> None:
        self.refusals.append(reason)


class Front:
    """The server, without its database: hub, service and a port with mutual TLS."""

    def __init__(
        self,
        consortium: Consortium,
        folder: Path,
        *,
        heartbeat: float = 5.0,
        grace: float = 30.0,
        payload_limit: int = 64 << 20,
        port: int = 0,
    ) -> None:
        self.folder = folder
        self.spool = folder / "spool"
        self.spool.mkdir(parents=True, exist_ok=True)
        self._consortium = consortium
        self._identity = consortium.identity
        self.gate = Gate(consortium.register, consortium.identity)
        self.hub = Hub(grace=grace, payload_limit=payload_limit)
        self.heard = Heard()
        # Of this folder: what a front before this one has seen counts.
        key = folder / "witness.pem"
        if not key.exists():
            key.write_bytes(IdentityKey.generate().to_bytes())
        self.witness = Witness(folder / "witness.db", name=SERVER, key=IdentityKey.read(key.read_bytes()))
        self.ledgers = Ledgers(self.hub, self.witness, consortium.register.identity)
        self._service = FleetService(
            self.hub, self.gate, self.heard, self.ledgers, heartbeat=heartbeat, insecure_demo=True
        )
        self.port = port
        self.streams = 0
        """Calls of `Connect` that have not ended."""

    async def __aenter__(self) -> Front:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._server.add_generic_rpc_handlers((fleet_handlers(self._connect, self._service.renew),))
        self.port = self._server.add_secure_port(f"127.0.0.1:{self.port}", fleet_credentials(self._identity))
        await self._server.start()
        self._watch = asyncio.create_task(self._service.watch())
        return self

    async def _connect(self, requests: Any, context: Any) -> None:
        self.streams += 1
        try:
            await self._service.connect(requests, context)
        finally:
            self.streams -= 1

    async def __aexit__(self, *_: object) -> None:
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)
        await self._server.stop(None)
        await self._server.wait_for_termination()
        self.ledgers.close()

    def connected(self, *sites: str) -> Callable[[], bool]:
        """Whether these sites are here, and no others."""
        return lambda: {s.site for s in self.hub.sessions.values()} == set(sites)

    def ask(
        self,
        site: str,
        content: RecordDict,
        *,
        kind: str = "train",
        number: int = 1,
        run: str = RUN,
        deadline: float = PATIENCE,
        exchange: bytes | None = None,
    ) -> asyncio.Future[Reply]:
        """Open an exchange with a site; how it ended, once it has. A second end fails the test."""
        exchange = os.urandom(16) if exchange is None else exchange
        payload = pack(content, self.folder / f"{exchange.hex()}.out")
        assign = pb.Assign(
            exchange=exchange,
            run=run,
            study_id=str(content.config_records[CONFIG]["study-id"]),
            round=number,
            type=kind,
            size=payload.size,
            sha256=payload.sha256,
            deadline_s=deadline,
            inline=payload.inline,
        )
        ended: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.hub.send(assign, payload, party=PARTY[site], spool=self.spool, arrived=ended.set_result)
        return ended

    async def run(
        self,
        study: Study,
        *,
        run: str = RUN,
        sites: dict[int, str] | None = None,
        progress: Callable[[dict[str, Any]], None] = lambda event: None,
        program: tuple[str, ...] | None = None,
    ) -> pb.Finished:
        """A whole run of a study, in a process of its own; gone on with where there is a checkpoint.

        `program` is what Python runs in the place of the library's own.
        """
        self.folder.joinpath("roster.bin").write_bytes(self._consortium.roster.signed)
        home = self.folder / run
        (home / "spool").mkdir(parents=True, exist_ok=True)
        (home / "study.canonical").write_bytes(study.canonical)
        sites = {PARTY[name]: name for name in SITES} if sites is None else sites
        RunSpec(
            run=run,
            study_id=study.id,
            sites=sites,
            join_deadline=PATIENCE,
            evaluate_deadline=PATIENCE,
            roster_key=self._consortium.roster_key.hex(),
            roster=str(self.folder / "roster.bin"),
        ).write(home / "run.json")
        link = RunnerLink(self.hub, home, run, study.id, set(sites), lambda _, event: progress(event))
        link.program = program or link.program
        return await link.run()


def content_of(answer: Reply) -> RecordDict:
    """The records in an answer, of which no file stays."""
    assert answer.payload is not None, (answer.error_code, answer.error_reason)
    content = unpack(answer.payload.open())
    if answer.payload.path is not None:
        answer.payload.path.unlink()
    return content


def outcome_of(finished: pb.Finished) -> dict[str, Any]:
    """What a run that came to its end says of itself."""
    assert finished.exit_code == 0, finished.message
    found: dict[str, Any] = json.loads(finished.json)
    return found


# Agents


def channel(consortium: Consortium, credentials: Credentials | None, port: int) -> grpc.aio.Channel:
    """A channel to the server, with that certificate or none."""
    key, certificate = (None, None) if credentials is None else (credentials.key, credentials.certificate)
    made = grpc.ssl_channel_credentials(consortium.root_pem, key, certificate)
    return grpc.aio.secure_channel(f"127.0.0.1:{port}", made, options=OPTIONS)


@contextlib.asynccontextmanager
async def agents(
    consortium: Consortium,
    port: int | Callable[[], int],
    apps: dict[str, Any],
    folder: Path,
    members: Mapping[str, EnrolledSite] | None = None,
) -> AsyncIterator[dict[str, Agent]]:
    """The real agents of these apps, in this process, until the block ends; `port` is asked each time."""
    where = port if callable(port) else lambda: port
    made: dict[str, Agent] = {}
    for name, app in apps.items():
        credentials = consortium.site(name)
        made[name] = Agent(
            app,
            lambda credentials=credentials: channel(consortium, credentials, where()),
            folder / name / "state",
            insecure_seed=True,
            member=(members or {}).get(name),
        )
    tasks = [asyncio.create_task(agent.run()) for agent in made.values()]
    try:
        yield made
    finally:
        for agent in made.values():
            agent.stop()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def sites_at(
    folder: Path, names: tuple[str, ...] = SITES, members: Mapping[str, EnrolledSite] | None = None
) -> Iterator[dict[str, Site[Simulated]]]:
    """Sites with their ledgers open."""
    made = {name: make_site(name, folder / name, (members or {}).get(name)) for name in names}
    try:
        yield made
    finally:
        for site in made.values():
            close_site(site)


def apps_of(sites: dict[str, Site[Simulated]]) -> dict[str, SiteApp[Simulated]]:
    return {name: client_app(site) for name, site in sites.items()}


@contextlib.asynccontextmanager
async def fleet_of(
    consortium: Consortium,
    folder: Path,
    names: tuple[str, ...],
    *,
    server: str = "server",
    change: Callable[[Site[Simulated]], Site[Simulated]] = lambda site: site,
) -> AsyncIterator[tuple[Front, dict[str, Site[Simulated]]]]:
    """A server and these sites of a consortium, changed as said, with agents that are connected to it."""
    members = {name: consortium.member(name, folder / "sites" / name / "pki") for name in names}
    with sites_at(folder / "sites", names, members) as sites:
        apps = apps_of({name: change(site) for name, site in sites.items()})
        async with (
            Front(consortium, folder / server) as front,
            agents(consortium, front.port, apps, folder / "sites", members),
        ):
            await until(front.connected(*names))
            yield front, sites


def stated(key: IdentityKey, site: str, run: str = "") -> bytes:
    """A statement of a ledger in which nothing is charged."""
    head = Head(1, hashlib.sha256(site.encode()).digest())
    return Statement.issue(key, site=site, data_set="puppet", head=head, run=run).signed


class Puppet:
    """An agent that says what a test says."""

    _ledger = IdentityKey.generate()

    def __init__(
        self,
        consortium: Consortium,
        site: str,
        port: int,
        *,
        credentials: Credentials | None = None,
        wire: grpc.aio.Channel | None = None,
    ) -> None:
        """With the site's own certificate, unless other `credentials`, or a whole channel, are given."""
        self.site = site
        self._channel = wire or channel(consortium, credentials or consortium.site(site), port)
        self.heard: list[pb.ToAgent] = []

    async def __aenter__(self) -> Puppet:
        self._stream = connect_method(self._channel)()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stream.cancel()
        await self._channel.close()

    async def hello(self, **changes: Any) -> pb.Welcome:
        """Say hello, and be let in."""
        hello = {
            "protocol": PROTOCOL,
            "release": __version__,
            "site": self.site,
            "instance": os.urandom(16),
            "device": "cpu",
            "statement": self._state(),
        }
        await self.say(hello=pb.Hello(**{**hello, **changes}))
        return (await self.hear("welcome")).welcome

    def _state(self, run: str = "") -> bytes:
        return stated(self._ledger, self.site, run)

    async def say(self, **kind: Any) -> None:
        if "result" in kind and not kind["result"].statement:
            kind["result"].statement = self._state(RUN)
        # A stream that has ended says so when it is read.
        with contextlib.suppress(asyncio.InvalidStateError):
            await self._stream.write(pb.FromAgent(**kind))

    async def hear(self, kind: str) -> pb.ToAgent:
        """The next message of that kind; others are kept in `heard`, but for those about ledgers.

        Raises:
            EOFError: the stream ended first.
        """
        async with asyncio.timeout(PATIENCE):
            while True:
                found = await self._stream.read()
                if found is grpc.aio.EOF:
                    raise EOFError("the server ended the stream")
                if found.WhichOneof("kind") == kind:
                    return found
                if found.WhichOneof("kind") not in ("receipts", "statements"):
                    self.heard.append(found)

    async def farewell(self) -> pb.Goodbye:
        """The server's goodbye, after which it ends the stream."""
        said = (await self.hear("goodbye")).goodbye
        with contextlib.suppress(EOFError):
            await self.hear("nothing more")
        return said


# The network


class Proxy:
    """Carries connections to `port`, and fails as it is told to."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._open: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.refuses = False
        self.connections = 0
        self.carried = {"up": 0, "down": 0}
        """Bytes so far: up is to the server."""
        self.cut_at: dict[str, int] = {}
        """Direction to the number of bytes after which every connection is cut, once."""
        self.pace: float = 0.0
        """Seconds that each piece of 4 KiB waits."""

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        await self._server.wait_closed()

    def hold(self) -> None:
        """Carry nothing, and tell nobody: a partition, as both ends see one."""
        self._flows.clear()

    def release(self) -> None:
        """Carry on."""
        self._flows.set()

    def cut(self) -> None:
        """Reset every connection that is open."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        self._writers.add(writer)
        try:
            if self.refuses:
                return
            self.connections += 1
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
            self._writers.add(far_writer)
            try:
                pumps = [
                    asyncio.create_task(self._pump("up", reader, far_writer)),
                    asyncio.create_task(self._pump("down", far_reader, writer)),
                ]
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
            finally:
                self._writers.discard(far_writer)
                far_writer.transport.abort()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()
            self._open.discard(task)

    async def _pump(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096 if self.pace else 65536):
            await self._flows.wait()
            if self.pace:
                await asyncio.sleep(self.pace)
            limit = self.cut_at.get(way)
            if limit is not None and self.carried[way] + len(data) > limit:
                # In the middle of whatever it is: the first bytes go, the rest never.
                data = data[: max(0, limit - self.carried[way])]
                del self.cut_at[way]
                writer.write(data)
                self.cut()
                return
            self.carried[way] += len(data)
            writer.write(data)
            await writer.drain()


# Whole runs


def undisturbed(study: Study, folder: Path, names: tuple[str, ...] = SITES) -> str:
    """The digest of the model that these sites make in one process, with nothing in between."""
    with sites_at(folder, names) as sites:
        federation = Federation(
            study=study,
            model=first_model(study),
            sites={PARTY[name]: name for name in names},
            run_id=RUN,
        )
        federation.run(InProcessGrid({PARTY[name]: app for name, app in apps_of(sites).items()}))
    return model_hash(federation.model)
