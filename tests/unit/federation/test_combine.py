"""Combining updates needs no memory but the result's, and breaks where it is said to."""

import tracemalloc

import numpy as np
import pytest

from lepton_fl.federation.combine import combine, geometric_median, mean, median, trimmed_mean
from lepton_fl.study import SecureAggregation

ROBUST = {"median": {}, "trimmed-mean": {"trim": 2}, "geometric-median": {}}
"""Rules with what else they ask for, each to hold out against two of five."""


def named(*values):
    return {f"site-{i}": {"w": np.full(3, value, np.float32)} for i, value in enumerate(values)}


def agreed(rule, **more):
    return SecureAggregation(min_sites=25, group_size=5, combine=rule, **more)


@pytest.mark.parametrize(
    "rule",
    [mean, median, lambda u: trimmed_mean(u, trim=2), geometric_median],
    ids=["mean", "median", "trimmed mean", "geometric median"],
)
def test_a_rule_needs_its_result_and_a_few_tiles(rule):
    """Of twelve updates of two megabytes: four for the result in float64, and no copy of them all beside.

    The geometric median compares a result with the one before.
    """
    updates = {str(site): {"w": np.full(1 << 19, site, np.float32)} for site in range(12)}
    results = 2 if rule is geometric_median else 1
    tracemalloc.start()
    try:
        found = rule(updates)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert found["w"] == pytest.approx(5.5)
    assert peak < results * found["w"].nbytes + (4 << 20)


def test_each_update_counts_once():
    """In float64, name by name, whatever the shapes."""
    updates = {
        "b": {"w": np.array([[1.0, 2.0]], np.float32), "s": np.array(1.0, np.float32)},
        "a": {"w": np.array([[0.0, 1.0]], np.float32), "s": np.array(0.0, np.float32)},
    }

    for rule in (mean, median, geometric_median):
        found = rule(updates)
        assert {name: array.tolist() for name, array in found.items()} == {"w": [[0.5, 1.5]], "s": 0.5}
        assert {array.dtype for array in found.values()} == {np.dtype(np.float64)}


@pytest.mark.parametrize("rule", ["mean", *ROBUST])
def test_the_updates_stay_as_they_are(rule):
    """They may be views of a message."""
    updates = named(1, 1, 1, 2, 3)
    for update in updates.values():
        update["w"].flags.writeable = False

    combine(updates, dict.fromkeys(updates, 5), agreed(rule, **ROBUST.get(rule, {})))

    assert [update["w"][0] for update in updates.values()] == [1, 1, 1, 2, 3]


def test_the_mean_is_over_sites():
    """A group of two counts twice as much as one of one."""
    found = combine(named(3, 0), {"site-0": 2, "site-1": 1}, SecureAggregation())

    assert found["w"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("rule", ROBUST)
def test_a_robust_rule_is_over_groups(rule):
    """A poisoned group of nine sites is one among five all the same."""
    updates, sizes = named(1e6, 0, 0, 0, 0), [9, 5, 5, 5, 5]

    found = combine(updates, dict(zip(updates, sizes, strict=True)), agreed(rule, **ROBUST[rule]))

    assert np.abs(found["w"]).max() < 1e-6


@pytest.mark.parametrize("rule", ROBUST)
def test_two_poisoned_of_five_are_borne_and_three_are_not(rule):
    """Where the line is; the mean is moved by one."""
    settled = agreed(rule, **ROBUST[rule])
    two, three = named(0.9, 1, 1.1, 1e6, 1e6), named(0.9, 1, 1e6, 1e6, 1e6)
    once = dict.fromkeys(two, 5)

    assert np.abs(combine(two, once, settled)["w"] - 1).max() <= 0.1 + 1e-6
    assert combine(three, once, settled)["w"].min() > 1e5
    assert combine(two, once, agreed("mean"))["w"].min() > 1e5


def test_trimming_leaves_something():
    """Of four updates two at each end would be all."""
    with pytest.raises(ValueError, match="leaves nothing of 4 updates"):
        trimmed_mean(named(1, 2, 3, 4), trim=2)


def test_the_geometric_median_is_a_corner_of_a_blunt_triangle():
    """Where one angle is 120 degrees or more; else the point that sees all sides at 120."""
    blunt = {"a": (0, 0), "b": (10, 1), "c": (-10, 1)}
    equal = {"a": (0, 0), "b": (1, 0), "c": (0.5, np.sqrt(0.75))}

    for corners, expected in ((blunt, (0, 0)), (equal, (0.5, np.sqrt(0.75) / 3))):
        updates = {name: {"w": np.array(corner, np.float32)} for name, corner in corners.items()}
        assert geometric_median(updates)["w"] == pytest.approx(expected, abs=1e-4)


def test_the_geometric_median_of_a_majority_that_agrees_is_what_it_says():
    """However far the others are."""
    assert geometric_median(named(2, 2, 2, -1e6, 1e6))["w"].tolist() == [2, 2, 2]
