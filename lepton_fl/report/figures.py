"""The charts of a run's report."""

from __future__ import annotations

import math

from lepton_fl.report import chart, wording
from lepton_fl.report.chart import Figure
from lepton_fl.report.findings import OWN, arm, better, comparisons, first_seeds, fprs, rare, recall_at
from lepton_fl.results import Arm, Curve, CurvePoint, FirstSeed, Results, RoundSummary

ARMS = ("local", "linear", "federated", "pooled")
_BAR = 20
"""Height of one bar, px."""
_LABEL = 24
"""Longest label of a site on an axis, characters."""


def by_site(results: Results) -> Figure:
    """Bars with whiskers: the site's own two models, federated and pooled."""
    rows = comparisons(results)
    sites = [chart.text(row.site.site) for row in rows]
    traces: list[Figure] = []
    for index, name in enumerate(ARMS):
        found = arm(results, name)
        if found is None:
            continue
        intervals = [row.intervals[index] for row in rows]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": chart.text(found.label),
                "y": sites,
                "x": [i.mean if i else None for i in intervals],
                "error_x": chart.whiskers(intervals),
                "marker": {"color": f"--{name}"},
                "customdata": [wording.interval(i) for i in intervals],
                "hovertemplate": "%{y}, %{fullData.name}<br>%{customdata}<extra></extra>",
            }
        )
    layout = chart.layout(height=90 + len(sites) * (_BAR * max(1, len(traces)) + 14))
    layout |= {
        "barmode": "group",
        "bargap": 0.22,
        "bargroupgap": 0.08,
        "yaxis": chart.axis(
            type="category",
            autorange="reversed",
            showgrid=False,
            automargin=True,
            tickvals=sites,
            ticktext=[chart.text(_short(row.site.site)) for row in rows],
        ),
        "xaxis": chart.axis(title=wording.METRIC[results.metric], rangemode="tozero"),
        "annotations": [
            chart.note(
                "not defined: only one class<br>among the held-out records"
                if row.measured
                else wording.NOT_MEASURED,
                y=site,
            )
            for row, site in zip(rows, sites, strict=True)
            if not row.defined
        ],
    }
    if results.metric == "auc":
        layout["xaxis"]["range"] = [0, 1]
        layout["shapes"] = [chart.vertical(0.5)]
    return {"data": traces, "layout": layout}


def against_epsilon(results: Results) -> Figure:
    """Utility against epsilon for each kind of noise, with the sites' own models as horizontal lines."""
    points = [p for p in results.curve if p.epsilon > 0 and p.mean.mean is not None]
    epsilons = sorted({p.epsilon for p in points})
    ends = [epsilons[0] / 1.25, epsilons[-1] * 1.25]
    traces: list[Figure] = []
    own = [found for name in OWN if (found := arm(results, name)) and found.mean.mean is not None]
    best = better(found.mean for found in own)
    for found in own:
        if found.mean is best and best.low is not None and best.high is not None:
            # The better one's only: a third and a fourth band would hide what lies between them.
            low, high = best.low, best.high
            traces.append(chart.band(ends, [low, low], [high, high], colour=f"--{found.arm}-band"))
    for found in own:
        text = wording.interval(found.mean)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": chart.text(found.label),
                "x": ends,
                "y": [found.mean.mean] * 2,
                "line": {
                    "color": f"--{found.arm}",
                    "dash": "dash" if found.arm == "local" else "dashdot",
                    "width": 2,
                },
                "hovertemplate": f"%{{fullData.name}}<br>{text}<extra></extra>",
            }
        )
    for noise, label, symbol in (
        ("local", "federated, local noise", "circle"),
        ("shared", "federated, shared noise", "diamond"),
    ):
        line = sorted((p for p in points if p.noise == noise), key=lambda p: p.epsilon)
        if line:
            traces += _line_with_band(line, label, symbol, colour=f"--noise-{noise}")
    layout = chart.layout(height=400)
    layout |= {
        "xaxis": chart.axis(
            title="epsilon (logarithmic)",
            type="log",
            range=[math.log10(end) for end in ends],
            tickvals=epsilons,
            ticktext=[f"{e:g}" for e in epsilons],
        ),
        "yaxis": chart.axis(title=wording.METRIC[results.metric], automargin=True),
    }
    return {"data": traces, "layout": layout}


def epsilon_by_round(results: Results) -> Figure:
    """Epsilon spent so far, round by round, under the line of what the study promises."""
    rounds = [r for r in results.rounds if r.epsilon is not None]
    values = [r.epsilon for r in rounds if r.epsilon is not None]
    traces: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(rounds) <= 40 else "lines",
            "name": "spent so far",
            "x": [r.round for r in rounds],
            "y": values,
            "line": {"color": "--accent", "width": 2},
            "customdata": [wording.spent(v) for v in values],
            "hovertemplate": "round %{x}<br>epsilon %{customdata}<extra></extra>",
        }
    ]
    promised = results.promise.epsilon
    if promised is not None:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "promised for the study",
                "x": [1, max(results.rounds_planned, *(r.round for r in rounds))],
                "y": [promised, promised],
                "line": {"color": "--warning", "dash": "dash", "width": 2},
                "hovertemplate": f"promised: epsilon {promised:g}<extra></extra>",
            }
        )
    layout = chart.layout(height=300)
    layout |= {
        "xaxis": _round_axis(results),
        "yaxis": chart.axis(title="epsilon", rangemode="tozero", automargin=True),
    }
    return {"data": traces, "layout": layout}


def time_line(results: Results) -> Figure:
    """A row for each site, a mark for each round: took part, dropped, or the round was lost."""
    rows = [site.site for site in results.sites]
    states: dict[str, list[tuple[str, RoundSummary]]] = {"in": [], "dropped": [], "lost": []}
    traces: list[Figure] = []
    marks: list[tuple[str, str, Figure]] = [
        ("in", "took part", {"symbol": "square", "color": "--calm", "size": 6}),
        ("dropped", "dropped", {"symbol": "x", "color": "--warning", "size": 9}),
        ("lost", "answered, but the round was lost", {"symbol": "diamond", "color": "--pooled", "size": 8}),
    ]
    for site in rows:
        for summary in results.rounds:
            if site in summary.dropped:
                states["dropped"].append((site, summary))
            elif site in summary.sites:
                states["in"].append((site, summary))
            elif not summary.sites and _was_asked(results, site):
                states["lost"].append((site, summary))
    for state, label, marker in marks:
        found = states[state]
        if found:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": label,
                    "x": [summary.round for _, summary in found],
                    "y": [chart.text(site) for site, _ in found],
                    "marker": marker,
                    "customdata": [_mark(label, site, summary) for site, summary in found],
                    "hovertemplate": "round %{x}, %{y}<br>%{customdata}<extra></extra>",
                }
            )
    layout = chart.layout(height=110 + 26 * len(rows))
    layout |= {
        "xaxis": _round_axis(results) | {"zeroline": False, "range": [0.3, results.rounds[-1].round + 0.7]},
        "yaxis": chart.axis(
            type="category",
            categoryorder="array",
            categoryarray=[chart.text(site) for site in rows][::-1],
            range=[-0.6, len(rows) - 0.4],
            showgrid=False,
            automargin=True,
            tickvals=[chart.text(site) for site in rows],
            ticktext=[chart.text(_short(site)) for site in rows],
        ),
    }
    return {"data": traces, "layout": layout}


def _was_asked(results: Results, site: str) -> bool:
    """It took part in the run, and was not turned away before the first round."""
    return any(site in summary.sites or site in summary.dropped for summary in results.rounds)


def _mark(label: str, site: str, summary: RoundSummary) -> str:
    why = summary.dropped.get(site)
    return f"{label}{': ' + chart.text(why) if why else ''}, {wording.duration(summary.seconds)}"


def precision_recall(results: Results) -> Figure:
    """Precision against recall of each arm, over all held-out records of one seed."""
    seen = _curves(results)
    traces: list[Figure] = []
    for found, _, curve in seen:
        # A recall is reached at the precision of the next threshold down: vertical first.
        traces.append(
            _curve(found, list(curve.recall), list(curve.precision), "vh")
            | {"hovertemplate": "%{fullData.name}<br>recall %{x:.3f}, precision %{y:.3f}<extra></extra>"}
        )
    _, first, _ = seen[0]
    prevalence = first.positives / first.records
    layout = chart.half_layout()
    layout |= {
        "xaxis": chart.axis(title="recall", range=[0, 1.01]),
        "yaxis": chart.axis(title="precision", range=[0, 1.02], automargin=True),
        "shapes": [chart.horizontal(prevalence)],
        "annotations": [
            chart.note(f"share of positives {wording.percent(prevalence)}", y=prevalence)
            | {"yanchor": "bottom", "bgcolor": "--clear"}
        ],
    }
    return {"data": traces, "layout": layout}


def roc(results: Results) -> Figure:
    """Recall against the logarithm of the false positive rate: alarms are dear, so the left end counts."""
    seen = _curves(results)
    _, first, _ = seen[0]
    low = max(1 / (first.records - first.positives), 1e-4)
    traces: list[Figure] = []
    for found, _, curve in seen:
        start = max((r for f, r in zip(curve.fpr, curve.recall, strict=True) if f <= low), default=0.0)
        points = [(f, r) for f, r in zip(curve.fpr, curve.recall, strict=True) if f > low]
        # A rate that may not be exceeded buys the recall of the last threshold within it: horizontal first.
        traces.append(
            _curve(found, [low, *(f for f, _ in points)], [start, *(r for _, r in points)], "hv")
            | {"hovertemplate": "%{fullData.name}<br>FPR %{x:.2%}, recall %{y:.3f}<extra></extra>"}
        )
    steps = [low ** (1 - i / 40) for i in range(41)]
    traces.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "chance",
            "x": steps,
            "y": steps,
            "line": {"color": "--soft", "width": 1, "dash": "dot"},
            "hoverinfo": "skip",
            "showlegend": False,
        }
    )
    ticks = [t for t in (1e-4, 1e-3, 1e-2, 1e-1, 1.0) if t >= low]
    layout = chart.half_layout()
    layout |= {
        "xaxis": chart.axis(
            title="false positive rate (logarithmic)",
            type="log",
            range=[math.log10(low), 0.01],
            ticklabeloverflow="allow",
            tickvals=ticks,
            ticktext=[wording.percent(t) for t in ticks],
        ),
        "yaxis": chart.axis(title="recall", range=[0, 1.02], automargin=True),
    }
    return {"data": traces, "layout": layout}


def recall_at_fpr(results: Results) -> Figure:
    """Recall of each arm at low false positive rates, mean of the sites, with whiskers."""
    rates = fprs(results)
    names = [f"at {wording.percent(fpr)} FPR" for fpr in rates]
    traces: list[Figure] = []
    defined: set[float] = set()
    for name in ARMS:
        found = arm(results, name)
        if found is None or not found.recall:
            continue
        intervals = [r.mean if (r := recall_at(found, fpr)) else None for fpr in rates]
        defined |= {fpr for fpr, i in zip(rates, intervals, strict=True) if i and i.mean is not None}
        traces.append(
            {
                "type": "bar",
                "name": chart.text(wording.ARM[name]),
                "x": names,
                "y": [i.mean if i else None for i in intervals],
                "error_y": chart.whiskers(intervals),
                "marker": {"color": f"--{name}"},
                "customdata": [wording.recall(i) for i in intervals],
                "hovertemplate": "%{fullData.name}, recall %{x}<br>%{customdata}<extra></extra>",
            }
        )
    layout = chart.layout(height=320)
    layout |= {
        "barmode": "group",
        "bargap": 0.25,
        "bargroupgap": 0.08,
        "xaxis": chart.axis(type="category", categoryorder="array", categoryarray=names, showgrid=False)
        | {"range": [-0.5, len(names) - 0.5]},
        "yaxis": chart.axis(title="recall", range=[0, 1.02], automargin=True),
        "annotations": [
            chart.note("not defined", y="")
            | {"x": name, "y": 0.02, "xshift": 0, "xanchor": "center", "align": "center", "yanchor": "bottom"}
            for fpr, name in zip(rates, names, strict=True)
            if fpr not in defined
        ],
    }
    return {"data": traces, "layout": layout}


def reliability(results: Results, *, scaled: bool) -> Figure:
    """Observed share of positives against the score that promised it; perfect on the diagonal.

    Logarithmic where positives are rare: nine bins of ten would lie in one corner.
    """
    seen = list(first_seeds(results).values())
    logarithmic = rare(results)
    # Side by side, before and after need the same axes.
    both = [c for _, f in seen for c in (f.calibration, f.recalibrated) if c]
    shares = [v for c in both for b in c.bins for v in (b.score, b.observed.mean) if v]
    low = max(min(shares, default=1e-5) / 1.5, 1e-5) if logarithmic else 0.0
    ends = [low, min(1.0, 1.05 * max([b.observed.high or 1.0 for c in both for b in c.bins] + shares))]
    traces: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "perfect",
            "x": ends,
            "y": ends,
            "line": {"color": "--soft", "width": 1, "dash": "dot"},
            "hoverinfo": "skip",
            "showlegend": False,
        }
    ]
    for found, first in seen:
        calibration = first.recalibrated if scaled else first.calibration
        # On a logarithmic axis there is no place for nothing.
        bins = [b for b in calibration.bins if b.positives or not logarithmic] if calibration else []
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": chart.text(wording.ARM[found.arm]),
                "x": [b.score for b in bins],
                "y": [b.observed.mean for b in bins],
                # Forty whiskers would hide each other; those of the other arms are in the hover text.
                "error_y": chart.whiskers([b.observed for b in bins] if found.arm == "federated" else [])
                | {"color": f"--{found.arm}", "width": 0},
                "line": {"color": f"--{found.arm}", "width": 2},
                "marker": {"size": 6},
                "customdata": [
                    f"{wording.share(b.observed)} of {wording.count(b.records, 'record')}" for b in bins
                ],
                "hovertemplate": "%{fullData.name}<br>score %{x:.3g}<br>share %{customdata}<extra></extra>",
            }
        )
    axis: Figure = {"range": ends}
    if logarithmic:
        ticks = [10.0**power for power in range(-5, 1) if ends[0] <= 10.0**power <= ends[1]]
        axis = {
            "type": "log",
            "range": [math.log10(end) for end in ends],
            "tickvals": ticks,
            "ticktext": [wording.percent(tick) for tick in ticks],
        }
    layout = chart.half_layout()
    layout |= {
        "xaxis": chart.axis(title="mean score", **axis),
        "yaxis": chart.axis(title="share of positives", automargin=True, **axis),
    }
    return {"data": traces, "layout": layout}


def _curves(results: Results) -> list[tuple[Arm, FirstSeed, Curve]]:
    return [(found, f, f.curve) for found, f in first_seeds(results).values() if f.curve is not None]


def _curve(found: Arm, x: list[float], y: list[float], shape: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": chart.text(wording.ARM[found.arm]),
        "x": x,
        "y": y,
        "line": {
            "color": f"--{found.arm}",
            "width": 2.5 if found.arm == "federated" else 1.75,
            "shape": shape,
        },
    }


def _line_with_band(points: list[CurvePoint], label: str, symbol: str, *, colour: str) -> list[Figure]:
    epsilons = [p.epsilon for p in points]
    line: Figure = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": label,
        "x": epsilons,
        "y": [p.mean.mean for p in points],
        "line": {"color": colour, "width": 2.5},
        "marker": {"size": 8, "symbol": symbol},
        "customdata": [f"{wording.interval(p.mean)}<br>{wording.count(p.seeds, 'seed')}" for p in points],
        "hovertemplate": "%{fullData.name}<br>epsilon %{x}: %{customdata}<extra></extra>",
    }
    return chart.with_intervals(line, [p.mean for p in points], colour=colour)


def _round_axis(results: Results) -> Figure:
    # Left to itself plotly counts a short run in halves of a round.
    ticks = {"dtick": 1} if len(results.rounds) <= 10 else {}
    return chart.axis(title="round", showgrid=False, **ticks)


def _short(name: str) -> str:
    """`name`, cut so that on a phone the bars keep their room."""
    return name if len(name) <= _LABEL else name[: _LABEL - 1] + "…"
