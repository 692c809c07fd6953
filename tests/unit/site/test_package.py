"""The package gives its names without loading what nobody has asked for."""

import subprocess
import sys

import pytest

from lepton_fl import site


def test_every_public_name_is_there():
    """Where they come from is written beside them, and could name another module."""
    found = {name: getattr(site, name) for name in site.__all__}

    assert {name: str(value.__module__).startswith("lepton_fl.site.") for name, value in found.items()} == {
        name: name != "Surroundings" for name in site.__all__
    }


def test_a_name_that_is_not_there_is_said_so():
    """As any module does."""
    with pytest.raises(AttributeError, match=r"'lepton_fl\.site' has no attribute 'Sight'"):
        _ = site.Sight


@pytest.mark.parametrize(
    "module",
    [
        "lepton_fl.site.config",
        "lepton_fl.site.policy",
        "lepton_fl.fleet.agent.enrol",
        "lepton_fl.fleet.agent.offers",
    ],
)
def test_commands_that_train_nothing_do_not_wait_for_torch(module):
    """It takes seconds to load, where `client status`, `enroll join` and `study list` take a tenth of one."""
    code = f"import sys, {module}; print({{'torch', 'flwr', 'opacus'}} & set(sys.modules))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)

    assert done.stdout == "set()\n", done.stderr
