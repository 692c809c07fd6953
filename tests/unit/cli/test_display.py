"""The progress of a run, as plain lines and in a terminal."""

import io

from rich.console import Console

from lepton_fl.cli.display import _Live, display_for
from lepton_fl.results import RoundSummary


def test_no_line_says_less_than_was_spent(capsys):
    """A budget of 2 of which 2.001 are spent is not "2.00 of 2"."""
    summary = RoundSummary(round=1, sites=("a", "b"), seconds=1.0, epsilon=2.001, metric=0.8)

    display_for("auc", "SIMULATED").round(summary, 3, 2.0)

    assert capsys.readouterr().err == "round 1/3: 2 sites, auc 0.800, epsilon 2.01 of 2\n"


def test_a_site_that_is_back_is_not_shown_as_left_out():
    """Nor is one that came late missing among the sites."""
    live = _Live("auc", "SIMULATED")
    live.joined(("a", "b"), {"c": "no answer before the deadline"})
    shown = []

    for sites, dropped in [(("a",), {"b": "gone"}), (("a", "b", "c"), {})]:
        live.round(RoundSummary(round=1, sites=sites, dropped=dropped, seconds=1.0, epsilon=None), 3, None)
        console = Console(file=io.StringIO(), width=100)
        console.print(live._render())
        shown.append(console.file.getvalue())

    assert "b: gone" in shown[0]
    assert "c: no answer" in shown[0]
    assert "left out" not in shown[1]
    assert "a, b, c" in shown[1]
