"""Rounds a second on pfl-research's own benchmark: CIFAR10's shapes, IID, no privacy; ours beside theirs.

    python simulations/benchmarks/pfl_cifar.py > simulations/benchmarks/pfl_cifar.md

Their published set-up (apple/pfl-research, publications/pfl): 1,000 users of 50 images, a cohort of 50 a
round, their CNN of two convolutions, one local epoch in batches of 10. The images are made up, and their
dropout is left out on both sides: speed alone is measured. Ours has no sampling of clients, so its 50 sites
are the same in each round, which is the same work; its batches are Poisson samples of 10 in expectation. Its
policies are obeyed and its ledgers kept, and it is measured once more with DP-SGD.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import loopback
from loopback import spread
from peers import PINS, cpu_of, workers

SETUP = {"images": 50, "cohort": 50, "batch": 10}
USERS = 1000
ROUNDS = 6
"""The first is set aside."""


def rounds_of(peer: str, **asked: Any) -> list[tuple[float, float]]:
    """CPU and wall seconds of each round but the first."""
    at = []
    with workers(peer) as found:
        worker = found[peer]
        worker.tell({"do": "cifar", **asked})
        while "round" in (said := worker.hear()):
            at.append((cpu_of(worker.pid), time.perf_counter()))
    assert "error" not in said, said
    return [(cpu - cpu_before, wall - before) for (cpu_before, before), (cpu, wall) in pairwise(at)]


def report(*, quick: bool, rounds: int) -> None:
    setup = {"images": 20, "cohort": 3, "batch": 10, "rounds": 2} if quick else {**SETUP, "rounds": rounds}
    found = {
        "lepton_fl": rounds_of("ours", **setup, private=False),
        "pfl-research": rounds_of("pfl", **setup, users=USERS),
        "lepton_fl, DP-SGD": rounds_of("ours", **setup, private=True),
    }
    theirs = [cpu for cpu, _ in found["pfl-research"]]
    print("# pfl-research's own benchmark\n")
    print(
        f"{USERS:,} users x {setup['images']} images of 32 x 32 x 3, cohort {setup['cohort']}, CNN of 1.6 "
        f"million parameters, an epoch in batches of {setup['batch']}; median [min, max] of "
        f"{setup['rounds'] - 1} rounds after the first, one thread. "
        f"{loopback.machine('lepton-fl', 'torch')}; the peer: {', '.join(PINS['pfl'])}.\n"
    )
    print("| simulator | rounds a minute | CPU s a round | wall s a round | CPU, of pfl's |")
    print("|---|---|---|---|---|")
    for name, times in found.items():
        cpu, wall = ([each[which] for each in times] for which in (0, 1))
        print(
            f"| {name} | {60 / statistics.median(wall):.1f} | {spread(cpu, '.2f')} | {spread(wall, '.2f')} "
            f"| {statistics.median(cpu) / statistics.median(theirs):.2f} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three sites, to see that it runs")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args(arguments)
    report(quick=given.quick, rounds=given.rounds)


if __name__ == "__main__":
    main()
