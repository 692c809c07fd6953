"""A thousand agents on one server: what a round takes that reaches all of them, and what one costs idle.

    python simulations/benchmarks/fleet_thousand.py > simulations/benchmarks/fleet_thousand.md

The agents are light: they speak the protocol, each over a TLS connection of its own with a certificate of its
own, but answer at once with an update made beforehand. Two processes hold them. Server, run's process and
round loop are the library's: a round is sent out, answered, checked, averaged over all sites and put on disk.
Memory is the growth of the server's process from before the first agent came until all were connected and
idle; its peak is over the rounds too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any, cast

import grpc.aio
import loopback
from loopback import fleet, memory, spread

import lepton_fl.fleet  # before grpc
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.methods import PROTOCOL, connect_method
from lepton_fl.fleet.protocol.payload import Payload

AGENTS, ROUNDS = 1000, 20
LOAD_PROCESSES = 2
AT_ONCE = 50
"""Agents of one process that connect at the same time."""
SETTLE_S = 3.0


def names(agents: int) -> list[str]:
    return [f"site-{number:05d}" for number in range(agents)]


def replies(folder: Path, site: str) -> dict[str, Payload]:
    """What a site answers, by the kind of message. Its update is 1 in every coordinate."""
    import numpy as np
    from flwr.app import ConfigRecord, MetricRecord, RecordDict

    from lepton_fl.fleet.protocol.records import pack
    from lepton_fl.messages import ARRAYS, CONFIG, EVALUATE, JOIN, METRICS, TRAIN, WEIGHT, to_record

    shapes = json.loads((folder / "shapes.json").read_text())
    update = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    weight = MetricRecord({WEIGHT: 1.0})
    contents = {
        JOIN: RecordDict({CONFIG: ConfigRecord({"site": site})}),
        TRAIN: RecordDict({ARRAYS: to_record(update), METRICS: weight}),
        EVALUATE: RecordDict({METRICS: weight}),
    }
    return {kind: pack(content, folder / "unused") for kind, content in contents.items()}


async def load(folder: Path, port: int, sites: list[str]) -> None:
    """Many agents in one process."""
    gate = asyncio.Semaphore(AT_ONCE)
    agents = [asyncio.create_task(_agent(folder, port, site, gate)) for site in sites]
    ended = asyncio.create_task(loopback.input_closed())
    # One that fails ends the benchmark.
    done, _ = await asyncio.wait([ended, *agents], return_when=asyncio.FIRST_COMPLETED)
    for agent in agents:
        agent.cancel()
    await asyncio.gather(*agents, return_exceptions=True)
    for task in done:
        task.result()


async def _agent(folder: Path, port: int, site: str, gate: asyncio.Semaphore) -> None:
    from lepton_fl.privacy.ledger import Head, Statement
    from lepton_fl.secagg.identity import IdentityKey

    answers = replies(folder, site)
    key = IdentityKey.generate()

    def stated(run: str) -> bytes:
        """Of a ledger in which nothing was charged."""
        return Statement.issue(key, site=site, data_set="records", head=Head(1, bytes(32)), run=run).signed

    async with loopback.site_channel(folder / "pki", site, port) as channel:
        stream = connect_method(channel)()
        hello = pb.Hello(
            protocol=PROTOCOL,
            release=lepton_fl.__version__,
            site=site,
            instance=os.urandom(16),
            statement=stated(""),
        )
        async with gate:
            await stream.write(pb.FromAgent(hello=hello))
            said = cast("pb.ToAgent", await stream.read())
            assert said.HasField("welcome")
        while (found := await stream.read()) is not grpc.aio.EOF:
            said = cast("pb.ToAgent", found)
            if said.HasField("assign"):
                asked = said.assign
                payload = answers[asked.type]
                result = pb.Result(
                    exchange=asked.exchange,
                    size=payload.size,
                    sha256=payload.sha256,
                    inline=payload.inline,
                    statement=stated(asked.run),
                )
                await stream.write(pb.FromAgent(result=result))
            elif said.HasField("heartbeat"):
                await stream.write(pb.FromAgent(heartbeat=pb.Heartbeat()))


def report(given: argparse.Namespace) -> None:
    import numpy as np

    from lepton_fl.data import Contract
    from lepton_fl.simulation.run import first_model

    agents, rounds = (40, 3) if given.quick else (given.agents, given.rounds)
    changes: dict[str, Any] = {
        "model__name": "mlp",
        "train__rounds": rounds,
        "train__optimizer": "sgd",
        "train__lr": 1.0,
    }
    study, _ = loopback.heart(**changes, secure_aggregation__min_sites=agents)
    first = {name: np.zeros_like(a) for name, a in first_model(study, Contract.of(study).width, 0).items()}
    with fleet(names(agents)) as made:
        shapes = {name: array.shape for name, array in first.items()}
        (made.folder / "shapes.json").write_text(json.dumps(shapes))
        time.sleep(SETTLE_S)
        before = memory(made.server.pid)
        began = time.perf_counter()
        made.start_load(LOAD_PROCESSES)
        made.wait()
        connecting = time.perf_counter() - began
        time.sleep(SETTLE_S)
        idle = memory(made.server.pid)
        found, events = made.run(study, first_model=first)
        time.sleep(SETTLE_S)
        after = memory(made.server.pid)
    assert found["done"] == rounds
    assert all(len(event["sites"]) == agents and not event["dropped"] for event in events)
    seconds = [event["seconds"] for event in events]
    parameters = sum(array.size for array in first.values())
    print(f"# {agents:,} agents\n")
    print(
        f"Model of {parameters} parameters, {rounds} rounds; median [min, max]. "
        f"{loopback.machine('lepton-fl', 'grpcio', 'flwr')}.\n"
    )
    print("| what | measured | aim |\n|---|---|---|")
    print(f"| round, s | {spread(seconds, '.2f')} | at most 5 |")
    print(f"| round, p99, s | {loopback.percentile(seconds, 0.99):.2f} | |")
    for name, key in (("resident", "resident"), ("own (anonymous)", "own")):
        each = (idle[key] - before[key]) / agents / 1000
        aim = "at most 200" if key == "resident" else ""
        print(f"| server's memory for an idle agent, {name}, kB | {each:.0f} | {aim} |")
    each = (after["resident"] - before["resident"]) / agents / 1000
    print(f"| the same after the rounds, resident, kB | {each:.0f} | |")
    print(f"| server, resident before, MiB | {before['resident'] / 2**20:.0f} | |")
    print(f"| server, resident with all idle, MiB | {idle['resident'] / 2**20:.0f} | |")
    print(f"| server, peak over connecting and rounds, MiB | {after['peak'] / 2**20:.0f} | |")
    print(f"| all agents start and connect, s | {connecting:.1f} | |")
    assert statistics.median(seconds) > 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--agents", type=int, default=AGENTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)


if __name__ == "__main__":
    loopback.main(loopback.Roles(report=report, load=load), _arguments)
