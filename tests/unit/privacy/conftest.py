"""A ledger whose budget has room for exactly ten rounds."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lepton_fl.privacy import Charge, Gaussian, Ledger, epsilon
from lepton_fl.privacy.ledger import Budget

STEP = Gaussian(noise_multiplier=2.0, sampling_rate=0.2, steps=1)
DELTA = 1e-5


def cost(rounds: int, delta: float = DELTA) -> float:
    return epsilon([replace(STEP, steps=rounds)], delta)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.db"


@pytest.fixture
def open_ledger(path: Path) -> Iterator[Callable[[], Ledger]]:
    """Open the file once more; all are closed in the end."""
    opened: list[Ledger] = []

    def run() -> Ledger:
        opened.append(Ledger(path))
        return opened[-1]

    yield run
    for ledger in opened:
        ledger.close()


@pytest.fixture
def ledger(open_ledger: Callable[[], Ledger]) -> Ledger:
    return open_ledger()


@pytest.fixture
def budget() -> Budget:
    """Room for ten rounds of `STEP`, in all and in each study."""
    return Budget(
        data_set="cards-2026",
        epsilon_total=cost(10),
        epsilon_per_study=cost(10),
        delta_total=DELTA,
        file="policy.toml",
    )


@pytest.fixture
def make_charge() -> Callable[..., Charge]:
    """One round of study s, run r; anything may be replaced."""

    def make(round: int = 1, **changes: Any) -> Charge:
        charge = Charge(
            study="s",
            study_name="study-s",
            run="r",
            round=round,
            event=STEP,
            clip=1.0,
            unit="record",
            delta=DELTA,
            fingerprint="f",
        )
        return replace(charge, **changes)

    return make


@pytest.fixture
def spend(ledger: Ledger, budget: Budget, make_charge: Callable[..., Charge]) -> Callable[..., None]:
    """Charge these rounds of a run that may take one more at a time."""

    def run(*rounds: int, **changes: Any) -> None:
        for number in rounds:
            ledger.charge(make_charge(number, **changes), rounds=1, budget=budget)

    return run
