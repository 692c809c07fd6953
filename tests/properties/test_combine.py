"""The rules that combine updates: numpy's and scipy's figures, and bits that depend on the updates alone."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import optimize, stats

from lepton_fl.federation.combine import geometric_median, mean, median, trimmed_mean
from lepton_fl.tasks.arrays import MAX_MAGNITUDE

SITES = st.lists(st.text(st.characters(codec="ascii"), min_size=1), min_size=1, max_size=6, unique=True)
EPS = np.finfo(np.float64).eps


def updates(draw, sites, limit=MAX_MAGNITUDE):
    """Updates of one shape, by site, in any order."""
    shape = draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
    numbers = st.floats(-limit, limit, width=32)
    return {site: {"w": draw(arrays.arrays(np.float32, shape, elements=numbers))} for site in sites}


@st.composite
def some(draw):
    return updates(draw, draw(SITES))


@st.composite
def weighted(draw):
    found = updates(draw, draw(SITES))
    return found, {site: draw(st.integers(1, 40)) for site in found}


@st.composite
def trimmed(draw):
    found = updates(draw, draw(SITES))
    return found, draw(st.integers(0, (len(found) - 1) // 2))


def stacked(updates):
    return np.stack([update["w"] for update in updates.values()]).astype(np.float64)


RULES = {
    "mean": mean,
    "weighted mean": lambda u, **more: mean(u, weights={site: len(site) for site in u}, **more),
    "median": median,
    "trimmed mean": lambda u, **more: trimmed_mean(u, trim=(len(u) - 1) // 3, **more),
    "geometric median": geometric_median,
}


@given(weighted())
def test_the_mean_is_numpys(found):
    """Each update by its weight; to the rounding of a few additions in float64."""
    updates, weights = found
    exact = np.average(stacked(updates), axis=0, weights=[weights[site] for site in updates])

    mean_found = mean(updates, weights=weights)["w"]

    assert mean_found.shape == exact.shape
    assert (np.abs(mean_found - exact) <= 16 * EPS * np.abs(stacked(updates)).max(axis=0)).all()


@given(some())
def test_without_weights_each_counts_once(updates):
    """Bit for bit as with weights of 1."""
    assert mean(updates)["w"].tobytes() == mean(updates, weights=dict.fromkeys(updates, 1))["w"].tobytes()


@given(some())
def test_the_median_is_numpys(updates):
    """Coordinate by coordinate, an even number included."""
    assert np.array_equal(median(updates)["w"], np.median(stacked(updates), axis=0))


@given(trimmed())
def test_the_trimmed_mean_is_scipys(found):
    """To the rounding of a few additions."""
    updates, trim = found
    # scipy is given a share, and cuts the whole part of it; half a one more leaves no doubt which.
    exact = stats.trim_mean(stacked(updates), (trim + 0.5) / len(updates) if trim else 0.0, axis=0)

    ours = trimmed_mean(updates, trim=trim)["w"]

    assert (np.abs(ours - exact) <= 16 * EPS * np.abs(stacked(updates)).max(axis=0)).all()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@settings(max_examples=30)
@given(updates=some(), random=st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(rule, updates, random):
    """Bit for bit."""
    shuffled = list(updates.items())
    random.shuffle(shuffled)

    assert rule(dict(shuffled))["w"].tobytes() == rule(updates)["w"].tobytes()


@pytest.mark.parametrize("rule", [rule for name, rule in RULES.items() if name != "geometric median"])
@settings(max_examples=30)
@given(updates=some(), tile=st.integers(1, 200))
def test_the_tile_does_not_matter(rule, updates, tile):
    """Bit for bit; the geometric median's sums over all coordinates are in tiles of one size."""
    assert rule(updates, tile=tile)["w"].tobytes() == rule(updates)["w"].tobytes()


@st.composite
def points(draw):
    count, size = draw(st.integers(3, 9)), draw(st.integers(1, 4))
    numbers = st.floats(-100, 100, width=32, allow_subnormal=False)
    return draw(arrays.arrays(np.float32, (count, size), elements=numbers))


@settings(max_examples=60)
@given(points())
def test_no_point_is_nearer_to_all_than_the_geometric_median(point_PL):
    """Nor one that scipy finds, from there, by a method that needs no derivative; nor any of the points."""
    exact_PL = point_PL.astype(np.float64)

    def cost(z_L):
        return float(np.linalg.norm(exact_PL - z_L, axis=1).sum())

    # In two arrays: distances are over both.
    cut = point_PL.shape[1] // 2
    found = geometric_median({f"{i}": {"a": row[:cut], "b": row[cut:]} for i, row in enumerate(point_PL)})
    z_L = np.concatenate([found["a"], found["b"]])
    best = optimize.minimize(cost, z_L, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})

    least = min(best.fun, *(cost(row) for row in exact_PL))
    assert cost(z_L) <= least * (1 + 1e-6) + 1e-12


@st.composite
def poisoned(draw):
    """Honest updates within a distance of one another, and as many others as can be borne, anywhere."""
    groups = draw(st.integers(3, 9))
    bad = draw(st.integers(1, math.ceil(groups / 2) - 1))
    near = st.floats(-1, 1, width=32, allow_subnormal=False)
    anywhere = st.floats(-MAX_MAGNITUDE, MAX_MAGNITUDE, width=32, allow_subnormal=False)
    honest_HL = draw(arrays.arrays(np.float32, (groups - bad, 3), elements=near))
    bad_BL = draw(arrays.arrays(np.float32, (bad, 3), elements=anywhere))
    order = draw(st.permutations(range(groups)))
    rows = [*honest_HL, *bad_BL]
    return honest_HL.astype(np.float64), {f"{order[i]}": {"w": row} for i, row in enumerate(rows)}


@given(poisoned())
def test_fewer_than_half_cannot_move_a_coordinate_beyond_the_honest_spread(found):
    """Of the median, and of the mean that trims as many as are poisoned."""
    honest_HL, updates = found
    low_L, high_L = honest_HL.min(axis=0), honest_HL.max(axis=0)

    for ours_L in (
        median(updates)["w"],
        trimmed_mean(updates, trim=len(updates) - len(honest_HL))["w"],
    ):
        assert (ours_L >= low_L - 1e-12).all()
        assert (ours_L <= high_L + 1e-12).all()


@given(poisoned())
def test_fewer_than_half_cannot_move_the_geometric_median_far(found):
    """(1 - a) / sqrt(1 - 2 a) times the radius of the honest (Minsker 2015), a the share of the poisoned."""
    honest_HL, updates = found
    centre_L = honest_HL.mean(axis=0)
    radius = np.linalg.norm(honest_HL - centre_L, axis=1).max()
    share = 1 - len(honest_HL) / len(updates)

    moved = np.linalg.norm(geometric_median(updates)["w"] - centre_L)

    assert moved <= (1 - share) / math.sqrt(1 - 2 * share) * radius * (1 + 1e-5) + 1e-6
