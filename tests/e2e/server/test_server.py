"""`lepton-fl server start` as a process: studies from their offer to a promoted model, killed or not."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.server.database import Database
from lepton_fl.fleet.server.register import Register
from lepton_fl.simulation.run import write_study
from lepton_fl.site.approvals import StudySignature
from lepton_fl.tasks.model_file import labels_of


@pytest.fixture
def sites(fleet):
    """Two sites that are connected as soon as there is a server."""
    found = [fleet.enrol(name) for name in ("a", "b")]
    for site in found:
        fleet.connect(site)
    return found


@pytest.fixture
def begin(fleet, until):
    """Submit a study, wait for what all sites say, and start it."""

    def submit_and_start(study, sites=2):
        fleet.call(lambda s: s.submit(study))
        until(lambda: len(fleet.call(lambda s: s.answers(study.id))) == sites, "answers")
        return fleet.call(lambda s: s.want(s.find(study.id)))

    return submit_and_start


@pytest.fixture
def ended(fleet, until):
    """The run, once it has ended."""

    def wait():
        until(lambda: not fleet.runs()[0].active, "the end of the run")
        return fleet.runs()[0]

    return wait


def test_a_study_runs_from_its_offer_to_a_promoted_model(fleet, make_study, sites, begin, ended, lepton):
    fleet.start()

    begin(make_study())
    run = ended()
    promoted = lepton("study", "promote", "rounds", "-c", fleet.config)
    again = lepton("study", "promote", "rounds", "-c", fleet.config)
    status = json.loads(lepton("server", "status", "--json", "-c", fleet.config).out)

    assert (run.state, run.reason, run.done) == ("finished", "", 5)
    assert [(r["number"], r["sites"]) for r in status["studies"][0]["runs"][0]["rounds"]] == [
        (number, ["a", "b"]) for number in range(1, 6)
    ]
    assert promoted.code == 0
    assert Path(promoted.out.strip()).joinpath("weights.safetensors").exists()
    assert (fleet.files.models / "rounds" / "current").resolve() == Path(promoted.out.strip()).resolve()
    assert again.code == 3
    assert not list((fleet.files.run(run.id) / "spool").iterdir())


def test_a_study_that_is_signed_later_is_offered_again(fleet, make_study, sites, until, tmp_path, lepton):
    """To sites that are connected, and by the command as it is typed."""
    fleet.start()
    study, file = make_study(), tmp_path / "study.toml"
    write_study(file, study)
    submit = ("study", "submit", file, "-c", fleet.config)
    lepton(*submit)
    until(lambda: all(study.id in site.offers for site in sites), "offers")
    unsigned = [site.offers[study.id] for site in sites]
    lepton("study", "key", "board.pem")
    lepton("study", "sign", file, "--key", "board.pem")
    again = lepton(*submit)
    until(lambda: all(site.offers[study.id] for site in sites), "signatures")

    assert unsigned == [b"", b""]
    assert f"{study.study.name} was submitted before, signed by " in again.err
    for site in sites:
        assert StudySignature.read(site.offers[study.id], study.id).key.hex()[:16] in again.err


def test_a_site_that_refuses_after_the_run_is_not_counted_on_for_another(
    fleet, make_study, sites, begin, ended, until, lepton
):
    """A finished study is offered no more; what its sites say to it is heard all the same."""
    fleet.start()
    begin(make_study())
    ended()

    sites[1].says = pb.Answer.REFUSED
    study = fleet.runs()[0].study
    until(
        lambda: [a.state for a in fleet.call(lambda s: s.answers(study))] == ["approved", "refused"],
        "refusal",
    )
    again = lepton("study", "start", "rounds", "--again", "-c", fleet.config)

    assert again.code == 6
    assert "b: refuses: as told" in again.last


@pytest.mark.slow
def test_a_killed_server_goes_on_with_the_round_after_the_last_one(
    fleet, make_study, sites, begin, ended, until
):
    """A round number that a site has been asked once is never asked again."""
    fleet.start()
    sites[0].hold = lambda number: number == 3
    begin(make_study())
    until(lambda: 3 in sites[0].rounds(), "round 3")
    (orphan,) = _children(fleet.server.pid)

    fleet.end(signal.SIGKILL)
    sites[0].hold = lambda number: False
    fleet.start()
    run = ended()
    until(lambda: not Path(f"/proc/{orphan}").exists(), "the end of the process without a server")

    assert (run.state, run.done) == ("finished", 5)
    for site in sites:
        assert site.rounds() == [1, 2, 3, 4, 5, 6]
    assert run.outcome["started"] == 6


@pytest.mark.slow
def test_a_run_whose_process_is_killed_is_begun_again(fleet, make_study, sites, begin, ended, until):
    server = fleet.start()
    sites[0].hold = lambda number: number == 3
    begin(make_study())
    until(lambda: 3 in sites[0].rounds(), "round 3")

    sites[0].hold = lambda number: False
    (child,) = _children(server.pid)
    os.kill(child, signal.SIGKILL)
    run = ended()

    assert (run.state, run.done) == ("finished", 5)
    assert sites[0].rounds() == [1, 2, 3, 4, 5, 6]
    assert not _children(server.pid)


def _children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_server_that_is_asked_to_end_lets_the_round_end_and_goes_on_later(
    fleet, make_study, sites, begin, ended, until
):
    fleet.start()
    sites[0].hold = lambda number: number >= 2
    begin(make_study(train={"deadline": 2.0, "rounds": 2}, secure_aggregation={"min_survivors": "all"}))
    until(lambda: 2 in sites[0].rounds(), "round 2")

    code = fleet.end()
    (run,) = fleet.runs()
    said = [site.goodbyes[-1].code for site in sites]
    sites[0].hold = lambda number: False
    fleet.start()
    last = ended()

    assert code == 0
    assert run.state == "interrupted"
    assert said == [pb.Goodbye.LEAVING] * 2
    # Round 2 was lost: not both sites were in.
    assert (last.state, last.done, sites[1].rounds()) == ("finished", 2, [1, 2, 3])


@pytest.mark.slow
def test_a_run_is_stopped_after_its_round_and_resumed(fleet, make_study, sites, begin, ended, until, lepton):
    fleet.start()
    begin(make_study(train={"rounds": 1000}))
    until(lambda: len(sites[0].rounds()) > 3, "some rounds")

    stop = lepton("study", "stop", "rounds", "-c", fleet.config)
    stopped = ended()
    resume = lepton("study", "resume", "rounds", "-c", fleet.config)
    before = len(sites[0].rounds())
    until(lambda: len(sites[0].rounds()) > before + 3, "more rounds")
    fleet.call(lambda s: s.stop(s.find("rounds")))
    last = ended()

    assert (stop.code, resume.code) == (0, 0)
    assert (stopped.state, last.state) == ("stopped", "stopped")
    assert last.done > stopped.done > 0
    assert sites[0].rounds() == list(range(1, len(sites[0].rounds()) + 1))


def test_too_few_approving_sites_are_named(fleet, make_study, sites, until, lepton):
    sites[1].says = pb.Answer.REFUSED
    fleet.enrol("c")
    fleet.start()
    study = make_study()
    fleet.call(lambda s: s.submit(study))
    until(lambda: len(fleet.call(lambda s: s.answers(study.id))) == 2, "answers")

    refused = lepton("study", "start", "rounds", "-c", fleet.config)
    unknown = lepton("study", "start", "rounds", "--sites", "a,nobody", "-c", fleet.config)
    waiting = lepton("study", "start", "rounds", "--wait", "-c", fleet.config)

    assert refused.code == 6
    assert "b: refuses: as told" in refused.last
    assert unknown.code == 3
    assert waiting.code == 0
    assert fleet.runs()[0].state == "wanted"


@pytest.mark.slow
def test_a_run_that_waits_begins_by_itself(fleet, make_study, until, ended, lepton):
    sites = [fleet.enrol(name) for name in ("a", "b")]
    fleet.call(lambda s: s.submit(make_study()))
    waiting = lepton("study", "start", "rounds", "--wait", "-c", fleet.config)
    down = lepton("study", "stop", "rounds", "-c", fleet.config)
    again = lepton("study", "resume", "rounds", "-c", fleet.config)
    fleet.start()
    for site in sites:
        fleet.connect(site)

    run = ended()

    assert (waiting.code, down.code, again.code) == (0, 0, 0)
    assert run.state == "finished"


@pytest.mark.slow
def test_a_model_with_noise_from_a_known_seed_cannot_be_promoted(
    fleet, make_study, begin, ended, lepton, until
):
    """Nor is such a site let in, unless the server is a demonstration's."""
    sites = [fleet.enrol(name) for name in ("a", "b")]
    sites[1].insecure_seed = True
    for site in sites:
        fleet.connect(site)
    fleet.start()
    until(lambda: sites[1].goodbyes, "refusal")
    fleet.end()
    fleet.config.write_text(fleet.config.read_text().replace("[server]", "[server]\ninsecure_demo = true"))
    fleet.start()

    begin(make_study())
    run = ended()
    promoted = lepton("study", "promote", "rounds", "-c", fleet.config)

    assert sites[1].goodbyes[0].code == pb.Goodbye.REFUSED
    assert run.state == "finished"
    assert labels_of((fleet.files.run(run.id) / "model.safetensors").read_bytes())
    assert promoted.code == 4


@pytest.mark.slow
def test_a_model_that_is_not_the_one_that_was_made_is_not_promoted(
    fleet, make_study, sites, begin, ended, lepton
):
    fleet.start()
    begin(make_study(train={"rounds": 1}))
    path = fleet.files.run(ended().id) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    assert lepton("study", "promote", "rounds", "-c", fleet.config).code == 7


def test_a_site_that_is_revoked_is_sent_away_while_it_is_connected(fleet, sites, until):
    fleet.start()
    until(lambda: all(site.sessions for site in sites), "both connected")
    database = Database(fleet.files.database)
    Register(database).revoke("b", datetime.now(UTC))
    database.close()

    until(lambda: sites[1].goodbyes, "goodbye")
    until(lambda: [s.site for s in fleet.call(lambda s: s.sessions()) if s.connected] == ["a"], "gone")

    assert sites[1].goodbyes[0].code == pb.Goodbye.REFUSED
    assert "revoked" in sites[1].goodbyes[0].reason
    assert not sites[0].goodbyes


def test_a_second_server_and_a_taken_port_are_one_line_each(fleet, tmp_path, lepton):
    server = fleet.start()
    second = lepton("server", "start", "-c", fleet.config)
    other = tmp_path / "other.toml"
    text = fleet.config.read_text().replace('name = "test"', 'name = "test"\nstate = "other"')
    with socket.create_server(("127.0.0.1", 0)) as held:
        for key in ("fleet", "enrolment", "status"):
            for taken in (getattr(server, key), f"127.0.0.1:{held.getsockname()[1]}"):
                other.write_text(text.replace(f'{key} = "127.0.0.1:0"', f'{key} = "{taken}"'))
                done = _server_start(other)
                assert done.returncode == 5
                assert len(done.stderr.splitlines()) == 1, done.stderr
                line = done.stderr.strip()
                assert f"listen.{key}: {taken} is in use" in line
    assert second.code == 5
    assert str(server.pid) in second.last


def _server_start(config):
    return subprocess.run(
        [sys.executable, "-m", "lepton_fl", "server", "start", "-c", str(config)],
        # As in a person's shell: what the tests have imported makes gRPC talkative.
        env={name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_server_tells_how_it_is(fleet, sites, until, lepton):
    server = fleet.start()
    until(lambda: len([s for s in fleet.call(lambda s: s.sessions()) if s.connected]) == 2, "connected")

    def get(path):
        with urllib.request.urlopen(f"http://{server.status}{path}", timeout=10) as reply:
            return reply.read().decode()

    until(lambda: "lepton_fl_sites_connected 2.0" in get("/metrics"), "metrics")
    up = lepton("server", "status", "-c", fleet.config)
    stop = lepton("server", "stop", "-c", fleet.config)
    fleet.server.wait()
    down = lepton("server", "status", "-c", fleet.config)
    again = lepton("server", "stop", "-c", fleet.config)

    assert up.out.count("connected") == 2
    assert stop.code == 0
    assert "the server is down" in down.out
    assert again.code == 5


def test_the_server_loads_neither_torch_nor_flower():
    """It moves bytes; what reads records is the run's process."""
    program = (
        "import sys, lepton_fl.cli.commands, lepton_fl.fleet.server.process;"
        "print([m for m in ('torch', 'flwr', 'numpy', 'opacus') if m in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)

    assert done.stdout.strip() == "[]", done.stderr
