"""The benchmarks still run, on small numbers. Each checks its own result."""

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
    "command",
    [
        "compiled.py --quick --part bfloat16 --case mlp --batch 16",
        "end_to_end.py --quick",
        "fleet_exchange.py --quick",
        "fleet_study.py --quick",
        "fleet_thousand.py --quick",
        "fleet_update.py --quick",
        "ledger.py --quick",
        "private_step.py --quick --without-peers --batch 16",
        "secure_rounds.py --quick",
        "simulate.py --clients 4 --rounds 2 --only ours --only process",
    ],
)
def test_a_benchmark_prints_its_table(command, tmp_path):
    """And leaves no file behind."""
    name, *options = command.split()
    done = subprocess.run(
        [sys.executable, ROOT / "simulations" / "benchmarks" / name, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# ")
    # torch's own cache aside, which importing it may make.
    assert [left for left in tmp_path.iterdir() if not left.name.startswith("torchinductor")] == []


def utility(tmp_path, seeds):
    """Breast cancer with four sites at epsilon 3; the lines of finished runs, and the page."""
    page, runs = tmp_path / "page.md", tmp_path / "runs.jsonl"
    options = ["--resume", runs, "--write", page, "--seeds", str(seeds)]
    options += ["--data", "cancer", "--sites", "4", "--epsilon", "3"]
    subprocess.run(
        [sys.executable, ROOT / "simulations" / "benchmarks" / "utility.py", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=600,
    )
    return runs.read_text().splitlines(), page.read_text()


def test_utility_goes_on_where_it_stopped(tmp_path):
    """What is finished is not run again, and the page keeps its words before the tables."""
    (tmp_path / "page.md").write_text("words\n<!-- written by simulations/benchmarks/utility.py -->\nold\n")
    first, _ = utility(tmp_path, 1)
    lines, page = utility(tmp_path, 2)

    assert len(first) == 4
    assert len(lines) == 8
    assert lines[:4] == first
    assert page.startswith("words\n<!--")
    assert "old" not in page
    assert page.count("(2)") == 8
    assert "1.15 = sqrt(4 / 3)" in page
