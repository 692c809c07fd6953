"""The mean of any updates is numpy's, and its bits depend on the updates and their sites' names alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lepton_fl.federation.mean import mean
from lepton_fl.tasks.arrays import MAX_MAGNITUDE

SITES = st.lists(st.text(st.characters(codec="ascii"), min_size=1), min_size=1, max_size=6, unique=True)


@st.composite
def updates(draw):
    """Updates of one shape, by site, in any order."""
    shape = draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
    numbers = st.floats(-MAX_MAGNITUDE, MAX_MAGNITUDE, width=32)
    sites = draw(SITES)
    return {site: {"w": draw(arrays.arrays(np.float32, shape, elements=numbers))} for site in sites}


@given(updates())
def test_it_is_numpys_mean(updates):
    """To the rounding of a few additions in float64."""
    stacked = np.stack([update["w"] for update in updates.values()]).astype(np.float64)

    found = mean(updates)["w"]

    assert found.shape == stacked.shape[1:]
    slack = 8 * np.finfo(np.float64).eps * np.abs(stacked).mean(axis=0)
    assert (np.abs(found - stacked.mean(axis=0)) <= slack).all()


@given(updates(), st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(updates, random):
    """Bit for bit."""
    shuffled = list(updates.items())
    random.shuffle(shuffled)

    assert mean(dict(shuffled))["w"].tobytes() == mean(updates)["w"].tobytes()


@given(updates(), st.integers(1, 200))
def test_the_tile_does_not_matter(updates, tile):
    """Bit for bit."""
    assert mean(updates, tile=tile)["w"].tobytes() == mean(updates)["w"].tobytes()
