"""Two small public data sets that come with the package: for the quickstart, demos and tests.

They pass through the same reading, checking and encoding as an institution's own table.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files

from lepton_fl.data.contract import Contract
from lepton_fl.data.read import batches
from lepton_fl.data.table import Table, load_table
from lepton_fl.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """What a bundled data set is. `natural_sites`: its rows come from different institutions."""

    name: str
    title: str
    licence: str
    natural_sites: bool
    target: str

    @property
    def columns_toml(self) -> str:
        """The `[features.columns.*]` tables of a study on it: public ranges and vocabularies."""
        return _resource(f"{self.name}.columns.toml")


DATASETS = (
    Dataset(
        name="heart",
        title="UCI Heart Disease: 920 patients of four hospitals, 509 of them ill",
        licence="CC BY 4.0",
        natural_sites=True,
        target="disease",
    ),
    Dataset(
        name="cancer",
        title="Breast Cancer Wisconsin (Diagnostic): 569 tumours, 212 of them malignant",
        licence="CC BY 4.0",
        natural_sites=False,
        target="malignant",
    ),
)


def dataset(name: str) -> Dataset:
    """The data set of that name, or a ConfigError with those there are."""
    for known in DATASETS:
        if known.name == name:
            return known
    allowed = ", ".join(known.name for known in DATASETS)
    raise ConfigError.at("--dataset", "name", found=name, allowed=allowed)


def load_dataset(name: str, contract: Contract) -> dict[str, Table]:
    """A data set's tables by site, as `load_table` makes them: one for each hospital, or just one.

    Raises:
        ConfigError: no such data set.
        DataError: the contract asks for a column that it does not have, or refuses its cells.
    """
    known = dataset(name)
    tables = _heart() if known.name == "heart" else _cancer()
    return {
        site: load_table(
            contract,
            batches(header, rows, contract, source=f"{name}/{site}"),
            source=f"{name}/{site}",
        )
        for site, header, rows in tables
    }


Site = tuple[str, Sequence[str], list[list[str]]]
"""Its name, the header and the rows."""


def _heart() -> Iterator[Site]:
    header, *rows = csv.reader(_resource("heart.csv").splitlines())
    hospital = header.index("hospital")
    for site in dict.fromkeys(row[hospital] for row in rows):
        yield site, header, [row for row in rows if row[hospital] == site]


def _cancer() -> Iterator[Site]:
    # Only here: importing scikit-learn takes a second that the other commands need not pay.
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    header = [*(name.replace(" ", "_") for name in bunch.feature_names), "malignant"]
    malignant = list(bunch.target_names).index("malignant")
    rows = [
        [*(repr(float(value)) for value in record), str(int(label == malignant))]
        for record, label in zip(bunch.data, bunch.target, strict=True)
    ]
    yield "cancer", header, rows


def _resource(name: str) -> str:
    return (files("lepton_fl.data") / "bundled" / name).read_text(encoding="utf-8")
