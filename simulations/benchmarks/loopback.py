"""A fleet on this machine's loopback, for the benchmarks: what is measured is put together here.

Not a benchmark itself. The server, each agent and a run are processes of their own, with the library's own
code and certificates of a root made for the occasion. Against `lepton-fl server start` the server here lacks
the database, the other ports and the log. Each benchmark's script is started anew as each of them: `main`
says which it is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import shutil
import socket
import statistics
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from children import Child

import lepton_fl
import lepton_fl.fleet  # before grpc: sets what gRPC reads when it is imported
from lepton_fl.fleet.pki import certificates
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.frames import Frames
from lepton_fl.fleet.protocol.methods import OPTIONS, fleet_handlers
from lepton_fl.fleet.server.hub import Hub
from lepton_fl.fleet.server.ledgers import SERVER, Ledgers
from lepton_fl.fleet.server.link import RunnerLink, RunSpec
from lepton_fl.fleet.server.service import FleetService
from lepton_fl.privacy.ledger import Witness
from lepton_fl.secagg.identity import IdentityKey
from lepton_fl.study import Study

if TYPE_CHECKING:
    from lepton_fl.tasks import Arrays  # with torch

FIRST_PARTY = 101
PATIENCE = 300.0
"""Seconds for processes to start."""
HEARTBEAT = 10.0


# Certificates


def make_identities(folder: Path, sites: Sequence[str]) -> None:
    """The keys and certificates of a server and its sites, under a new root."""
    now = datetime.now(UTC)
    root_key, issuing_key, server_key = (certificates.new_key() for _ in range(3))
    root = certificates.make_root(root_key, "benchmark", now)
    issuing = certificates.make_issuing(root, root_key, issuing_key.public_key(), now)
    server = certificates.make_server(issuing, issuing_key, server_key.public_key(), ["127.0.0.1"], now)
    folder.mkdir(mode=0o700)
    (folder / "root.pem").write_bytes(certificates.certificate_pem(root))
    (folder / "issuing.pem").write_bytes(certificates.certificate_pem(issuing))
    _write(folder / "server", server_key, server, issuing)
    for site in sites:
        key = certificates.new_key()
        _write(folder / site, key, certificates.make_site(issuing, issuing_key, key.public_key(), site, now))


def _write(path: Path, key: certificates.Key, *chain: certificates.Certificate) -> None:
    path.with_name(f"{path.name}.key").write_bytes(certificates.key_pem(key))
    path.with_name(f"{path.name}.pem").write_bytes(certificates.certificate_pem(*chain))


def server_credentials(folder: Path) -> grpc.ServerCredentials:
    """Mutual TLS."""
    pair = ((folder / "server.key").read_bytes(), (folder / "server.pem").read_bytes())
    return grpc.ssl_server_credentials([pair], (folder / "issuing.pem").read_bytes(), True)


def site_channel(folder: Path, site: str, port: int) -> grpc.aio.Channel:
    """To the server, as `site`."""
    root, key, chain = ((folder / n).read_bytes() for n in ("root.pem", f"{site}.key", f"{site}.pem"))
    credentials = grpc.ssl_channel_credentials(root, key, chain)
    return grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=OPTIONS)


def make_members(folder: Path, parties: dict[str, int]) -> None:
    """The sites' identities towards one another, under a roster of their own."""
    from lepton_fl.simulation.members import memberships

    consortium, members = memberships({party: site for site, party in parties.items()})
    folder.mkdir(mode=0o700)
    (folder / "roster.key").write_bytes(consortium.root_key)
    (folder / "roster.bin").write_bytes(consortium.roster.signed)
    for site, member in members.items():
        (folder / f"{site}.pem").write_bytes(member.identity.to_bytes())
        (folder / f"{site}.cert").write_bytes(member.certificate)


def member(fleet: Path, site: str, history: Any) -> Any:
    """Who `site` is in a secure round, and what it remembers of them."""
    from lepton_fl.secagg.context import Consortium
    from lepton_fl.secagg.identity import Roster
    from lepton_fl.site.secure import Membership

    folder = fleet / "members"
    key = (folder / "roster.key").read_bytes()
    consortium = Consortium(key, Roster.read((folder / "roster.bin").read_bytes(), key))
    return Membership(
        name=site,
        party=json.loads((fleet / "parties.json").read_text())[site],
        identity=IdentityKey.read((folder / f"{site}.pem").read_bytes()),
        certificate=(folder / f"{site}.cert").read_bytes(),
        consortium=lambda: consortium,
        history=history,
    )


@dataclass(frozen=True, slots=True)
class _Admission:
    party: int
    site: str
    certificate: certificates.SiteCertificate


class _Gate:
    """Lets in the sites that there are certificates for."""

    def __init__(self, folder: Path, parties: dict[str, int]) -> None:
        (self._issuing,) = certificates.read_chain(
            (folder / "issuing.pem").read_bytes(), file="issuing.pem", length=1
        )
        self._parties = parties

    def admit(self, pem: bytes) -> _Admission:
        found = certificates.check_site(pem, issuer=self._issuing, now=datetime.now(UTC))
        return _Admission(self._parties[found.site], found.site, found)

    def check(self, admission: _Admission) -> None:
        admission.certificate.check_time(datetime.now(UTC))

    def renew(self, admission: _Admission, request: pb.RenewRequest) -> pb.RenewReply:
        raise NotImplementedError


class _Nobody:
    """A Listener that keeps no books."""

    def entered(self, *_: object) -> None: ...
    def answered(self, *_: object) -> None: ...
    def left(self, *_: object) -> None: ...
    def refused(self, *_: object) -> None: ...


# The processes


@dataclass(frozen=True, slots=True)
class Roles:
    """What a benchmark's script does as each of its processes."""

    report: Callable[[argparse.Namespace], None]
    """Measures, and prints the table."""
    agent: Callable[[Path, str], Any] | None = None
    """The ClientApp of a site, from the fleet's folder and the site's name."""
    load: Callable[[Path, int, list[str]], Any] | None = None
    """Coroutine function: many sites in one process, from the folder, the port and their names."""
    work: Callable[[Frames[pb.ToRunner], Path], dict[str, Any]] | None = None
    """A run, instead of the library's; what it returns reaches the report as JSON."""


def main(roles: Roles, *arguments: Callable[[argparse.ArgumentParser], None]) -> None:
    """The script's entry, whichever process it is."""
    raise_file_limit()
    role, *rest = sys.argv[1:] or [""]
    match role:
        case "--server":
            asyncio.run(_serve(Path(rest[0])))
        case "--agents":
            assert roles.agent is not None
            _agents(roles.agent, Path(rest[0]), int(rest[1]), rest[2:])
        case "--load":
            assert roles.load is not None
            asyncio.run(_load(roles.load, Path(rest[0]), int(rest[1])))
        case "--work":
            assert roles.work is not None
            _work(roles.work, int(rest[1]), Path(rest[2]))
        case _:
            parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
            parser.add_argument("--quick", action="store_true", help="small numbers: does it still run?")
            for add in arguments:
                add(parser)
            roles.report(parser.parse_args())


@asynccontextmanager
async def listening(folder: Path, *handlers: grpc.GenericRpcHandler) -> AsyncIterator[int]:
    """A gRPC server with the fleet's options and certificates; gives its port, and says it on stdout."""
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers(handlers)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(folder / "pki"))
    await server.start()
    print(json.dumps({"port": port}), flush=True)
    try:
        yield port
    finally:
        await server.stop(1.0)


async def _serve(folder: Path) -> None:
    """The server: serves each run to its end that a line on stdin names."""
    names: dict[str, int] = json.loads((folder / "parties.json").read_text())
    hub = Hub(grace=30.0, payload_limit=4 << 30)
    witness = Witness(folder / "witness.db", name=SERVER, key=IdentityKey.generate())
    # The sites' ledgers are witnessed by the server, whose work it is each round; no peers countersign.
    ledgers = Ledgers(hub, witness, lambda _: None)
    service = FleetService(
        hub, _Gate(folder / "pki", names), _Nobody(), ledgers, heartbeat=HEARTBEAT, insecure_demo=True
    )
    watching = asyncio.create_task(service.watch())
    async with listening(folder, fleet_handlers(service.connect, service.renew)):
        while line := await next_line():
            asked = json.loads(line)
            async with asyncio.timeout(PATIENCE):
                while len(hub.sessions) < len(names):
                    await asyncio.sleep(0.05)
            if asked["run"] is None:
                print(json.dumps({"connected": len(hub.sessions)}), flush=True)
                continue
            run = Path(asked["run"])
            spec = RunSpec.read(run / "run.json")
            link = RunnerLink(hub, run, spec.run, spec.study_id, spec.sites, _tell)
            if asked["program"]:
                link.program = tuple(asked["program"])
            finished = await link.run()
            said = {
                "code": finished.exit_code,
                "message": finished.message,
                **json.loads(finished.json or "{}"),
            }
            print(json.dumps({"finished": said}), flush=True)
    watching.cancel()
    ledgers.close()


def _tell(_: str, event: dict[str, Any]) -> None:
    print(json.dumps({"progress": event}), flush=True)


def _agents(make: Callable[[Path, str], Any], folder: Path, port: int, sites: list[str]) -> None:
    """A process for each site, forked from one that has imported everything: imports take seconds each."""
    import torch

    from lepton_fl.fleet.agent.agent import Agent
    from lepton_fl.fleet.logs import log_to

    async def connected(site: str) -> None:
        agent = Agent(
            make(folder, site),
            lambda: site_channel(folder / "pki", site, port),
            folder / "state" / site,
            insecure_seed=True,
        )
        running = asyncio.create_task(agent.run())
        await input_closed()
        agent.stop()
        await running

    children = []
    for site in sites:
        if child := os.fork():
            children.append(child)
            continue
        torch.set_num_threads(1)
        log_to(folder / f"{site}.log")
        asyncio.run(connected(site))
        return
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(codes), codes


async def _load(load: Callable[[Path, int, list[str]], Any], folder: Path, port: int) -> None:
    await load(folder, port, json.loads(await next_line()))


async def next_line() -> str:
    """The next word of the benchmark; empty: it wants this process to end."""
    return (await (await _input()).readline()).decode()


@cache
def _input() -> asyncio.Future[asyncio.StreamReader]:
    """Standard input. No thread, whose blocked read would keep a process that has failed."""

    async def opened() -> asyncio.StreamReader:
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
        )
        return reader

    return asyncio.ensure_future(opened())


async def input_closed() -> None:
    """Until the benchmark wants this process to end."""
    while await next_line():
        pass


def _work(work: Callable[[Frames[pb.ToRunner], Path], dict[str, Any]], fd: int, folder: Path) -> None:
    frames = Frames(socket.socket(fileno=fd), pb.ToRunner)
    frames.send(pb.FromRunner(ready=pb.Ready(run=RunSpec.read(folder / "run.json").run)))
    found = work(frames, folder)
    frames.send(pb.FromRunner(finished=pb.Finished(exit_code=0, message="", json=json.dumps(found))))
    while True:
        try:
            frames.receive(PATIENCE)
        except EOFError:
            return


# The fleet, as the report's process sees it


class Fleet:
    """A server and its sites."""

    def __init__(self, folder: Path, start: Callable[..., Child], sites: Sequence[str]) -> None:
        self.folder = folder
        self.sites = sorted(sites)
        self.parties = {site: FIRST_PARTY + i for i, site in enumerate(self.sites)}
        make_identities(folder / "pki", self.sites)
        make_members(folder / "members", self.parties)
        (folder / "parties.json").write_text(json.dumps(self.parties))
        self._start = start
        self.server = start("--server", str(folder))
        self.port = self.server.hear()["port"]
        self._runs = 0

    def start_agents(self) -> None:
        """One process for each site."""
        self._start("--agents", str(self.folder), str(self.port), *self.sites)

    def start_load(self, processes: int) -> None:
        """All sites, in so many processes."""
        for first in range(processes):
            load = self._start("--load", str(self.folder), str(self.port))
            load.tell(self.sites[first::processes])

    def wait(self) -> None:
        """Until all sites are connected."""
        self.server.tell({"run": None, "program": None})
        assert self.server.hear() == {"connected": len(self.sites)}

    def run(
        self,
        study: Study,
        *,
        own: bool = False,
        first_model: Arrays | None = None,
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A run of `study` by the library's program or (`own`) the script's: how it ended, its rounds."""
        from safetensors.numpy import save

        from lepton_fl.tasks import model_hash

        self.wait()
        self._runs += 1
        run, folder = os.urandom(16).hex(), self.folder / f"run-{self._runs}"
        (folder / "spool").mkdir(parents=True)
        (folder / "study.canonical").write_bytes(study.canonical)
        if first_model is not None:
            (folder / "first.safetensors").write_bytes(save(first_model))
        RunSpec(
            run=run,
            study_id=study.id,
            sites={party: site for site, party in self.parties.items()},
            join_deadline=PATIENCE,
            evaluate_deadline=PATIENCE,
            first_model=None if first_model is None else "first.safetensors",
            first_model_sha256=None if first_model is None else model_hash(first_model),
            roster_key=(self.folder / "members" / "roster.key").read_bytes().hex(),
            roster=str(self.folder / "members" / "roster.bin"),
        ).write(folder / "run.json")
        program = [sys.modules["__main__"].__file__, "--work"] if own else None
        self.server.tell({"run": str(folder), "program": program})
        events = []
        while "finished" not in (said := self.server.hear()):
            events.append(said["progress"])
        found = said["finished"]
        assert found["code"] == 0, found["message"] or (folder / "stderr.log").read_text()
        shutil.rmtree(folder)
        return found, [event for event in events if event["event"] == "round"]


@contextmanager
def processes() -> Iterator[tuple[Path, Callable[..., Child]]]:
    """A folder and what starts this script's processes; they end, and the folder goes, with the context."""
    children: list[Child] = []

    def start(*arguments: str) -> Child:
        children.append(Child(sys.executable, sys.modules["__main__"].__file__ or "", *arguments))
        return children[-1]

    with tempfile.TemporaryDirectory(prefix="lepton-fl-") as folder:
        try:
            yield Path(folder), start
        finally:
            for child in reversed(children):
                child.close()


@contextmanager
def fleet(sites: Sequence[str]) -> Iterator[Fleet]:
    """A server for `sites`; agents are yet to be started."""
    with processes() as (folder, start):
        yield Fleet(folder, start, sites)


# Studies


def heart(sites: int | None = None, **changes: Any) -> tuple[Study, Any]:
    """The study of the bundled heart records with `changes`, and its sites' (train, test) tables.

    Without secure aggregation, unless `changes` have it: what is measured is mostly the transport.
    """
    import tomllib

    from lepton_fl.cli.texts import study_text
    from lepton_fl.config import parse
    from lepton_fl.data import Contract, load_dataset
    from lepton_fl.simulation.run import arrange, split_sites
    from lepton_fl.simulation.simulate import freeze
    from lepton_fl.study import override

    template = tomllib.loads(study_text("heart", epsilon=3.0))
    study = parse(Study, template, file="the heart template")
    plain = {"secure_aggregation__enabled": False, "privacy__noise": "local"}
    study = override(study, {key.replace("__", "."): value for key, value in {**plain, **changes}.items()})
    tables = load_dataset("heart", Contract.of(study))
    tables = arrange(tables, "natural" if sites is None else "iid", sites, 0)
    study = freeze(study, tables)
    return study, split_sites(tables, study, 0)


# Looking, and saying


def memory(pid: int) -> dict[str, int]:
    """Bytes of a process now: all that is resident, its own part (anonymous), and the peak of the former."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    names = {"VmRSS": "resident", "RssAnon": "own", "VmHWM": "peak"}
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return {name: int(lines[line].split()[0]) << 10 for line, name in names.items()}


class Watch:
    """The most memory that a process, and those it started, had while this was open: a look every 5 ms."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.own: dict[int, int] = {}
        self.resident: dict[int, int] = {}
        self.both_own = self.both_resident = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._ended.wait(0.005):
            own = resident = 0
            for pid in (self._pid, *_children(self._pid)):
                try:
                    found = memory(pid)
                except (OSError, KeyError):
                    continue  # It has ended.
                own, resident = own + found["own"], resident + found["resident"]
                self.own[pid] = max(self.own.get(pid, 0), found["own"])
                self.resident[pid] = max(self.resident.get(pid, 0), found["resident"])
            self.both_own = max(self.both_own, own)
            self.both_resident = max(self.both_resident, resident)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def _children(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended
            found += [int(child) for child in path.read_text().split()]
    return found


def raise_file_limit() -> None:
    """A socket for each of a thousand sites."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that `part` of them do not exceed."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def spread(values: Sequence[float], form: str) -> str:
    """Median [min, max]."""
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def machine(*packages: str) -> str:
    """What this was measured on, and how busy it was."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} {lepton_fl.__version__}" if package == "lepton-fl" else f"{package} ?")
    return (
        f"{platform.machine()}, {os.cpu_count()} shared CPU cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}, {', '.join(found)}; load average at the end "
        f"{os.getloadavg()[0]:.1f}"
    )
