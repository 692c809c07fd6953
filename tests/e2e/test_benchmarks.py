"""The fleet's benchmarks still run, on small numbers. Each checks its own result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lepton_fl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory in /proc"),
]
ROOT = Path(lepton_fl.__file__).parents[1]


@pytest.mark.parametrize(
    "name", ["fleet_exchange", "fleet_study", "fleet_thousand", "fleet_update", "ledger"]
)
def test_a_benchmark_prints_its_table(name, tmp_path):
    """And leaves no file behind."""
    done = subprocess.run(
        [sys.executable, ROOT / "simulations" / "benchmarks" / f"{name}.py", "--quick"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# ")
    # torch's own cache aside, which importing it may make.
    assert [left for left in tmp_path.iterdir() if not left.name.startswith("torchinductor")] == []
