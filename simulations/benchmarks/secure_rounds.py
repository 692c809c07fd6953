"""What secure aggregation costs a round in one process: 200 lock-step rounds of 8 sites, and by sites.

    python simulations/benchmarks/secure_rounds.py > simulations/benchmarks/secure_rounds.md

The simulator runs every site and the server one after another on one core, with policies and ledgers on disk:
with the protocol in full, in a session and with fresh keys in each round, and with the same integers and
noise added up in clear ("functional"). All must end with the same model, bit for bit. Training and the
ledger's charges are timed where they happen; what the runs differ in is the protocol: keys, shares,
signatures, masks, and four exchanges or five in place of one. A session's first round has fresh keys, and is
in its figures.

CPU seconds, so that neighbours on a shared machine count little; waiting for the disk is in the wall times
alone. A site's memory of its rounds is in this process; what a deployed site writes for it is measured with
the fleet.

At --profile N: where the time of a round of N sites goes, by function.
"""

from __future__ import annotations

import argparse
import cProfile
import math
import os
import pstats
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import loopback
from loopback import spread

SITES, ROUNDS = 8, 200
HIDDEN = 113
"""Of the MLP on the heart records' 42 features: 4,973 parameters."""
BY_SITES = {4: 20, 8: 20, 16: 20, 32: 10, 64: 5, 128: 3}
"""Sites, and rounds that are measured."""
DEALT = 16
"""Sites up to which the records are dealt; more sites have the same records again."""


def study(sites: int, rounds: int, suite: str = "LSA1", **changes: Any) -> tuple[Any, Any]:
    made, splits = loopback.heart(
        min(sites, DEALT),
        train__rounds=rounds,
        model__name="mlp",
        model__hidden=[HIDDEN],
        privacy__noise="shared",
        privacy__delta=1e-3,
        secure_aggregation__enabled=True,
        secure_aggregation__suite=suite,
        **changes,
    )
    tables = list(splits.values())
    return made, {f"site-{i:03d}": tables[i % len(tables)] for i in range(sites)}


Seams = Sequence[tuple[str, Any, str]]
"""What is timed: what for, and the object and the name of the function there."""


def seams() -> Seams:
    """Training, and the ledger's charges."""
    from lepton_fl.privacy.ledger import Ledger
    from lepton_fl.simulation import stacked

    return (("training", stacked, "train_together"), ("ledger", Ledger, "charge"))


class Watch:
    """CPU and wall seconds by what they went into, and those of all rounds.

    What is timed inside of something else that is timed counts for itself alone.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.wall: Counter[str] = Counter()
        self.rounds = 0
        self._began = 0.0
        self._within: list[list[float]] = [[0.0, 0.0]]
        """Of each call that goes on: CPU and wall seconds of the calls in it."""

    def timed(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(*args: Any, **more: Any) -> Any:
            self._within.append([0.0, 0.0])
            before, wall = time.process_time(), time.perf_counter()
            try:
                return function(*args, **more)
            finally:
                took = time.process_time() - before, time.perf_counter() - wall
                inner = self._within.pop()
                for each, outer in enumerate(took):
                    self._within[-1][each] += outer
                self.seconds[what] += took[0] - inner[0]
                self.wall[what] += took[1] - inner[1]

        return wrapper

    def joined(self, *_: object) -> None:
        self._began = time.process_time()

    def round_done(self, report: Any, _: object) -> None:
        assert report.sites, report.dropped
        self.rounds += 1
        self.seconds["all rounds"] = time.process_time() - self._began
        self.wall["all rounds"] += report.seconds

    @contextmanager
    def watching(self, timed: Seams) -> Iterator[None]:
        """The seams are timed meanwhile."""
        plain = [(owner, name, getattr(owner, name)) for _, owner, name in timed]
        for (what, owner, name), (_, _, function) in zip(timed, plain, strict=True):
            setattr(owner, name, self.timed(what, function))
        try:
            yield
        finally:
            for owner, name, function in plain:
                setattr(owner, name, function)


def measured(made: Any, splits: Any, *, masked: bool, timed: Seams | None = None) -> tuple[Watch, str]:
    """One run, and its model's digest. None: training and the ledger's charges are timed."""
    from lepton_fl.simulation.run import prepare
    from lepton_fl.tasks import model_hash

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder, watch.watching(seams() if timed is None else timed):
        home = Path(folder)
        run = prepare(
            made,
            splits,
            0,
            folder=home / "sites",
            checkpoint=home / "checkpoint.safetensors",
            observer=watch,
            masked=masked,
        )
        try:
            run.start()
        finally:
            run.close()
    return watch, model_hash(run.federation.model)


def ways(sites: int, rounds: int, suite: str = "LSA1") -> tuple[Watch, Watch, Watch]:
    """A run in a session, one with fresh keys in each round and a functional one, which agree."""
    made, splits = study(sites, rounds, suite)
    session, model = measured(made, splits, masked=True)
    functional, other = measured(made, splits, masked=False)
    assert model == other, "the protocol made another model than the sum in clear"
    fresh, _ = measured(*study(sites, rounds, suite, secure_aggregation__sessions=False), masked=True)
    return session, fresh, functional


def report(*, quick: bool, repetitions: int) -> None:
    rounds = 5 if quick else ROUNDS
    ways(4, 2)  # imports, caches
    found = [ways(SITES, rounds) for _ in range(repetitions)]

    def of(which: int, what: str) -> list[float]:
        return [three[which].seconds[what] for three in found]

    def protocol(which: int) -> list[float]:
        pairs = zip(of(which, "all rounds"), of(2, "all rounds"), strict=True)
        return [full - functional for full, functional in pairs]

    print("# Secure rounds in one process\n")
    print(
        "MLP of 4,973 parameters, lock-step with shared noise, ledgers on disk; median [min, max] of "
        f"{repetitions}. {loopback.machine('lepton-fl', 'torch', 'flwr', 'cryptography')}.\n"
    )
    print(f"## {rounds} rounds of {SITES} sites\n")
    print("| CPU seconds | in a session | fresh keys | functional |\n|---|---|---|---|")
    for what in ("all rounds", "training", "ledger"):
        print(f"| {what} |" + "".join(f" {spread(of(which, what), '.1f')} |" for which in range(3)))
    print("| the protocol |" + "".join(f" {spread(protocol(which), '.1f')} |" for which in range(2)) + " |")
    per_round = [[1000 * seconds / rounds for seconds in protocol(which)] for which in range(2)]
    print(
        "| the protocol, milliseconds a round |"
        + "".join(f" {spread(ms, '.0f')} |" for ms in per_round)
        + " |"
    )
    for what in ("all rounds", "ledger"):
        walls = [spread([three[which].wall[what] for three in found], ".1f") for which in range(3)]
        print(f"| wall seconds, {what} |" + "".join(f" {wall} |" for wall in walls))
    print("\n## By the number of sites\n\nCPU milliseconds a round.\n")
    print(
        "| sites | suite | in a session | fresh keys | functional | the protocol in a session | fresh keys |"
    )
    print("|---|---|---|---|---|---|---|")
    cases = [(n, r, "LSA1") for n, r in BY_SITES.items()] + [(8, 20, "LSA1-PQ")]
    for sites, wanted, suite in cases if not quick else [(4, 2, "LSA1")]:
        ms = [1000 * watch.seconds["all rounds"] / watch.rounds for watch in ways(sites, wanted, suite)]
        pairs = math.comb(sites, 2)
        costs = [f"{cost:.0f} ({cost / pairs:.2f} a pair)" for cost in (ms[0] - ms[2], ms[1] - ms[2])]
        figures = [f"{figure:.0f}" for figure in ms] + costs
        print(f"| {sites} | {suite} | {' | '.join(figures)} |", flush=True)


def profile(sites: int) -> None:
    made, splits = study(sites, 10)
    found = cProfile.Profile()
    found.runcall(measured, made, splits, masked=True)
    pstats.Stats(found, stream=sys.stdout).sort_stats("tottime").print_stats(35)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that it runs")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--profile", type=int, metavar="N", help="of a round of N sites, instead")
    given = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    if given.profile:
        profile(given.profile)
    else:
        report(quick=given.quick, repetitions=1 if given.quick else given.repetitions)


if __name__ == "__main__":
    main()
