from __future__ import annotations

import pytest

from lepton_fl.report import wording
from lepton_fl.results import wilson


@pytest.mark.parametrize(
    ("epsilon", "shown"),
    [(2.9871, "2.99"), (2.981, "2.99"), (3.0000000000000004, "3"), (0.01234, "0.0124"), (0.0, "0")],
)
def test_epsilon_spent_is_rounded_up(epsilon, shown):
    """What is printed is never less than what was spent; binary noise adds nothing."""
    assert wording.spent(epsilon) == shown


@pytest.mark.parametrize(
    ("delta", "shown"), [(1e-5, "1e-5"), (2.5e-6, "2.5e-6"), (0.01, "0.01"), (1e-10, "1e-10")]
)
def test_delta_reads_as_in_a_paper(delta, shown):
    """No leading zero in the exponent."""
    assert wording.delta(delta) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(4.21, "4.2 s"), (133.4, "2 min 13 s"), (59.99, "60.0 s"), (3599.9, "1 h 00 min")],
)
def test_duration_reads_as_said(seconds, shown):
    """Seconds, minutes or hours, whichever a person would say."""
    assert wording.duration(seconds) == shown


def test_promise_is_one_whole_sentence(hospitals):
    """Epsilon, delta, unit and whom it holds against, together."""
    assert wording.guarantee(hospitals.promise) == (
        "The study promises epsilon 3, delta 1e-5 per record, against: the server and readers of "
        "the model, provided at most 1 member colludes with the server."
    )


def test_counts_are_scaled_to_10000():
    """A small one keeps a digit: 0.4 alarms are not none."""
    assert wording.per_10000(3, 7388) == "4.1"
    assert wording.per_10000(300, 7388) == "406"
    assert wording.per_10000(0, 7388) == "0"


def test_a_share_of_nothing_is_none():
    """No alarm, no precision."""
    assert wording.share(wilson(0, 0)) == wording.rate(wilson(0, 0)) == "none"
    assert wording.rate(wilson(1, 100)) == "1\u00a0% [0.18, 5.45]"


@pytest.mark.parametrize(("positives", "few"), [(1, True), (29, True), (30, False), (70, False), (71, True)])
def test_intervals_on_few_records_of_one_class_are_said_to_be_narrow(hospitals, positives, few):
    """At every site 100 are held out; 30 of each class are enough."""
    sites = tuple(
        site.model_copy(update={"test_records": 100, "test_positives": positives}) for site in hospitals.sites
    )

    found = wording.evidence(hospitals.model_copy(update={"sites": sites}))

    assert ("Too narrow, as a rule, at 4 sites with fewer than 30 of one class." in found) == few


def test_a_site_of_one_class_has_no_interval_to_be_narrow(hospitals):
    """It is not among those named."""
    sites = tuple(
        site.model_copy(update={"test_records": 100, "test_positives": 100}) for site in hospitals.sites
    )

    assert "narrow" not in wording.evidence(hospitals.model_copy(update={"sites": sites}))
