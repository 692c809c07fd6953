"""Four small hospitals, and the heart-disease data that comes with the package."""

import tomllib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lepton_fl.config import parse
from lepton_fl.data import Batch, Contract, Table, dataset, load_dataset, load_table
from lepton_fl.messages import identify
from lepton_fl.simulation import Plan
from lepton_fl.study import Study

STUDY: dict[str, Any] = {
    "study": {"name": "heart"},
    "task": {"kind": "binary", "target": "ill"},
    "privacy": {"epsilon": 4.0, "delta": 1e-3, "noise": "shared"},
    "train": {"rounds": 3, "sample_rate": 0.2, "lr": 0.1, "expected_batch": 10.0},
    "features": {
        "columns": {
            "x": {"type": "float", "range": [-1, 1], "identifier": "allow"},
            "z": {"type": "float", "range": [-1, 1], "identifier": "allow"},
        }
    },
}


@pytest.fixture(autouse=True)
def _known_to_flower() -> None:
    identify("0123456789abcdef" * 2, 1)


@pytest.fixture
def make_study() -> Callable[..., Study]:
    """The study with keys of these tables changed."""

    def make(**changes: Any) -> Study:
        raw = {key: {**STUDY.get(key, {}), **changes.get(key, {})} for key in [*STUDY, *changes]}
        return parse(Study, raw, file="study.toml")

    return make


@pytest.fixture
def study(make_study: Callable[..., Study]) -> Study:
    return make_study()


def make_table(study: Study, rows: int) -> Table:
    rng = np.random.default_rng(rows)
    x_N, z_N = rng.uniform(-1, 1, (2, rows))
    ill_N = x_N + z_N + rng.normal(0, 0.5, rows) > 0
    cells = {"x": map(str, x_N), "z": map(str, z_N), "ill": [str(int(ill)) for ill in ill_N]}
    batch = Batch({name: list(column) for name, column in cells.items()})
    return load_table(Contract.of(study), [batch], source="records.csv")


@pytest.fixture
def tables(study: Study) -> dict[str, Table]:
    """Sites of different sizes."""
    return {name: make_table(study, rows) for name, rows in zip("abcd", (40, 60, 80, 100), strict=True)}


@pytest.fixture
def splits(tables: dict[str, Table]) -> dict[str, tuple[Table, Table]]:
    """All records train, and judge."""
    return {name: (table, table) for name, table in tables.items()}


@pytest.fixture
def heart_plan(tmp_path: Any) -> Callable[..., Plan]:
    """Three rounds over the four hospitals of the heart-disease data."""

    def make(**more: Any) -> Plan:
        raw = {
            **STUDY,
            **tomllib.loads(dataset("heart").columns_toml),
            "task": {"kind": "binary", "target": "disease"},
            "train": {"rounds": 3, "sample_rate": 0.2, "lr": 0.1},
        }
        study = parse(Study, raw, file="study.toml")
        return Plan(
            **{
                "study": study,
                "tables": load_dataset("heart", Contract.of(study)),
                "out": tmp_path / "run",
                "compare": ("federated",),
                "bootstrap": 20,
                **more,
            }
        )

    return make
