"""Whatever write or fsync of a round fails, and however: spent >= released, and the ledger opens again."""

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from lepton_fl.privacy import Ledger

HERE = Path(__file__).parent
FAULTS = [
    "EIO once",
    "CUT once",
    *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("KILL once", "ENOSPC once", "EROFS once")),
    *(pytest.param(f"{fault} lasting", marks=pytest.mark.slow) for fault in ("EIO", "ENOSPC", "EROFS")),
]


def reachable() -> bool:
    code = "import _sqlite3, faulty_disk, sys; sys.exit(faulty_disk.sqlite_library() is None)"
    return subprocess.run([sys.executable, "-c", code], cwd=HERE, timeout=60).returncode == 0


pytestmark = pytest.mark.skipif(
    not reachable(), reason="this Python has SQLite built in, where its writes cannot be reached"
)


@pytest.fixture
def sites(tmp_path):
    """The folders of sites whose disk failed at the 1st, 2nd, ... write."""

    def run(fault):
        command = [sys.executable, "site_rounds.py", str(tmp_path), *fault.split()]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        writes = int(done.stdout)
        assert writes > 30
        return sorted(tmp_path.iterdir())[:writes]

    return run


def lines(path):
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.mark.parametrize("fault", FAULTS)
def test_spent_is_never_less_than_released(sites, fault):
    """At each write: what was read was charged, what left was committed, nothing is charged twice."""
    wasted = cut_off = 0
    for home in sites(fault):
        read, released = lines(home / "read"), lines(home / "released")
        # By a process on a sound disk, as at the next start: it must neither forget nor refuse.
        with closing(Ledger(home / "ledger.db")) as ledger:
            rows = {row["round"]: row["outcome"] for row in ledger.history("d")}

        assert set(released) <= set(read) <= set(rows), home.name
        assert {rows[round] for round in released} <= {"released"}, home.name
        wasted += len(rows) > len(read)
        cut_off += len(released) < 2
    # The moments that matter are among those tried.
    assert cut_off > 5
    assert wasted > 0
