"""What the checks train on: records of their own making, and a model that tells what became of each.

N records, U units, F features, L parameters, here one for each feature.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lepton_fl.privacy.lattice import Lattice
from lepton_fl.tasks import arrays_of, load_arrays
from lepton_fl.tasks.arrays import flatten
from lepton_fl.tasks.task import BINARY
from lepton_fl.training import LocalPlan, Noise, train_locally

BATCH = 16.0
"""Public divisor of each sum: a power of two, so that integers stay exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """What training needs of a table, and no more."""

    x_NF: NDArray[np.float32]
    y_N: NDArray[np.float32]
    unit_N: NDArray[np.int64]
    units: int

    @classmethod
    def one_each(cls, x_NF: NDArray[np.float32], y_N: NDArray[np.float32] | None = None) -> Records:
        """Each record a unit, positive where nothing is said."""
        units = len(x_NF)
        y_N = np.ones(units, np.float32) if y_N is None else y_N
        return cls(x_NF=x_NF, y_N=y_N, unit_N=np.arange(units), units=units)

    @classmethod
    def random(cls, units: int, features: int, rng: np.random.Generator, *, each: int = 1) -> Records:
        """Units of `each` records, uniform in [-1, 1]."""
        rows = units * each
        return cls(
            x_NF=rng.uniform(-1, 1, (rows, features)).astype(np.float32),
            y_N=rng.integers(0, 2, rows).astype(np.float32),
            unit_N=np.repeat(np.arange(units), each),
            units=units,
        )

    def and_one(self, x_NF: NDArray[np.float32], y_N: NDArray[np.float32]) -> Records:
        """With one unit more, of these records."""
        return Records(
            x_NF=np.concatenate([self.x_NF, x_NF]),
            y_N=np.concatenate([self.y_N, y_N]),
            unit_N=np.concatenate([self.unit_N, np.full(len(y_N), self.units)]),
            units=self.units + 1,
        )


def linear(features: int) -> nn.Module:
    """Logistic regression without a constant, at zero: a unit with one feature moves one parameter."""
    layer = nn.Linear(features, 1, bias=False)
    nn.init.zeros_(layer.weight)
    return nn.Sequential(layer, nn.Flatten(0))


def gradient(
    model: nn.Module, records: Records, plan: LocalPlan, noise: Noise, round: int
) -> NDArray[np.float64]:
    """The one step's sum over the sampled units that a lock-step plan releases, times `expected_batch`."""
    arrays = arrays_of(model)
    update = train_locally(model, BINARY, arrays, records, plan, noise, round)
    # A step moves the model that it is given.
    load_arrays(model, arrays)
    return -flatten(update.delta).astype(np.float64) * plan.expected_batch


def lockstep(*, clip: float, lattice: Lattice | None, rate: float = 1.0) -> LocalPlan:
    """One step, released as it is."""
    return LocalPlan(
        clip=clip,
        lattice=lattice,
        sample_rate=rate,
        expected_batch=BATCH,
        steps=1,
        optimizer="sgd",
        lr=1.0,
        gradient_only=True,
    )


def lattice_for(model: nn.Module, *, clip: float, noise_multiplier: float) -> Lattice:
    """Of one site that noises its own steps."""
    return Lattice.of(
        clip=clip,
        noise_multiplier=noise_multiplier,
        coordinates=sum(p.numel() for p in model.parameters()),
        cohort=1,
        shares=1,
        expected_batch=BATCH,
    )
