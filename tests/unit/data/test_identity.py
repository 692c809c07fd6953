import hashlib

import numpy as np
import pytest

from lepton_fl.data import Batch, load_table
from lepton_fl.data.identity import row_keys

FLOAT = {"type": "float", "range": [0, 100], "identifier": "allow"}


def key_of(*cells):
    """By hand: the number of cells, the length of each, and their texts."""
    sizes = b"".join(n.to_bytes(8, "big") for n in (len(cells), *map(len, cells)))
    message = sizes + "".join(cells).encode()
    return list(hashlib.blake2b(message, digest_size=16, person=b"lepton-fl/unit/1").digest())


@pytest.fixture
def load(make_contract):
    """A table of a feature `c`, labels and maybe patients and a second feature, in these batches."""

    def run(*parts, columns=("c",), **tables):
        contract = make_contract(dict.fromkeys(columns, FLOAT), **tables)
        return load_table(contract, [Batch(part) for part in parts], source="t")

    return run


def test_a_key_is_a_hash_of_the_cells():
    """Pinned: another hash draws every site's split anew."""
    assert row_keys([["a", ""], ["\u00e9\u4e2d", "b"]]).tolist() == [
        key_of("a", "\u00e9\u4e2d"),
        key_of("", "b"),
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [(("ab", "c"), ("a", "bc")), (("", "a"), ("a", "")), (("a",), ("a", "")), (("\0",), ("",))],
)
def test_cells_do_not_run_together(one, other):
    """Rows that differ are hashed as different bytes."""
    assert row_keys([[c] for c in one]).tolist() != row_keys([[c] for c in other]).tolist()


def test_no_rows_have_no_keys():
    """A batch may bring no new unit."""
    assert row_keys([[]]).shape == (0, 16)


def test_a_unit_is_its_normal_text(load, by_patient):
    """However it is spelt, in whatever batch it is met, whatever its records say."""
    parts = (
        {"c": ["1", "2"], "ill": ["0", "1"], "patient": ["07", "x"]},
        {"c": ["3", "4", "5"], "ill": ["0"] * 3, "patient": ["x", "7.0", "y"]},
    )

    table = load(*parts, privacy=by_patient)

    assert table.key_U.tolist() == [key_of("7"), key_of("x"), key_of("y")]


def test_a_unit_has_one_key_in_every_study(load, by_patient):
    """Which other columns are read does not matter to a unit column."""
    part = {"c": ["1"], "d": ["2"], "ill": ["0"], "patient": ["p"]}

    one, other = (load(part, columns=c, privacy=by_patient) for c in (["c"], ["c", "d"]))

    assert one.key_U.tolist() == other.key_U.tolist()


def test_a_record_is_the_text_of_all_that_is_read(load):
    """By column name, whichever of them is the target."""
    table = load({"z": ["1.50"], "ill": ["0"], "a": [" 3"]}, columns=["z", "a"])

    assert table.key_U.tolist() == [key_of(" 3", "0", "1.50")]


def test_a_record_has_another_key_in_a_study_of_other_columns(load):
    """Then its side is drawn anew: the cells of columns not read are not there to be hashed."""
    part = {"c": ["1"], "d": ["2"], "ill": ["0"]}

    one, other = (load(part, columns=columns) for columns in (["c"], ["c", "d"]))

    assert one.key_U.tolist() != other.key_U.tolist()


def test_records_that_read_the_same_are_units_of_one_key(load):
    """They cannot be told apart, so no rule could treat them differently."""
    table = load({"c": ["1", "1"], "ill": ["0", "0"]})

    assert table.units == 2
    assert len(np.unique(table.key_U, axis=0)) == 1
