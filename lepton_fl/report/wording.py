"""How a figure is put into words: the same in HTML, in Markdown and in a chart's hover text.

Nothing here escapes: that is done where the text is written, by the rules of that format.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, Context, Decimal
from typing import Literal

from lepton_fl.report.findings import Advice
from lepton_fl.results import Interval, Promise, Results

METRIC = {"auc": "AUC", "auprc": "AUPRC (average precision)"}
UNDEFINED = "not defined: only one class among the held-out records"
NOT_MEASURED = "not measured"
ARM = {
    "local": "own boosting",
    "linear": "own logistic regression",
    "federated": "federated",
    "pooled": "pooled",
}
"""Short, where an arm's label would not fit."""
ADVICE: dict[Advice, str] = {
    "keep": "keep your own model",
    "unclear": "no clear difference",
    "gains": "gains",
}
OWN_BEST = (
    "Own best is the better of the site's own models on these records: chosen with hindsight, in its favour."
)
NO_BOUND = "no bound: the study adds no noise"
STATUS = {
    "completed": "completed",
    "interrupted": "interrupted by the user",
    "stopped": "stopped: too few sites, or refused in mid-run",
}
NOISE = {
    "local": "local: every site adds all of it",
    "shared": "shared: every site adds a part, under secure aggregation",
    "none": "none",
}


def figure(value: float | None) -> str:
    """A metric, to three decimals."""
    return UNDEFINED if value is None else f"{value:.3f}"


def interval(found: Interval | None) -> str:
    """`0.842 [0.801, 0.880]`."""
    if found is None:
        return NOT_MEASURED
    if found.mean is None:
        return UNDEFINED
    return f"{found.mean:.3f} {bounds(found)}"


def change(found: Interval) -> str:
    """`+0.015 [-0.004, +0.034]`: an interval of a difference."""
    if found.mean is None:
        return UNDEFINED
    return f"{found.mean:+.3f} {bounds(found, sign='+')}"


def bounds(found: Interval, sign: Literal["", "+"] = "") -> str:
    """`[0.801, 0.880]`, with signs where it is of a difference."""
    if found.low is None or found.high is None:
        return "(no interval)"
    return f"[{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def may_be_nothing(found: Interval) -> bool:
    """The interval of a difference holds zero."""
    return found.low is not None and found.high is not None and found.low <= 0 <= found.high


def spent(epsilon: float) -> str:
    """An epsilon spent, to three digits, rounded up: what is printed never flatters."""
    # The inner rounding takes off binary noise, or 3.0000000000000004 would print as 3.01.
    exact = Decimal(f"{epsilon:.9g}")
    return f"{float(Context(prec=3, rounding=ROUND_CEILING).create_decimal(exact)):g}"


def delta(value: float) -> str:
    """`1e-5`, as in a paper."""
    if value >= 1e-3:
        return f"{value:g}"
    digits, exponent = f"{value:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def unit(promise: Promise) -> str:
    """`per record`, or `per customer_id`."""
    return f"per {promise.unit}"


def guarantee(promise: Promise) -> str:
    """The study's promise in one sentence: epsilon, delta, unit and whom it holds against."""
    if promise.epsilon is None or promise.delta is None:
        return f"The study promises no privacy {unit(promise)}: it adds no noise."
    return (
        f"The study promises epsilon {promise.epsilon:g}, delta {delta(promise.delta)} "
        f"{unit(promise)}, against: {promise.holds_against}."
    )


def duration(seconds: float) -> str:
    """`4.2 s`, `2 min 13 s`, `3 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def count(number: int, singular: str, plural: str = "") -> str:
    """`1 site`, `1,204 records`."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def evidence(results: Results) -> str:
    """What every caption says of the figures above it: n, seeds, resamples and the interval."""
    records = sum(site.test_records for site in results.sites)
    return (
        f"n = {count(records, 'test record')} at {count(len(results.sites), 'site')}; "
        f"{count(len(results.seeds), 'seed')}; {count(results.bootstrap, 'bootstrap resample')}; "
        "intervals are 95 % over seeds and test rows."
    )
