"""`lepton-fl client` as a process: real certificates, a server that says what a test says."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

import lepton_fl.fleet  # noqa: F401 - before grpc: it sets what gRPC reads at import

# isort: split
import grpc.aio
import torch
from flwr.app import RecordDict

from lepton_fl import __version__
from lepton_fl.config import parse
from lepton_fl.data import Contract
from lepton_fl.files import write_atomic
from lepton_fl.fleet.agent.local import ask
from lepton_fl.fleet.agent.offers import offers_of
from lepton_fl.fleet.pki import certificates
from lepton_fl.fleet.pki.authority import Authority, Issuing, ServerIdentity, make_private
from lepton_fl.fleet.pki.credentials import fleet_credentials
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.methods import PROTOCOL, fleet_handlers
from lepton_fl.fleet.protocol.records import pack
from lepton_fl.messages import CONFIG, Assignment, assignment_config, to_record
from lepton_fl.privacy import Ledger
from lepton_fl.secagg.identity import IdentityKey
from lepton_fl.study import Study
from lepton_fl.tasks import arrays_of, build_model

PATIENCE_S = 60.0
"""Longest wait for anything; nothing is asserted of how long it took."""
RUN = "0123456789abcdef" * 2
POLICY = """\
[data]
id = "clinic-records"
[budget]
epsilon_total = 5.0
epsilon_per_study = 5.0
delta_total = 1e-2
[require]
secure_aggregation = false
approval = "auto"
"""
STUDY = {
    "study": {"name": "heart"},
    "task": {"kind": "binary", "target": "ill"},
    "privacy": {"epsilon": 4.0, "delta": 1e-3},
    "secure_aggregation": {"enabled": False},
    "train": {"rounds": 3, "sample_rate": 0.2, "lr": 0.1, "expected_batch": 10.0},
    "features": {"columns": {"x": {"type": "float", "range": [-1, 1], "identifier": "allow"}}},
}


def until(true, what):
    """Wait until it is so."""
    end = time.monotonic() + PATIENCE_S
    while not (found := true()):
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.02)
    return found


class Server:
    """A fleet port with real certificates, which gives every agent the same request and keeps the answers."""

    def __init__(self, pki) -> None:
        self._pki = pki
        self.request: pb.Assign | None = None
        self.goodbye: pb.Goodbye | None = None
        self.clock_ahead = 0.0
        self.results: list[pb.Result] = []
        self.renewed = 0
        self.serials: list[bytes] = []
        self.hellos: list[pb.Hello] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def start(self, port=0) -> int:
        self._thread.start()
        return self._do(self._start(port))

    async def _start(self, port) -> int:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((fleet_handlers(self._connect, self._renew),))
        credentials = fleet_credentials(ServerIdentity.load(self._pki))
        found = self._server.add_secure_port(f"127.0.0.1:{port}", credentials)
        await self._server.start()
        return found

    def stop(self) -> None:
        if self._thread.is_alive():
            self._do(self._server.stop(0))
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    def _do(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    async def _connect(self, requests, context) -> None:
        self.serials.append(context.auth_context()["x509_pem_cert"][0])
        hello = (await anext(requests)).hello
        self.hellos.append(hello)
        if self.goodbye is not None:
            await context.write(pb.ToAgent(goodbye=self.goodbye))
            return
        at = time.time() + self.clock_ahead
        welcome = pb.Welcome(protocol=PROTOCOL, release=__version__, heartbeat_s=5.0, party=101, time=at)
        await context.write(pb.ToAgent(welcome=welcome))
        if hello.probe:
            return
        if self.request is not None:
            await context.write(pb.ToAgent(assign=self.request))
        async for message in requests:
            match message.WhichOneof("kind"):
                case "result":
                    self.results.append(message.result)
                    await context.write(pb.ToAgent(ack=pb.Ack(exchange=message.result.exchange)))
                case "heartbeat":
                    await context.write(pb.ToAgent(heartbeat=pb.Heartbeat()))
                case "goodbye":
                    return

    async def _renew(self, asked, context) -> pb.RenewReply:
        self.renewed += 1
        issuing = Issuing.open(self._pki)
        pem, _ = issuing.issue_site(certificates.read_csr(asked.csr), "clinic", datetime.now(UTC))
        return pb.RenewReply(certificate=pem, chain=issuing.pem)


@pytest.fixture
def server(tmp_path):
    Authority.create(
        tmp_path / "server",
        name="clinics",
        hosts=["localhost", "127.0.0.1"],
        passphrase="correct horse battery",
        # Old enough to have issued what has expired since.
        now=datetime.now(UTC) - timedelta(days=60),
    )
    found = Server(tmp_path / "server")
    yield found
    found.stop()


@pytest.fixture
def enrol(tmp_path, server):
    """Make the clinic's folder, enrolled at some time in the past, its server on that port."""

    def make(port: int, *, ago=timedelta(0)):
        home, pki = tmp_path / "clinic", tmp_path / "clinic" / "pki"
        home.mkdir()
        make_private(pki)
        authority = Authority.open(tmp_path / "server", "correct horse battery")
        issuing, now = Issuing.open(tmp_path / "server"), datetime.now(UTC)
        key, identity = certificates.new_key(), IdentityKey.generate()
        leaf, _ = issuing.issue_site(key.public_key(), "clinic", now - ago)
        certified = authority.certify(party=101, site="clinic", key=identity.public, now=now)
        roster = authority.next_roster(None, joined=[certified])
        files = {
            "site.pem": certificates.key_pem(key) + leaf + issuing.pem,
            "identity.pem": identity.to_bytes(),
            "identity.cert": certified.signed,
            "consortium.bin": authority.consortium.encode(),
            "roster.bin": roster.signed,
            "fleet.txt": f"127.0.0.1:{port}\n".encode(),
        }
        for name, data in files.items():
            write_atomic(pki / name, data, mode=0o600)
        (home / "site.toml").write_text('[site]\nid = "clinic"\n[data]\nsource = "records.csv"\n')
        (home / "policy.toml").write_text(POLICY)
        rows = "".join(f"{i / 100 - 0.5},{i % 2}\n" for i in range(100))
        (home / "records.csv").write_text("x,ill\n" + rows)
        return home

    return make


@pytest.fixture
def client():
    """Start `lepton-fl client start` as a process; none is left behind."""
    started = []

    def start(home, *args):
        log = (home / "err.log").open("ab")
        process = subprocess.Popen(
            [sys.executable, "-m", "lepton_fl", "client", "start", "-c", home / "site.toml", *args],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        log.close()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def request_once(tmp_path):
    """A round of training, as a run asks for it."""
    study = parse(Study, STUDY, file="study.toml")
    assignment = Assignment(study=study, run=RUN, round=1, cohort=("bank", "clinic", "ward"))
    model = arrays_of(build_model(study, Contract.of(study).width, torch.Generator()))
    content = RecordDict({CONFIG: assignment_config(assignment), "arrays": to_record(model)})
    payload = pack(content, tmp_path / "request")
    return pb.Assign(
        exchange=b"e" * 16,
        run=RUN,
        study_id=study.id,
        round=1,
        type="train",
        size=payload.size,
        sha256=payload.sha256,
        deadline_s=600.0,
        inline=payload.inline,
    )


def errors(home) -> str:
    return (home / "err.log").read_text()


def test_a_client_that_was_killed_gives_the_same_bytes_again(server, enrol, client, request_once):
    """Through real processes and certificates; the ledger is charged once. Then it is asked to stop."""
    server.request = request_once
    home = enrol(server.start())
    for number in (1, 2):
        process = client(home)
        until(lambda number=number: len(server.results) == number, "an answer")
        if number == 1:
            process.kill()
            process.wait()
    os.kill(process.pid, signal.SIGTERM)
    code = process.wait(PATIENCE_S)

    assert code == 0, errors(home)
    assert server.results[0].error_code == 0
    assert server.results[0] == server.results[1]
    ledger = Ledger(home / "state" / "ledger.db")
    assert [charge["round"] for charge in ledger.history("clinic-records")] == [1]
    ledger.close()
    lines = [json.loads(line) for line in errors(home).splitlines() if line.startswith("{")]
    assert {"connected", "answered", "stopping", "ended"} <= {line["event"] for line in lines}
    assert "the server sees each update of this site" in errors(home)


@pytest.mark.slow
def test_a_certificate_is_renewed_without_a_restart(server, enrol, client):
    """Two thirds of its life are over; the next connection shows the new one."""
    home = enrol(server.start(), ago=timedelta(days=21))
    process = client(home)

    until(lambda: len(server.serials) >= 2, "a second connection")

    assert process.poll() is None
    assert server.renewed == 1
    assert server.serials[0] != server.serials[1]
    assert server.hellos[0].instance == server.hellos[1].instance


@pytest.mark.slow
def test_people_of_the_site_command_it(server, enrol, client, lepton):
    """status, pause, resume, stop and doctor, while it runs."""
    home = enrol(server.start())
    process = client(home)
    config = ("-c", home / "site.toml")
    until(lambda: server.hellos, "a connection")
    waited = json.loads(lepton("client", "status", "--wait", PATIENCE_S, *config, "--json").out)

    paused = json.loads(lepton("client", "pause", *config, "--json").out)
    resumed = json.loads(lepton("client", "resume", *config, "--json").out)
    second = lepton("client", "doctor", *config)
    third = lepton("client", "start", *config)
    stopped = lepton("client", "stop", *config)
    after = lepton("client", "status", "--wait", "0.3", *config)

    assert waited["connected"]
    assert (paused["state"], resumed["state"]) == ("paused", "idle")
    assert second.code == 0, second.out
    assert "fail" not in second.out
    assert third.code == 3
    assert "another agent runs here" in third.err
    assert stopped.code == 0
    assert process.wait(PATIENCE_S) == 0
    assert after.code == 5
    assert len([hello for hello in server.hellos if not hello.probe]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("goodbye", "says"),
    [("clinic: was revoked", "the server refuses this site: clinic: was revoked")],
)
def test_a_revoked_site_gets_one_line(server, enrol, client, lepton, goodbye, says):
    """And exit code 5, from start and from doctor."""
    home = enrol(server.start())
    server.goodbye = pb.Goodbye(code=pb.Goodbye.REFUSED, reason=goodbye)

    started = client(home).wait(PATIENCE_S)
    examined = lepton("client", "doctor", "-c", home / "site.toml")

    assert started == 5
    assert errors(home).splitlines()[-1].startswith(f"lepton-fl: {says}")
    assert examined.code == 5
    assert "clinic: was revoked" in examined.out


@pytest.mark.slow
@pytest.mark.parametrize("ago", [timedelta(days=-2), timedelta(days=33)])
def test_a_certificate_that_is_not_in_force_gets_one_line_with_both_times(enrol, client, ago):
    """Often it is the clock."""
    home = enrol(9, ago=ago)

    assert client(home).wait(PATIENCE_S) == 5
    last = errors(home).splitlines()[-1]
    assert last.count("UTC") == 2
    assert "clock" in last


@pytest.mark.slow
def test_a_clock_two_days_off_gets_one_line_with_both_times(server, enrol, client):
    """The certificate may be in force all the same."""
    home = enrol(server.start())
    server.clock_ahead = 2 * 86_400.0

    assert client(home).wait(PATIENCE_S) == 5
    assert errors(home).splitlines()[-1].count("UTC") == 2


@pytest.mark.slow
def test_a_server_that_is_down_is_tried_again_until_it_is_up(server, enrol, client):
    """One line says that it is down."""
    port = _free_port()
    home = enrol(port)
    client(home)
    until(lambda: "nothing listens there" in errors(home), "the line")

    server.start(port)
    until(lambda: server.hellos, "a connection")

    assert errors(home).count("nothing listens there") == 1


@pytest.mark.slow
def test_a_client_gives_up_where_it_is_told_to(enrol, client):
    """Exit code 5, and why."""
    home = enrol(_free_port())

    assert client(home, "--give-up-after", "0.1").wait(PATIENCE_S) == 5
    assert "nothing listens there" in errors(home).splitlines()[-1]


@pytest.mark.slow
def test_a_server_of_another_consortium_is_not_talked_to(server, enrol, client, tmp_path):
    """Whatever it is called."""
    other = tmp_path / "other"
    Authority.create(
        other,
        name="clinics",
        hosts=["127.0.0.1"],
        passphrase="correct horse battery",
        now=datetime.now(UTC),
    )
    server._pki = other
    home = enrol(server.start())

    assert client(home, "--give-up-after", "0.1").wait(PATIENCE_S) == 5
    assert "not under this consortium's root" in errors(home).splitlines()[-1]
    assert server.hellos == []


@pytest.mark.parametrize("missing", ["policy.toml", "pki", "site.toml"])
def test_nothing_is_started_without_its_files(enrol, lepton, missing):
    """It fails closed, on one line."""
    home = enrol(9)
    (home / missing).rename(home / "away")

    done = lepton("client", "start", "-c", home / "site.toml")

    assert done.code == (5 if missing == "pki" else 3)
    assert done.err.count("\n") == 1


def test_a_lost_ledger_is_not_begun_anew(enrol, lepton):
    """What was spent would be spent again."""
    home = enrol(9)
    replies = home / "state" / "replies" / RUN
    replies.mkdir(parents=True)
    (replies / "reply").touch()

    done = lepton("client", "start", "-c", home / "site.toml")

    assert done.code == 3
    assert "bring ledger.db back" in done.err
    assert not (home / "state" / "ledger.db").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_refused(enrol, lepton):
    """Nobody is to believe that a GPU works for them; `doctor` says the same."""
    home = enrol(9)
    with (home / "site.toml").open("a") as file:
        file.write('[runtime]\ndevice = "cuda"\n')

    done = lepton("client", "start", "-c", home / "site.toml")

    assert done.code == 3
    assert "sees no CUDA device" in done.err
    examined = lepton("client", "doctor", "-c", home / "site.toml")
    assert "sees no CUDA device" in examined.out + examined.err


def test_init_makes_a_sites_two_files(lepton, tmp_path):
    """Named after their folder; the next command is told."""
    done = lepton("init", "bank-1", "--template", "site")

    assert done.code == 0
    assert sorted(path.name for path in (tmp_path / "bank-1").iterdir()) == ["policy.toml", "site.toml"]
    assert 'id = "bank-1"' in (tmp_path / "bank-1" / "site.toml").read_text()
    assert "enroll join" in done.err


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_the_socket_is_the_agents_own(server, enrol, client):
    """Mode 0600 in a folder of mode 0700, also where the folder was open before."""
    home = enrol(server.start())
    (home / "state").mkdir()
    client(home)
    until((home / "state" / "agent.sock").exists, "the socket")

    status = until(lambda: _status(home), "an answer")

    assert status["site"] == "clinic"
    modes = [(home / "state" / name).stat().st_mode & 0o777 for name in (".", "agent.sock", "agent.lock")]
    assert modes == [0o700, 0o600, 0o600]


def _status(home):
    from lepton_fl.errors import ConnectionFailed

    try:
        return ask(home / "state", "status")
    except ConnectionFailed:
        return None


def test_the_doctor_says_what_the_site_gets_of_secure_aggregation(enrol, lepton):
    """By its policy, and in each study that it was offered; and whether it remembers its rounds."""
    home = enrol(1)
    policy = (home / "policy.toml").read_text()
    (home / "policy.toml").write_text(policy.replace("aggregation = false", "aggregation = true"))
    study = parse(Study, {**STUDY, "secure_aggregation": {"enabled": True}}, file="study.toml")
    offers_of(home / "site.toml").take(study.canonical, study.id, current=[study.id])

    said = lepton("client", "doctor", "-c", home / "site.toml").out
    Ledger(home / "state" / "ledger.db").close()
    after = lepton("client", "doctor", "-c", home / "site.toml").out

    assert "updates leave in sums over at least 3 sites only" in said
    assert "ok   rounds: " in said
    assert "study heart: In a cohort of 3: against the server together with up to 1 of 3" in said
    assert "hidden among at least t - n_C = 2 honest sites; no site may drop out." in said
    assert "fail rounds: " in after
    assert "rounds.db: is gone, and this site has a ledger" in after
