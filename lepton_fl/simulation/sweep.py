"""Many simulations over a grid of keys: which points there are, and each in a process of its own."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

from lepton_fl.errors import ConfigError
from lepton_fl.files import lock
from lepton_fl.results import Interval, SweepAxis, SweepPoint, SweepValue, read_results, shown
from lepton_fl.study import Study, override

SPLIT, SITES = "split", "sites"
"""Axes that are no keys of a study: how one table is cut, and into how many sites."""
_POLL = 0.1
_ENDED_BY_ITSELF = (0, 6, 130)
"""Exit codes of a simulation that has written its results."""


def read_axes(texts: Sequence[str]) -> tuple[SweepAxis, ...]:
    """`KEY=V1,V2,...`, each once.

    Raises:
        ConfigError: no such form, an empty or repeated value, or a repeated key.
    """
    axes: list[SweepAxis] = []
    for text in texts:
        key, equals, listed = (part.strip() for part in text.partition("="))
        values = [part.strip() for part in listed.split(",")]
        if not (key and equals and all(values)):
            raise ConfigError.at("command line", "--sweep", found=text, allowed="KEY=V1,V2,... without gaps")
        if "." not in key and key not in (SPLIT, SITES):
            allowed = f"a dotted key of study.toml such as privacy.epsilon, or {SPLIT}, or {SITES}"
            raise ConfigError.at("command line", "--sweep", found=key, allowed=allowed)
        if key.startswith("study."):
            # A name changes the study's id and so the noise that is drawn, and nothing else.
            raise ConfigError.at(
                *("command line", "--sweep"),
                found=key,
                allowed="a key that trains",
                fix="--seeds N for repeats",
            )
        if key in (axis.key for axis in axes):
            raise ConfigError.at("command line", "--sweep", found=key, allowed="each key once")
        if repeated := [value for value in values if values.count(value) > 1]:
            raise ConfigError.at(
                "command line", f"--sweep {key}", found=repeated[0], allowed="each value once"
            )
        axes.append(SweepAxis(key=key, values=tuple(_scalar(value) for value in values)))
    return tuple(axes)


def grid(axes: Sequence[SweepAxis]) -> list[dict[str, SweepValue]]:
    """All combinations, the last key varying fastest."""
    keys = [axis.key for axis in axes]
    return [
        dict(zip(keys, values, strict=True)) for values in itertools.product(*(axis.values for axis in axes))
    ]


def study_at(study: Study, values: Mapping[str, SweepValue]) -> Study:
    """The study with the keys of one point replaced, checked anew."""
    return override(study, {key: value for key, value in values.items() if key not in (SPLIT, SITES)})


def name_of(values: Mapping[str, SweepValue]) -> str:
    """`KEY=VALUE,...`: in order, and with nothing in it that a folder could not be called."""
    text = ",".join(f"{key}={shown(value)}" for key, value in values.items())
    return re.sub(r"[^A-Za-z0-9._=,+-]", "-", text)[:200]


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold `folder` for one sweep; what is yielded is handed to its processes, which hold it too.

    Raises:
        ConfigError: another sweep, or a process that one has left behind, is at work there.
    """
    handle = lock(folder / ".lock")
    if handle is None:
        raise ConfigError(
            f"{folder}: another sweep is at work here",
            fix="wait for it, or name another folder with --out",
        )
    try:
        yield handle
    finally:
        os.close(handle)


class Observer(Protocol):
    """Is told how the points go on."""

    def began(self, point: SweepPoint) -> None:
        """Its process has been started."""

    def ended(self, point: SweepPoint) -> None:
        """Its process has ended; the point holds what came out."""


@dataclass(kw_only=True)
class Processes:
    """Runs points, at most `jobs` at a time, each as a process of its own.

    A process that fails or is killed ends its own point only. SIGINT and SIGTERM end the sweep: every
    process is asked once to write what it has, and at the second time is killed. None is left behind.
    """

    folder: Path
    jobs: int
    lock: int
    """The descriptor of `locked`."""
    observer: Observer
    interrupted: int = 0
    """How often we were asked to end."""
    _running: dict[str, tuple[SweepPoint, subprocess.Popen[bytes]]] = field(default_factory=dict)

    def run(self, points: Sequence[SweepPoint], commands: Mapping[str, Sequence[str]]) -> None:
        """Run each point's command: the arguments of `lepton-fl`, by name of point."""
        waiting, asked = list(points), 0
        with self._listening():
            while self._running or (waiting and not self.interrupted):
                while waiting and len(self._running) < self.jobs and not self.interrupted:
                    self._begin(waiting.pop(0), commands)
                if asked < self.interrupted:
                    for _, process in self._running.values():
                        # Not SIGINT: where we run in the background our children ignore it.
                        process.terminate() if asked == 0 else process.kill()
                    asked = self.interrupted
                for point, process in list(self._running.values()):
                    if (code := process.poll()) is not None:
                        del self._running[point.name]
                        self.observer.ended(self._outcome(point, code))
                time.sleep(_POLL)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def heard(_: int, __: FrameType | None) -> None:
            self.interrupted += 1

        before = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            # Here with a process running only after an error of our own.
            for _, process in self._running.values():
                process.kill()
                process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _begin(self, point: SweepPoint, commands: Mapping[str, Sequence[str]]) -> None:
        with self._console(point).open("wb") as console:
            process = subprocess.Popen(  # noqa: S603 - our own program, with arguments that were checked
                # -P: a file in the current folder must not stand in for a library.
                [sys.executable, "-P", "-m", "lepton_fl", *commands[point.name]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=console,
                # Ctrl-C reaches us, and we tell each process once.
                process_group=0,
                pass_fds=(self.lock,),
            )
        self._running[point.name] = (point, process)
        self.observer.began(point.model_copy(update={"status": "running"}))

    def _outcome(self, point: SweepPoint, code: int) -> SweepPoint:
        if code < 0 and not self.interrupted:
            name = signal.Signals(-code).name
            return point.model_copy(update={"status": "killed", "reason": f"its process was killed ({name})"})
        if code in _ENDED_BY_ITSELF and (self.folder / point.folder / "results.json").exists():
            return with_results(point, self.folder)
        if self.interrupted:
            return point
        return point.model_copy(
            update={"status": "refused", "reason": _last_line(self._console(point)) or f"exit code {code}"}
        )

    def _console(self, point: SweepPoint) -> Path:
        return self.folder / point.folder / "console.log"


def with_results(point: SweepPoint, folder: Path) -> SweepPoint:
    """The point with what its results.json holds."""
    results = read_results(folder / point.folder / "results.json")
    arms: dict[str, Interval] = {arm.arm: arm.mean for arm in results.arms}
    return SweepPoint(
        **{
            **point.model_dump(),
            "study_id": results.study_id,
            "status": results.status,
            "reason": "" if results.status == "completed" else results.verdict,
            "arms": arms,
            "gain": results.gain,
            "epsilon": max((s.epsilon_run for s in results.sites if s.epsilon_run is not None), default=None),
            "rounds": sum(1 for r in results.rounds if r.sites),
            "seconds": results.seconds,
        }
    )


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("lepton-fl: ") if lines else ""


def _scalar(text: str) -> SweepValue:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
