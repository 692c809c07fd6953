"""`lepton-fl demo network` as a user runs it: processes, sockets and certificates are real."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lepton_fl.cli import demo_agent
from lepton_fl.cli.children import ChildFailed, Children
from lepton_fl.errors import ConfigError
from lepton_fl.site.config import load_site_config
from lepton_fl.study import load_study

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for what is left behind")
ROOT = Path(__file__).parents[2]
LEPTON = (sys.executable, "-m", "lepton_fl")


@pytest.fixture
def place(tmp_path_factory):
    """A folder of a short name: the path of a Unix socket has room for a hundred bytes."""
    return tmp_path_factory.mktemp("d")


@pytest.fixture
def demo(place):
    """Run the demonstration in place/demo; its outcome, as JSON."""

    def run(*options):
        done = subprocess.run(
            [*LEPTON, "demo", "network", "--folder", str(place / "demo"), "--json", *options],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def processes_in(folder):
    """Those whose working directory is in `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve().is_relative_to(folder):
                found.append(int(entry.name))
        except OSError:
            pass
    return found


def gone(find, seconds=60):
    """Whether `find` comes to find nothing, in time."""
    until = time.monotonic() + seconds
    while find() and time.monotonic() < until:
        time.sleep(0.1)
    return not find()


@pytest.mark.slow
def test_the_model_of_a_fleet_is_that_of_a_simulation(demo, place):
    """To the bit, though an agent was killed in mid-run; and the command that it prints says so too."""
    saw = demo("--insecure-seed", "7", "--rounds", "300")

    simulate = shlex.split(saw["simulation"])
    done = subprocess.run(
        [*LEPTON, *simulate[1:], "--json"],
        cwd=place / "demo",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert json.loads(done.stdout)["model"]["sha256"] == saw["model"]
    killed = saw["sites"][1]
    assert killed["missed"]
    assert "--drop" in simulate
    assert [site["rounds"] for site in saw["sites"]] == [300, killed["rounds"], 300, 300]
    assert killed["rounds"] < 300
    assert (saw["killed"], saw["returned"]) == (killed["site"], True)
    assert "INSECURE SEED: a demonstration, no privacy" in saw["labels"]
    assert "cannot be promoted" in saw["promoted"]
    assert processes_in(place) == []


@pytest.mark.slow
def test_a_fleet_without_a_seed_ends_with_a_promoted_model(demo, place):
    """What left is in each site's ledger, and nothing that was sent or kept carries a seed."""
    saw = demo("--rounds", "100")

    assert saw["labels"] == []
    assert saw["simulation"] is None
    assert saw["rounds"] == 100
    # It is back in later rounds, or the demonstration says that the run was over before.
    missed = saw["sites"][1]["missed"]
    assert saw["returned"] is not any(span.endswith("100") for span in missed)
    assert (place / "demo" / saw["promoted"] / "weights.safetensors").is_file()
    for site in saw["sites"]:
        assert 0 < site["epsilon_spent"] <= 1.0
        assert site["charged"] >= site["rounds"] > 0
        assert site["bytes_sent"] > 0
    assert "seed" not in (place / "demo/study.toml").read_text()
    assert processes_in(place) == []


@pytest.mark.slow
def test_nothing_outlives_a_demonstration_that_is_killed(tmp_path):
    """With -9, when it can clean up nothing itself: its server and its agents end all the same."""
    folder = tmp_path / "demo"
    process = subprocess.Popen(
        [*LEPTON, "demo", "network", "--folder", str(folder)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 300
    while not list(folder.glob("*/agent.log")) and time.monotonic() < until:
        time.sleep(0.1)

    process.kill()
    process.wait()

    assert list(folder.glob("*/agent.log"))
    assert gone(lambda: processes_in(folder))


def test_a_demonstration_that_is_interrupted_leaves_nothing(tmp_path):
    """Neither a process nor, in its temporary folder, a file."""
    (tmp_path / "tmp").mkdir()
    env = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    process = subprocess.Popen(
        [*LEPTON, "demo", "network"], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
    )
    with process.stderr as lines:
        next(line for line in lines if "server start" in line)
        process.send_signal(signal.SIGTERM)
        said = lines.read()
    code = process.wait(120)

    assert code == 130, said
    assert gone(lambda: processes_in(tmp_path))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_folder_that_is_in_use_is_not_taken(lepton, tmp_path):
    """What is in it may be somebody's own."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")

    ended = lepton("demo", "network", "--folder", "mine")

    assert ended.code == 3
    assert "mine: is not empty" in ended.last


def test_a_command_that_fails_is_named_with_its_own_last_line(tmp_path):
    """And with its exit code."""
    with Children(tmp_path) as children, pytest.raises(ChildFailed, match=r"no such file") as failed:
        children.run("ca", "show", "-c", "server.toml")

    assert failed.value.exit_code == 3


def test_the_demonstration_s_agent_refuses_records_that_are_not_public(tmp_path, short_study):
    """A known seed protects nobody: whoever's records these are, they are not trained on."""
    header, row, *_ = (ROOT / "lepton_fl/data/bundled/heart.csv").read_text().splitlines()
    cells = row.split(",")
    cells[1] = str(int(cells[1]) + 1)
    (tmp_path / "records.csv").write_text("\n".join([header, row, ",".join(cells)]) + "\n")
    (tmp_path / "site.toml").write_text('[site]\nid = "clinic"\n[data]\nsource = "records.csv"\n')
    load = demo_agent._loader(load_site_config(tmp_path / "site.toml"), tmp_path, bytes(32))

    with pytest.raises(ConfigError, match="not in the public data set"):
        load(load_study(short_study))
