"""The report's charts as plotly figures, in plain JSON types.

A colour is the name of a CSS property (`--federated`): report.js looks it up, so that the charts
follow the page into dark mode and onto paper. plotly reads tags in the text it draws (links among
them), so every name that came from a study or a site passes through `_text`.
"""

from __future__ import annotations

import math
from html import escape
from typing import Any

from lepton_fl.report import wording
from lepton_fl.report.findings import OWN, arm, better, comparisons
from lepton_fl.results import CurvePoint, Interval, Results, RoundSummary

Figure = dict[str, Any]

ARMS = ("local", "linear", "federated", "pooled")
_BAR = 20
"""Height of one bar, px."""
_LABEL = 24
"""Longest label of a site on an axis, characters."""


def by_site(results: Results) -> Figure:
    """Bars with whiskers: the site's own two models, federated and pooled."""
    rows = comparisons(results)
    sites = [_text(row.site.site) for row in rows]
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
                "name": _text(found.label),
                "y": sites,
                "x": [i.mean if i else None for i in intervals],
                "error_x": _whiskers(intervals),
                "marker": {"color": f"--{name}"},
                "customdata": [wording.interval(i) for i in intervals],
                "hovertemplate": "%{y}, %{fullData.name}<br>%{customdata}<extra></extra>",
            }
        )
    layout = _layout(height=90 + len(sites) * (_BAR * max(1, len(traces)) + 14))
    layout |= {
        "barmode": "group",
        "bargap": 0.22,
        "bargroupgap": 0.08,
        "yaxis": _axis(
            type="category",
            autorange="reversed",
            showgrid=False,
            automargin=True,
            tickvals=sites,
            ticktext=[_text(_short(row.site.site)) for row in rows],
        ),
        "xaxis": _axis(title=wording.METRIC[results.metric], rangemode="tozero"),
        "annotations": [
            _note(
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
        layout["shapes"] = [_vertical(0.5)]
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
            traces.append(_band(ends, [low, low], [high, high], colour=f"--{found.arm}-band"))
    for found in own:
        text = wording.interval(found.mean)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": _text(found.label),
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
    layout = _layout(height=400)
    layout |= {
        "xaxis": _axis(
            title="epsilon (logarithmic)",
            type="log",
            range=[math.log10(end) for end in ends],
            tickvals=epsilons,
            ticktext=[f"{e:g}" for e in epsilons],
        ),
        "yaxis": _axis(title=wording.METRIC[results.metric], automargin=True),
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
    layout = _layout(height=300)
    layout |= {
        "xaxis": _round_axis(results),
        "yaxis": _axis(title="epsilon", rangemode="tozero", automargin=True),
    }
    return {"data": traces, "layout": layout}


def time_line(results: Results) -> Figure:
    """Seconds of each round; rounds that lost a site stand out."""
    traces: list[Figure] = []
    for name, colour, rounds in (
        ("all sites in", "--calm", [r for r in results.rounds if not r.dropped]),
        ("a site was dropped", "--warning", [r for r in results.rounds if r.dropped]),
    ):
        if rounds:
            traces.append(
                {
                    "type": "bar",
                    "name": name,
                    "x": [r.round for r in rounds],
                    "y": [r.seconds for r in rounds],
                    "marker": {"color": colour},
                    "customdata": [_round(r) for r in rounds],
                    "hovertemplate": "round %{x}<br>%{customdata}<extra></extra>",
                }
            )
    layout = _layout(height=260)
    layout |= {
        "barmode": "overlay",
        "bargap": 0.15,
        "xaxis": _round_axis(results),
        "yaxis": _axis(title="seconds", rangemode="tozero", automargin=True),
    }
    return {"data": traces, "layout": layout}


def _round(summary: RoundSummary) -> str:
    lines = [wording.duration(summary.seconds), wording.count(len(summary.sites), "site") + " in"]
    lines += [f"{_text(site)}: {_text(why)}" for site, why in summary.dropped.items()]
    return "<br>".join(lines)


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
    bounded = [
        (p.epsilon, p.mean.low, p.mean.high)
        for p in points
        if p.mean.low is not None and p.mean.high is not None
    ]
    if len(bounded) < 2:
        # A band needs two points; one gets a whisker.
        line["error_y"] = _whiskers([p.mean for p in points])
        return [line]
    x, low, high = (list(column) for column in zip(*bounded, strict=True))
    return [_band(x, low, high, colour=f"{colour}-band"), line]


def _band(x: list[float], low: list[float], high: list[float], *, colour: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": x + x[::-1],
        "y": high + low[::-1],
        "fill": "toself",
        "fillcolor": colour,
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _whiskers(intervals: list[Interval | None]) -> Figure:
    up = [0.0] * len(intervals)
    down = [0.0] * len(intervals)
    for index, i in enumerate(intervals):
        if i is not None and i.mean is not None and i.low is not None and i.high is not None:
            # The percentiles of a skewed bootstrap can leave its mean out: no negative whisker.
            up[index] = max(0.0, i.high - i.mean)
            down[index] = max(0.0, i.mean - i.low)
    return {
        "type": "data",
        "symmetric": False,
        "array": up,
        "arrayminus": down,
        "color": "--ink",
        "thickness": 1.5,
        "width": 4,
    }


def _layout(*, height: int) -> Figure:
    return {
        "height": height,
        "autosize": True,
        "margin": {"l": 8, "r": 16, "t": 36, "b": 48},
        "paper_bgcolor": "--clear",
        "plot_bgcolor": "--clear",
        "font": {"color": "--ink", "size": 14, "family": "system-ui, sans-serif"},
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yanchor": "bottom",
            "itemclick": False,
            "itemdoubleclick": False,
        },
        "showlegend": True,
        # A drag on a phone scrolls the page.
        "dragmode": False,
        "hoverlabel": {"bgcolor": "--card", "bordercolor": "--line", "font": {"color": "--ink"}},
    }


def _axis(*, title: str = "", **options: Any) -> Figure:
    axis: Figure = {
        "fixedrange": True,
        "gridcolor": "--line",
        "linecolor": "--line",
        "zerolinecolor": "--line",
    }
    if title:
        axis["title"] = {"text": title, "standoff": 12}
    return axis | options


def _round_axis(results: Results) -> Figure:
    # Left to itself plotly counts a short run in halves of a round.
    ticks = {"dtick": 1} if len(results.rounds) <= 10 else {}
    return _axis(title="round", showgrid=False, **ticks)


def _note(text: str, *, y: str) -> Figure:
    return {
        "text": text,
        "x": 0,
        "xshift": 6,
        "xanchor": "left",
        "align": "left",
        "y": y,
        "showarrow": False,
        "font": {"color": "--soft", "size": 12.5},
        "bgcolor": "--paper",
    }


def _vertical(x: float) -> Figure:
    return {
        "type": "line",
        "x0": x,
        "x1": x,
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "line": {"color": "--soft", "width": 1, "dash": "dot"},
    }


def _short(name: str) -> str:
    """`name`, cut so that on a phone the bars keep their room."""
    return name if len(name) <= _LABEL else name[: _LABEL - 1] + "…"


def _text(untrusted: str) -> str:
    return escape(untrusted, quote=False)
