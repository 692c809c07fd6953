"""Is the noise what accounting says: its size, shape and independence, at one site and in an opened sum?

Residuals are what a round released less what the same round gives without noise, from the same sampled units.
L = coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lepton_fl.audit.federation import SITES, small_run, small_study, sum_lattice, sum_words, tapped
from lepton_fl.audit.finding import Finding
from lepton_fl.audit.subject import Records, gradient, lattice_for, linear, lockstep
from lepton_fl.messages import ARRAYS, TRAIN, Assignment, from_record, read_assignment
from lepton_fl.simulation.run import Run
from lepton_fl.tasks import Arrays, arrays_of
from lepton_fl.tasks.arrays import flatten
from lepton_fl.tasks.task import BINARY
from lepton_fl.training import LocalPlan, Noise, SimulationNoise, train_locally

TAIL = 5e-7
"""Chance, to either side, with which a right implementation is refused at a seed."""
CLIP, SIGMA = 2.0**-7, 1.5
COORDINATES, FULL_COORDINATES = 60_000, 400_000
_UNITS, _RATE = 24, 0.5
_CHECK = "noise"


def check_noise(seed: int, *, full: bool) -> Iterator[Finding]:
    """Of one site's steps, then of its shares in a sum that is opened."""
    yield from _local(seed, FULL_COORDINATES if full else COORDINATES)
    yield from _shared(seed, rounds=24 if full else 3)


def _local(seed: int, coordinates: int) -> Iterator[Finding]:
    model = linear(coordinates)
    records = Records.random(_UNITS, coordinates, np.random.default_rng(seed))
    lattice = lattice_for(model, clip=CLIP, noise_multiplier=SIGMA)
    quiet, noisy = (lockstep(clip=CLIP, lattice=on, rate=_RATE) for on in (None, lattice))
    noise = SimulationNoise(seed, "audit")
    released_2L = [gradient(model, records, noisy, noise, round) * lattice.scale for round in (1, 2)]
    residual_2L = [
        (released_L - gradient(model, records, quiet, noise, round) * lattice.scale) / lattice.share
        for round, released_L in zip((1, 2), released_2L, strict=True)
    ]
    yield _deviation("of one step", residual_2L[0])
    yield _deviation("of four steps of a round", _four_steps(coordinates, seed) / 2)
    yield _shape(residual_2L[0])
    yield _independence(residual_2L)
    off = sum(int(np.count_nonzero(z_L != np.rint(z_L))) for z_L in released_2L)
    yield Finding.of(
        _CHECK,
        "what is released are integers times a public step",
        passed=off == 0,
        statistic=f"{off} of {2 * coordinates} numbers off the lattice, allowed 0",
        power="noise added in floating point, of whatever size",
    )
    yield _apart(
        "of a site's own steps",
        lambda noise: gradient(model, records, noisy, noise, 1) * lattice.scale,
        seed,
        lattice.share,
    )


def _four_steps(features: int, seed: int) -> NDArray[np.float64]:
    """Residuals of four local steps, in shares, of units whose gradients stay far beyond the clip."""
    records = Records.one_each(np.eye(_UNITS, features, dtype=np.float32))
    model = linear(features)
    start = arrays_of(model)
    lattice = lattice_for(model, clip=CLIP, noise_multiplier=SIGMA)
    plan = replace(lockstep(clip=CLIP, lattice=lattice, rate=_RATE), steps=4, gradient_only=False)
    with_L, without_L = (
        flatten(train_locally(model, BINARY, start, records, p, SimulationNoise(seed, "audit"), 1).delta)
        for p in (plan, replace(plan, lattice=None))
    )
    residual_L: NDArray[np.float64] = with_L.astype(np.float64) - without_L
    return residual_L * plan.expected_batch * lattice.scale / lattice.share


def _shared(seed: int, *, rounds: int) -> Iterator[Finding]:
    study = small_study(noise="shared", rounds=rounds, hidden=4096)
    run, tap = tapped(small_run(study, seed))
    run.start()
    residuals = []
    for asked, replies in tap.passed:
        if asked[0].metadata.message_type == TRAIN:
            model = from_record(asked[0].content.array_records[ARRAYS])
            (reply,) = (one for one in replies if not one.has_error())
            mean_L = flatten(from_record(reply.content.array_records[ARRAYS]))
            exact_L = np.mean(
                [_update(run, name, read_assignment(asked[0]), model) for name in SITES], axis=0
            )
            lattice = sum_lattice(study, len(mean_L))
            unit = len(SITES) * lattice.expected_batch * lattice.scale
            residuals.append((mean_L - exact_L) * unit / lattice.share)
    summed_L = np.concatenate(residuals)
    yield _deviation(f"of {rounds} opened sums over {len(SITES)} sites", summed_L / math.sqrt(len(SITES)))
    model = run.sites[SITES[0]].bench(study).template
    words = sum_words(study, model)
    lattice = sum_lattice(study, len(summed_L) // rounds)
    update_L = np.random.default_rng(seed).uniform(-0.01, 0.01, len(summed_L) // rounds)

    yield _apart("of a share in a sum", lambda noise: words(update_L, noise), seed, lattice.share)


def _update(run: Run, name: str, assignment: Assignment, model: Arrays) -> NDArray[np.float64]:
    """What a site encodes in a round, once more: its samples are drawn from the same key."""
    site = run.sites[name]
    bench = site.bench(assignment.study)
    plan = LocalPlan.of(assignment.study, bench.guarantee, coordinates=bench.coordinates)
    noise = site.noise.of(assignment.study.id)
    update = train_locally(bench.model, bench.task, model, bench.data.train, plan, noise, assignment.round)
    return flatten(update.delta).astype(np.float64)


def _deviation(of: str, residual_L: NDArray[np.float64]) -> Finding:
    """Chi-square of the sum of squares: its standard deviation is 1 if what accounting says is right."""
    count = len(residual_L)
    found = math.sqrt(float(np.mean(residual_L**2)))
    low, high = (math.sqrt(stats.chi2.ppf(p, count) / count) for p in (TAIL, 1 - TAIL))
    return Finding.of(
        _CHECK,
        f"the deviation {of}",
        passed=low < found < high,
        statistic=f"{found:.4f} of the stated one, allowed {low:.4f} to {high:.4f}, {count} numbers",
        power=f"deviations of {_found(count, -1):.3f} or {_found(count, 1):.3f} of the stated, 999 in 1000",
    )


def _found(count: int, side: int) -> float:
    """The deviation, below or above 1, that is refused with a probability of 0.999."""
    if side < 0:
        return math.sqrt(stats.chi2.ppf(TAIL, count) / stats.chi2.ppf(0.999, count))
    return math.sqrt(stats.chi2.ppf(1 - TAIL, count) / stats.chi2.ppf(0.001, count))


def _shape(residual_L: NDArray[np.float64]) -> Finding:
    """Kolmogorov and Smirnov: a share of 1024 or more differs from a normal by less than 1e-3."""
    p = float(stats.kstest(residual_L, "norm").pvalue)
    return Finding.of(
        _CHECK,
        "the noise is normal and centred",
        passed=p > 2 * TAIL,
        statistic=f"Kolmogorov-Smirnov p = {p:.3g}, refused below {2 * TAIL:g}",
        power=f"distribution functions that are off by {3.5 / math.sqrt(len(residual_L)):.3f} somewhere",
    )


def _independence(residual_2L: list[NDArray[np.float64]]) -> Finding:
    """Correlations between rounds, and between coordinates at all lags up to 64."""
    one_L, other_L = residual_2L
    pairs = [(one_L, other_L), *((one_L[lag:], one_L[:-lag]) for lag in range(1, 65))]
    scores = [
        abs(float(a_L @ b_L)) / math.sqrt(float(a_L @ a_L) * float(b_L @ b_L) / len(a_L))
        for a_L, b_L in pairs
    ]
    worst, allowed = max(scores), float(-stats.norm.ppf(TAIL / len(pairs)))
    return Finding.of(
        _CHECK,
        "no draw serves two rounds or two coordinates",
        passed=worst < allowed,
        statistic=f"largest of {len(pairs)} correlations {worst:.2f} deviations, allowed {allowed:.2f}",
        power=f"correlations of {(allowed + 3.1) / math.sqrt(len(one_L)):.3f}",
    )


class _Replaced(Noise):
    """Streams of a simulation, one purpose's taken from elsewhere; keeps which were asked for."""

    def __init__(self, seed: int, purpose: str = "") -> None:
        self._usual, self._other = SimulationNoise(seed, "audit"), SimulationNoise(seed, "other")
        self._purpose = purpose
        self.asked: list[tuple[str, int]] = []

    def of(self, study_id: str) -> Noise:  # noqa: ARG002 - of one study here
        return self

    def key(self, purpose: str, round: int = 0) -> bytes:
        self.asked.append((purpose, round))
        source = self._other if purpose == self._purpose else self._usual
        return source.key(purpose, round)


def _apart(of: str, integers: Callable[[Noise], NDArray[np.float64]], seed: int, share: float) -> Finding:
    """By intervention: each key is replaced in turn, and what changes tells what it is for.

    Rounding has a key of its own if replacing one moves integers by 1 at most. If the noise shared it, the
    noise would move with it, by many shares.
    """
    usual = _Replaced(seed)
    usual_L = integers(usual)
    purposes = [purpose for purpose, _ in usual.asked]
    moved = {p: np.abs(integers(_Replaced(seed, p)) - usual_L) for p in purposes}
    rounds = [p for p, moved_L in moved.items() if 0 < moved_L.max() <= 1]
    noises = [p for p, moved_L in moved.items() if math.sqrt(float(np.mean(moved_L**2))) > share]
    repeated = len(purposes) - len(set(usual.asked))
    return Finding.of(
        _CHECK,
        f"rounding and noise {of} have keys of their own",
        passed=len(rounds) == 1 and len(noises) >= 1 and repeated == 0,
        statistic=f"of {len(purposes)} keys {len(rounds)} move integers by 1 at most, allowed 1; "
        f"{repeated} are asked for twice, allowed 0",
        power="any key that serves two purposes",
    )
