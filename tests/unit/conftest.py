"""One small valid study, to be changed by the tests of everything that reads a study."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from lepton_fl.config import parse
from lepton_fl.study import Study

RAW: dict[str, Any] = {
    "study": {"name": "heart"},
    "task": {"kind": "binary", "target": "ill"},
    "privacy": {"epsilon": 3.0, "delta": 1e-5},
    "train": {"rounds": 20, "sample_rate": 0.1, "lr": 0.1, "expected_batch": 20.0},
    "features": {"columns": {"age": {"type": "float", "range": [20, 90]}}},
}


@pytest.fixture
def raw() -> dict[str, Any]:
    """The study as a TOML reader would give it."""
    return copy.deepcopy(RAW)


@pytest.fixture
def make_study(raw: dict[str, Any]) -> Callable[..., Study]:
    """The study with some keys replaced: `make_study(train={"rounds": 5})`; None removes a key."""

    def make(**tables: dict[str, Any]) -> Study:
        merged = copy.deepcopy(raw)
        for name, table in tables.items():
            kept = {**merged.get(name, {}), **table}
            merged[name] = {key: value for key, value in kept.items() if value is not None}
        return parse(Study, merged, file="study.toml")

    return make
