"""An update of 200 MB from each of four agents: throughput beside raw gRPC, and the server's memory.

    python simulations/benchmarks/fleet_update.py > simulations/benchmarks/fleet_update.md

Three measurements, one after another, all over mutual TLS on the loopback:

* raw: four processes stream 200 MB each, in messages of 1 MiB, to a gRPC server that drops them. The same
  library, options and certificates, and nothing else: no digest, no file, no check.
* upload: a run's process asks four agents for an update of 200 MB, reads and checks each, and takes their
  mean, as the round loop does. The clock runs from the request to the last update checked. In it are, at each
  site, Flower's serialisation, the digest and the copy on disk that a repeated request is answered from; at
  the server, the digest and the file. Asked again, the sites answer from that copy: the transfer, with the
  digests and files, and nothing besides.
* round: one whole round of a federation by the library's own program, with about the largest model that a
  study may have (20 million parameters): the model goes to four agents, their updates come back, the strategy
  steps, the checkpoint is written.

Memory is the server's (its own process and the run's), by a look every 5 ms. Own is anonymous memory;
resident counts the pages of mapped files as well, which the kernel takes back when it needs them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import loopback
import numpy as np
from loopback import Watch, fleet, memory, spread

from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.methods import connect_method, fleet_handlers
from lepton_fl.fleet.protocol.payload import CHUNK

SITES, REPETITIONS = 4, 3
WIDTH, QUICK_WIDTH = 4096, 512
"""Of the square arrays that an update is made of, and of the layers of a model."""


def names() -> list[str]:
    return [f"site-{number}" for number in range(SITES)]


def update_of(width: int) -> dict[str, np.ndarray]:
    """An update of zeros: 200 MB for the full width."""
    return {f"layer-{number}": np.zeros((width, width), np.float32) for number in range(3)}


def study(width: int) -> tuple[Any, dict[str, np.ndarray]]:
    """A study of one round, and a first model of zeros."""
    import torch

    from lepton_fl.data import Contract
    from lepton_fl.tasks import arrays_of, build_model

    made, _ = loopback.heart(
        model__name="mlp",
        model__hidden=[width, width],
        train__rounds=1,
        train__optimizer="sgd",
        train__lr=1.0,
        secure_aggregation__min_sites=SITES,
    )
    model = arrays_of(build_model(made, Contract.of(made).width, torch.Generator()))
    return made, {name: np.zeros_like(array) for name, array in model.items()}


def width_of(folder: Path) -> int:
    return int((folder / "width").read_text())


# An agent whose update is made beforehand: its site's number, from 1, in every coordinate


def agent(folder: Path, name: str) -> Any:
    from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

    from lepton_fl.messages import CONFIG, JOIN, METRICS, TRAIN, WEIGHT, update_reply
    from lepton_fl.simulation.run import open_sites
    from lepton_fl.site import SiteApp

    # A run of our own asks for an update, the library's for one of its model.
    whole = (folder / "round").exists()
    template = study(width_of(folder))[1] if whole else update_of(width_of(folder))
    small, splits = loopback.heart()
    site = open_sites(small, {name: next(iter(splits.values()))}, 0, folder / "sites")[name]
    value = 1.0 + names().index(name)
    update = {key: np.full_like(array, value) for key, array in template.items()}
    del template

    class Prepared(SiteApp[Any]):
        """Asks no control, and trains nothing."""

        def __call__(self, message: Any, context: Any) -> Any:  # noqa: ARG002 - a ClientApp's form
            match message.metadata.message_type:
                case kind if kind == TRAIN:
                    return update_reply(message, update)
                case kind if kind == JOIN:
                    content = RecordDict({CONFIG: ConfigRecord({"site": name})})
                case _:
                    content = RecordDict({METRICS: MetricRecord({WEIGHT: 1.0})})
            return Message(content, reply_to=message)

    return Prepared(site)


# Raw gRPC


async def _raw_server(folder: Path) -> None:
    """Counts what comes and drops it; says so when all have ended."""
    ended = asyncio.Queue[tuple[float, float, int]]()

    async def connect(requests: AsyncIterator[pb.FromAgent], _: Any) -> None:
        began, size = 0.0, 0
        async for message in requests:
            began = began or time.monotonic()
            size += len(message.chunk.data)
        await ended.put((began, time.monotonic(), size))

    async def renew(*_: Any) -> Any:
        raise NotImplementedError

    async with loopback.listening(folder, fleet_handlers(connect, renew)):
        while True:
            asked = await loopback.next_line()
            if not asked:
                return
            found = [await ended.get() for _ in range(SITES)]
            seconds = max(end for _, end, _ in found) - min(began for began, _, _ in found)
            said = {"seconds": seconds, "bytes": sum(size for _, _, size in found)}
            print(json.dumps(said), flush=True)


async def _raw_client(folder: Path, port: int, sites: list[str]) -> None:
    (site,) = sites
    size = int((folder / "bytes").read_text())
    data = np.random.default_rng(0).bytes(CHUNK)
    async with loopback.site_channel(folder / "pki", site, port) as channel:
        await channel.channel_ready()
        print(json.dumps({"ready": site}), flush=True)
        while await loopback.next_line():
            stream = connect_method(channel)()
            for offset in range(0, size, CHUNK):
                part = data[: min(CHUNK, size - offset)]
                await stream.write(pb.FromAgent(chunk=pb.Chunk(offset=offset, data=part)))
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF


def raw(size: int, repetitions: int) -> list[float]:
    """Bytes a second, of `size` from each."""
    with loopback.processes() as (folder, start):
        loopback.make_identities(folder / "pki", names())
        (folder / "bytes").write_text(str(size))
        server = start("--raw-server", str(folder))
        port = server.hear()["port"]
        clients = []
        for site in names():
            clients.append(start("--load", str(folder), str(port)))
            clients[-1].tell([site])
        for client in clients:
            client.hear()
        rates = []
        for _ in range(repetitions):
            server.tell("go")
            for client in clients:
                client.tell("go")
            found = server.hear()
            assert found["bytes"] == SITES * size
            rates.append(found["bytes"] / found["seconds"])
    return rates


# The fleet's upload, and a whole round


def work(frames: Any, folder: Path) -> dict[str, Any]:
    """In the run's process: ask for the updates, and take their mean."""
    from flwr.app import Message, RecordDict

    from lepton_fl.federation.combine import mean
    from lepton_fl.federation.rounds import read_update
    from lepton_fl.fleet.server.grid import FleetGrid
    from lepton_fl.fleet.server.link import RunSpec
    from lepton_fl.messages import CONFIG, TRAIN, Assignment, assignment_config, identify
    from lepton_fl.study import parse_canonical

    spec = RunSpec.read(folder / "run.json")
    made = parse_canonical((folder / "study.canonical").read_bytes(), spec.study_id)
    identify(spec.run, 1)
    grid = FleetGrid(frames, folder / "spool", stop=lambda: None, insecure=lambda: None)
    while len(nodes := list(grid.get_node_ids())) < SITES:
        time.sleep(0.05)
    # Their shapes only: the same number stands in every place.
    zeros = update_of(width_of(folder.parent))
    shapes = {name: np.broadcast_to(np.float32(0), array.shape) for name, array in zeros.items()}
    del zeros
    idle = memory(os.getpid())
    times: dict[str, list[float]] = {"asked": [], "again": [], "mean": []}
    for number in range(1, 1 + int((folder.parent / "repetitions").read_text())):
        cohort = tuple(sorted(spec.sites.values()))
        config = assignment_config(Assignment(study=made, run=spec.run, round=number, cohort=cohort))
        content = RecordDict({CONFIG: config})
        updates: dict[str, Any] = {}
        for what in ("asked", "again"):
            updates.clear()
            began = time.perf_counter()
            asked = [Message(content, dst_node_id=node, message_type=TRAIN) for node in nodes]
            for reply in grid.send_and_receive(asked, timeout=loopback.PATIENCE):
                updates[spec.sites[reply.metadata.src_node_id]] = read_update(reply, shapes)
            times[what].append(time.perf_counter() - began)
            assert len(updates) == SITES
        began = time.perf_counter()
        found = mean(updates)
        times["mean"].append(time.perf_counter() - began)
        assert all((array == (1 + SITES) / 2).all() for array in found.values())
        del updates, found
    return {**times, "idle": idle, "pid": os.getpid()}


def upload(width: int, repetitions: int) -> dict[str, Any]:
    """Seconds of each, and the memory of both processes."""
    made, _ = loopback.heart()
    with fleet(names()) as network:
        (network.folder / "width").write_text(str(width))
        (network.folder / "repetitions").write_text(str(repetitions))
        network.start_agents()
        network.wait()
        idle = memory(network.server.pid)
        with Watch(network.server.pid) as watch:
            found, _ = network.run(made, own=True)
        return {**found, **watched(watch, network.server.pid, idle, found["idle"])}


def whole_round(width: int) -> dict[str, Any]:
    """A round's seconds, and the memory of both processes."""
    made, model = study(width)
    with fleet(names()) as network:
        (network.folder / "width").write_text(str(width))
        (network.folder / "round").touch()
        network.start_agents()
        network.wait()
        idle = memory(network.server.pid)
        with Watch(network.server.pid) as watch:
            found, events = network.run(made, first_model=model)
        assert found["done"] == 1
        assert len(events[0]["sites"]) == SITES
        size = sum(array.nbytes for array in model.values())
        return {
            "seconds": [events[0]["seconds"]],
            "bytes": size,
            **watched(watch, network.server.pid, idle, None),
        }


def watched(
    watch: Watch, server: int, idle: dict[str, int], run_idle: dict[str, int] | None
) -> dict[str, Any]:
    """Bytes: most of each process, what it had before, and the most of both together."""
    (run,) = (pid for pid in watch.own if pid != server)
    return {
        "server": (watch.own[server], watch.resident[server]),
        "run": (watch.own[run], watch.resident[run]),
        "both": (watch.both_own, watch.both_resident),
        "server_idle": (idle["own"], idle["resident"]),
        "run_idle": None if run_idle is None else (run_idle["own"], run_idle["resident"]),
    }


def report(given: argparse.Namespace) -> None:
    width, repetitions = (QUICK_WIDTH, 1) if given.quick else (WIDTH, REPETITIONS)
    size = sum(array.nbytes for array in update_of(width).values())
    bare = raw(size, repetitions)
    up, rounds = upload(width, repetitions), whole_round(width)
    print(f"# An update of {size / 1e6:.0f} MB from four agents\n")
    print(
        f"{repetitions} repetitions, median [min, max]; a round once. "
        f"{loopback.machine('lepton-fl', 'grpcio', 'flwr', 'numpy')}.\n"
    )
    print("| what | seconds | MB/s, all four | of raw | aim |\n|---|---|---|---|---|")
    base = statistics.median(bare)
    raw_seconds = [SITES * size / rate for rate in bare]
    print(f"| raw gRPC | {spread(raw_seconds, '.2f')} | {spread([r / 1e6 for r in bare], '.0f')} | 1 | |")
    for name, key, aim in (
        ("upload", "asked", "at least 0.5"),
        ("upload, asked again", "again", "at least 0.5"),
    ):
        rates = [SITES * size / seconds for seconds in up[key]]
        print(
            f"| {name} | {spread(up[key], '.2f')} | {spread([r / 1e6 for r in rates], '.0f')} | "
            f"{statistics.median(rates) / base:.2f} | {aim} |"
        )
    print(f"| the mean | {spread(up['mean'], '.2f')} | | | |")
    print(
        f"| a whole round of {rounds['bytes'] / 1e6:.0f} MB, model sent and checkpoint written | "
        f"{rounds['seconds'][0]:.2f} | | | |"
    )
    print(
        "\nThe server's memory, MB. The upload's aim is at most 1.5 updates and the sum: "
        f"{(1.5 * size + size) / 1e6:.0f} with a float32 sum; the library's is float64, "
        f"{(1.5 * size + 2 * size) / 1e6:.0f}.\n"
    )
    print("| when | process | own, most | own, before | resident, most | resident, before |")
    print("|---|---|---|---|---|---|")
    for when, found in (("upload", up), ("round", rounds)):
        for process, name in (("server", "the server"), ("run", "the run's"), ("both", "both at once")):
            own, resident = (f"{value / 1e6:.0f}" for value in found[process])
            before = found.get(f"{process}_idle") or None
            cells = ["", ""] if before is None else [f"{value / 1e6:.0f}" for value in before]
            print(f"| {when} | {name} | {own} | {cells[0]} | {resident} | {cells[1]} |")
    held = up["both"][0] - up["server_idle"][0] - up["run_idle"][0]
    print(f"\nOf its own for the updates and their sum, both processes: {held / 1e6:.0f} MB.")


if __name__ == "__main__":
    import sys

    if sys.argv[1:2] == ["--raw-server"]:
        asyncio.run(_raw_server(Path(sys.argv[2])))
    else:
        loopback.main(loopback.Roles(report=report, agent=agent, work=work, load=_raw_client))
