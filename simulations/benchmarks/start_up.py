"""How long a new user waits: `lepton-fl --help`, and `lepton-fl quickstart heart` after installation.

    python simulations/benchmarks/start_up.py [RUNS] > simulations/benchmarks/start_up.md

Whole processes, wall and CPU seconds, one warm-up and then the median of RUNS (5).
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

COMMANDS = {
    "`lepton-fl --help`": ["--help"],
    "`lepton-fl quickstart heart`": ["quickstart", "heart"],
}


def once(arguments: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one run in an empty folder, so that its budget is whole."""
    with tempfile.TemporaryDirectory() as folder:
        before, cpu = time.perf_counter(), _cpu()
        subprocess.run(
            [sys.executable, "-m", "lepton_fl", *arguments], cwd=folder, check=True, capture_output=True
        )
        return time.perf_counter() - before, _cpu() - cpu


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print("# Start-up\n")
    packages = ", ".join(f"{p} {version(p)}" for p in ("lepton-fl", "torch", "flwr", "opacus"))
    print(
        f"Median of {runs} runs after one warm-up, [min, max]. {platform.machine()}, {os.cpu_count()} shared "
        f"CPU cores, Python {platform.python_version()}, {packages}.\n"
    )
    print("| command | wall s | CPU s |\n|---|---|---|")
    for name, arguments in COMMANDS.items():
        once(arguments)
        walls, cpus = zip(*(once(arguments) for _ in range(runs)), strict=True)
        cells = (f"{statistics.median(v):.2f} [{min(v):.2f}, {max(v):.2f}]" for v in (walls, cpus))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
