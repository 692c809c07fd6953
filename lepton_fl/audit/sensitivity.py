"""Does one unit move what is summed by no more than accounting says, whatever its records are?

Two rounds that draw the same from the same keys, with and without one unit, differ by what the unit moved the
integers, rounding included: the noise is the same and cancels. L = coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lepton_fl.audit.federation import SITES, small_study, sum_lattice, sum_words
from lepton_fl.audit.finding import Finding
from lepton_fl.audit.subject import BATCH, Records, gradient, lattice_for, linear, lockstep
from lepton_fl.errors import LeptonError
from lepton_fl.privacy.lattice import Lattice
from lepton_fl.tasks import arrays_of
from lepton_fl.training import SimulationNoise
from lepton_fl.training.noising import Noising

CLIP = 0.5
_FEATURES, _UNITS, _MANY = 64, 30, 300
_CHECK = "sensitivity"
_BITE = 0.9
"""Part of the bound that the probes must reach, or they show nothing."""
_EXACT = 1 + 2.0**-30
"""Room for float64 in what is computed here."""

Vector = NDArray[np.float64]
Rows = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Features and labels of one unit's records."""


def check_sensitivity(seed: int, *, full: bool) -> Iterator[Finding]:
    """Of a site's own sums, then of what it gives to a sum over sites."""
    rng = np.random.default_rng(seed)
    tries = 600 if full else 20
    noise = SimulationNoise(seed, "audit")
    for of, model in (
        ("a site's own sum, linear model", linear(_FEATURES)),
        ("the same, a network", _network()),
    ):
        lattice = lattice_for(model, clip=CLIP, noise_multiplier=1.0)
        yield _probed(of, _local(model, lattice, noise), lattice, tries, rng)
    study, model = small_study(noise="shared", rounds=3, hidden=8), linear(_FEATURES)
    summed, words = sum_lattice(study, _FEATURES), sum_words(study, arrays_of(model))
    plan = lockstep(clip=summed.clip, lattice=None)
    yield _probed(
        f"a share in a sum over {len(SITES)} sites",
        lambda records: words(gradient(model, records, plan, noise, 1) / BATCH, noise),
        summed,
        tries,
        rng,
    )
    own = lattice_for(linear(_FEATURES), clip=CLIP, noise_multiplier=1.0)
    yield _rounded(
        "a site's own sum",
        lambda sum_L: Noising(own, len(sum_L), [noise], 1, steps=1)(sum_L[None] / own.scale)[0] * own.scale,
        tries,
        rng,
    )
    yield _rounded("a share in a sum", lambda sum_L: words(sum_L / (summed.scale * BATCH), noise), tries, rng)


def _network() -> nn.Module:
    """With weights that are not zero, or nothing but its last layer would have a gradient."""
    model = nn.Sequential(nn.Linear(_FEATURES, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(0))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def _local(model: nn.Module, lattice: Lattice, noise: SimulationNoise) -> Callable[[Records], Vector]:
    plan = lockstep(clip=CLIP, lattice=lattice)
    return lambda records: gradient(model, records, plan, noise, 1) * lattice.scale


@dataclass(kw_only=True)
class _Search:
    """The unit that moves the integers furthest."""

    integers: Callable[[Records], Vector]
    base: Records
    furthest: float = 0.0
    rows: Rows = field(init=False)
    name: str = "none"
    refused: int = 0
    _usual_L: Vector = field(init=False)

    def __post_init__(self) -> None:
        self._usual_L = self.integers(self.base)

    def probe(self, name: str, rows: Rows) -> None:
        try:
            moved_L = self.integers(self.base.and_one(*rows)) - self._usual_L
        except LeptonError:
            # Nothing leaves, and that there was something to refuse is a fact about a record.
            self.refused += 1
            return
        moved = float(np.linalg.norm(moved_L))
        if not moved <= self.furthest:
            self.furthest, self.rows, self.name = moved, rows, name


def _probed(
    of: str, integers: Callable[[Records], Vector], lattice: Lattice, tries: int, rng: np.random.Generator
) -> Finding:
    base = Records.random(_UNITS, _FEATURES, rng, each=2)
    # Records that are not finite, or enormous, among those that stay.
    base.x_NF[0, 3], base.x_NF[3, 5] = np.nan, np.inf
    base.x_NF[6] *= 1e6
    what, power = f"one unit in {of}", "a bound exceeded by what any of the probes can do"
    try:
        search = _Search(integers=integers, base=base)
    except LeptonError as error:
        statistic = f"a table with records that are not finite is refused: {type(error).__name__}"
        return Finding.of(_CHECK, what, passed=False, statistic=statistic, power=power)
    for name, rows in _adversarial(base, rng):
        search.probe(name, rows)
    for _ in range(tries):
        size = 10.0 ** rng.uniform(-8, 38)
        many = int(rng.integers(1, 6))
        x_NF = np.clip(rng.normal(size=(many, _FEATURES)) * size, -3e38, 3e38).astype(np.float32)
        search.probe("a random unit", (x_NF, rng.integers(0, 2, many).astype(np.float32)))
    for _ in range(tries):
        x_NF, y_N = search.rows
        with np.errstate(over="ignore"):
            turned_NF = x_NF * np.exp(rng.normal(0, 0.1, x_NF.shape)).astype(np.float32)
        search.probe(f"{search.name.removesuffix(', improved')}, improved", (turned_NF, y_N))
    ratio = search.furthest / lattice.sensitivity
    statistic = (
        f"at most {search.furthest:.1f} of {lattice.sensitivity:.1f} integers ({ratio:.4f}), by "
        f"{search.name}; {search.refused} units refused, allowed 0"
    )
    passed = ratio <= 1 and search.refused == 0
    if passed and ratio < _BITE:
        return Finding(
            check=_CHECK, what=what, verdict="inconclusive", statistic=statistic, power="none: no probe bites"
        )
    return Finding.of(_CHECK, what, passed=passed, statistic=statistic, power=power)


def _adversarial(base: Records, rng: np.random.Generator) -> Iterator[tuple[str, Rows]]:
    """Units that somebody might make to be seen."""
    x_1F = rng.uniform(-1, 1, (1, _FEATURES)).astype(np.float32)
    for label in (np.zeros(1, np.float32), np.ones(1, np.float32)):
        for size in (1e-30, 1e-3, 1.0, 1e6, 1e20, 3e38):
            yield f"a record scaled by {size:g}", (x_1F * np.float32(size), label)
        for value in (np.nan, np.inf, -np.inf):
            one_1F = x_1F.copy()
            one_1F[0, 0] = value
            yield f"a record with {value}", (one_1F, label)
            yield f"a record all {value}", (np.full_like(x_1F, value), label)
        for size in (1.0, 1e6):
            many_NF = np.repeat(x_1F * np.float32(size), _MANY, axis=0)
            yield f"{_MANY} equal records scaled by {size:g}", (many_NF, np.repeat(label, _MANY))
        axis_1F = np.zeros_like(x_1F)
        axis_1F[0, 0] = 1e6
        yield "a record along one feature", (axis_1F, label)
    yield "a copy of another unit", (base.x_NF[10:12], base.y_N[10:12])
    for label_1 in (1e6, -1e6, np.nan):
        yield f"a label of {label_1:g}", (x_1F, np.full(1, label_1, np.float32))
    mixed_NF = rng.normal(size=(_MANY, _FEATURES)).astype(np.float32)
    mixed_NF[::7] = np.nan
    yield f"{_MANY} records, some not numbers", (mixed_NF, np.ones(_MANY, np.float32))


def _rounded(of: str, integers: Callable[[Vector], Vector], tries: int, rng: np.random.Generator) -> Finding:
    """What rounding adds to a distance, at most 1 a coordinate: worst where a hair moves all of them.

    `integers` takes a vector in steps. Each coordinate's threshold is found by bisection.
    """
    low_L = np.floor(rng.uniform(-1000, 1000, _FEATURES))
    high_L = low_L + 1
    below_L = integers(low_L)
    for _ in range(20):
        middle_L = (low_L + high_L) / 2
        up_L = integers(middle_L) > below_L
        low_L, high_L = np.where(up_L, low_L, middle_L), np.where(up_L, middle_L, high_L)
    pairs = [(low_L, high_L)]
    pairs += [(low_L, low_L + rng.normal(size=_FEATURES) * 10.0 ** rng.uniform(-6, 3)) for _ in range(tries)]
    added = max(
        float(np.linalg.norm(integers(b_L) - integers(a_L)) - np.linalg.norm(b_L - a_L)) for a_L, b_L in pairs
    )
    most = math.sqrt(_FEATURES)
    return Finding.of(
        _CHECK,
        f"rounding in {of}",
        passed=added <= most * _EXACT,
        statistic=f"adds at most {added:.4f} integers to a distance, allowed {most:g}",
        power="a rounding that is not monotone, or drawn anew for another table",
    )
