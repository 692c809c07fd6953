"""One consortium for all tests, and nothing that a test leaves behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_harness import RUN, Consortium, make_study

from lepton_fl.messages import identify
from lepton_fl.study import Study


@pytest.fixture(scope="session")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    made = Consortium(tmp_path_factory.mktemp("consortium"))
    yield made
    made.close()


@pytest.fixture
def study() -> Study:
    return make_study()


@pytest.fixture(autouse=True)
def _known_to_flower() -> None:
    identify(RUN, 1)


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """No process, no socket of the network, no open file of the test's folder, and no payload on its way."""
    before = _held(tmp_path)
    yield
    gc.collect()  # What is mapped stays open while anybody looks at it.
    left = _held(tmp_path) - before
    waiting = [str(path) for spool in tmp_path.rglob("spool") for path in spool.iterdir()]

    assert not left
    assert not waiting


def _held(folder: Path) -> set[str]:
    """What this process holds that the next test must not find."""
    held = {f"process {line}" for line in _children()}
    for handle in Path("/proc/self/fd").iterdir():
        try:
            target = str(handle.readlink())
        except FileNotFoundError:
            continue
        if target.startswith(str(folder)):
            held.add(f"file {target}")
        elif target.startswith("socket:") and target[8:-1] in _tcp():
            held.add(f"connection {target}")
    return held


def _children() -> list[str]:
    found = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False
    )
    return [line.strip() for line in found.stdout.splitlines() if " ps -o " not in f" {line}"]


def _tcp() -> set[str]:
    """Inodes of this machine's TCP sockets."""
    return {
        line.split()[9]
        for family in ("tcp", "tcp6")
        for line in Path(f"/proc/self/net/{family}").read_text().splitlines()[1:]
    }


if sys.platform != "linux":
    collect_ignore_glob = ["*.py"]  # /proc says what is left.
