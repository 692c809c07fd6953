"""The mean of the updates needs no memory but its own."""

import tracemalloc

import numpy as np

from lepton_fl.federation.mean import mean


def test_the_mean_needs_one_sum_and_a_tile():
    """Of eight updates of eight megabytes: sixteen for the sum in float64, and no temporary of that size."""
    updates = {str(site): {"w": np.full(1 << 21, site, np.float32)} for site in range(8)}
    tracemalloc.start()
    try:
        found = mean(updates)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert (found["w"] == 3.5).all()
    assert peak < found["w"].nbytes + (2 << 20)


def test_each_site_counts_once():
    """In float64, name by name, whatever the shapes."""
    updates = {
        "b": {"w": np.array([[1.0, 2.0]], np.float32), "s": np.array(1.0, np.float32)},
        "a": {"w": np.array([[0.0, 1.0]], np.float32), "s": np.array(0.0, np.float32)},
    }

    found = mean(updates)

    assert {name: array.tolist() for name, array in found.items()} == {"w": [[0.5, 1.5]], "s": 0.5}
    assert {array.dtype for array in found.values()} == {np.dtype(np.float64)}


def test_the_updates_stay_as_they_are():
    """They may be views of a message."""
    update = np.ones(3, np.float32)
    update.flags.writeable = False

    mean({"a": {"w": update}, "b": {"w": update}})

    assert update.tolist() == [1, 1, 1]
