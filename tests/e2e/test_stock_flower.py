"""The same model under stock Flower: over a SuperLink and SuperNodes, and on its Ray engine."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import lepton_fl
from lepton_fl.simulation.ray import wait_for_port
from lepton_fl.tasks import model_hash

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc"),
]
START = 60
"""Seconds for a process to start or to end; minutes of margin on a quiet machine."""
RUN = 600
"""Seconds for a run: every message starts a Python process that imports torch."""


class Flower:
    """Flower's commands in one environment of their own; what they start is found by it, and ended."""

    def __init__(self, app, scratch):
        self.app = app
        self._scratch = scratch
        env = dict(line.removeprefix("export ").split("=", 1) for line in _exports(app / "flower.env"))
        self._env = {
            **{name: value for name, value in os.environ.items() if name != "LEPTON_FL_SITE"},
            **env,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(Path(lepton_fl.__file__).parents[1]),
        }
        self._started = []

    def start(self, *command):
        with (self._scratch / f"{len(self._started)}.log").open("wb") as out:
            done = subprocess.Popen(
                command, env=self._env, stdout=out, stderr=out, cwd=self._scratch, start_new_session=True
            )
        self._started.append(done)

    def start_superlink(self):
        """A SuperLink on a free port of the loopback, known to `flwr run` as `loopback`."""
        port = free_port()
        self.start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
        config = self.app / ".flwr" / "config.toml"
        config.write_text(config.read_text().replace("127.0.0.1:9091", f"127.0.0.1:{port}"))
        wait_for_port(port)
        return port

    def run(self):
        """`flwr run` to its end; what it and the run said."""
        done = subprocess.run(
            ["flwr", "run", str(self.app), "loopback", "--stream"],
            env=self._env,
            cwd=self._scratch,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN,
        )
        return done.stdout + "".join(log.read_text()[-2000:] for log in sorted(self._scratch.glob("*.log")))

    def close(self):
        """End everything that was started, and what that has started in sessions of its own."""
        for process in self._started:
            process.terminate()
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(START)
        # SuperNodes leave theirs to notice that they are alone.
        for number in processes(self.app):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        for process in self._started:
            process.wait(START)


def processes(app):
    """Those that run in a Flower app's environment, defunct ones apart."""
    mark, found = f"FLWR_HOME={app / '.flwr'}".encode(), []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
    return found


def left_behind(app):
    """Those of `processes` that are still there when each has had its time to end."""
    for number in processes(app):
        with contextlib.suppress(ProcessLookupError):
            watch = os.pidfd_open(number)
            select.select([watch], [], [], START)
            os.close(watch)
    return processes(app)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _exports(path):
    return [line for line in path.read_text().splitlines() if line.startswith("export ")]


@pytest.fixture
def app(tmp_path, lepton):
    """The Flower app of the template, two rounds long."""
    lepton("init", "app", "--template", "flower")
    study = tmp_path / "app" / "study.toml"
    study.write_text(
        study.read_text().replace("rounds = 50", "rounds = 2").replace("min_sites = 3", "min_sites = 2")
    )
    return tmp_path / "app"


@pytest.fixture
def flower(app, tmp_path):
    scratch = tmp_path / "flower"
    scratch.mkdir()
    flower = Flower(app, scratch)
    yield flower
    flower.close()

    assert left_behind(app) == []


def in_process(lepton, app, *options):
    """SHA-256 of the model of the same study, seed and sites in the in-process grid."""
    study = app / "study.toml"
    lepton("simulate", study, "--dataset", "heart", "--compare", "federated", "--out", "here", *options)
    return json.loads(Path("here/results.json").read_text())["model"]["sha256"]


def left(app, said):
    """SHA-256 and header of the one model that a run left in the run config's folder."""
    models = list((app / "runs").glob("*/model.safetensors"))
    assert len(models) == 1, said
    assert (models[0].parent / "checkpoint.safetensors").exists()
    with safe_open(models[0], "numpy") as file:
        return model_hash(load_file(models[0])), file.metadata()


def test_a_superlink_and_supernodes_give_the_in_process_model(flower, app, lepton):
    """Bit for bit, though each message had a process of its own."""
    config = app / "pyproject.toml"
    config.write_text(config.read_text().replace('"natural"', '"iid"').replace("sites = 4", "sites = 2"))
    link = flower.start_superlink()
    for part in range(2):
        node = f"partition-id={part} num-partitions=2"
        flower.start(
            *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}"),
            *("--host", "127.0.0.1", "--port", str(free_port()), "--node-config", node),
        )

    digest, about = left(app, flower.run())

    assert digest == in_process(lepton, app, "--sites", "2", "--split", "iid")
    assert about["labels"] == "SIMULATED; simulation noise; stock Flower: no site control"


def test_flowers_ray_engine_gives_the_in_process_model(app, lepton, tmp_path):
    """Bit for bit, over the four hospitals."""
    pytest.importorskip("ray", reason="pip install 'lepton-fl[simulation]'")

    done = lepton("simulate", app / "study.toml", "--dataset", "heart", "--engine", "ray", "--out", "ray")

    model = load_file(tmp_path / "ray" / "model.safetensors")
    assert done.code == 0
    assert model_hash(model) == in_process(lepton, app)
    assert (tmp_path / "ray" / "checkpoint.safetensors").exists()
    assert left_behind(tmp_path / "ray" / "flower") == []
