"""What secure aggregation costs a round in one process: 200 lock-step rounds of 8 sites, and by sites.

    python simulations/benchmarks/secure_rounds.py > simulations/benchmarks/secure_rounds.md

The simulator runs every site and the server one after another on one core, with policies and ledgers on disk;
once with the protocol in full, once with the same integers and noise added up in clear ("functional"). Both
must end with the same model, bit for bit. Training and the ledger's charges are timed where they happen; what
the two runs differ in is the protocol: keys, shares, signatures, masks, and five exchanges in place of one.

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
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import loopback
from loopback import spread

SITES, ROUNDS = 8, 200
HIDDEN = 113
"""Of the MLP on the heart records' 42 features: 4,973 parameters."""
BY_SITES = {4: 20, 8: 20, 16: 5, 32: 3, 64: 1, 128: 1}
"""Sites, and rounds that are measured."""
DEALT = 16
"""Sites up to which the records are dealt; more sites have the same records again."""


def study(sites: int, rounds: int, suite: str = "LSA1") -> tuple[Any, Any]:
    made, splits = loopback.heart(
        min(sites, DEALT),
        train__rounds=rounds,
        model__name="mlp",
        model__hidden=[HIDDEN],
        privacy__noise="shared",
        privacy__delta=1e-3,
        secure_aggregation__enabled=True,
        secure_aggregation__suite=suite,
    )
    tables = list(splits.values())
    return made, {f"site-{i:03d}": tables[i % len(tables)] for i in range(sites)}


class Watch:
    """CPU seconds by what they went into, those of all rounds among them, and the rounds' wall time."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.wall: Counter[str] = Counter()
        self.rounds = 0
        self._began = 0.0

    def timed(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **more: Any) -> Any:
            before, wall = time.process_time(), time.perf_counter()
            try:
                return function(*args, **more)
            finally:
                self.seconds[what] += time.process_time() - before
                self.wall[what] += time.perf_counter() - wall

        return wrapper

    def joined(self, *_: object) -> None:
        self._began = time.process_time()

    def round_done(self, report: Any, _: object) -> None:
        assert report.sites, report.dropped
        self.rounds += 1
        self.seconds["all rounds"] = time.process_time() - self._began
        self.wall["all rounds"] += report.seconds

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Training and charging are timed meanwhile."""
        from lepton_fl.privacy.ledger import Ledger
        from lepton_fl.site import app

        train, charge = app.train_locally, Ledger.charge
        app.train_locally = self.timed("training", train)
        Ledger.charge = self.timed("ledger", charge)  # type: ignore[method-assign]
        try:
            yield
        finally:
            app.train_locally, Ledger.charge = train, charge  # type: ignore[method-assign]


def measured(made: Any, splits: Any, *, masked: bool) -> tuple[Watch, str]:
    """One run, and its model's digest."""
    from lepton_fl.simulation.run import prepare
    from lepton_fl.tasks import model_hash

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder, watch.watching():
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


def both(sites: int, rounds: int, suite: str = "LSA1") -> tuple[Watch, Watch]:
    """A run in full and a functional one, which agree."""
    made, splits = study(sites, rounds, suite)
    full, model = measured(made, splits, masked=True)
    functional, other = measured(made, splits, masked=False)
    assert model == other, "the protocol made another model than the sum in clear"
    return full, functional


def report(*, quick: bool, repetitions: int) -> None:
    rounds = 5 if quick else ROUNDS
    found = [both(SITES, rounds) for _ in range(repetitions)]

    def of(which: int, what: str) -> list[float]:
        return [pair[which].seconds[what] for pair in found]

    whole = of(0, "all rounds"), of(1, "all rounds")
    protocol = [full - functional for full, functional in zip(*whole, strict=True)]
    print("# Secure rounds in one process\n")
    print(
        "MLP of 4,973 parameters, lock-step with shared noise, ledgers on disk; median [min, max] of "
        f"{repetitions}. {loopback.machine('lepton-fl', 'torch', 'flwr', 'cryptography')}.\n"
    )
    print(f"## {rounds} rounds of {SITES} sites\n")
    print("| CPU seconds | in full | functional |\n|---|---|---|")
    for what in ("all rounds", "training", "ledger"):
        print(f"| {what} | {spread(of(0, what), '.1f')} | {spread(of(1, what), '.1f')} |")
    print(f"| the protocol | {spread(protocol, '.1f')} | |")
    per_round = [1000 * seconds / rounds for seconds in protocol]
    print(f"| the protocol, milliseconds a round | {spread(per_round, '.0f')} | |")
    for what in ("all rounds", "ledger"):
        walls = [spread([pair[which].wall[what] for pair in found], ".1f") for which in (0, 1)]
        print(f"| wall seconds, {what} | {walls[0]} | {walls[1]} |")
    print("\n## By the number of sites\n\nCPU milliseconds a round.\n")
    print("| sites | suite | in full | functional | the protocol | for each pair |")
    print("|---|---|---|---|---|---|")
    cases = [(n, r, "LSA1") for n, r in BY_SITES.items()] + [(8, 20, "LSA1-PQ")]
    for sites, wanted, suite in cases if not quick else [(4, 2, "LSA1")]:
        ms = [1000 * watch.seconds["all rounds"] / watch.rounds for watch in both(sites, wanted, suite)]
        cost, pairs = ms[0] - ms[1], math.comb(sites, 2)
        print(
            f"| {sites} | {suite} | {ms[0]:.0f} | {ms[1]:.0f} | {cost:.0f} | {cost / pairs:.2f} |", flush=True
        )


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
