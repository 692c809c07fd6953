import csv
import hashlib
import tomllib
from importlib.resources import files

import numpy as np
import pytest

from lepton_fl.data import DATASETS, check_table, dataset, load_dataset, read_csv
from lepton_fl.errors import ConfigError

HEART = files("lepton_fl.data") / "bundled" / "heart.csv"


@pytest.fixture
def contract_of(make_contract):
    """The contract of a study on a bundled data set's own columns."""

    def run(name):
        columns = tomllib.loads(dataset(name).columns_toml)["features"]["columns"]
        return make_contract(columns, task={"kind": "binary", "target": dataset(name).target})

    return run


def test_heart_is_four_hospitals(contract_of):
    """Rows and ill patients by hospital, as in the original files."""
    tables = load_dataset("heart", contract_of("heart"))

    assert {site: (len(t), t.positives) for site, t in tables.items()} == {
        "cleveland": (303, 139),
        "hungary": (294, 106),
        "switzerland": (123, 115),
        "long-beach": (200, 149),
    }


def test_cancer_is_one_table(contract_of):
    """Malignant is positive."""
    tables = load_dataset("cancer", contract_of("cancer"))

    assert [(site, len(t), t.positives) for site, t in tables.items()] == [("cancer", 569, 212)]


@pytest.mark.parametrize("name", [d.name for d in DATASETS])
def test_encoded_values_are_bounded(contract_of, name):
    """Every feature of every record is in [-1, 1]."""
    for table in load_dataset(name, contract_of(name)).values():
        assert np.abs(table.x_NF).max() <= 1


@pytest.mark.parametrize("name", [d.name for d in DATASETS])
def test_ranges_are_public(contract_of, name):
    """Almost nothing is beyond them, and none ends at the data's own least or greatest value."""
    contract = contract_of(name)
    raw = np.concatenate([t.raw_NC for t in load_dataset(name, contract).values()])
    ends = [(n, c.range) for n, c in contract.columns if c.type == "float"]
    places = [n for n, _ in contract.columns]
    for column, (low, high) in ends:
        value = raw[:, places.index(column)]
        value = value[~np.isnan(value)]

        assert ((value < low) | (value > high)).sum() <= 1
        if name == "cancer":
            assert (value.min() == low, value.max() == high) in {(False, False), (low == 0, False)}


def test_heart_needs_every_column(contract_of):
    """The bundled columns are all thirteen measures."""
    assert len(contract_of("heart").columns) == 13


def test_heart_is_pinned():
    """A change of the data is a change of every figure made with it."""
    digest = hashlib.sha256(HEART.read_bytes()).hexdigest()

    assert digest == "d99fc9c19c205bbcbdbe76d534e8dcee962cc91547d37b668abea2147db4eaf6"


def test_heart_says_nothing_was_measured_as_zero():
    """A pressure or cholesterol of 0 is a missing one."""
    rows = list(csv.DictReader(HEART.read_text(encoding="utf-8").splitlines()))

    assert not [r for r in rows if r["chol"] == "0" or r["trestbps"] == "0"]
    assert sum(r["chol"] == "" for r in rows) == 202


def test_heart_passes_the_check_as_a_file(contract_of, tmp_path):
    """The bundled file and an institution's own go the same way."""
    path = tmp_path / "heart.csv"
    path.write_bytes(HEART.read_bytes())
    contract = contract_of("heart")

    report = check_table(contract, read_csv(path, contract), source="heart.csv")

    assert report.ok
    assert (report.rows, report.positives) == (920, 509)


def test_an_unknown_data_set_is_refused_with_those_there_are():
    """A misspelt name is one clear line."""
    with pytest.raises(ConfigError, match="found 'hart', allowed: heart, cancer"):
        dataset("hart")


def test_attribution_lies_beside_the_data():
    """The licence asks for it."""
    text = (HEART.parent / "ATTRIBUTION.md").read_text(encoding="utf-8")

    assert "CC BY 4.0" in text
    assert "10.24432/C52P4X" in text
