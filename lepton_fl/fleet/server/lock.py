"""One server for each state folder, and where it can be reached."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lepton_fl.errors import ConfigError, ConnectionFailed
from lepton_fl.files import lock
from lepton_fl.fleet.server.config import ServerFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A server that runs, as its lock file says."""

    pid: int
    since: float
    fleet: str
    enrolment: str | None
    status: str | None


def running(files: ServerFiles) -> Running | None:
    """The server that runs on this state folder, if one does."""
    try:
        handle = os.open(_lock_path(files), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{_lock_path(files)}: cannot be read: {error.strerror}") from None
    with os.fdopen(handle, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            pass
        try:
            return Running(**json.loads(file.read()))
        except (ValueError, TypeError):
            # It has the lock and is about to say who it is.
            return Running(pid=0, since=time.time(), fleet="", enrolment=None, status=None)


def _lock_path(files: ServerFiles) -> Path:
    return files.state / "server.lock"


@contextlib.contextmanager
def locked(files: ServerFiles) -> Iterator[Callable[[Running], None]]:
    """Be the one server of this state folder; gives what tells others how it can be reached.

    Raises:
        ConnectionFailed: another one runs.
    """
    # `running` holds it for a moment when it looks.
    handle = lock(_lock_path(files), patience=1.0)
    if handle is None:
        found = running(files)
        pid = "" if found is None else f", process {found.pid}"
        raise ConnectionFailed(
            f"{files.state}: a server runs on this state folder already{pid}",
            fix=f"lepton-fl server stop -c {files.path}",
        )
    try:
        os.ftruncate(handle, 0)

        def tell(found: Running) -> None:
            os.pwrite(handle, json.dumps(asdict(found)).encode(), 0)

        yield tell
    finally:
        os.close(handle)
