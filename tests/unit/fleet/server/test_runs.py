"""Runs whose processes die: other programs stand in for them."""

import asyncio
import json
import os
import stat
import time
from pathlib import Path

import pytest

from lepton_fl.config import parse
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.transfer import Outbox
from lepton_fl.fleet.server import runs as module
from lepton_fl.fleet.server.config import load_server
from lepton_fl.fleet.server.database import Database
from lepton_fl.fleet.server.hub import Hub, Session
from lepton_fl.fleet.server.link import RunnerLink
from lepton_fl.fleet.server.runs import ATTEMPTS, Runs
from lepton_fl.fleet.server.studies import Answered, Journal, Studies
from lepton_fl.fleet.server.telemetry import Telemetry
from lepton_fl.study import Study

STUDY = {
    "study": {"name": "s"},
    "task": {"kind": "binary", "target": "ill"},
    "privacy": {"epsilon": 4.0, "delta": 1e-3},
    "secure_aggregation": {"enabled": False, "min_sites": 1},
    "train": {"rounds": 3, "sample_rate": 0.2, "lr": 0.5, "expected_batch": 10.0},
    "features": {"columns": {"x": {"type": "float", "range": [-1, 1]}}},
}
TELL = """
import json, socket, sys
from pathlib import Path
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.frames import Frames
frames = Frames(socket.socket(fileno=int(sys.argv[2])), pb.ToRunner)
folder = Path(sys.argv[3])
lives = folder / "lives"
lives.write_text(lives.read_text() + "x" if lives.exists() else "x")
"""
DIES = "import sys; print('in vain', file=sys.stderr); sys.exit('no room left')"
DIES_AFTER_A_ROUND = (
    TELL
    + """
number = len(lives.read_text())
if number <= 5:
    event = {"event": "round", "round": number, "sites": ["a"], "dropped": {}, "seconds": 0.1}
    frames.send(pb.FromRunner(progress=pb.Progress(json=json.dumps(event))))
    sys.exit("once more")
frames.send(pb.FromRunner(finished=pb.Finished(exit_code=0, json=json.dumps({"done": 5, "model": "m"}))))
"""
)
STOPS = (
    TELL
    + """
frames.send(pb.FromRunner(ready=pb.Ready()))
while (said := frames.receive(60.0)) is not None and not said.HasField("stop"):
    pass
frames.send(pb.FromRunner(finished=pb.Finished(exit_code=0, json=json.dumps({"done": 1, "stopped": True}))))
"""
)
LEAVES = (
    TELL
    + """
(folder / "spool" / "cannot be unlinked").mkdir()
frames.send(pb.FromRunner(finished=pb.Finished(exit_code=0, json=json.dumps({"done": 5, "model": "m"}))))
"""
)
HANGS = "import time; time.sleep(600)"


class Place:
    """A server's parts without its ports; one site is connected and approves."""

    def __init__(self, home: Path) -> None:
        config = home / "server.toml"
        config.write_text('[server]\nname = "test"\n')
        self.files = load_server(config)
        self.database = Database(self.files.database)
        self.studies = Studies(self.database)
        self.hub = Hub(grace=1.0, payload_limit=1 << 20)
        self.relayed: list[object] = []
        self.hub.sessions[101] = Session(
            party=101,
            site="a",
            instance=bytes(16),
            release="",
            device="",
            insecure_seed=False,
            outbox=Outbox(lambda: None),
        )
        self.runs = Runs(
            self.hub,
            self.files,
            self.studies,
            Journal(self.studies),
            Telemetry(),
            lambda: {101: "a"},
            relay=self.relayed.append,
            roster_key=bytes(32),
        )
        study = parse(Study, STUDY, file="study.toml")
        self.studies.submit(study)
        said = Answered(study=study.id, party=101, site="a", state="approved", reason="", at=1.0)
        self.studies.record(answers=[said])
        self.run = self.studies.want(self.studies.find("s")).id

    @property
    def folder(self) -> Path:
        return self.files.run(self.run)

    async def until(self, *states: str):
        end = time.monotonic() + 60
        while (found := self.studies.run(self.run)).state not in states:
            assert time.monotonic() < end, found
            self.runs.look()
            await asyncio.sleep(0.02)
        return found


@pytest.fixture
def in_place(tmp_path, monkeypatch):
    """Run a scenario with `program` as the process of each run."""
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)

    def go(program, scenario):
        def link(*args):
            made = RunnerLink(*args)
            made.program = ("-c", program)
            return made

        monkeypatch.setattr(module, "RunnerLink", link)

        async def whole():
            place = Place(tmp_path)
            try:
                return await scenario(place)
            finally:
                await place.runs.leave(0.0)
                place.database.close()

        return asyncio.run(whole())

    return go


def test_a_run_whose_process_always_dies_has_failed(in_place):
    """With what it said last, and the exit code of an error of our own."""
    run = in_place(DIES, lambda place: place.until("failed"))

    assert run.exit_code == 1
    assert run.reason == "its process died: exit code 1 (no room left)"


def test_a_process_that_dies_after_a_round_is_begun_again(in_place):
    """More often than one that does nothing."""

    async def scenario(place):
        return await place.until("failed", "finished"), place.studies.rounds(place.run)

    run, rounds = in_place(DIES_AFTER_A_ROUND, scenario)

    assert (run.state, run.done) == ("finished", 5)
    assert len(rounds) == 5 > ATTEMPTS


def test_sites_countersign_every_tenth_round_and_at_the_end(in_place):
    """So that no round waits for it, and no more than ten are in the server's memory alone."""
    told = """
for number in (9, 10, 11, 20):
    event = {"event": "round", "round": number, "sites": ["a"], "dropped": {}, "seconds": 0.1}
    frames.send(pb.FromRunner(progress=pb.Progress(json=json.dumps(event))))
frames.send(pb.FromRunner(finished=pb.Finished(exit_code=0, json=json.dumps({"done": 4, "model": "m"}))))
"""

    async def scenario(place):
        await place.until("finished")
        return place.relayed

    assert in_place(TELL + told, scenario) == [{101: "a"}] * 3


def test_a_run_has_finished_also_where_its_spool_cannot_be_emptied(in_place):
    """Its model is made, and would not be promoted."""

    async def scenario(place):
        await place.until("failed", "finished")
        while place.runs._tasks:
            await asyncio.sleep(0.02)
        return place.studies.run(place.run)

    assert in_place(LEAVES, scenario).state == "finished"


def test_a_run_is_asked_to_stop(in_place):
    async def scenario(place):
        await place.until("running")
        place.studies.stop(place.studies.find("s"))
        return await place.until("stopped")

    assert in_place(STOPS, scenario).done == 1


def test_a_run_that_does_not_end_is_ended_when_the_server_leaves(in_place):
    async def scenario(place):
        await place.until("running")
        await asyncio.sleep(0.2)
        await place.runs.leave(0.1)
        return place.studies.run(place.run)

    assert in_place(HANGS, scenario).state == "interrupted"


def test_a_run_waits_for_enough_sites(in_place):
    async def scenario(place):
        session = place.hub.sessions.pop(101)
        place.runs.look()
        before = place.studies.run(place.run).state
        place.hub.sessions[101] = session
        return before, (await place.until("running")).state

    assert in_place(STOPS, scenario) == ("wanted", "running")


def test_what_a_run_is_told_is_in_its_folder_alone(in_place):
    async def scenario(place):
        await place.until("running")
        await asyncio.sleep(0.1)
        return {path.name: path.stat().st_mode & 0o077 for path in place.folder.iterdir()}, json.loads(
            (place.folder / "run.json").read_text()
        )

    modes, told = in_place(STOPS, scenario)

    assert {
        name: mode for name, mode in modes.items() if name in ("study.canonical", "run.json", "spool")
    } == {
        "study.canonical": 0,
        "run.json": 0,
        "spool": 0,
    }
    assert told["sites"] == {"101": "a"}


def test_answers_go_through_files_while_a_process_is_behind(tmp_path, monkeypatch):
    """What a thousand sites answer does not pile up in the server's memory; nor does its loop wait for a
    disk a thousand times."""
    from lepton_fl.fleet.protocol.payload import Payload
    from lepton_fl.fleet.server.hub import Reply
    from lepton_fl.fleet.server.link import MAX_HELD

    class Transport:
        def get_write_buffer_size(self):
            return MAX_HELD + 1

    class Writer:
        transport = Transport()
        sent: list[bytes] = []

        def is_closing(self):
            return False

        def write(self, data):
            self.sent.append(data)

    def forced(_):
        raise AssertionError("the event loop waits for the disk")

    monkeypatch.setattr(os, "fsync", forced)
    (tmp_path / "spool").mkdir()
    link = RunnerLink(Hub(grace=1, payload_limit=1), tmp_path, "r", "s", {101}, lambda *_: None)
    link._writer = Writer()
    link._arrived(Reply(exchange=bytes(16), payload=Payload.of(b"x" * 1000)))
    body = pb.ToRunner.FromString(Writer.sent[0][4:]).arrived.body

    assert body.inline == b""
    assert Path(body.file).read_bytes() == b"x" * 1000
    assert stat.S_IMODE(Path(body.file).stat().st_mode) == 0o600
