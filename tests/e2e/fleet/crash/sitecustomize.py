"""Ends this process by SIGKILL at a point that a test names: as a power cut would, and exactly there.

Python imports this by itself where the folder is on PYTHONPATH. LEPTON_FL_CRASH names a file that says
`MODULE:NAME:before|after:CALL`; it is removed first, so that a process started anew lives.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class _Watcher(importlib.abc.MetaPathFinder):
    """Puts the crash into a module as soon as it has been imported."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._module, self._name, self._when, call = file.read_text(encoding="utf-8").split(":")
        self._left = int(call)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            raise ImportError(fullname)
        execute = spec.loader.exec_module

        def execute_and_mine(module: ModuleType) -> None:
            execute(module)
            self._mine(module)

        spec.loader.exec_module = execute_and_mine  # type: ignore[method-assign]
        return spec

    def _mine(self, module: ModuleType) -> None:
        owner: Any = module
        *outer, last = self._name.split(".")
        for name in outer:
            owner = getattr(owner, name)
        setattr(owner, last, self._mined(getattr(owner, last)))

    def _mined(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def mined(*args: Any, **more: Any) -> Any:
            self._left -= 1
            if self._left == 0 and self._when == "before":
                self._die()
            result = function(*args, **more)
            if self._left == 0 and self._when == "after":
                self._die()
            return result

        return mined

    def _die(self) -> None:
        try:
            self._file.unlink()
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


if os.path.exists(os.environ.get("LEPTON_FL_CRASH", "")):  # noqa: PTH110 - an empty path is a folder to Path
    sys.meta_path.insert(0, _Watcher(Path(os.environ["LEPTON_FL_CRASH"])))
