"""The parts that the charts of a run and of a sweep share, as plotly figures in plain JSON types.

A colour is the name of a CSS property (`--federated`): report.js looks it up, so that the charts
follow the page into dark mode and onto paper. plotly reads tags in the text it draws (links among
them), so every name that came from a study or a site passes through `text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from lepton_fl.results import Interval

Figure = dict[str, Any]


def with_intervals(line: Figure, intervals: Sequence[Interval], *, colour: str) -> list[Figure]:
    """A line of numbers with the band of its intervals, or with whiskers where a band has too few points."""
    bounded = [
        (x, i.low, i.high)
        for x, i in zip(line["x"], intervals, strict=True)
        if i.low is not None and i.high is not None
    ]
    if len(bounded) < 2:
        # A band needs two points; one gets a whisker.
        line["error_y"] = whiskers(intervals)
        return [line]
    x, low, high = (list(column) for column in zip(*bounded, strict=True))
    return [band(x, low, high, colour=f"{colour}-band"), line]


def band(x: list[float], low: list[float], high: list[float], *, colour: str) -> Figure:
    """A coloured area between `low` and `high`."""
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


def whiskers(intervals: Sequence[Interval | None]) -> Figure:
    """Error bars; none where an interval has no bounds."""
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


def layout(*, height: int) -> Figure:
    """What every chart has: `height` px, no zoom, the page's own colours."""
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


def half_layout() -> Figure:
    """The same for a chart beside another: its legend in small type, or it would take half the height."""
    half = layout(height=380)
    half["legend"] |= {"font": {"size": 12}}
    half["margin"] |= {"r": 28}
    return half


def axis(*, title: str = "", **options: Any) -> Figure:
    """An axis that cannot be dragged, with plotly's further `options`."""
    found: Figure = {
        "fixedrange": True,
        "gridcolor": "--line",
        "linecolor": "--line",
        "zerolinecolor": "--line",
    }
    if title:
        found["title"] = {"text": title, "standoff": 12}
    return found | options


def note(text: str, *, y: str | float) -> Figure:
    """A remark at the left end of the row `y`."""
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


def vertical(x: float) -> Figure:
    """A dotted line over the whole height."""
    return {
        "type": "line",
        "x0": x,
        "x1": x,
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "line": {"color": "--soft", "width": 1, "dash": "dot"},
    }


def horizontal(y: float) -> Figure:
    """A dotted line over the whole width."""
    return vertical(0) | {"x0": 0, "x1": 1, "xref": "paper", "y0": y, "y1": y, "yref": "y"}


def text(untrusted: str) -> str:
    """A name in which plotly finds no tag."""
    return escape(untrusted, quote=False)
