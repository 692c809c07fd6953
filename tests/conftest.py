"""What must be set before anything is imported; fixtures live beside the tests that use them."""

import os

# Flower reads these at import. No test may call out or install anything.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
# One thread a process is faster at these sizes, and sums in the same order everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# A shared machine is slow now and then; how long an example took is no property of the code.
settings.register_profile("lepton_fl", deadline=None)
settings.load_profile("lepton_fl")


@pytest.fixture(autouse=True)
def usual_umask():
    """A command that keeps to its owner what it writes leaves that, run in here, to no test after it."""
    before = os.umask(0o022)
    yield
    os.umask(before)
