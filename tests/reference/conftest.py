"""The recipes under simulations/, which are files to copy and no package."""

import importlib.util
import sys
from pathlib import Path

import pytest

from lepton_fl.data import dataset

SIMULATIONS = Path(__file__).parents[2] / "simulations"


def _recipe(name):
    # Under a name of its own in sys.modules: dataclasses look their module up there.
    spec = importlib.util.spec_from_file_location(f"recipe_{Path(name).name}", SIMULATIONS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def poisoning():
    return _recipe("attacks/poisoning")


@pytest.fixture(scope="session")
def flamby():
    return _recipe("flamby_heart")


@pytest.fixture(scope="session")
def ulb():
    known = dataset("ulb")
    if not known.cached.exists():
        pytest.skip(f"{known.cached} is not there: lepton-fl data get ulb")
    return _recipe("ulb_reference")
