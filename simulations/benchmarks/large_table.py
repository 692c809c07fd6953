"""What a large table costs a deployed site: seconds and memory to encode, split and train on it.

    python simulations/benchmarks/large_table.py [ROWS ...] > simulations/benchmarks/large_table.md

For each number of rows (1,000,000 and 10,000,000) a Parquet file of 30 columns is generated, always the
same: 24 doubles, 5 codes and a label. A process of its own then does what a site does: read, check and
encode, hold out a part, take the fingerprint, and train three rounds of lockstep. Peak RSS is the kernel's
(ru_maxrss); it counts pages of mapped files, which the kernel takes back when it needs them. "Own" is the
most anonymous memory seen, ten looks a second. Files lie in $TMPDIR and are removed.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import duckdb

FLOATS, CODES = 24, 5
ROUNDS = 3
EXPECTED_BATCH = 4096


def study(rows: int) -> dict[str, Any]:
    """A study of one record in thousands a round."""
    floats = {f"c{i}": {"type": "float", "range": [0, 1000]} for i in range(FLOATS)}
    codes = {f"k{i}": {"type": "category", "vocabulary": list(range(10))} for i in range(CODES)}
    return {
        "study": {"name": "large"},
        "task": {"kind": "binary", "target": "y"},
        "privacy": {"epsilon": 1.0, "delta": 1e-8, "noise": "local"},
        "train": {
            "rounds": ROUNDS,
            "sample_rate": EXPECTED_BATCH / rows,
            "expected_batch": float(EXPECTED_BATCH),
            "lr": 0.1,
        },
        "features": {"columns": {**floats, **codes}},
    }


def generate(rows: int, path: Path) -> None:
    """The file, row by row a function of the row's number."""
    floats = [f"(hash(i * 31 + {c}) % 1000000007) / 1000000.007 AS c{c}" for c in range(FLOATS)]
    codes = [f"(hash(i * 37 + {c}) % 10)::INTEGER AS k{c}" for c in range(CODES)]
    columns = ", ".join([*floats, *codes, "(hash(i * 41) % 50 = 0)::INTEGER AS y"])
    with duckdb.connect() as connection:
        connection.execute(f"COPY (SELECT {columns} FROM range({rows}) AS t(i)) TO '{path}'")  # noqa: S608 - its own words


def measure(rows: int, path: Path, scratch: Path) -> dict[str, float]:
    """Seconds of each stage, and memory, of this process."""
    import torch

    from lepton_fl.config import parse
    from lepton_fl.data import Contract, Room, load_table, open_batches, split
    from lepton_fl.data.sources import ParquetFile
    from lepton_fl.privacy import Guarantee
    from lepton_fl.study import Study
    from lepton_fl.tasks import arrays_of, build_model, task_of
    from lepton_fl.training.local import LocalPlan, train_locally
    from lepton_fl.training.noise import SimulationNoise

    torch.set_num_threads(1)
    at = time.perf_counter()
    found: dict[str, float] = {"start_mib": own_mib()}
    peak = {"mib": 0.0}
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.1):
            peak["mib"] = max(peak["mib"], own_mib())

    def stage(name: str) -> None:
        nonlocal at
        found[name], at = time.perf_counter() - at, time.perf_counter()

    looking = threading.Thread(target=look)
    looking.start()
    made = parse(Study, study(rows), file="study")
    contract = Contract.of(made)
    room = Room(folder=scratch)
    table = load_table(
        contract, open_batches(ParquetFile(path=path), contract), source="large", raw=False, room=room
    )
    assert len(table) == rows
    stage("encode")
    train, test = split(table, made.evaluation, b"k" * 32)
    assert len(train) + len(test) == rows
    del table
    stage("split")
    assert train.fingerprint
    stage("fingerprint")
    model, task = build_model(made, contract.width, torch.Generator()), task_of(made)
    plan = LocalPlan.of(made, Guarantee.of(made))
    for round in range(1, ROUNDS + 1):
        noise = SimulationNoise.unseeded("site")
        train_locally(model, task, arrays_of(model), train, plan, noise, round)
    stage("train")
    ended.set()
    looking.join()
    found["own_mib"] = peak["mib"]
    found["rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found["x_mib"] = rows * contract.width * 4 / 2**20
    return found


def own_mib() -> float:
    """Anonymous memory of this process now."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        rows, path, scratch = sys.argv[2:]
        print(json.dumps(measure(int(rows), Path(path), Path(scratch))))
        return
    print("# Large tables\n")
    packages = ", ".join(f"{p} {version(p)}" for p in ("lepton-fl", "duckdb", "pyarrow", "numpy", "torch"))
    print(
        f"30 columns of Parquet, 79 features; one run. {platform.machine()}, {os.cpu_count()} shared CPU "
        f"cores, Python {platform.python_version()}, {packages}.\n"
    )
    print(
        "| rows | file MiB | features MiB | encode s | rows/s | split s | fingerprint s | 3 rounds s "
        "| peak RSS MiB | own MiB | own at start MiB |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for rows in [int(n) for n in sys.argv[1:]] or [1_000_000, 10_000_000]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "large.parquet"
            generate(rows, path)
            command = [sys.executable, __file__, "--measure", str(rows), str(path), folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
            size = path.stat().st_size / 2**20
        numbers = [
            f"{rows:,}",
            f"{size:,.0f}",
            f"{found['x_mib']:,.0f}",
            f"{found['encode']:.1f}",
            f"{rows / found['encode']:,.0f}",
            *(f"{found[name]:.1f}" for name in ("split", "fingerprint", "train")),
            *(f"{found[name]:,.0f}" for name in ("rss_mib", "own_mib", "start_mib")),
        ]
        print(f"| {' | '.join(numbers)} |", flush=True)


if __name__ == "__main__":
    main()
