"""What the benchmarks' processes have in common: each is asked in lines of JSON, and answers so.

Not a benchmark itself.
"""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from typing import Any

PATIENCE = 300.0
"""Seconds that a child has to end."""


class Child:
    """A process of one thread for each product that says JSON lines; it ends when its input does."""

    def __init__(self, *command: str, **environment: str) -> None:
        """Start `command`, with `environment` beside ours."""
        # Where it fails is seen on stderr, which is the terminal's.
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self.pid = self._child.pid

    def tell(self, said: object) -> None:
        """Say one line to it."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(said) + "\n")
        self._child.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The next line that it says."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        assert line, "a process of the benchmark has died; its last words are above"
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, **what: Any) -> dict[str, Any]:
        """Tell, and hear one line."""
        self.tell(what)
        return self.hear()

    def close(self) -> None:
        """End it."""
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
