"""A server as a process of its own, and sites that speak its protocol and say what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from lepton_fl.config import parse
from lepton_fl.fleet.pki import certificates
from lepton_fl.fleet.pki.authority import Authority
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.methods import OPTIONS, PROTOCOL, connect_method
from lepton_fl.fleet.protocol.payload import Payload
from lepton_fl.fleet.protocol.records import pack, unpack
from lepton_fl.fleet.server.config import ServerFiles, load_server
from lepton_fl.fleet.server.database import Database
from lepton_fl.fleet.server.lock import Running, running
from lepton_fl.fleet.server.register import Register, Request
from lepton_fl.fleet.server.studies import Run, Studies
from lepton_fl.messages import CONFIG, METRICS, WEIGHT, from_record, identify, incoming, update_reply
from lepton_fl.privacy.ledger import Head, Statement
from lepton_fl.secagg.identity import IdentityKey
from lepton_fl.study import Study

PATIENCE_S = 60.0
"""Longest wait for anything; nothing is asserted of how long it took."""
SERVER_TOML = """
[server]
name = "test"
[listen]
fleet = "127.0.0.1:0"
enrolment = "127.0.0.1:0"
status = "127.0.0.1:0"
[runs]
heartbeat_s = 1.0
settle_s = 0.0
leave_s = 10.0
join_deadline_s = 20.0
evaluate_deadline_s = 20.0
"""
STUDY: dict[str, Any] = {
    "study": {"name": "rounds"},
    "task": {"kind": "binary", "target": "ill"},
    "privacy": {"epsilon": 4.0, "delta": 1e-3},
    "secure_aggregation": {"enabled": False, "min_sites": 2, "min_survivors": 2},
    "train": {
        "rounds": 5,
        "sample_rate": 0.2,
        "lr": 0.5,
        "optimizer": "sgd",
        "deadline": 20.0,
        "expected_batch": 10.0,
    },
    "features": {"columns": {"x": {"type": "float", "range": [-1, 1]}}},
}


def until(true: Callable[[], Any], what: str) -> Any:
    """Wait until it is so."""
    end = time.monotonic() + PATIENCE_S
    while not (found := true()):
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.02)
    return found


@dataclass
class Site:
    """A site's certificate, and what it says to studies and to rounds."""

    name: str
    party: int
    key: bytes
    certificate: bytes
    says: pb.Answer.State = pb.Answer.APPROVED
    asked: list[tuple[str, int]] = field(default_factory=list)
    """(type, round) of each request, as often as it came."""
    hold: Callable[[int], bool] = lambda number: False
    """Rounds that it does not answer."""
    insecure_seed: bool = False
    goodbyes: list[pb.Goodbye] = field(default_factory=list)
    offers: dict[str, bytes] = field(default_factory=dict)
    """By study, the signature that it came with last."""
    sessions: int = 0
    ledger: IdentityKey = field(default_factory=IdentityKey.generate, repr=False)

    def rounds(self) -> list[int]:
        return [number for kind, number in self.asked if kind == "train"]

    async def live(self, running: Callable[[], Running | None], root: bytes) -> None:
        """Connect, answer, and connect again, until cancelled."""
        credentials = grpc.ssl_channel_credentials(root, self.key, self.certificate)
        while True:
            found = running()
            if found is not None and found.fleet:
                options = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
                async with grpc.aio.secure_channel(found.fleet, credentials, options=options) as channel:
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        await self._session(channel)
            await asyncio.sleep(0.1)

    async def _session(self, channel: grpc.aio.Channel) -> None:
        stream = connect_method(channel)()
        hello = pb.Hello(
            protocol=PROTOCOL,
            release="0.1.0",
            site=self.name,
            instance=os.urandom(16),
            insecure_seed=self.insecure_seed,
            device="cpu",
            statement=self._state(),
        )
        await stream.write(pb.FromAgent(hello=hello))
        async for said in stream:
            match said.WhichOneof("kind"):
                case "welcome":
                    self.sessions += 1
                case "offer":
                    self.offers[said.offer.study_id] = said.offer.signature
                    await stream.write(self._to(said.offer.study_id))
                case "heartbeat":
                    await stream.write(pb.FromAgent(heartbeat=pb.Heartbeat(state="idle")))
                    for study in self.offers:  # Its people may have thought better of it.
                        await stream.write(self._to(study))
                case "goodbye":
                    self.goodbyes.append(said.goodbye)
                case "assign":
                    result = self._answer(said.assign)
                    if result is not None:
                        await stream.write(pb.FromAgent(result=result))

    def _to(self, study: str) -> pb.FromAgent:
        return pb.FromAgent(answer=pb.Answer(study_id=study, state=self.says, reason="as told"))

    def _answer(self, asked: pb.Assign) -> pb.Result | None:
        self.asked.append((asked.type, asked.round))
        if asked.type == "train" and self.hold(asked.round):
            return None
        identify(asked.run, 1)
        content = unpack(Payload.of(asked.inline).open())
        message = incoming(content, kind=asked.type, run=asked.run, message_id=asked.exchange.hex())
        if asked.type == "query.join":
            reply = Message(RecordDict({CONFIG: ConfigRecord({"site": self.name})}), reply_to=message)
        elif asked.type == "train":
            model = from_record(message.content.array_records["arrays"])
            reply = update_reply(message, {n: np.ones_like(a) for n, a in model.items()})
        else:
            reply = Message(RecordDict({METRICS: MetricRecord({WEIGHT: 1.0})}), reply_to=message)
        payload = pack(reply.content, Path("/nonexistent"))
        return pb.Result(
            exchange=asked.exchange,
            size=payload.size,
            sha256=payload.sha256,
            inline=payload.inline,
            statement=self._state(asked.run),
        )

    def _state(self, run: str = "") -> bytes:
        """Of a ledger in which nothing is charged."""
        head = Head(1, bytes(32))
        return Statement.issue(self.ledger, site=self.name, data_set="records", head=head, run=run).signed


class Fleet:
    """A consortium in a folder, its server's process and its sites."""

    def __init__(self, home: Path) -> None:
        self.config = home / "server.toml"
        self.config.write_text(SERVER_TOML)
        self.files: ServerFiles = load_server(self.config)
        self.log = home / "server.log"
        self._authority = Authority.create(
            self.files.pki,
            name="test",
            hosts=["localhost", "127.0.0.1"],
            passphrase="correct horse battery",
            now=datetime.now(UTC),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._lives: list[Any] = []
        self.server: subprocess.Popen[bytes] | None = None

    def enrol(self, name: str) -> Site:
        """A site that is enrolled, and not connected yet."""
        from lepton_fl.fleet.pki.authority import Issuing

        now, issuing = datetime.now(UTC), Issuing.open(self.files.pki)
        key = certificates.new_key()
        database = Database(self.files.database)
        register = Register(database)
        token = register.invite(name, consortium=self._authority.consortium, life=timedelta(hours=1), now=now)
        request = Request(
            token_id=token.id,
            secret=token.secret,
            site=name,
            csr=certificates.make_csr(key),
            identity_key=IdentityKey.generate().public,
        )
        register.request(request, issuing, now)
        register.approve(name, keys=register.requested(name), authority=self._authority, now=now)
        pem = register.request(request, issuing, now).tls_certificate
        party = next(row.party for row in register.sites(now) if row.site == name)
        database.close()
        assert party is not None
        return Site(name=name, party=party, key=certificates.key_pem(key), certificate=pem)

    def connect(self, site: Site) -> Callable[[], None]:
        """Let a site live; gives what ends it."""
        root = self._authority.consortium.root_pem
        life = asyncio.run_coroutine_threadsafe(site.live(lambda: running(self.files), root), self._loop)
        self._lives.append(life)
        return life.cancel

    def start(self) -> Running:
        with self.log.open("ab") as log:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "lepton_fl", "server", "start", "-c", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return until(self._up, "server started")

    def _up(self) -> Running | None:
        assert self.server is not None
        assert self.server.poll() is None, self.log.read_text()
        found = running(self.files)
        return found if found is not None and found.pid == self.server.pid and found.fleet else None

    def end(self, how: int = signal.SIGTERM) -> int:
        """End the server's process; its exit code."""
        assert self.server is not None
        self.server.send_signal(how)
        code = self.server.wait(PATIENCE_S)
        self.server = None
        return code

    def call(self, work: Callable[[Studies], Any]) -> Any:
        """What `work` finds in, or does to, the database."""
        database = Database(self.files.database)
        try:
            return work(Studies(database))
        finally:
            database.close()

    def runs(self) -> list[Run]:
        return self.call(lambda studies: studies.runs())

    def events(self) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def close(self) -> None:
        for life in self._lives:
            life.cancel()

        async def rest() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            await asyncio.gather(*others, return_exceptions=True)

        self._do(rest())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self.server is not None:
            self.server.kill()
            self.server.wait()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    found = Fleet(tmp_path)
    yield found
    found.close()


@pytest.fixture
def make_study() -> Callable[..., Study]:
    """The study with keys of these tables changed."""

    def make(**changes: Any) -> Study:
        raw = {key: {**STUDY.get(key, {}), **changes.get(key, {})} for key in [*STUDY, *changes]}
        return parse(Study, raw, file="study.toml")

    return make


@pytest.fixture(name="until")
def _until() -> Callable[[Callable[[], Any], str], Any]:
    return until
