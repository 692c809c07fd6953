"""The side of a benchmark that is measured: a process that answers one line of JSON with another.

Runs in any environment that has torch; the side that asks is `peers.workers`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, TextIO

os.environ["OMP_NUM_THREADS"] = "1"


def say(**what: Any) -> None:
    """One line to the side that asks, from any process that serves."""
    print(json.dumps(what), file=_said(), flush=True)


@cache
def _said() -> TextIO:
    said = os.fdopen(os.dup(1), "w")
    # What libraries print is not for the side that asks.
    os.dup2(2, 1)
    return said


def serve(**answers: Callable[..., dict[str, Any]]) -> None:
    """Answer {"do": NAME, ...} by the function of that name, until there are no more lines.

    What an answer raises is said in one line and is no end: that something cannot be done is a result.
    """
    import torch

    torch.set_num_threads(1)
    _said()
    for line in sys.stdin:
        asked = json.loads(line)
        answer = answers[asked.pop("do")]
        try:
            said = answer(**asked)
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is what it could not do
            text = next(iter(str(error).strip().splitlines()), "")
            said = {"error": f"{type(error).__name__}: {text}"}
        say(**said)


class Timed:
    """Times a function of a number of steps: so many that they take a while, after a warm-up."""

    def __init__(self, steps: Callable[[int], object], seconds: float) -> None:
        self._run = steps
        steps(2)
        self._steps = max(1, round(seconds / max(self._took(2)[1] / 2, 1e-9)))

    def _took(self, steps: int) -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        self._run(steps)
        return time.process_time() - cpu, time.perf_counter() - wall

    def __call__(self) -> dict[str, float]:
        """CPU and wall seconds a step."""
        cpu, wall = self._took(self._steps)
        return {"cpu": cpu / self._steps, "wall": wall / self._steps}


class Epochs(Protocol):
    """Draws as many batches as so many epochs have; counts them, and their records."""

    sampled: int
    steps: int

    def __call__(self, epochs: int) -> None: ...


def sampling(make: Callable[[int, int, int], Epochs]) -> Callable[..., dict[str, Any]]:
    """An answer for `serve`: what the sampling of `make`'s tables (rows, features, batch) costs."""

    @cache
    def made(rows: int, features: int, batch: int, seconds: float) -> tuple[Epochs, Timed]:
        epochs = make(rows, features, batch)
        return epochs, Timed(epochs, seconds)

    def answer(**asked: Any) -> dict[str, Any]:
        """Seconds of an epoch, and the mean batch."""
        epochs, timed = made(**asked)
        return {**timed(), "mean_batch": epochs.sampled / epochs.steps}

    return answer


def versions(*packages: str) -> dict[str, str]:
    """Of what this environment has."""
    from importlib.metadata import version

    return {package: version(package) for package in packages}
