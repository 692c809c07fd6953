from __future__ import annotations

import pytest

from lepton_fl.report import findings
from lepton_fl.report.findings import Comparison
from lepton_fl.results import Interval, Results


@pytest.fixture
def site(hospitals: Results):
    """The first site with its own two models, the federated one, and what the run says of them."""

    def build(*, federated=None, local=None, linear=None, own_best=None, gain=None) -> Comparison:
        summary = hospitals.sites[0].model_copy(update={"own_best": own_best, "gain": gain})
        return Comparison(site=summary, local=local, linear=linear, federated=federated, pooled=None)

    return build


def at(mean: float | None, low: float | None = None, high: float | None = None) -> Interval:
    return Interval(mean=mean, low=low, high=high)


def test_own_is_the_arm_that_the_run_chose(site):
    """The run decided which of the own models is the better one."""
    assert site(local=at(0.7), linear=at(0.8), own_best="linear").own == at(0.8)
    assert site(local=at(0.7), linear=at(0.8), own_best="local").own == at(0.7)


def test_own_falls_back_to_what_there_is(site):
    """Without a choice: the only own model, or the better of two, in the site's favour."""
    assert site(local=at(0.7)).own == at(0.7)
    assert site(linear=at(0.7), own_best="local").own == at(0.7)
    assert site(local=at(0.7), linear=at(0.8)).own == at(0.8)
    assert site(local=at(None), linear=at(0.8)).own == at(0.8)
    assert site().own is None


def test_gain_is_the_paired_one_where_there_is_one(site):
    """The difference of the means serves only where the run has no pairs."""
    paired = at(0.02, 0.01, 0.03)

    assert site(federated=at(0.9), local=at(0.8), gain=paired).gain == paired
    assert site(federated=at(0.9), local=at(0.8)).gain.mean == pytest.approx(0.1)
    assert site(federated=at(0.9), local=at(0.8), gain=at(None)).gain.mean == pytest.approx(0.1)
    assert site(federated=at(0.9)).gain is None


@pytest.mark.parametrize(
    ("gain", "advice"),
    [
        (at(-0.03, -0.05, -0.01), "keep"),
        (at(-0.03, -0.05, 0.01), "unclear"),
        (at(0.03, 0.0, 0.05), "unclear"),
        (at(0.03, 0.01, 0.05), "gains"),
        (at(0.001, -0.05, -0.01), "keep"),
    ],
)
def test_paired_interval_decides_the_advice(site, gain, advice):
    """Wholly below zero, holding it or wholly above; wide overlapping intervals of the arms do not matter."""
    wide = at(0.8, 0.5, 1.0)

    assert site(federated=wide, local=wide, gain=gain).advice == advice


@pytest.mark.parametrize(
    ("federated", "advice"),
    [
        (at(0.60, 0.55, 0.65), "keep"),
        (at(0.75, 0.65, 0.85), "unclear"),
        (at(0.90, 0.85, 0.95), "gains"),
        (at(0.90), "unclear"),
        (at(None), None),
        (None, None),
    ],
)
def test_without_pairs_only_separate_intervals_are_clear(site, federated, advice):
    """Overlap, or no interval, is no clear difference; without a figure there is nothing to say."""
    assert site(federated=federated, local=at(0.75, 0.7, 0.8)).advice == advice


def test_keeps_own_goes_by_the_mean(site):
    """A site that is behind on the mean has no reason to switch, however unsure that is."""
    assert site(gain=at(-0.01, -0.03, 0.01)).keeps_own
    assert not site(gain=at(0.01, -0.01, 0.03)).keeps_own


def test_classes_hold_every_comparable_site_once(hospitals):
    """Switzerland, without a metric, is in none of them."""
    told = {advice: [r.site.site for r in rows] for advice, rows in findings.by_advice(hospitals).items()}

    assert told == {"keep": ["long-beach"], "unclear": ["cleveland"], "gains": ["hungary"]}


def test_overall_gain_without_pairs_is_against_each_sites_better_model(hospitals):
    """Boosting at Long Beach, logistic regression elsewhere: not one arm for all sites."""
    bare = tuple(s.model_copy(update={"gain": None, "own_best": None}) for s in hospitals.sites)

    found = findings.gain(hospitals.model_copy(update={"gain": None, "sites": bare}))

    assert found.mean == pytest.approx((0.006 + 0.036 - 0.032) / 3)
    assert found.low is None
