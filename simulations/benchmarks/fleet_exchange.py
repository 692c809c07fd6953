"""An empty exchange: a run's process asks four agents, through the server, and has all four answers.

    python simulations/benchmarks/fleet_exchange.py > simulations/benchmarks/fleet_exchange.md

Over the fleet (mutual TLS on the loopback, every process its own) it is the smallest that a run asks: would
you take part? It carries the study; the site parses and admits it by its policy, and keeps its answer on disk
before that leaves. Over stock Flower's SuperLink and SuperNodes, on the same machine just after, an exchange
carries nothing, nobody asks a policy, and there is no TLS at all. Times are taken where the ServerApp runs,
from before the messages are made to after the last answer is there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loopback
from loopback import fleet, percentile

EXCHANGES, WARM_UP = 1000, 20
STOCK_EXCHANGES = 10
SITES = 4
"""As many as the bundled heart records have hospitals."""

APP = """
[project]
name = "empty"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "local"
fab-include = ["empty.py"]

[tool.flwr.app.components]
serverapp = "empty:server"
clientapp = "empty:client"

[tool.flwr.app.config]
exchanges = {exchanges}
nodes = {nodes}
out = "{out}"
"""

CODE = """
import json, time
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@client.query()
def query(message, context):
    return Message(RecordDict(), reply_to=message)


@server.main()
def main(grid, context):
    config = context.run_config
    while len(nodes := list(grid.get_node_ids())) < config["nodes"]:
        time.sleep(0.2)
    seconds = []
    for _ in range(config["exchanges"]):
        before = time.perf_counter()
        asked = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
        replies = list(grid.send_and_receive(asked))
        seconds.append(time.perf_counter() - before)
        assert {r.metadata.src_node_id for r in replies} == set(nodes)
        assert not any(r.has_error() for r in replies)
    Path(config["out"]).write_text(json.dumps(seconds))
"""


def agent(folder: Path, name: str) -> Any:
    """A site of the heart study, as simulations have it: policy and ledger on disk."""
    from lepton_fl.simulation.run import open_sites
    from lepton_fl.site import client_app

    study, splits = loopback.heart()
    return client_app(open_sites(study, {name: splits[name]}, 0, folder / "sites")[name])


def work(frames: Any, folder: Path) -> dict[str, Any]:
    """In the run's process: the exchanges, one after another."""
    from flwr.app import Message, RecordDict

    from lepton_fl.fleet.server.grid import FleetGrid
    from lepton_fl.fleet.server.link import RunSpec
    from lepton_fl.messages import CONFIG, JOIN, Assignment, assignment_config, identify
    from lepton_fl.study import parse_canonical

    spec = RunSpec.read(folder / "run.json")
    study = parse_canonical((folder / "study.canonical").read_bytes(), spec.study_id)
    identify(spec.run, 1)
    grid = FleetGrid(frames, folder / "spool", stop=lambda: None, insecure=lambda: None)
    nodes = wait_for(lambda: list(grid.get_node_ids()), len(spec.sites))
    seconds = []
    for number in range(int((folder.parent / "exchanges").read_text()) + WARM_UP):
        before = time.perf_counter()
        # Another number each time: a site would answer from its cache what it has answered before.
        config = assignment_config(Assignment(study=study, run=spec.run, round=number, cohort=()))
        # One record for all, as the round loop has it: the grid packs it once.
        content = RecordDict({CONFIG: config})
        asked = [Message(content, dst_node_id=node, message_type=JOIN) for node in nodes]
        replies = list(grid.send_and_receive(asked, timeout=loopback.PATIENCE))
        seconds.append(time.perf_counter() - before)
        said = {r.metadata.src_node_id: r.content.config_records[CONFIG]["site"] for r in replies}
        assert said == spec.sites
    return {"seconds": seconds[WARM_UP:]}


def wait_for(look: Callable[[], list[int]], enough: int) -> list[int]:
    until = time.monotonic() + loopback.PATIENCE
    while len(found := look()) < enough:
        assert time.monotonic() < until, f"{len(found)} of {enough} agents are connected"
        time.sleep(0.05)
    return found


def measure_fleet(exchanges: int) -> list[float]:
    """Seconds of each exchange over the fleet."""
    study, splits = loopback.heart()
    with fleet(list(splits)) as made:
        (made.folder / "exchanges").write_text(str(exchanges))
        made.start_agents()
        found, _ = made.run(study, own=True)
    seconds: list[float] = found["seconds"]
    assert len(seconds) == exchanges
    return seconds


def measure_stock(exchanges: int) -> list[float]:
    """Seconds of each exchange over stock Flower."""
    with tempfile.TemporaryDirectory(prefix="flower-") as scratch:
        folder = Path(scratch)
        out = folder / "seconds.json"
        (app := folder / "app").mkdir()
        (app / "pyproject.toml").write_text(APP.format(exchanges=exchanges, nodes=SITES, out=out))
        (app / "empty.py").write_text(CODE)
        port = _free_port()
        (home := folder / "home").mkdir()
        (home / "config.toml").write_text(
            f'[superlink.loopback]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        env = {
            **os.environ,
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            # Flower starts some of its commands by name.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        with _flower(env, folder) as start:
            start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
            _wait_for_port(port)
            for _ in range(SITES):
                here = ("--host", "127.0.0.1", "--port", str(_free_port()))
                start("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", *here)
            limit = 120 + 60 * exchanges
            flwr = [str(Path(sys.executable).parent / "flwr"), "run", str(app), "loopback", "--stream"]
            done = subprocess.run(flwr, check=False, env=env, cwd=folder, capture_output=True, timeout=limit)
            assert out.exists(), done.stdout.decode() + done.stderr.decode()
        seconds: list[float] = json.loads(out.read_text())
    assert len(seconds) == exchanges
    return seconds


@contextlib.contextmanager
def _flower(env: dict[str, str], folder: Path) -> Iterator[Callable[..., None]]:
    """Starts Flower's commands, and ends them with all that they have started."""
    children: list[subprocess.Popen[bytes]] = []

    def start(name: str, *arguments: str) -> None:
        command = [str(Path(sys.executable).parent / name), *arguments]
        with (folder / f"{len(children)}.log").open("wb") as log:
            children.append(
                subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True)
            )

    try:
        yield start
    finally:
        for child in children:
            child.terminate()
        for child in children:
            try:
                child.wait(loopback.PATIENCE / 2)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        # SuperNodes leave theirs to notice that they are alone.
        mark = f"FLWR_HOME={env['FLWR_HOME']}".encode()
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (place / "environ").read_bytes().split(b"\0"):
                    os.kill(int(place.name), signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _wait_for_port(port: int) -> None:
    until = time.monotonic() + loopback.PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            return
        except OSError:
            assert time.monotonic() < until, f"nothing listens on port {port}"
            time.sleep(0.2)


def report(given: argparse.Namespace) -> None:
    exchanges = 50 if given.quick else EXCHANGES
    stock_exchanges = 1 if given.quick else STOCK_EXCHANGES
    ours, stock = measure_fleet(exchanges), measure_stock(stock_exchanges)
    print("# An empty exchange with four agents\n")
    print(f"{loopback.machine('lepton-fl', 'flwr', 'grpcio')}.\n")
    print("| transport | exchanges | median ms | p99 ms | min ms | max ms |\n|---|---|---|---|---|---|")
    names = "the fleet, mutual TLS", "stock Flower, SuperLink and SuperNodes, no TLS"
    for name, seconds in zip(names, (ours, stock), strict=True):
        values = (statistics.median(seconds), percentile(seconds, 0.99), min(seconds), max(seconds))
        cells = " | ".join(f"{1000 * value:,.1f}" for value in values)
        print(f"| {name} | {len(seconds)} | {cells} |")
    print(f"\nThe medians' ratio is {statistics.median(stock) / statistics.median(ours):,.0f}.")


if __name__ == "__main__":
    loopback.main(loopback.Roles(report=report, agent=agent, work=work))
