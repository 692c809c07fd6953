"""What a ledger costs as it grows: to open and verify it, to charge and commit a round; and under witness.

    python simulations/benchmarks/ledger.py > simulations/benchmarks/ledger.md

Runs of 200 rounds each are written in one transaction a run; then one more run is charged round by round, as
a site does it. On a disk in memory where there is one, so that fsync is not what is measured.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from lepton_fl.privacy import Charge, Gaussian, Ledger
from lepton_fl.privacy.ledger import Budget, Receipt, Statement, Witness
from lepton_fl.privacy.ledger.entries import Commit
from lepton_fl.secagg.identity import IdentityKey

T = TypeVar("T")
DATA = "records"
BUDGET = Budget(data_set=DATA, epsilon_total=1e6, epsilon_per_study=1e6, delta_total=1e-5, file="policy.toml")
STEP = Gaussian(noise_multiplier=50.0, sampling_rate=0.01, steps=1)
ROUNDS = 200
MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it


def charge(run: str, round: int) -> Charge:
    return Charge(
        study="5" * 64,
        study_name="card-fraud",
        run=run,
        round=round,
        event=STEP,
        clip=1.0,
        unit="record",
        delta=1e-5,
        fingerprint="f" * 64,
    )


def filled(path: Path, entries: int) -> None:
    """A ledger with at least so many entries."""
    with closing(Ledger(path)) as ledger:
        number = 0
        while ledger.head().counter < entries:
            number += 1
            with ledger._appending():
                for round in range(1, ROUNDS + 1):
                    ledger._append(DATA, charge(f"{number:032x}", round))
                    ledger._append(DATA, Commit(f"{number:032x}", round, bytes(32)))


def timed(path: Path) -> tuple[float, float, float]:
    """Seconds to open; milliseconds to charge and to commit a round, medians."""
    opened = []
    for _ in range(3):
        began = time.perf_counter()
        ledger = Ledger(path)
        opened.append(time.perf_counter() - began)
        ledger.close()
    with closing(Ledger(path)) as ledger:
        # The first composes; the rest find its reservation.
        ledger.charge(charge("f" * 32, 1), rounds=ROUNDS, budget=BUDGET)
        charged, committed = [], []
        for round in range(2, 102):
            began = time.perf_counter()
            ledger.charge(charge("f" * 32, round), rounds=ROUNDS, budget=BUDGET)
            middle = time.perf_counter()
            ledger.commit(DATA, run="f" * 32, round=round, sha256=bytes(32))
            charged.append(middle - began)
            committed.append(time.perf_counter() - middle)
    return min(opened), 1e3 * statistics.median(charged), 1e3 * statistics.median(committed)


def witnessed(folder: Path) -> list[tuple[str, float]]:
    """Milliseconds of CPU for what is stated of a round, and seen of it; medians."""
    spent: dict[str, list[float]] = {}

    def timing(what: str, action: Callable[[], T]) -> T:
        began = time.process_time()
        made = action()
        spent.setdefault(what, []).append(1e3 * (time.process_time() - began))
        return made

    identity, server = IdentityKey.generate(), IdentityKey.generate()
    with (
        closing(Ledger(folder / "ledger.db")) as ledger,
        closing(Witness(folder / "witness.db", name="the server", key=server)) as witness,
    ):
        for round in range(1, 101):
            ledger.charge(charge("f" * 32, round), rounds=ROUNDS, budget=BUDGET)
            told = timing(
                "the site states it",
                lambda round=round: ledger.state(
                    site="bank", data_set=DATA, run="f" * 32, round=round, identity=identity
                ),
            )
            read = timing("a witness verifies it", lambda told=told: Statement.read(told.signed))
            timing("judges and remembers it", lambda read=read: witness.see(read))
            (given,) = timing("countersigns, for the last of many", witness.countersign)
            receipt = timing("the site verifies a receipt", lambda given=given: Receipt.read(given.signed))
            timing("and keeps it", lambda receipt=receipt: ledger.keep(receipt))
    return [(what, statistics.median(each)) for what, each in spent.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest alone")
    sizes = (1_000,) if parser.parse_args().quick else (1_000, 10_000, 100_000)
    print("# A ledger as it grows\n")
    print(
        f"{platform.machine()}, {os.cpu_count()} CPU cores, {platform.system()} {platform.release()}, Python "
        f"{platform.python_version()}; the disk is {'memory' if MEMORY.is_dir() else 'a disk'}.\n"
    )
    print("| entries | file, MB | open and verify, s | charge, ms | commit, ms |")
    print("|---|---|---|---|---|")
    for entries in sizes:
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
            path = Path(folder) / "ledger.db"
            filled(path, entries)
            size = path.stat().st_size / 1e6
            opened, charged, committed = timed(path)
            print(
                f"| {entries:,} | {size:.1f} | {opened:.2f} | {charged:.2f} | {committed:.2f} |", flush=True
            )
    print("\n## Under witness\n\n| of one round | CPU, ms |\n|---|---|")
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        for what, spent in witnessed(Path(folder)):
            print(f"| {what} | {spent:.2f} |")
    print(f"\nLoad average at the end {os.getloadavg()[0]:.1f}.")


if __name__ == "__main__":
    main()
