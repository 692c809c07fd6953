"""The peers of the speed benchmarks, each in an environment of its own, and the side that asks them.

Not a benchmark itself. An environment is made where it is asked for first, with the pins below, under
$LEPTON_FL_PEERS or the user's cache folder; some 1.5 GB each. Ours is the environment that the benchmark
itself runs in.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from children import Child

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parents[1] / "constraints.txt"
TICKS = os.sysconf("SC_CLK_TCK")

_OPACUS = ("torch==2.13.0", "opacus==1.6.0", "numpy==2.4.6")
PINS = {
    "opacus": _OPACUS,
    # Needs dp-accounting below 0.6, which we do not.
    "pfl": (*_OPACUS, "pfl==0.6.0"),
    "flower": (*_OPACUS, "flwr[simulation]==1.41.0", "ray==2.55.1"),
}
"""By peer. torch is the same everywhere, and by constraints.txt the same as ours."""


def python_of(peer: str) -> str:
    """The interpreter of a peer's environment, which is made if it is not there. `ours` is this one."""
    if peer == "ours":
        return sys.executable
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lepton-fl" / "peers"
    pins = [*PINS[peer], CONSTRAINTS.read_text(encoding="utf-8"), sys.version]
    # Other pins are another environment.
    named = f"{peer}-{hashlib.sha256(repr(pins).encode()).hexdigest()[:8]}"
    home = Path(os.environ.get("LEPTON_FL_PEERS", cache)).absolute() / named
    python, whole = home / "bin" / "python", home / "installed"
    if not whole.exists():
        print(f"making {home} for {peer}: {', '.join(PINS[peer])}", file=sys.stderr)
        venv.create(home, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "-qq", "-c", str(CONSTRAINTS), *PINS[peer]]
        subprocess.run(pip, check=True, stdout=2)
        whole.touch()
    return str(python)


def _start(peer: str) -> Child:
    """A process of a peer that is asked for measurements."""
    return Child(
        python_of(peer),
        str(HERE / f"peer_{peer}.py"),
        RAY_USAGE_STATS_ENABLED="0",
        FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_UPDATE_CHECK="1",
        # For the processes that a peer starts; a peer never sees our own packages.
        PYTHONPATH=os.environ.get("PYTHONPATH", "") if peer == "ours" else str(HERE),
    )


@contextmanager
def workers(*names: str) -> Iterator[dict[str, Child]]:
    """One for each peer; they end with the context."""
    found: dict[str, Child] = {}
    try:
        for name in names:
            found[name] = _start(name)
        yield found
    finally:
        for worker in found.values():
            worker.close()


# What a process and those it started have used


def tree_of(pid: int) -> list[int]:
    """The process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            # After the name, which may hold anything: state and parent.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def cpu_of(pid: int) -> float:
    """CPU seconds of the tree so far, of its processes that have ended too."""
    seconds = 0.0
    for each in tree_of(pid):
        with suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            # Linux's name for the CPU clock of another process: finer than the ticks of /proc.
            own = time.clock_gettime((~each << 3) | 2)
            # And of the children that it waited for, user and system.
            seconds += own + sum(int(ticks) for ticks in fields[13:15]) / TICKS
    return seconds


def memory_of(pid: int) -> int:
    """Bytes of the tree now; what processes share is counted once (proportional set size)."""
    total = 0
    for each in tree_of(pid):
        with suppress(OSError):
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total
