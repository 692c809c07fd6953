"""A table in files is the table in memory; a count by samples is near the count."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lepton_fl.config import parse
from lepton_fl.data import Batch, Contract, Room, load_table, split
from lepton_fl.data import findings as module
from lepton_fl.errors import DataError
from lepton_fl.study import Evaluation, Study

COLUMNS = {
    "age": {"type": "float", "range": [0, 100], "missing": "flag"},
    "ward": {"type": "category", "hash": 4, "missing": "flag"},
}
ARRAYS = ("x_NF", "y_N", "unit_N", "key_U", "raw_NC")
record = st.tuples(st.sampled_from(["", "1", "50.5", "99"]), st.sampled_from("abc"), st.integers(0, 5))


def contract(unit):
    raw = {
        "study": {"name": "large"},
        "task": {"kind": "binary", "target": "ill"},
        "privacy": {"noise": "none", "unit": unit},
        "train": {"rounds": 1, "sample_rate": 0.1, "lr": 0.1},
        "features": {"columns": COLUMNS},
    }
    return Contract.of(parse(Study, raw, file="study"))


def batches(records, size):
    for start in range(0, len(records), size):
        ages, wards, people = zip(*records[start : start + size], strict=True)
        ill = [str(person % 2) for person in people]
        yield Batch({"age": ages, "ward": wards, "patient": [str(p) for p in people], "ill": ill})


def same(one, other):
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.units == other.units
    assert one.fingerprint == other.fingerprint


@given(
    st.lists(record, min_size=4, max_size=30),
    st.integers(1, 9),
    st.integers(0, 2000),
    st.sampled_from(["record", "patient"]),
    st.data(),
)
def test_room_changes_nothing(records, size, memory, unit, data):
    """Encoding, subsets, split and fingerprint are the same however little is kept in memory."""
    with tempfile.TemporaryDirectory() as folder:
        room = Room(memory=memory, folder=Path(folder))
        whole = load_table(contract(unit), batches(records, size), source="memory")
        spilt = load_table(contract(unit), batches(records, size), source="files", room=room)

        same(whole, spilt)
        which = np.array(data.draw(st.lists(st.booleans(), min_size=len(whole), max_size=len(whole))))
        same(whole.subset(which), spilt.subset(which))
        places = np.array(data.draw(st.permutations(range(len(whole)))), dtype=np.int64)
        same(whole.subset(places), spilt.subset(places))
        sides = []
        for table in (whole, spilt):
            try:
                sides.append(split(table, Evaluation(test_fraction=0.5), b"k" * 16))
            except DataError:
                sides.append(())  # All of so few units are on one side.
        for one, other in zip(*sides, strict=True):
            same(one, other)


@given(st.integers(0, 30_000), st.integers(0, 2**40), st.integers(1, 7))
def test_different_values_are_counted(different, start, step):
    """Exactly as long as they fit, and within six standard errors beyond, each seen twice."""
    keys = np.arange(different, dtype=np.int64) * step + start
    kept, module.DISTINCT_KEYS = module.DISTINCT_KEYS, 4096
    try:
        counter = module.Distinct()
        for part in np.array_split(np.concatenate([keys, keys]), 7):
            counter.add(part)
        found = counter.count()
        held = len(counter.hashes)
    finally:
        module.DISTINCT_KEYS = kept

    assert held <= 4096
    if different <= 4096:
        assert found == different
    else:
        assert abs(found / different - 1) < 6 * 1.2 / 4096**0.5
