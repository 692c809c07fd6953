"""A clinic's agent, and a server that says what a test says."""

import asyncio
import contextlib
import time
from pathlib import Path

import pytest

import lepton_fl.fleet  # noqa: F401 - before grpc: it sets what gRPC reads at import

# isort: split
import grpc
import grpc.aio
import torch
from flwr.app import RecordDict

from lepton_fl import __version__
from lepton_fl.config import parse
from lepton_fl.data import Contract
from lepton_fl.fleet.agent.agent import Agent
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.methods import FLEET, PROTOCOL
from lepton_fl.fleet.protocol.payload import SMALL, Payload
from lepton_fl.fleet.protocol.records import pack
from lepton_fl.messages import CONFIG, JOIN, TRAIN, Assignment, assignment_config, to_record
from lepton_fl.site import client_app, open_site
from lepton_fl.study import Study
from lepton_fl.tasks import arrays_of, build_model

RUN = "0123456789abcdef" * 2
COHORT = ("bank", "clinic", "ward")
PATIENCE_S = 30.0
"""A bound for what never comes, not a measurement."""
STUDY = {
    "study": {"name": "heart"},
    "task": {"kind": "binary", "target": "ill"},
    "privacy": {"epsilon": 4.0, "delta": 1e-3},
    "secure_aggregation": {"enabled": False},
    "train": {"rounds": 3, "sample_rate": 0.2, "lr": 0.1, "expected_batch": 10.0},
    "features": {"columns": {"x": {"type": "float", "range": [-1, 1], "identifier": "allow"}}},
}
POLICY = """\
[data]
id = "clinic-records"
[budget]
epsilon_total = 5.0
epsilon_per_study = 5.0
delta_total = 1e-2
[require]
secure_aggregation = false
approval = "{approval}"
"""


class Connection:
    """One agent's connection, as a server sees it."""

    def __init__(self, requests, context) -> None:
        self._requests = requests
        self._context = context
        self.over = asyncio.Event()

    async def hear(self, kind: str):
        """The next message of that kind; heartbeats and others are passed over."""
        async with asyncio.timeout(PATIENCE_S):
            async for message in self._requests:
                if message.WhichOneof("kind") == kind:
                    return getattr(message, kind)
        raise AssertionError(f"the agent never said {kind}")

    async def heard(self, kind: str, *, within: float = 0.3) -> bool:
        """Whether the agent says that soon."""
        with contextlib.suppress(TimeoutError, AssertionError):
            async with asyncio.timeout(within):
                await self.hear(kind)
                return True
        return False

    async def say(self, **kind) -> None:
        await self._context.write(pb.ToAgent(**kind))

    async def until(self, happened) -> None:
        """Keep the connection alive until something is so."""
        async with asyncio.timeout(PATIENCE_S):
            while not happened():
                await self.say(heartbeat=pb.Heartbeat())
                await asyncio.sleep(0.01)

    async def send_raw(self, data: bytes) -> None:
        await self._context.write(data)

    async def welcome(self, *, still=(), release=__version__, heartbeat=5.0, at=None) -> pb.Hello:
        """Hear the hello, and say welcome."""
        hello = await self.hear("hello")
        at = time.time() if at is None else at
        word = pb.Welcome(
            protocol=PROTOCOL, release=release, heartbeat_s=heartbeat, party=101, open=still, time=at
        )
        await self.say(welcome=word)
        return hello

    async def ended_by_agent(self) -> None:
        """Wait until the agent is gone."""
        with contextlib.suppress(grpc.aio.BaseError, asyncio.CancelledError):
            async with asyncio.timeout(PATIENCE_S):
                async for _ in self._requests:
                    pass


class Puppet:
    """A server whose every word is the test's. In clear: the certificates are tested elsewhere."""

    def __init__(self) -> None:
        self._arrived: asyncio.Queue[Connection] = asyncio.Queue()

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        connect = grpc.stream_stream_rpc_method_handler(
            self._connect,
            request_deserializer=pb.FromAgent.FromString,
            # Bytes that are no message go out as they are.
            response_serializer=lambda said: said if isinstance(said, bytes) else said.SerializeToString(),
        )
        handlers = grpc.method_handlers_generic_handler(FLEET, {"Connect": connect})
        self._server.add_generic_rpc_handlers((handlers,))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    async def _connect(self, requests, context) -> None:
        connection = Connection(requests, context)
        await self._arrived.put(connection)
        await connection.over.wait()

    async def next(self) -> Connection:
        """The next connection that an agent makes."""
        async with asyncio.timeout(PATIENCE_S):
            return await self._arrived.get()

    def channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(
            f"127.0.0.1:{self.port}", options=[("grpc.use_local_subchannel_pool", 1)]
        )


@pytest.fixture
def study() -> Study:
    return parse(Study, STUDY, file="study.toml")


@pytest.fixture
def home(tmp_path) -> Path:
    """A clinic's folder, its policy approving by itself."""
    (tmp_path / "site.toml").write_text('[site]\nid = "clinic"\n[data]\nsource = "records.csv"\n')
    (tmp_path / "policy.toml").write_text(POLICY.format(approval="auto"))
    rows = "".join(f"{i / 100 - 0.5},{i % 2}\n" for i in range(100))
    (tmp_path / "records.csv").write_text("x,ill\n" + rows)
    return tmp_path


@pytest.fixture
def site(home):
    """The clinic, open."""
    opened = open_site(home / "site.toml")
    yield opened
    opened.ledger.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """An agent that waits for nothing longer than a test does."""
    monkeypatch.setattr("lepton_fl.fleet.agent.agent.FIRST_WAIT", 0.01)
    monkeypatch.setattr("lepton_fl.fleet.agent.agent.LONGEST_WAIT", 0.05)
    monkeypatch.setattr("lepton_fl.fleet.agent.agent._LOOK_S", 0.02)
    monkeypatch.setattr("lepton_fl.fleet.agent.agent._STOP_S", 0.05)
    monkeypatch.setattr("lepton_fl.fleet.agent.agent._GOODBYE_S", 0.05)


@pytest.fixture
def play(home, site):
    """Run a scene: `scene(puppet, agent)`, with the agent running beside it. Gives what the agent raised."""

    def run(scene, *, stops=True, **given):
        async def whole():
            puppet = Puppet()
            await puppet.start()
            agent = Agent(client_app(site), given.pop("connect", puppet.channel), home / "state", **given)
            running = asyncio.create_task(agent.run())
            try:
                async with asyncio.timeout(2 * PATIENCE_S):
                    await scene(puppet, agent)
                    if stops:
                        agent.stop()
                    return (await asyncio.gather(running, return_exceptions=True))[0]
            finally:
                agent.stop()
                await puppet.stop()
                await asyncio.gather(running, return_exceptions=True)

        return asyncio.run(whole())

    return run


@pytest.fixture
def ask(study, tmp_path):
    """A request as a run makes it: the assignment, and its payload."""

    def make(kind=TRAIN, *, round=1, exchange=b"e" * 16, study=study, padding=0, **changes):
        assignment = Assignment(study=study, run=RUN, round=round, cohort=() if kind == JOIN else COHORT)
        content = RecordDict({CONFIG: assignment_config(assignment)})
        if kind != JOIN:
            model = build_model(study, Contract.of(study).width, torch.Generator())
            content["arrays"] = to_record(arrays_of(model))
        if padding:
            content["padding"] = to_record({"zeros": torch.zeros(padding).numpy()})
        payload = pack(content, tmp_path / "request")
        about = {
            "exchange": exchange,
            "run": RUN,
            "study_id": study.id,
            "round": round,
            "type": kind,
            "size": payload.size,
            "sha256": payload.sha256,
            "deadline_s": 60.0,
            "inline": payload.inline,
        }
        assert (payload.path is None) == (payload.size <= SMALL)
        return pb.Assign(**{**about, **changes}), payload

    return make


@pytest.fixture
def charged(site):
    """The rounds in the clinic's ledger."""
    return lambda: [entry["round"] for entry in site.ledger.history(site.budget.data_set)]


def chunks(exchange: bytes, payload: Payload, size: int = 100_000):
    """A payload in pieces."""
    whole = bytes(payload.open())
    return [
        pb.Chunk(exchange=exchange, offset=start, data=whole[start : start + size])
        for start in range(0, len(whole), size)
    ]


@pytest.fixture
def pieces():
    return chunks
