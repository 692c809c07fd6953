"""The report as one HTML file that needs no network, now or in ten years."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from lepton_fl.report import figures, findings, wording
from lepton_fl.results import Interval, Results


def render_html(results: Results) -> str:
    """The whole page: style, plotly.js, figures and tables in one string.

    Guarantee: the page loads nothing. Its content security policy allows no address at all and only
    the two scripts below, by digest, so that text from a study or a site can neither run nor call
    home even if it were to slip past the template's escaping.
    """
    # Imported here: a command that writes no report should not wait for them.
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped, unused-ignore]

    scripts = {"plotly": str(get_plotlyjs()), "charts": _resource("report.js")}
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_resource("report.html.j2"))
    return page.render(
        r=results,
        style=_resource("report.css"),
        scripts=scripts,
        policy=_content_security_policy(list(scripts.values())),
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


def _figures(results: Results) -> dict[str, figures.Figure]:
    """The charts that this run has the numbers for, by the id of their place on the page."""
    drawn: dict[str, figures.Figure] = {}
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


def _content_security_policy(scripts: list[str]) -> str:
    digests = (hashlib.sha256(script.encode("utf-8")).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(d).decode('ascii')}'" for d in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _resource(name: str) -> str:
    return files("lepton_fl.report").joinpath(name).read_text(encoding="utf-8")
