"""Arrays that grow by rows: in memory while they are small, in unlinked files when they are not."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError

SLICE_ROWS = 65_536
"""Rows of a large array that are copied at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How much of one table is kept in memory, and where the rest goes. Memory only: not what is read."""

    memory: int = 256 << 20
    """Bytes of all of a table's arrays together, above which they are moved to files."""
    folder: Path | None = None
    """Of those files; None for the system's own place for temporary files."""


MEMORY = Room()
"""For whoever names no other."""


class Growing:
    """Named arrays to which rows are added, within the memory of a `Room`.

    The files hold records, though encoded. They are readable by their owner only and have no name from
    the start, so that nothing is left of them when the process ends, however it ends.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self._waiting: dict[str, list[NDArray[Any]]] = {}
        self._held = 0
        self._written: dict[str, int] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._open = ExitStack()

    def __enter__(self) -> Growing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A mapped file stays readable after this.
        self._open.close()

    def add(self, **blocks: NDArray[Any]) -> None:
        """Put rows after those of the same name.

        Raises:
            ConfigError: the folder cannot be written, or is full.
        """
        for name, block in blocks.items():
            self._waiting.setdefault(name, []).append(block)
            self._held += block.nbytes
        if self._files or self._held > self._room.memory:
            self._write()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that was added, by name; those in files mapped into memory."""
        if not self._files:
            return {name: np.concatenate(blocks) for name, blocks in self._waiting.items()}
        return {name: self._mapped(name) for name in self._waiting}

    def _write(self) -> None:
        try:
            for name, blocks in self._waiting.items():
                if name not in self._files:
                    file = tempfile.TemporaryFile(dir=self._room.folder)  # noqa: SIM115 - closed by __exit__
                    self._files[name] = self._open.enter_context(file)
                for block in blocks:
                    self._files[name].write(np.ascontiguousarray(block).data)
                    self._written[name] = self._written.get(name, 0) + len(block)
                # An empty one stays, to know type and width by.
                blocks[:] = [blocks[0][:0].copy()]
                self._files[name].flush()
        except OSError as error:
            raise ConfigError(
                f"{self._room.folder or tempfile.gettempdir()}: cannot hold what of the table exceeds "
                f"{self._room.memory >> 20} MiB: {error.strerror}",
                fix='site.toml: [runtime] scratch = "FOLDER" on a disk with room',
            ) from None
        self._held = 0

    def _mapped(self, name: str) -> NDArray[Any]:
        empty = self._waiting[name][0]
        shape = (self._written[name], *empty.shape[1:])
        if 0 in shape:
            return np.empty(shape, empty.dtype)
        # Shared and writable: torch warns of an array that is neither, and nobody writes to it.
        return np.asarray(np.memmap(self._files[name], empty.dtype, mode="r+", shape=shape))


def slices(rows: int) -> Iterator[slice]:
    """Consecutive slices over `rows`; one, empty, where there are none."""
    for start in range(0, max(rows, 1), SLICE_ROWS):
        yield slice(start, start + SLICE_ROWS)
