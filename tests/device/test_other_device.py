"""Training on a device that is not the CPU, where there is none: on memory that torch takes for one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = [str(HERE / "on_other_device.py"), str(HERE.parent / "unit/site/on_other_device.py")]
LEAST = 61
"""As many as pass, at least: so that nobody leaves them out unseen."""


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The device, compiled."""
    sys.path.insert(0, str(HERE))
    try:
        import other_device
    finally:
        sys.path.remove(str(HERE))
    if other_device.COMPILER is None:
        pytest.skip("no C++ compiler (g++ or clang++) is installed, to make the test's device")
    return other_device.compiled(tmp_path_factory.mktemp("device"))


@pytest.mark.slow
def test_training_on_another_device(library, tmp_path):
    """In a process of its own: what torch knows of a device it does not forget."""
    python_path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'inside'}"]

    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *CASES],
        env={**os.environ, "OTHER_DEVICE": str(library), "PYTHONPATH": python_path},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=900,
    )

    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= LEAST
