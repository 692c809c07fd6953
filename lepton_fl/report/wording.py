"""How a figure is put into words: the same in HTML, in Markdown and in a chart's hover text.

Nothing here escapes: that is done where the text is written, by the rules of that format.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING, Context, Decimal
from typing import Literal

from lepton_fl.report.findings import Advice
from lepton_fl.results import (
    Arm,
    Bounded,
    FirstSeed,
    Interval,
    Promise,
    RecallAt,
    Results,
    SecureSums,
)

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
FEW = 30
"""Held-out records of one class, below which a site's percentile intervals are often too narrow."""
NO_SHARE = "none"
"""A share of nothing."""
NO_BOUND = "no bound: the study adds no noise"
STATUS = {
    "completed": "completed",
    "interrupted": "interrupted by the user",
    "stopped": "stopped: too few sites, or refused in mid-run",
}
SECURE_RUN = {
    "full": "the protocol ran in every round of the charged run; rehearsals added up the same integers and "
    "noise without masks",
    "functional": "not run: the simulator added up the same integers and the same noise without masks",
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


def spent_of(epsilon: float, allowed: float) -> str:
    """`2.01 of 3`."""
    return f"{spent(epsilon)} of {allowed:g}"


def delta(value: float) -> str:
    """`1e-5`, as in a paper."""
    if value >= 1e-3:
        return f"{value:g}"
    digits, exponent = f"{value:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def secure_run(sums: SecureSums) -> str:
    """`LSA1: ` and whether the protocol ran."""
    return f"{sums.suite}: {SECURE_RUN[sums.ran]}"


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


def by_who_looks(promise: Promise) -> str:
    """The epsilon of each who may look, in one sentence; empty where all see the same."""
    if not promise.epsilon_against or promise.delta is None:
        return ""
    said = "; ".join(f"{spent(epsilon)} against {who}" for who, epsilon in promise.epsilon_against.items())
    return f"Of all of the training, at delta {delta(promise.delta)} {unit(promise)}, epsilon is {said}."


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
    few = sum(
        0 < min(site.test_positives, site.test_records - site.test_positives) < FEW for site in results.sites
    )
    narrow = (
        f" Too narrow, as a rule, at {count(few, 'site')} with fewer than {FEW} of one class." if few else ""
    )
    return (
        f"n = {count(records, 'test record')} at {count(len(results.sites), 'site')}; "
        f"{count(len(results.seeds), 'seed')}; {count(results.bootstrap, 'bootstrap resample')}; "
        f"intervals are 95 % over seeds and test rows.{narrow}"
    )


def one_seed(first: FirstSeed) -> str:
    """What a caption says of a figure that shows one seed's records."""
    return (
        f"n = {count(first.records, 'held-out record')} of all sites as one list, {first.positives:,} "
        f"positive; seed {first.seed} alone."
    )


def percent(share: float) -> str:
    """`1 %`, `0.1 %`, `2.35 %`; never broken over two lines."""
    return f"{100 * share:.3g}\N{NO-BREAK SPACE}%"


def share(found: Interval) -> str:
    """`0.812 [0.771, 0.846]`, or that there is nothing to take a share of."""
    return NO_SHARE if found.mean is None else f"{found.mean:.3f} {bounds(found)}"


def rate(found: Interval) -> str:
    """`1.19 % [0.97, 1.46]`."""
    return NO_SHARE if found.mean is None else f"{percent(found.mean)} {percent_bounds(found)}"


def percent_bounds(found: Interval) -> str:
    """`[0.97, 1.46]`, in percent."""
    if found.low is None or found.high is None:
        return "(no interval)"
    return f"[{100 * found.low:.2f}, {100 * found.high:.2f}]"


def per_10000(number: int, of: int) -> str:
    """A count, as if there had been 10,000 records."""
    scaled = 10_000 * number / of
    return f"{scaled:,.1f}" if 0 < scaled < 10 else f"{scaled:,.0f}"


def recall(found: Interval | None) -> str:
    """A recall, which too few negatives leave undefined."""
    return "not defined" if found is None or found.mean is None else interval(found)


def recall_sites(found: RecallAt) -> str:
    """`4 of 6 sites`, where the mean is not over all of them."""
    defined = sum(i.mean is not None for i in found.per_site.values())
    return f"{defined} of {count(len(found.per_site), 'site')}" if 0 < defined < len(found.per_site) else ""


def recall_undefined(fprs: tuple[float, ...]) -> str:
    """When a recall is not defined."""
    needed = ", ".join(f"{round(1 / fpr):,} for {percent(fpr)}" for fpr in fprs)
    return f"Not defined on fewer negatives than one false alarm takes ({needed}), or without a positive."


def operating_point(results: Results) -> str:
    """What the study agreed on, or what is shown instead."""
    point = results.operating_point
    if point is None:
        return "This run has no operating point."
    if point.alerts_per_day is not None:
        return (
            f"The study asks for {count(point.alerts_per_day, 'alert')} a day. Not evaluated: nothing says "
            "how many records a day has."
        )
    if point.fpr is not None:
        words = f"a false positive rate of at most {percent(point.fpr)}"
    else:
        words = f"least cost, {point.cost_fn:g} for a missed positive and {point.cost_fp:g} for a false alarm"
    if results.operating_point_agreed:
        return f"The study asks for {words}."
    return f"The study names no operating point; shown is {words}."


def thresholds(results: Results) -> str:
    """How the thresholds at the operating point were set."""
    known = ", and without noise it may know them too well" if results.promise.noise == "none" else ""
    return (
        "Each site sets its threshold on its own training records, as it would in use, and keeps it; what "
        "it then does is counted on the held-out records. Own and pooled models score the training records "
        f"out of fold, the federated model as it is{known}."
    )


def one_list(arms: Mapping[str, Arm | None]) -> str:
    """What the figures over all records as one list compare."""
    one_model = " and the ".join(name for name in ("federated", "pooled") if arms.get(name))
    words = f"Over all held-out records as one list, one model scores all in the {one_model} arm"
    if arms.get("local") or arms.get("linear"):
        words += "; of the sites' own models, the list holds scores of different models"
    return f"{words}."


def pooled(results: Results) -> list[str]:
    """What the sum of the sites' histograms told, a line for each figure; the first says how it was had."""
    found, promise = results.pooled, results.promise
    if found is None:
        return []
    how = "exact figures: no noise"
    if found.epsilon is not None:
        how = (
            f"with noise: epsilon {found.epsilon:g} of the study, at delta {delta(promise.delta or 0)} "
            f"{unit(promise)}"
        )
    figures = {METRIC[results.metric]: found.metric} | {
        f"recall at {percent(float(fpr))} FPR": figure for fpr, figure in found.recall.items()
    }
    return [
        f"From one sum of the score histograms of {found.sites} sites ({how}):",
        *(f"{name} {_bounded(figure)}" for name, figure in figures.items()),
    ]


def _bounded(figure: Bounded) -> str:
    if figure.value is None or figure.low is None or figure.high is None:
        return f"not shown: {figure.withheld}"
    return f"{figure.value:.3f}, between {figure.low:.3f} and {figure.high:.3f}"
