"""A disk that fails, or kills its process, at the n-th write or fsync: SQLite's own and those of `os`.

SQLite does its writes through a table of functions (https://www.sqlite.org/vfs.html). In a process that
is there for nothing else, the open function of the default one is replaced, so that each file it opens gets
ours for write, sync and truncate.
"""

import ctypes
import ctypes.util
import errno
import os
import signal
import sqlite3
import sys
from pathlib import Path

IOERR_WRITE = 10 | 3 << 8
CODES = {"EIO": IOERR_WRITE, "ENOSPC": 13, "EROFS": 8}
"""What SQLite's functions return: SQLITE_IOERR_WRITE, SQLITE_FULL, SQLITE_READONLY."""

_INT, _PTR = ctypes.c_int, ctypes.c_void_p
_OPEN = ctypes.CFUNCTYPE(_INT, _PTR, _PTR, _PTR, _INT, _PTR)
_WRITE = ctypes.CFUNCTYPE(_INT, _PTR, _PTR, _INT, ctypes.c_int64)
_TRUNCATE = ctypes.CFUNCTYPE(_INT, _PTR, ctypes.c_int64)
_SYNC = ctypes.CFUNCTYPE(_INT, _PTR, _INT)


class _Vfs(ctypes.Structure):
    _fields_ = [
        ("version", _INT),
        ("file_size", _INT),
        ("longest_path", _INT),
        ("next", _PTR),
        ("name", _PTR),
        ("data", _PTR),
        ("open", _PTR),
    ]


class _Methods(ctypes.Structure):
    _fields_ = [
        ("version", _INT),
        *((name, _PTR) for name in ("close", "read", "write", "truncate", "sync")),
        *((f"other_{number}", _PTR) for number in range(13)),
    ]


def sqlite_library() -> ctypes.CDLL | None:
    """The SQLite that Python uses; None where it is built into Python and cannot be reached."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = {line.split()[-1] for line in maps.splitlines() if "libsqlite3" in line}
    if len(found) != 1:
        return None
    library = ctypes.CDLL(found.pop())
    library.sqlite3_libversion.restype = ctypes.c_char_p
    return library if library.sqlite3_libversion().decode() == sqlite3.sqlite_version else None


class FaultyDisk:
    """Counts writes and fsyncs, and fails at those that it is told to.

    `fault` is EIO, ENOSPC or EROFS, or KILL, which is SIGKILL before it, or CUT, which is SIGKILL in the
    middle of it. `lasting`: from the n-th on, as a disk that stays full.
    """

    def __init__(self, library: ctypes.CDLL, fault: str, n: int, *, lasting: bool) -> None:
        self.fault, self.n, self.lasting, self.count = fault, n, lasting, 0
        self._kept: dict[int, object] = {}
        library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
        vfs = library.sqlite3_vfs_find(None).contents
        self._open = _OPEN(vfs.open)
        self._ours = _OPEN(self._opened)
        vfs.open = ctypes.cast(self._ours, _PTR)
        self._pwrite, self._fsync = os.pwrite, os.fsync
        os.pwrite, os.fsync = self._os_pwrite, self._os_fsync

    @property
    def met(self) -> bool:
        """Whether there was an n-th."""
        return self.count >= self.n

    def _now(self) -> bool:
        self.count += 1
        return self.count == self.n or (self.lasting and self.count > self.n)

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    # SQLite's

    def _opened(self, vfs, name, file, flags, out) -> int:
        code = self._open(vfs, name, file, flags, out)
        methods = ctypes.cast(file, ctypes.POINTER(_PTR))
        if code == 0 and methods[0]:
            methods[0] = self._faulty(methods[0])
        return code

    def _faulty(self, address: int) -> int:
        if address not in self._kept:
            methods = _Methods.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(_Methods)))
            write, truncate, sync = _WRITE(methods.write), _TRUNCATE(methods.truncate), _SYNC(methods.sync)

            def faulty_write(file, data, size, offset):
                if not self._now():
                    return write(file, data, size, offset)
                if self.fault == "CUT":
                    write(file, data, size // 2, offset)
                return self._fail()

            def faulty_truncate(file, size):
                return self._fail() if self._now() else truncate(file, size)

            def faulty_sync(file, flags):
                return self._fail() if self._now() else sync(file, flags)

            ours = _WRITE(faulty_write), _TRUNCATE(faulty_truncate), _SYNC(faulty_sync)
            methods.write, methods.truncate, methods.sync = (ctypes.cast(one, _PTR) for one in ours)
            self._kept[address] = (methods, ours, write, truncate, sync)
            self._kept[ctypes.addressof(methods)] = self._kept[address]
        return ctypes.addressof(self._kept[address][0])

    def _fail(self) -> int:
        if self.fault in ("KILL", "CUT"):
            self._die()
        return CODES[self.fault]

    # Python's

    def _os_pwrite(self, handle, data, offset):
        if not self._now():
            return self._pwrite(handle, data, offset)
        if self.fault == "CUT":
            self._pwrite(handle, data[: len(data) // 2], offset)
        return self._raise()

    def _os_fsync(self, handle):
        return self._raise() if self._now() else self._fsync(handle)

    def _raise(self):
        if self.fault in ("KILL", "CUT"):
            self._die()
        number = getattr(errno, self.fault)
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    sys.exit(0 if sqlite_library() else 1)
