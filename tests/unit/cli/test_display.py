"""The progress of a run as plain lines."""

from lepton_fl.cli.display import display_for
from lepton_fl.results import RoundSummary


def test_no_line_says_less_than_was_spent(capsys):
    """A budget of 2 of which 2.001 are spent is not "2.00 of 2"."""
    summary = RoundSummary(round=1, sites=("a", "b"), seconds=1.0, epsilon=2.001, metric=0.8)

    display_for("auc", "SIMULATED").round(summary, 3, 2.0)

    assert capsys.readouterr().err == "round 1/3: 2 sites, auc 0.800, epsilon 2.01 of 2\n"
