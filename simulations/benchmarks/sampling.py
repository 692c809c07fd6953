"""What sampling costs: an epoch of Poisson batches by our sampler and by Opacus's DPDataLoader.

    python simulations/benchmarks/sampling.py > simulations/benchmarks/sampling.md

A table of 20,000 records of 30 features; an epoch is as many batches as a whole pass would have, each with
its features and labels gathered and nothing computed. One thread; the two take turns. Ours draws from
AES-256-CTR, Opacus from torch's Mersenne Twister.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import loopback
from loopback import spread
from peers import PINS, workers

ROWS, FEATURES = 20_000, 30
BATCHES = (64, 256, 4096)
REPETITIONS = 5
SECONDS = 0.3


def report(*, quick: bool) -> None:
    repetitions, seconds = (2, 0.01) if quick else (REPETITIONS, SECONDS)
    print("# Sampling\n")
    print(
        f"CPU milliseconds an epoch (wall: median), median [min, max] of {repetitions}, one thread; {ROWS:,} "
        f"records of {FEATURES} features. {loopback.machine('lepton-fl', 'torch', 'numpy')}; the peer: "
        f"{', '.join(PINS['opacus'])}.\n"
    )
    print("| expected batch | ours | wall | DPDataLoader | wall | times faster, CPU |")
    print("|---|---|---|---|---|---|")
    with workers("ours", "opacus") as found:
        for batch in BATCHES:
            asked = {"rows": ROWS, "features": FEATURES, "batch": batch, "seconds": seconds}
            turns = [
                {name: worker.ask(do="sampling", **asked) for name, worker in found.items()}
                for _ in range(repetitions)
            ]
            for name in found:
                # DPDataLoader samples at 1 / (number of batches), which is not quite the rate asked for.
                assert 0.9 * batch < turns[-1][name]["mean_batch"] < 1.1 * batch, (name, turns[-1])
            cpu, wall = (
                {name: [1e3 * turn[name][which] for turn in turns] for name in found}
                for which in ("cpu", "wall")
            )
            faster = [turn["opacus"]["cpu"] / turn["ours"]["cpu"] for turn in turns]
            print(
                f"| {batch} | {spread(cpu['ours'], '.1f')} | {statistics.median(wall['ours']):.1f} "
                f"| {spread(cpu['opacus'], '.0f')} | {statistics.median(wall['opacus']):.0f} "
                f"| {spread(faster, '.0f')} |",
                flush=True,
            )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short repetitions, to see that it runs")
    report(quick=parser.parse_args(arguments).quick)


if __name__ == "__main__":
    main()
