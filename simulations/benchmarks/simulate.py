"""What a simulated round costs: ours, Opacus one after another, pfl-research and Flower's Ray engine.

    python simulations/benchmarks/simulate.py > simulations/benchmarks/simulate.md

10, 100 and 1,000 clients of 200 to 2,000 records each (federation.py); in a round each trains an MLP
30-64-32-1 for an epoch in expectation, 20 steps of DP-SGD at the same rate, clip and noise; the server takes
the mean. All begin with the same parameters, and all are judged on the same records, which no client has: a
simulator that trains less would show it. Each runs in a process, and in an environment, of its own
(peers.py); clients of the peers train with Opacus. Ours runs its sites' policies, accounting and ledgers
besides.

CPU seconds are of all processes that a simulator started. The first round is counted from the start of the
process, imports included; the others are the steady ones. Memory is what all processes together hold at the
end of a round, shared pages once.

At --clients N: only these. At --only PEER: only this one, and others so named. At --scale N: peers are run at
up to N clients, and their figures scaled beyond, which the table says.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import loopback
from peers import PINS, cpu_of, memory_of, workers

ROUNDS = {10: 10, 100: 7, 1000: 3}
"""By the number of clients."""
TITLES = {
    "ours": "lepton_fl",
    "process": "lepton_fl, `--engine process`",
    "opacus": "Opacus, one after another",
    "pfl": "pfl-research with Opacus",
    "flower": "Flower + Ray, with Opacus",
}
ENGINES = {"ours": "vectorised", "process": "process"}
"""The two that are ours."""
SCALED = {"flower": 100}
"""Above so many clients a simulator's figures are theirs, scaled: to run it would take an hour."""
HEAD = """\
| simulator | CPU s a round | wall s a round | CPU, of ours | first round, CPU s | wall s | memory, MB | AUC |
|---|---|---|---|---|---|---|---|"""
SAME = 0.02
"""Most that two simulators' AUC may be apart."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One simulator's rounds: seconds since its process began, CPU seconds, bytes; at the end of each."""

    wall: list[float]
    cpu: list[float]
    memory: list[int]
    auc: float

    def steady(self, which: list[float]) -> list[float]:
        """Of each round but the first."""
        return [after - before for before, after in pairwise(which)]


def run(simulator: str, path: Path, rounds: int) -> Found | str:
    """The federation at `path`, simulated; or what went wrong."""
    wall: list[float] = []
    cpu: list[float] = []
    memory: list[int] = []
    began = time.perf_counter()
    peer = "ours" if simulator in ENGINES else simulator
    engine = {"engine": ENGINES[simulator]} if simulator in ENGINES else {}
    with workers(peer) as found:
        worker = found[peer]
        worker.tell({"do": "simulate", "path": str(path), "rounds": rounds, **engine})
        while "round" in (said := worker.hear()):
            wall.append(time.perf_counter() - began)
            cpu.append(cpu_of(worker.pid))
            memory.append(memory_of(worker.pid))
    if "error" in said:
        return str(said["error"])
    assert len(wall) == rounds, (simulator, len(wall), rounds)
    return Found(wall=wall, cpu=cpu, memory=memory, auc=said["auc"])


def line(name: str, found: Found, ours: float) -> str:
    """A row of the table; `ours` is the CPU time of our steady round."""
    walls, cpus = found.steady(found.wall), found.steady(found.cpu)
    return (
        f"| {name} | {loopback.spread(cpus, '.3g')} | {loopback.spread(walls, '.3g')} "
        f"| {statistics.median(cpus) / ours:.1f} | {found.cpu[0]:.1f} | {found.wall[0]:.1f} "
        f"| {max(found.memory) / 1e6:,.0f} | {found.auc:.4f} |"
    )


def scaled(name: str, found: Found, clients: int, of: int, ours: float) -> str:
    """The same for figures of fewer clients."""
    cpu, wall = (statistics.median(found.steady(w)) * clients / of for w in (found.cpu, found.wall))
    return f"| {name}, *scaled from {of}* | *{cpu:.3g}* | *{wall:.3g}* | *{cpu / ours:.1f}* | | | | |"


def report(arguments: argparse.Namespace) -> None:
    sizes = [arguments.clients] if arguments.clients else list(ROUNDS)
    peers = arguments.only or list(TITLES)
    kept: dict[tuple[str, int], Found] = {}
    print("# Simulated rounds\n")
    print(
        "MLP 30-64-32-1, clients of 200 to 2,000 records, 20 steps of DP-SGD a round. Medians of the rounds "
        "after the first, [min, max]; one thread a process. Without masks or shared noise, which no peer "
        "has."
    )
    with tempfile.TemporaryDirectory() as folder:
        for clients in sizes:
            rounds = arguments.rounds or ROUNDS.get(clients, 3)
            path = Path(folder) / f"{clients}.npz"
            with workers("ours") as found:
                made = found["ours"].ask(
                    do="write_federation", path=str(path), clients=clients, rounds=rounds
                )
            assert "error" not in made, made
            print(f"{clients} clients: noise multiplier {made['noise']:.3f}", file=sys.stderr)
            print(f"\n## {clients:,} clients, {rounds} rounds\n")
            print(HEAD, flush=True)
            ours = float("nan")
            for peer in peers:
                of = arguments.scale or SCALED.get(peer)
                if of is not None and clients > of and peer not in ENGINES:
                    if (peer, of) in kept:
                        print(scaled(TITLES[peer], kept[peer, of], clients, of, ours), flush=True)
                    continue
                result = run(peer, path, rounds)
                if isinstance(result, str):
                    print(f"| {TITLES[peer]} | no: {result} | | | | | | |", flush=True)
                    continue
                kept[peer, clients] = result
                if peer == "ours":
                    ours = statistics.median(result.steady(result.cpu))
                print(line(TITLES[peer], result, ours), flush=True)
            aucs = [found.auc for (_, n), found in kept.items() if n == clients]
            assert max(aucs, default=0.0) - min(aucs, default=0.0) < SAME, aucs
    pins = dict.fromkeys(pin for pins in PINS.values() for pin in pins)
    print(f"\n{loopback.machine('lepton-fl', 'torch', 'flwr')}; peers: {', '.join(pins)}.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--scale", type=int, metavar="N")
    parser.add_argument("--only", choices=TITLES, action="append")
    report(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
