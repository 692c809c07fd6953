"""`server status` from the database alone."""

import json

import pytest

from lepton_fl.cli.desk import open_desk
from lepton_fl.cli.server import _news, status_json
from lepton_fl.config import parse
from lepton_fl.fleet.server.studies import Answered, RoundRow, SessionRow
from lepton_fl.study import Study

STUDY = {
    "study": {"name": "s"},
    "task": {"kind": "binary", "target": "ill"},
    "privacy": {"epsilon": 4.0, "delta": 1e-3},
    "secure_aggregation": {"enabled": False, "min_sites": 2},
    "train": {"rounds": 3, "sample_rate": 0.2, "lr": 0.5, "expected_batch": 10.0},
    "features": {"columns": {"x": {"type": "float", "range": [-1, 1]}}},
}


@pytest.fixture
def desk(tmp_path):
    config = tmp_path / "server.toml"
    config.write_text('[server]\nname = "test"\n')
    with open_desk(config) as found:
        found.studies.submit(parse(Study, STUDY, file="study.toml"))
        yield found


@pytest.fixture
def run(desk):
    study = desk.studies.find("s")
    run = desk.studies.want(study)
    desk.studies.begin(run.id)
    row = RoundRow(number=1, sites=("a",), dropped={"b": "late"}, seconds=0.5, at=1.0)
    said = Answered(study=study.id, party=101, site="a", state="approved", reason="", at=1.0)
    session = SessionRow(
        party=101,
        site="a",
        connected=True,
        since=1.0,
        heard=2.0,
        release="0.1.0",
        device="cpu",
        state="idle",
        bytes_in=3,
        bytes_out=4,
    )
    desk.studies.record(rounds=[(run.id, row)], answers=[said], sessions=[session])
    return run


def test_a_server_that_is_down_has_nobody_connected(desk, run):
    """Whatever its last words in the database were."""
    assert desk.server is None
    assert desk.connected() == {}


def test_status_has_every_round_with_who_was_in(desk, run):
    found = json.loads(json.dumps(status_json(desk)))

    (told,) = found["studies"][0]["runs"]
    assert (told["id"], told["state"], told["done"]) == (run.id, "running", 1)
    assert told["rounds"] == [
        {"number": 1, "sites": ["a"], "dropped": {"b": "late"}, "seconds": 0.5, "at": 1.0}
    ]
    assert found["server"] is None
    assert found["studies"][0]["answers"][0]["state"] == "approved"


def test_a_watcher_without_a_terminal_gets_a_line_for_each_change(desk, run):
    before = dict(_news(desk))
    desk.studies.ended(run.id, "failed", reason="too few")
    after = dict(_news(desk))

    assert [after[what] for what in after if before[what] != after[what]] == [
        "failed, 1 of 3 rounds, too few"
    ]
