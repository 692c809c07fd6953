"""The report of a sweep: one offline HTML file beside sweep.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import get_args
from urllib.parse import quote

from lepton_fl.files import write_atomic
from lepton_fl.report import chart, wording
from lepton_fl.report.page import render_page
from lepton_fl.results import ArmName, Interval, OwnArm, Sweep, SweepAxis, SweepPoint, SweepValue, shown

NOT_CHOSEN = (
    "Whoever picks the best of these points picks it by the records it is judged on: its figure flatters. "
    "On real records each point would have been charged."
)
LOGARITHMIC = "privacy.epsilon"
BEST = 3
"""How many points are named as the best, where there are too many keys to draw."""
_MARKERS = ("circle", "diamond", "square", "triangle-up", "x", "star")
_SERIES = 6
"""Colours in sweep.css; a seventh line has the first one's, with another marker and dash."""


def write_sweep_report(sweep: Sweep, folder: Path) -> Path:
    """Write sweep.html into `folder`, atomically, and return its path."""
    path = folder / "sweep.html"
    write_atomic(path, render_sweep(sweep).encode("utf-8"))
    return path


def render_sweep(sweep: Sweep) -> str:
    """The whole page in one string; it loads nothing, as `render_page` promises."""
    return render_page(
        "sweep.html.j2",
        ["report.css", "sweep.css"],
        s=sweep,
        figures={"metric": figure} if (figure := _metric(sweep)) else {},
        arms=arms_of(sweep),
        baselines_vary=len(sweep.axes) == 2 and not _one_line(sweep),
        x=_order(sweep)[0].key,
        best=_best(sweep.points),
        link=lambda point: quote(f"{point.folder}/report.html"),
        shown=shown,
        verdict=verdict(sweep),
        not_chosen=NOT_CHOSEN,
        w=wording,
    )


def verdict(sweep: Sweep) -> str:
    """What came out, in one or two sentences."""
    means = [mean for point in sweep.points if (mean := _mean(point)) is not None]
    if not means:
        return "No point has completed."
    low, high = min(means), max(means)
    span = f"{low:.3f}" if len(means) == 1 else f"{low:.3f} to {high:.3f}"
    said = f"Federated {sweep.metric.upper()} {span} over {wording.count(len(means), 'point')}."
    sides = [p.gain.side for p in sweep.points if p.gain is not None and _mean(p) is not None]
    if not sides:
        return said
    return (
        f"{said} Against each site's own best: clearly better at {sides.count(1)}, clearly worse at "
        f"{sides.count(-1)} of {len(sides)}."
    )


def arms_of(sweep: Sweep) -> list[ArmName]:
    """The arms that some point has, in the order of the report."""
    return [name for name in get_args(ArmName) if any(name in point.arms for point in sweep.points)]


def _best(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    measured = [(mean, p) for p in points if (mean := _mean(p)) is not None]
    return [point for _, point in sorted(measured, key=lambda pair: -pair[0])[:BEST]]


def _mean(point: SweepPoint) -> float | None:
    """What a completed point is judged by: a model of fewer rounds is another point's no match."""
    found = point.arms.get("federated") if point.status == "completed" else None
    return None if found is None else found.mean


def _order(sweep: Sweep) -> list[SweepAxis]:
    """The axis to draw along first: of two, the one of numbers, since a line between names says nothing."""
    return sorted(sweep.axes, key=lambda axis: not _numeric(axis)) if len(sweep.axes) == 2 else [*sweep.axes]


def _numeric(axis: SweepAxis) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in axis.values)


def _metric(sweep: Sweep) -> chart.Figure | None:
    """The metric along one key, a line for each value of the other; None for more keys, or no figure."""
    if len(sweep.axes) > 2 or not any(_mean(point) is not None for point in sweep.points):
        return None
    along, *by = _order(sweep)
    numeric = _numeric(along)
    values = sorted(along.values, key=float) if numeric else list(along.values)
    traces: list[chart.Figure] = []
    for name in arms_of(sweep):
        if name == "federated":
            continue
        # The second key may change the data; then one line would be wrong for the others.
        if not by or _one_line(sweep):
            points = _along(sweep, along, values, {by[0].key: by[0].values[0]} if by else {})
            traces += _line(
                *(points, name, wording.ARM[name]),
                colour=f"--{name}",
                dash="dash",
                numeric=numeric,
                # A third and a fourth band would hide what lies between them.
                band=name == _better_own(points),
            )
    for number, fixed in enumerate([{by[0].key: value} for value in by[0].values] if by else [{}]):
        points = _along(sweep, along, values, fixed)
        label = ", ".join(["federated", *(f"{key} {shown(value)}" for key, value in fixed.items())])
        colour = f"--series-{number % _SERIES + 1}" if by else "--federated"
        traces += _line(points, "federated", label, colour=colour, number=number, numeric=numeric)
    layout = chart.layout(height=420)
    logarithmic = along.key == LOGARITHMIC and numeric and all(float(v) > 0 for v in values)
    title = f"{along.key} (logarithmic)" if logarithmic else along.key
    axis = chart.axis(title=chart.text(title), automargin=True)
    if logarithmic:
        ends = [math.log10(float(values[0]) / 1.25), math.log10(float(values[-1]) * 1.25)]
        axis |= {"type": "log", "range": ends}
    elif not numeric:
        axis |= {"type": "category"}
    if numeric:
        axis |= {"tickvals": [float(v) for v in values], "ticktext": [f"{float(v):g}" for v in values]}
    layout |= {
        "xaxis": axis,
        "yaxis": chart.axis(title=wording.METRIC[sweep.metric], automargin=True),
    }
    return {"data": traces, "layout": layout}


def _one_line(sweep: Sweep) -> bool:
    """Whether the second key leaves the own and pooled models as they are, wherever they were measured."""
    along, _ = _order(sweep)
    for value in along.values:
        for name in arms_of(sweep):
            here = [p.arms[name] for p in sweep.points if p.values[along.key] == value and name in p.arms]
            if name != "federated" and any(found != here[0] for found in here):
                return False
    return True


def _along(
    sweep: Sweep, along: SweepAxis, values: Sequence[SweepValue], fixed: dict[str, SweepValue]
) -> list[tuple[SweepValue, SweepPoint]]:
    """The points on a line, in the order of `values`."""
    found = {p.values[along.key]: p for p in sweep.points if all(p.values[k] == v for k, v in fixed.items())}
    return [(value, found[value]) for value in values if value in found]


def _better_own(points: list[tuple[SweepValue, SweepPoint]]) -> ArmName | None:
    """The one of the sites' own models with the higher sum along a line."""
    sums = {
        name: sum(p.arms[name].mean or 0 for _, p in points if name in p.arms) for name in get_args(OwnArm)
    }
    return max(sums, key=lambda name: sums[name]) if any(sums.values()) else None


def _line(
    points: list[tuple[SweepValue, SweepPoint]],
    name: ArmName,
    label: str,
    *,
    colour: str,
    numeric: bool,
    number: int = 0,
    dash: str = "solid",
    band: bool = True,
) -> list[chart.Figure]:
    measured: list[tuple[float | str, Interval]] = [
        (float(value) if numeric else chart.text(shown(value)), interval)
        for value, point in points
        if _mean(point) is not None and (interval := point.arms.get(name)) and interval.mean is not None
    ]
    if not measured:
        return []
    intervals = [interval for _, interval in measured]
    line: chart.Figure = {
        "type": "scatter",
        # No line between names: there is nothing in between.
        "mode": "lines+markers" if numeric else "markers",
        "name": chart.text(label),
        "x": [x for x, _ in measured],
        "y": [interval.mean for interval in intervals],
        "line": {"color": colour, "width": 2.5 if name == "federated" else 2, "dash": dash},
        "marker": {"color": colour, "size": 8, "symbol": _MARKERS[number % len(_MARKERS)]},
        "customdata": [wording.interval(interval) for interval in intervals],
        "hovertemplate": "%{fullData.name}<br>%{x}: %{customdata}<extra></extra>",
    }
    if not band:
        return [line]
    if numeric:
        return chart.with_intervals(line, intervals, colour=colour)
    line["error_y"] = chart.whiskers(intervals)
    return [line]
