from __future__ import annotations

import re

import pytest

from lepton_fl.report import render_html, render_markdown
from lepton_fl.results import Bounded, Pooled, Results, SecureSums


def test_table_has_a_row_for_each_site(hospitals):
    """Site, counts, four intervals, the paired difference and the advice, in a Markdown table."""
    lines = render_markdown(hospitals).splitlines()

    assert "|---|---:|---|---|---|---|---|---|" in lines
    assert (
        "| long-beach | 60 (45) | 0.694 [0.541, 0.833] | 0.671 [0.515, 0.815] | 0.662 [0.503, 0.811] "
        "| 0.708 [0.561, 0.844] | -0.032 [-0.060, -0.005] | **keep your own model** |"
    ) in lines
    assert sum("**keep your own model**" in line for line in lines) == 1


def test_sites_are_told_apart(hospitals):
    """One sentence names the sites that lose, that gain, and that cannot tell."""
    told = "Keep your own model: long-beach; no clear difference: cleveland; gains: hungary."

    assert told in render_markdown(hospitals)


def test_file_without_pairs_still_renders(old):
    """An older results.json has one own model and no paired interval."""
    found = render_markdown(old)

    assert "| not measured | 0.894 [0.826, 0.949] | 0.902 [0.838, 0.955] | +0.023 (no interval) |" in found
    assert "No clear difference: cleveland, hungary, long-beach." in found


def test_undefined_metric_is_worded(hospitals):
    """A site of one class says why it has no figure."""
    row = next(s for s in render_markdown(hospitals).splitlines() if s.startswith("| switz"))

    assert row.count("not defined: only one class among the held-out records") == 4


def test_privacy_line_is_whole(hospitals):
    """Epsilon comes with its delta, its unit and whom it holds against."""
    found = render_markdown(hospitals)

    assert "epsilon 3, delta 1e-5 per record, against: the server and readers of the model" in found
    assert "epsilon 6.45 of 8 at hungary" in found
    assert "**hungary released without noise: AUC on held-out records**" in found


@pytest.mark.parametrize(
    ("ran", "said"),
    [
        ("full", "LSA1: the protocol ran in every round of the charged run"),
        ("functional", "LSA1: not run: the simulator added up the same integers"),
    ],
)
def test_what_leaves_and_what_hides_it_is_said(hospitals, ran, said):
    """Beside the promise, with whether the protocol ran; the page has the same."""
    sums = SecureSums(ran=ran, suite="LSA1", hides="hidden among 3", noise_factor=1.15)
    promise = hospitals.promise.model_copy(update={"leaves": "Each round releases 43 numbers."})
    results = hospitals.model_copy(update={"secure_aggregation": sums, "promise": promise})

    for written in (render_markdown(results), render_html(results)):
        assert "Each round releases 43 numbers." in written
        assert "hidden among 3" in written
        assert said in written


def test_epsilon_is_said_by_who_looks(hospitals):
    """Rounded up, with its delta and unit, on the page too; where all see the same it is said once."""
    against = {
        "the server alone, and every reader of the model": 2.481,
        "the server and 1 member together": 3.0,
    }
    promise = hospitals.promise.model_copy(update={"epsilon_against": against})

    said = (
        "at delta 1e-5 per record, epsilon is 2.49 against the server alone, and every reader of the model; "
        "3 against the server and 1 member together."
    )
    for render in (render_markdown, render_html):
        assert said in render(hospitals.model_copy(update={"promise": promise}))
        assert "Of all of the training" not in render(hospitals)


def test_gain_has_its_interval(hospitals):
    """The difference that the verdict rests on is given with how sure it is."""
    means = next(s for s in render_markdown(hospitals).splitlines() if "mean of the sites" in s)

    assert means.endswith("| +0.003 [-0.014, +0.022] | |")


def test_labels_come_before_any_figure(hospitals):
    """SIMULATED stands above the first number."""
    found = render_markdown(hospitals)

    assert found.index("**SIMULATED**") < found.index("0.814")


def test_unfinished_run_says_so(hospitals):
    """An interrupted run is not reported as a whole one."""
    found = render_markdown(hospitals.model_copy(update={"status": "interrupted"}))

    assert "**interrupted by the user**" in found


def test_names_stay_in_their_cell(hospitals):
    """A site's name opens neither a cell nor a line nor a tag."""
    named = Results.model_validate_json(
        hospitals.model_dump_json().replace("hungary", "a | b\\n# c <img src=x> [d](e)")
    )

    found = render_markdown(named)

    assert "| a \\| b \\# c &lt;img src=x&gt; \\[d\\](e) | 88 (32) |" in found
    assert "<img" not in found


def test_command_and_digests_are_there(hospitals):
    """A reader can run it again and check that the model is the same."""
    found = render_markdown(hospitals)

    assert f"    {hospitals.command}\n" in found
    assert hospitals.study_id in found
    assert hospitals.model.sha256 in found


def test_operating_point_and_calibration_follow(hospitals):
    """Per 10,000 records, recall at low false positive rates, and calibration before and after."""
    found = render_markdown(hospitals)

    assert "The study asks for a false positive rate of at most 10\u00a0%." in found
    assert "| at 0.1\u00a0% FPR | not defined | not defined | not defined | not defined |" in found
    assert re.search(r"^\| federated \| [\d,]+ \| [\d,]+ \| [\d,]+ \| 0\.\d+ \[", found, re.M)
    assert re.search(r"^\| federated \| 0\.\d{4} -> 0\.\d{4} \|", found, re.M)


def test_older_file_has_neither(old):
    """No scores, no figures of them."""
    found = render_markdown(old)

    assert "## Operating point" not in found
    assert "## Calibration" not in found
    assert "- data not known" in found


def test_figures_of_the_sites(hospitals):
    """As in the HTML report."""
    figures = Pooled(
        release="exact", sites=4, epsilon=None, metric=Bounded(value=0.8123, low=0.81, high=0.815), recall={}
    )

    found = render_markdown(hospitals.model_copy(update={"pooled": figures}))

    assert "(exact figures: no noise):" in found
    assert "* AUC 0.812, between 0.810 and 0.815" in found
