import csv
import gzip
import hashlib
import tomllib
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from lepton_fl.data import DATASETS, check_table, dataset, dealt, load_dataset, read_csv
from lepton_fl.data.datasets import _credit
from lepton_fl.errors import ConfigError, VerificationFailed

BUNDLED = [d.name for d in DATASETS if d.wheel is None]
PUBLISHED = Path(__file__).parents[4] / "shared/data/credit_default/UCI_Credit_Card.csv.gz"
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


@pytest.mark.parametrize("name", BUNDLED)
def test_encoded_values_are_bounded(contract_of, name):
    """Every feature of every record is in [-1, 1]."""
    for table in load_dataset(name, contract_of(name)).values():
        assert np.abs(table.x_NF).max() <= 1


@pytest.mark.parametrize("name", BUNDLED)
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
    with pytest.raises(
        ConfigError, match=r"^public data: name: found 'hart', allowed: heart, cancer, ulb, credit"
    ):
        dataset("hart")


def test_attribution_lies_beside_the_data():
    """The licence asks for it."""
    text = (HEART.parent / "ATTRIBUTION.md").read_text(encoding="utf-8")

    assert "CC BY 4.0" in text
    assert "10.24432/C52P4X" in text


@pytest.mark.parametrize(("name", "rows", "positives"), [("ulb", 284_807, 492), ("credit", 30_000, 6_636)])
def test_a_fetched_data_set_is_one_table(contract_of, name, rows, positives):
    """Of as many records as its publisher says, and every feature is in [-1, 1]."""
    if not dataset(name).cached.exists():
        pytest.skip(f"needs `lepton-fl data get {name}`")
    tables = load_dataset(name, contract_of(name))

    assert [(site, len(t), t.positives) for site, t in tables.items()] == [(name, rows, positives)]
    assert np.abs(tables[name].x_NF).max() <= 1


@pytest.mark.skipif(
    not (PUBLISHED.exists() and dataset("credit").cached.exists()),
    reason="needs the publisher's own table beside the project, and `lepton-fl data get credit`",
)
def test_credit_is_its_publishers_table():
    """Each cell, though the wheel has other codes of sex, education and marriage."""
    _, header, rows = next(_credit())
    ours = [{name: float(cell) for name, cell in zip(header, row, strict=True)} for row in rows]
    with gzip.open(PUBLISHED, "rt", encoding="utf-8") as file:
        theirs = [
            {
                name.lower().replace("default.payment.next.month", "default"): float(cell)
                for name, cell in r.items()
            }
            for r in csv.DictReader(file)
        ]

    assert len(ours) == 30_000
    assert ours == theirs


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("LEPTON_FL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["ulb", "credit"])
def test_what_was_not_fetched_is_refused(contract_of, cache, name):
    """With the command that fetches it."""
    with pytest.raises(ConfigError, match=f"fix: lepton-fl data get {name}"):
        load_dataset(name, contract_of(name))


def test_a_cached_file_that_was_changed_is_refused(contract_of, cache):
    """A figure from other data would be published as one from these."""
    cache.mkdir()
    dataset("credit").cached.write_text("ID,SEX\n1,1\n")
    with pytest.raises(VerificationFailed, match="SHA-256"):
        load_dataset("credit", contract_of("credit"))


def test_the_cache_is_where_the_users_caches_are(monkeypatch, tmp_path):
    """In $XDG_CACHE_HOME or in ~/.cache, and for its owner only."""
    monkeypatch.delenv("LEPTON_FL_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    assert dataset("ulb").cached == tmp_path / "home/.cache/lepton-fl/ulb.csv"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert dataset("ulb").cached == tmp_path / "xdg/lepton-fl/ulb.csv"
    assert not (tmp_path / "xdg").exists()
    assert dataset("heart").get(None).parent.stat().st_mode & 0o777 == 0o700


def test_heart_is_put_into_the_cache(cache):
    """The bundled bytes, verified."""
    path = dataset("heart").get(None)

    assert path.read_bytes() == HEART.read_bytes()


def test_cut_banks_are_called_artificial():
    """Whoever reads the title knows that no bank has such a table."""
    for known in DATASETS:
        if known.wheel is not None:
            assert not known.natural_sites
            assert "artificial" in known.title


def test_dealt_rows_are_all_of_them_once():
    """Whatever the number of sites; the same sites each time."""
    header, *rows = csv.reader(HEART.read_text(encoding="utf-8").splitlines())

    first, again = list(dealt("heart", 7)), list(dealt("heart", 7))

    assert [site for site, _, _ in first] == [f"site-{n}" for n in range(1, 8)]
    assert all(list(names) == header for _, names, _ in first)
    assert sorted(row for _, _, part in first for row in part) == sorted(rows)
    assert {len(part) for _, _, part in first} == {131, 132}
    assert first == again


def test_dealt_as_they_come_are_the_hospitals():
    """Not one row is moved."""
    dealt_rows = {site: list(rows) for site, _, rows in dealt("heart", None)}

    assert {site: len(rows) for site, rows in dealt_rows.items()} == {
        "cleveland": 303,
        "hungary": 294,
        "switzerland": 123,
        "long-beach": 200,
    }
    assert all(row[0] == site for site, rows in dealt_rows.items() for row in rows)


def test_no_more_sites_than_rows():
    """A site without a row is none."""
    with pytest.raises(ConfigError, match="at most 569"):
        list(dealt("cancer", 570))
