"""The report of one run, as one HTML file."""

from __future__ import annotations

from lepton_fl.report import figures, findings, wording
from lepton_fl.report.chart import Figure
from lepton_fl.report.page import render_page
from lepton_fl.results import Interval, Results


def render_html(results: Results) -> str:
    """The whole page in one string; it loads nothing, as `render_page` promises."""
    return render_page(
        "report.html.j2",
        ["report.css"],
        r=results,
        figures=_figures(results),
        rows=findings.comparisons(results),
        arms={name: findings.arm(results, name) for name in figures.ARMS},
        told=findings.by_advice(results),
        most=findings.most_spent(results),
        gap=findings.difference(_mean(results, "pooled"), _mean(results, "federated")),
        gain=findings.gain(results),
        rare=findings.rare(results),
        seen=findings.first_seeds(results),
        fprs=findings.fprs(results),
        recall_at=findings.recall_at,
        at_point=findings.at_point(results),
        without_threshold=findings.without_threshold(results),
        w=wording,
    )


def _figures(results: Results) -> dict[str, Figure]:
    """The charts that this run has the numbers for, by the id of their place on the page."""
    drawn: dict[str, Figure] = {}
    if results.arms and results.sites:
        drawn["by-site"] = figures.by_site(results)
    seen = findings.first_seeds(results)
    if any(first.curve for _, first in seen.values()):
        drawn["precision-recall"] = figures.precision_recall(results)
        drawn["roc"] = figures.roc(results)
    if findings.fprs(results):
        drawn["recall-at"] = figures.recall_at_fpr(results)
    if seen:
        drawn["calibration-before"] = figures.reliability(results, scaled=False)
    if any(first.recalibrated for _, first in seen.values()):
        drawn["calibration-after"] = figures.reliability(results, scaled=True)
    if any(p.epsilon > 0 and p.mean.mean is not None for p in results.curve):
        drawn["against-epsilon"] = figures.against_epsilon(results)
    if any(r.epsilon is not None for r in results.rounds):
        drawn["epsilon-by-round"] = figures.epsilon_by_round(results)
    if results.rounds:
        drawn["time-line"] = figures.time_line(results)
    return drawn


def _mean(results: Results, name: str) -> Interval | None:
    found = findings.arm(results, name)
    return found.mean if found else None
