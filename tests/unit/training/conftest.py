"""Small tables of units with several records, plans without noise, and models to train on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lepton_fl.privacy.lattice import Lattice
from lepton_fl.tasks import arrays_of
from lepton_fl.tasks.task import BINARY
from lepton_fl.training import LocalPlan, LocalUpdate, SimulationNoise, train_locally


@dataclass
class Records:
    """What training needs of a table, and no more."""

    x_NF: np.ndarray
    y_N: np.ndarray
    unit_N: np.ndarray
    units: int


@pytest.fixture
def make_records() -> Callable[..., Records]:
    """Random records; `sizes` says how many each unit has, in an order that mixes the units."""

    def make(sizes: Sequence[int], *, features: int = 4, seed: int = 1) -> Records:
        rng = np.random.default_rng(seed)
        unit_N = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        x_NF = rng.uniform(-1, 1, (len(unit_N), features)).astype(np.float32)
        y_N = (rng.random(len(unit_N)) < 0.3).astype(np.float32)
        return Records(x_NF, y_N, unit_N, len(sizes))

    return make


@pytest.fixture
def one_hot() -> Callable[[int], Records]:
    """As many units as features, each alone with one: its weight moves if and only if it is sampled."""

    def make(units: int) -> Records:
        return Records(
            np.eye(units, dtype=np.float32), np.ones(units, dtype=np.float32), np.arange(units), units
        )

    return make


def lattice_of(noise_multiplier: float, clip: float) -> Lattice | None:
    """For a model of a few hundred parameters."""
    if not noise_multiplier:
        return None
    return Lattice.of(
        clip=clip,
        noise_multiplier=noise_multiplier,
        coordinates=300,
        cohort=1,
        shares=1,
        expected_batch=10.0,
    )


@pytest.fixture
def plan() -> Callable[..., LocalPlan]:
    """One step over all units, clipped, without noise; SGD at rate 1, so that delta = -sum / batch."""

    def make(*, noise_multiplier: float = 0.0, **changes: Any) -> LocalPlan:
        usual: dict[str, Any] = {
            "clip": 0.5,
            "lattice": lattice_of(noise_multiplier, clip=changes.get("clip", 0.5)),
            "sample_rate": 1.0,
            "expected_batch": 10.0,
            "steps": 1,
            "optimizer": "sgd",
            "lr": 1.0,
        }
        return LocalPlan(**{**usual, **changes})

    return make


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    """Logistic regression, or a network with these hidden widths, at random weights."""

    def make(features: int = 4, hidden: Sequence[int] = (), *, norm: bool = False) -> nn.Module:
        torch.manual_seed(3)
        layers: list[nn.Module] = []
        width = features
        for after in hidden:
            layers += [nn.Linear(width, after), *([nn.LayerNorm(after)] if norm else []), nn.Tanh()]
            width = after
        return nn.Sequential(*layers, nn.Linear(width, 1), nn.Flatten(0))

    return make


@pytest.fixture
def train() -> Callable[..., LocalUpdate]:
    """Train from the model's present weights."""

    def run(model: nn.Module, records: Records, plan: LocalPlan, *, seed: int = 1, round: int = 1) -> Any:
        noise = SimulationNoise(seed, "north")
        return train_locally(model, BINARY, arrays_of(model), records, plan, noise, round)

    return run
