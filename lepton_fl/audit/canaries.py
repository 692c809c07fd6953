"""What can be told of who was in the data: empirical lower bounds on epsilon, held against the stated one.

A canary is a unit that owns one parameter: nothing else moves it, so its final value is the best score there
is, and the audit as strong as the mechanism allows. Confidence is stated; seeds are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lepton_fl.audit.bounds import gdp_epsilon, many_run_mu, one_run_epsilon, one_run_mu
from lepton_fl.audit.finding import Finding
from lepton_fl.audit.subject import Records, lattice_for, linear, lockstep
from lepton_fl.privacy.accounting import DiscreteGaussian, epsilon
from lepton_fl.privacy.discrete_gaussian import distance
from lepton_fl.tasks import arrays_of
from lepton_fl.tasks.arrays import flatten
from lepton_fl.tasks.task import BINARY
from lepton_fl.training import LocalPlan, SimulationNoise, train_locally

P = 1e-2
"""Chance, at most, with which each check refuses an implementation that keeps its promise."""
DELTA = 1e-5
CANARIES, GUESSED = 1000, 0.08
"""A site's canaries, and the part of all that is guessed: half of it in, half of it out."""
SITES, FULL_SITES = 20, 100
_CLIP, _STEPS, _SIGMA = 2.0**-8, 4, 4.0
_RUNS, _FULL_RUNS, _RUN_SIGMA = 300, 5000, 1.0
_ONE, _MANY = "one-run", "many-run"


def check_one_run(seed: int, *, full: bool) -> Iterator[Finding]:
    """One run over sites that have nothing in common: of all their canaries, who was there?

    Sites are private each for itself, so all of them together are one mechanism, in which each canary is
    in or out by a coin of its own.
    """
    sites = FULL_SITES if full else SITES
    plan, event = _plan(CANARIES, sigma=_SIGMA, steps=_STEPS)
    total, guesses = sites * CANARIES, 2 * round(sites * CANARIES * GUESSED / 2)
    rng = np.random.default_rng(seed)
    present = rng.random((sites, CANARIES)) < 0.5
    scores = np.concatenate([_scores(present[at], plan, seed, f"site-{at}") for at in range(sites)])
    order = np.argsort(scores)
    half = guesses // 2
    there = present.ravel()[order]
    right = int(np.count_nonzero(~there[:half]) + np.count_nonzero(there[-half:]))
    stated, most = epsilon([event], DELTA), _stated_mu(event)
    guessed = f"{right} of {guesses} guesses right, {total} canaries"
    yield _bounded(
        _ONE,
        "Steinke, Nasr and Jagielski 2023",
        one_run_epsilon(canaries=total, guesses=guesses, right=right, delta=DELTA, p=P),
        stated,
        guessed,
        "noise of half the deviation, 94 times in 100",
    )
    mu = one_run_mu(canaries=total, guesses=guesses, right=right, p=P)
    yield _bounded(
        _ONE,
        "Mahloujifar, Melis and Chaudhuri 2024",
        gdp_epsilon(mu, DELTA),
        gdp_epsilon(most, DELTA),
        guessed,
        "noise of half the deviation, and of 0.6 of it 83 times in 100",
    )


def check_many_runs(seed: int, *, full: bool) -> Iterator[Finding]:
    """One step and one parameter, over and over: was its only unit there?"""
    runs = _FULL_RUNS if full else _RUNS
    plan, event = _plan(1, sigma=_RUN_SIGMA, steps=1)
    right = []
    for there in (False, True):
        present = np.array([there])
        scores = [_scores(present, plan, seed, f"run {number}, {there}")[0] > 0.5 for number in range(runs)]
        right.append(sum(found == there for found in scores))
    mu = many_run_mu(absent=runs, absent_right=right[0], present=runs, present_right=right[1], p=P)
    yield _bounded(
        _MANY,
        "Clopper and Pearson's limits",
        gdp_epsilon(mu, DELTA),
        gdp_epsilon(_stated_mu(event), DELTA),
        f"{right[0]} and {right[1]} of {runs} runs without and with it told right",
        f"noise of {0.9 if full else 0.6} of the deviation, most times (docs/audit.md)",
    )


def _plan(canaries: int, *, sigma: float, steps: int) -> tuple[LocalPlan, DiscreteGaussian]:
    """Steps over every unit, and what accounting says that they cost."""
    lattice = lattice_for(linear(canaries), clip=_CLIP, noise_multiplier=sigma)
    plan = replace(lockstep(clip=_CLIP, lattice=lattice), steps=steps, gradient_only=False)
    event = lattice.event(sampling_rate=1.0, steps=steps, sampler_distance=distance(lattice.share))
    return plan, event


def _stated_mu(event: DiscreteGaussian) -> float:
    return math.sqrt(event.steps) / event.noise_multiplier


def _scores(present_U: NDArray[np.bool_], plan: LocalPlan, seed: int, party: str) -> NDArray[np.float64]:
    """What each canary's parameter came to, 1 on average where it was there and 0 where not."""
    canaries = len(present_U)
    x_NF = np.eye(canaries, dtype=np.float32)[present_U]
    model = linear(canaries)
    update = train_locally(
        model, BINARY, arrays_of(model), Records.one_each(x_NF), plan, SimulationNoise(seed, party), 1
    )
    moved = plan.steps * plan.clip / plan.expected_batch
    return flatten(update.delta).astype(np.float64) / moved


def _bounded(check: str, by: str, found: float, stated: float, how: str, power: str) -> Finding:
    return Finding.of(
        check,
        f"epsilon, by {by}",
        passed=found <= stated,
        statistic=f"at least {found:.3f}, {1 - P:.0%} sure, stated {stated:.3f} at delta {DELTA:g} ({how})",
        power=power,
    )
