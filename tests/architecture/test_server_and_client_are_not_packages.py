"""server/ and client/ are folders to deploy from: as packages they would collide with anybody's."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["server", "client", "simulations"])
def test_folder_is_no_package(folder):
    """It is there, and has no __init__.py at any depth."""
    assert (ROOT / folder).is_dir()
    assert list((ROOT / folder).rglob("__init__.py")) == []


def test_wheel_is_configured_to_hold_the_library_only():
    """No other folder is named; tests/e2e/test_wheel.py looks into the wheel itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]

    assert wheel == {"packages": ["lepton_fl"]}
