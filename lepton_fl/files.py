"""Files that a crash cannot leave half written, and locks that it cannot leave behind."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace the file at `path` by `data` so that no crash leaves half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # Made anew: what lies there, in a folder that others may write in, may be theirs, or a link.
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def lock(path: Path, *, patience: float = 0.0) -> int | None:
    """Have `path`, made with mode 0600, for this process alone; an open file, whose end is the lock's.

    None: another process has it, also after `patience` seconds.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(handle)
                return None
            time.sleep(0.05)
