"""The report of a sweep: offline, in the open about what it is, and never a line that misleads."""

import html
import itertools
import json
import re

import pytest

from lepton_fl.report.sweep import NOT_CHOSEN, render_sweep, verdict, write_sweep_report
from lepton_fl.results import Interval, Sweep, SweepAxis, SweepPoint


def interval(mean):
    return Interval(mean=mean, low=mean - 0.05, high=mean + 0.05)


@pytest.fixture
def make():
    """A sweep over axes; federated gets better along them, the others stay."""

    def make(axes, **changes):
        keys = list(axes)
        points = []
        for number, values in enumerate(itertools.product(*axes.values())):
            name = ",".join(f"{k}={v}" for k, v in zip(keys, values, strict=True))
            arms = {
                "local": interval(0.7),
                "linear": interval(0.75),
                "federated": interval(0.7 + number / 100),
            }
            points.append(
                SweepPoint(
                    name=name,
                    folder=f"points/{name}",
                    values=dict(zip(keys, values, strict=True)),
                    study_id="0" * 64,
                    status="completed",
                    arms=arms,
                    gain=Interval(mean=0.1, low=0.05, high=0.15),
                    epsilon=1.0,
                    rounds=3,
                    seconds=2.0,
                )
            )
        raw = {
            "status": "completed",
            "labels": ("SIMULATED", "artificial sites: one table cut 4 ways (iid)"),
            "study_name": "heart",
            "purpose": "",
            "metric": "auc",
            "axes": tuple(SweepAxis(key=k, values=tuple(v)) for k, v in axes.items()),
            "points": tuple(points),
            "seeds": (0,),
            "options": (),
            "command": "lepton-fl simulate study.toml --sweep privacy.epsilon=1,3",
            "started": "2026-01-01T00:00:00+00:00",
            "seconds": 9.0,
        }
        return Sweep(**{**raw, **changes})

    return make


def chart(page):
    """The chart's traces and layout; None where there is none."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)
    return json.loads(found[1])["metric"] if found else None


def lines(page):
    return {trace["name"]: trace for trace in chart(page)["data"] if "name" in trace}


EPSILON = {"privacy.epsilon": (3, 0.3, 1)}


def test_epsilon_is_drawn_in_order_and_logarithmic(make):
    """Whatever order it was asked in."""
    page = render_sweep(make(EPSILON))

    assert lines(page)["federated"]["x"] == [0.3, 1.0, 3.0]
    assert lines(page)["federated"]["y"] == pytest.approx([0.71, 0.72, 0.7])
    assert chart(page)["layout"]["xaxis"]["type"] == "log"
    assert set(lines(page)) == {"federated", "own boosting", "own logistic regression"}


def test_the_page_loads_nothing_and_says_what_it_is(make):
    """One file under a policy without any address; labels, command and the warning against choosing."""
    whole = render_sweep(make(EPSILON))
    page = html.unescape(re.sub(r"<script.*?</script>", "", whole, flags=re.DOTALL))

    assert "default-src 'none'" in page
    assert not re.search(r'(src|href)="(https?:)?//', page)
    for text in ("SIMULATED", "artificial sites", "--sweep privacy.epsilon=1,3", NOT_CHOSEN):
        assert text in page


def test_each_point_leads_to_its_own_report(make):
    """By a relative link, so that the folder can be moved."""
    page = render_sweep(make(EPSILON))

    links = re.findall(r'<a href="([^"]+)"', page)
    assert links[:3] == [f"points/privacy.epsilon%3D{e}/report.html" for e in ("3", "0.3", "1")]


def test_a_second_key_is_a_line_each(make):
    """And numbers are along the axis: a line between names says nothing."""
    page = render_sweep(make({"train.strategy": ("lockstep", "fedavg"), "privacy.epsilon": (1, 3)}))

    found = lines(page)
    assert found["federated, train.strategy lockstep"]["x"] == [1.0, 3.0]
    assert found["federated, train.strategy fedavg"]["y"] == pytest.approx([0.72, 0.73])
    assert "own boosting" in found


def test_own_models_that_differ_by_the_second_key_are_in_the_table_only(make):
    """One line for all would be wrong for some."""
    sweep = make({"privacy.epsilon": (1, 3), "sites": (4, 8)})
    last = sweep.points[-1]
    other = last.model_copy(update={"arms": {**last.arms, "local": interval(0.6)}})
    page = render_sweep(sweep.model_copy(update={"points": (*sweep.points[:-1], other)}))

    assert set(lines(page)) == {"federated, sites 4", "federated, sites 8"}
    assert "differ from line to line" in page


def test_three_keys_are_a_table_and_the_best(make):
    """No chart shows them."""
    page = render_sweep(make({"a.b": (1, 2), "c.d": (1, 2), "e.f": (1, 2)}))

    assert chart(page) is None
    best = re.search(r'<ol id="best">(.*?)</ol>', page, re.S)[1]
    assert re.findall(r">([^<]+)</a>", best) == [
        "a.b=2,c.d=2,e.f=2",
        "a.b=2,c.d=2,e.f=1",
        "a.b=2,c.d=1,e.f=2",
    ]


def test_names_have_no_line_between(make):
    """There is nothing between two strategies."""
    trace = lines(render_sweep(make({"train.strategy": ("lockstep", "fedavg")})))["federated"]

    assert trace["mode"] == "markers"
    assert trace["error_y"]["array"] == pytest.approx([0.05, 0.05])


def test_a_point_that_did_not_complete_is_told_and_not_drawn(make):
    """A model of fewer rounds is no match for the others."""
    sweep = make(EPSILON, status="incomplete")
    cut = sweep.points[0].model_copy(
        update={"status": "killed", "reason": "its process was killed (SIGKILL)"}
    )
    sweep = sweep.model_copy(update={"points": (cut, *sweep.points[1:])})
    page = render_sweep(sweep)

    assert lines(page)["federated"]["x"] == [0.3, 1.0]
    assert "killed: its process was killed (SIGKILL)" in page
    assert "sweep incomplete: 2 of 3 points completed" in page
    assert verdict(sweep).startswith("Federated AUC 0.710 to 0.720 over 2 points.")


def test_a_sweep_without_a_figure_is_a_page_too(make):
    """All points were killed."""
    sweep = make(EPSILON)
    points = tuple(p.model_copy(update={"status": "left", "arms": {}, "gain": None}) for p in sweep.points)
    page = render_sweep(sweep.model_copy(update={"points": points}))

    assert chart(page) is None
    assert "No point has completed." in page


def test_text_from_a_study_cannot_be_a_script(make, tmp_path):
    """Keys, values and names are escaped, in the page and in the chart."""
    evil = "<script>alert(1)</script>"
    changed = {"study_name": evil, "purpose": evil, "command": evil, "labels": (evil,)}
    path = write_sweep_report(make({f"task.{evil}": (evil, "b")}, **changed), tmp_path)

    page = path.read_text(encoding="utf-8")
    assert evil not in page
    assert lines(page)["federated"]["x"][0] == "&lt;script&gt;alert(1)&lt;/script&gt;"
