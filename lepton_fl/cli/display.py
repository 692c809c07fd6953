"""How a simulation shows its progress: a live view in a terminal, plain lines elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from lepton_fl.cli.terminal import console, say
from lepton_fl.report.wording import spent, spent_of
from lepton_fl.results import RoundSummary, Sweep, SweepPoint

if TYPE_CHECKING:
    from rich.console import RenderableType

_ENDED = ("completed", "stopped", "refused", "killed")
"""States of a point of a sweep that is not worked on further."""
_BLOCKS = " ▁▂▃▄▅▆▇█"


class _Entered(Protocol):
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class RunDisplay(_Entered, Protocol):
    """A display that is entered for the time of a run."""

    def stage(self, title: str, total: int) -> None: ...
    def advance(self) -> None: ...
    def joined(self, cohort: tuple[str, ...], refused: Mapping[str, str]) -> None: ...
    def round(self, summary: RoundSummary, planned: int, allowed: float | None) -> None: ...


def display_for(metric: str, labels: str) -> RunDisplay:
    """The display that suits standard error."""
    if console(stderr=True).is_terminal:
        return _Live(metric, labels)
    return _Lines(metric, labels)


class _Lines:
    """One line for each thing worth knowing."""

    def __init__(self, metric: str, labels: str) -> None:
        self._metric = metric
        self._labels = labels

    def __enter__(self) -> _Lines:
        say(self._labels)
        return self

    def __exit__(self, *_: object) -> None: ...

    def stage(self, title: str, total: int) -> None:
        say(f"{title}: {total} steps")

    def advance(self) -> None: ...

    def joined(self, cohort: tuple[str, ...], refused: Mapping[str, str]) -> None:
        say(f"sites: {', '.join(cohort)}")
        for name, reason in sorted(refused.items()):
            say(f"left out: {name}: {reason}")

    def round(self, summary: RoundSummary, planned: int, allowed: float | None) -> None:
        for name, reason in sorted(summary.dropped.items()):
            say(f"round {summary.round}: dropped {name}: {reason}")
        if summary.metric is not None:
            say(
                f"round {summary.round}/{planned}: {len(summary.sites)} sites, "
                f"{self._metric} {summary.metric:.3f}, {_spent(summary.epsilon, allowed)}"
            )


class _InTerminal(ABC):
    """Drawn anew again and again on standard error, while it is entered."""

    def __init__(self, *, refresh_per_second: float) -> None:
        from rich.live import Live

        self._live = Live(
            get_renderable=self._render, console=console(stderr=True), refresh_per_second=refresh_per_second
        )

    @abstractmethod
    def _render(self) -> RenderableType:
        """How things stand."""

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.__exit__(kind, error, trace)


class _Live(_InTerminal):
    """Progress bar, epsilon bar, the metric so far, and the sites."""

    def __init__(self, metric: str, labels: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self._metric = metric
        self._labels = labels
        self._progress = Progress(
            "[bold]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        )
        self._cohort: tuple[str, ...] = ()
        self._out: dict[str, str] = {}
        self._epsilon: tuple[float | None, float | None] = (None, None)
        self._seen: list[float] = []
        self._title = "before the first round"
        super().__init__(refresh_per_second=8)

    def stage(self, title: str, total: int) -> None:
        for task in self._progress.tasks:
            self._progress.update(task.id, completed=task.total)
        self._progress.add_task(title, total=total)

    def advance(self) -> None:
        self._progress.advance(self._progress.task_ids[-1])

    def joined(self, cohort: tuple[str, ...], refused: Mapping[str, str]) -> None:
        self._cohort = cohort
        self._out.update(refused)

    def round(self, summary: RoundSummary, planned: int, allowed: float | None) -> None:
        self._cohort = tuple(sorted({*self._cohort, *summary.sites}))
        self._out.update(summary.dropped)
        for name in summary.sites:
            self._out.pop(name, None)
        self._title = f"round {summary.round} of {planned}"
        if summary.epsilon is not None:
            self._epsilon = (summary.epsilon, allowed)
        if summary.metric is not None:
            self._seen.append(summary.metric)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1))
        grid.add_row("charged run", self._title)
        epsilon, allowed = self._epsilon
        if epsilon is not None and allowed is not None:
            grid.add_row("epsilon", ProgressBar(total=allowed, completed=epsilon, width=40))
            grid.add_row("", _spent(epsilon, allowed))
        if self._seen:
            shown = f"{_sparkline(self._seen)} {self._seen[-1]:.3f} on held-out records"
            grid.add_row(self._metric, shown)
        if self._cohort:
            grid.add_row("sites", Text(", ".join(self._cohort)))
        for name, reason in sorted(self._out.items()):
            grid.add_row("left out", Text(f"{name}: {reason}", style="yellow"))
        return Group(Text(self._labels, style="bold yellow"), self._progress, grid)


class SweepDisplay(_Entered, Protocol):
    """A display that is entered for the time of a sweep."""

    def show(self, sweep: Sweep) -> None:
        """How the points stand."""

    def ended(self, point: SweepPoint) -> None:
        """A point has ended."""


def sweep_display(sweep: Sweep) -> SweepDisplay:
    """The display that suits standard error."""
    return _SweepLive(sweep) if console(stderr=True).is_terminal else _SweepLines(sweep)


class _SweepLines:
    """One line for each point that ends."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def __enter__(self) -> _SweepLines:
        say(", ".join(self._sweep.labels))
        done = sum(1 for point in self._sweep.points if point.status in _ENDED)
        say(f"{len(self._sweep.points)} points" + (f", {done} of them done before" if done else ""))
        return self

    def __exit__(self, *_: object) -> None: ...

    def show(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def ended(self, point: SweepPoint) -> None:
        done = sum(1 for p in self._sweep.points if p.status in _ENDED)
        say(f"{done}/{len(self._sweep.points)} {_of_point(point, self._sweep.metric)}")


class _SweepLive(_InTerminal):
    """A bar, the points that run, and the last that ended."""

    def __init__(self, sweep: Sweep) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

        self._sweep = sweep
        self._progress = Progress("[bold]points", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = self._progress.add_task("points", total=len(sweep.points))
        self._last: list[SweepPoint] = []
        super().__init__(refresh_per_second=4)

    def show(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def ended(self, point: SweepPoint) -> None:
        self._last = [*self._last, point][-8:]

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        points = self._sweep.points
        self._progress.update(self._bar, completed=sum(1 for p in points if p.status in _ENDED))
        left = sum(1 for p in points if p.status == "left")
        grid = Table.grid(padding=(0, 1))
        for point in self._last:
            good = point.status == "completed"
            grid.add_row("", Text(_of_point(point, self._sweep.metric), style="" if good else "yellow"))
        for point in points:
            if point.status == "running":
                grid.add_row("running", Text(point.name))
        grid.add_row("left", str(left))
        return Group(Text(", ".join(self._sweep.labels), style="bold yellow"), self._progress, grid)


def _of_point(point: SweepPoint, metric: str) -> str:
    parts: list[str] = [point.status]
    mean = point.arms["federated"].mean if "federated" in point.arms else None
    if mean is not None:
        parts.append(f"{metric} {mean:.3f}")
    if point.epsilon is not None:
        parts.append(f"epsilon {spent(point.epsilon)}")
    if point.seconds is not None:
        parts.append(f"{point.seconds:.0f} s")
    if point.reason:
        parts.append(point.reason)
    return f"{point.name}: {', '.join(parts)}"


def _spent(epsilon: float | None, allowed: float | None) -> str:
    if epsilon is None or allowed is None:
        return "no privacy"
    return f"epsilon {spent_of(epsilon, allowed)}"


def _sparkline(values: list[float], width: int = 40) -> str:
    shown = values[-width:]
    low, high = min(shown), max(shown)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[1 + int((v - low) * scale * 0.999)] if scale else _BLOCKS[4] for v in shown)
