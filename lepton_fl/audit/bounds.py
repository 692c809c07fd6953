"""Lower bounds on a mechanism's privacy loss, from guesses that came true.

GDP: mu-Gaussian differential privacy (Dong, Roth and Su 2022): telling two neighbours apart is no easier than
telling N(0, 1) from N(mu, 1). A Gaussian step of noise multiplier sigma is 1 / sigma-GDP, and T of them,
unsampled, are sqrt(T) / sigma-GDP.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri

_EPSILON_MOST = 60.0
_MU_MOST = 20.0


def gdp_epsilon(mu: float, delta: float) -> float:
    """The epsilon of mu-GDP at `delta` (Dong, Roth and Su 2022, Corollary 1)."""

    def excess(epsilon: float) -> float:
        first, second = -epsilon / mu + mu / 2, -epsilon / mu - mu / 2
        return float(ndtr(first) - math.exp(epsilon + log_ndtr(second)) - delta)

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    return float(brentq(excess, 0.0, mu * mu + 20 * mu))


def one_run_p_value(*, canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The chance, at most, of so many right guesses, were the mechanism (epsilon, delta)-private.

    Steinke, Nasr and Jagielski (2023), "Privacy Auditing with One (1) Training Run", Theorem 5.2: each of the
    canaries was in or out by a fair coin of its own, and of all of them so many were guessed, on the
    mechanism's output alone.
    """
    truth = 1 / (1 + math.exp(-epsilon))
    beta = float(stats.binom.sf(right - 1, guesses, truth))
    below = stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, truth)
    # P[right > B >= right - i] / i, for the i that makes most of it.
    alpha = float(np.max(np.cumsum(below) / np.arange(1, right + 1), initial=0.0))
    return min(1.0, beta + 2 * canaries * delta * alpha)


def one_run_epsilon(*, canaries: int, guesses: int, right: int, delta: float, p: float) -> float:
    """The largest epsilon that so many right guesses refute, but for a chance of `p`; 0 for none."""

    def refuted(epsilon: float) -> bool:
        return p > one_run_p_value(
            canaries=canaries, guesses=guesses, right=right, epsilon=epsilon, delta=delta
        )

    return _largest(refuted, _EPSILON_MOST)


def one_run_refutes_gdp(*, canaries: int, guesses: int, right: int, mu: float, p: float) -> bool:
    """Whether so many right guesses refute mu-GDP, but for a chance of `p`.

    Mahloujifar, Melis and Chaudhuri (2024), "Auditing f-Differential Privacy in One Run", the recursion for
    in-or-out canaries with abstentions. From the top count down, `hits` is the least part of all canaries
    that is rightly guessed in outcomes with more right guesses than i, and `misses` the same for wrong ones,
    if `right` are reached with a chance of p; together they cannot exceed the part that is guessed.
    """
    part = guesses / canaries
    hits, misses = p * right / canaries, p * (guesses - right) / canaries
    for i in range(right - 1, -1, -1):
        more = max(misses, float(ndtr(ndtri(hits) - mu)))
        hits += i / (guesses - i) * (more - misses)
        misses = more
        if hits + misses > part:
            return True
    return hits + misses > part


def one_run_mu(*, canaries: int, guesses: int, right: int, p: float) -> float:
    """The largest mu that so many right guesses refute, but for a chance of `p`; 0 for none."""

    def refuted(mu: float) -> bool:
        return one_run_refutes_gdp(canaries=canaries, guesses=guesses, right=right, mu=mu, p=p)

    return _largest(refuted, _MU_MOST)


def many_run_mu(*, absent: int, absent_right: int, present: int, present_right: int, p: float) -> float:
    """The largest mu that a test of one unit's presence refutes, over so many runs without and with it.

    Clopper and Pearson's (1934) upper limits on both of its error rates, `p` / 2 each, against the trade-off
    of mu-GDP, as Nasr et al. (2023), "Tight Auditing of Differentially Private Machine Learning", section 4.
    """
    false_positive = _most(absent - absent_right, absent, p / 2)
    false_negative = _most(present - present_right, present, p / 2)
    return max(0.0, float(-ndtri(false_positive) - ndtri(false_negative)))


def _most(wrong: int, runs: int, p: float) -> float:
    """Clopper and Pearson's upper limit on a rate."""
    return float(stats.beta.ppf(1 - p, wrong + 1, runs - wrong)) if wrong < runs else 1.0


def _largest(refuted: Callable[[float], bool], most: float) -> float:
    """Where `refuted`, true below and false above, changes; by bisection to 2^-12 of `most`."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, most
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
