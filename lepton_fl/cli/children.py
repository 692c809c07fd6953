"""`lepton-fl` commands as processes of another command, which outlive it in no way that it can end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import lepton_fl
from lepton_fl.errors import LeptonError

COMMAND = ("-P", "-m", "lepton_fl.cli.children")
"""Python's arguments for `lepton-fl` as a child."""
END_S = 60.0
"""Patience with a child that was asked to end: more than a server has with its runs (`runs.leave_s`)."""
_PARENT = "LEPTON_FL_PARENT"
_PR_SET_PDEATHSIG = 1


class ChildFailed(LeptonError):
    """A command that had to succeed did not; its own last line is the message, its exit code ours."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A command that ended."""

    code: int
    out: str
    last: str
    """The last line on standard error: the error, where there is one."""


class Children:
    """Commands that run beside this process, each in a session of its own, so that we say when they end."""

    def __init__(self, folder: Path) -> None:
        """`folder` is where they run."""
        self._folder = folder
        # They must find this very library, wherever they run.
        path = [str(Path(lepton_fl.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self._env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "NO_COLOR": "1",
            _PARENT: str(os.getpid()),
        }
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._logs: dict[str, Path] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """None of them is left: asked first, then killed."""
        for process in self._running.values():
            process.terminate()
        for name in list(self._running):
            self.wait(name)

    def end(self) -> None:
        """Ask all to end, those that were started last first, and see that they do so well.

        Raises:
            ChildFailed: one did not.
        """
        for name in reversed(list(self._running)):
            self._running[name].terminate()
            if code := self.wait(name):
                raise ChildFailed(f"{name}: ended with {code} when it was asked to end", max(code, 1))

    def start(self, name: str, *arguments: str | Path, log: Path, program: tuple[str, ...] = COMMAND) -> None:
        """Start a command whose output goes to `log`."""
        with log.open("ab") as file:
            self._running[name] = subprocess.Popen(  # noqa: S603 - the command is ours
                [sys.executable, *program, *map(str, arguments)],
                cwd=self._folder,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._logs[name] = log

    def kill(self, name: str) -> None:
        """As kill -9 does."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def wait(self, name: str, seconds: float = END_S) -> int:
        """Its exit code; it is killed if it has not ended in time."""
        process = self._running[name]
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        del self._running[name]
        return code

    def check(self, *names: str) -> None:
        """Raise for those that have ended badly.

        Raises:
            ChildFailed: with the last line that one of them wrote.
        """
        for name in names or tuple(self._running):
            code = self._running[name].poll() if name in self._running else None
            if code:
                raise ChildFailed(f"{name}: {_last_line(self._logs[name].read_text())}", max(code, 1))

    def run(self, *arguments: str | Path, allowed: tuple[int, ...] = (0,)) -> Ended:
        """Run a command to its end.

        Raises:
            ChildFailed: its exit code is not among the `allowed`.
        """
        words = [str(word) for word in arguments]
        done = subprocess.run(  # noqa: S603 - the command is ours
            [sys.executable, *COMMAND, *words],
            cwd=self._folder,
            env=self._env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            start_new_session=True,
            check=False,
        )
        ended = Ended(code=done.returncode, out=done.stdout, last=_last_line(done.stderr))
        if ended.code not in allowed:
            raise ChildFailed(f"lepton-fl {' '.join(words[:2])}: {ended.last}", max(ended.code, 1))
        return ended


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("lepton-fl: ") if lines else "it said nothing"


def end_with_parent() -> None:
    """Be killed when the process that started us is gone, however it ended. On Linux; elsewhere nothing."""
    parent = os.environ.pop(_PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        # It was gone before we had asked.
        sys.exit(1)


if __name__ == "__main__":
    end_with_parent()
    from lepton_fl.cli import main

    sys.argv[0] = "lepton-fl"
    main()
