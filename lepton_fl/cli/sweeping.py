"""A sweep from the command line: every point is checked first, then each runs as a process of its own."""

from __future__ import annotations

import os
import time
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import typer

from lepton_fl.cli.display import SweepDisplay, sweep_display
from lepton_fl.cli.running import Request, this_command
from lepton_fl.cli.terminal import INTERRUPTED, fail, make_writable, print_table, say
from lepton_fl.data import Contract, Table
from lepton_fl.errors import ConfigError, LeptonError, TooFewSites
from lepton_fl.privacy import Guarantee
from lepton_fl.report.sweep import NOT_CHOSEN, arms_of, verdict, write_sweep_report
from lepton_fl.report.wording import ARM, count, spent
from lepton_fl.results import (
    Interval,
    SecureRun,
    Sweep,
    SweepAxis,
    SweepPoint,
    SweepValue,
    read_results,
    read_sweep,
    shown,
    write_results,
)
from lepton_fl.simulation import check_plan
from lepton_fl.simulation.run import write_study
from lepton_fl.simulation.sweep import Processes, grid, locked, name_of, read_axes, with_results
from lepton_fl.study import Study

_RESIZED_BY = ("train.sample_rate", "sites", "split")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """A point that a simulation would accept."""

    name: str
    values: dict[str, SweepValue]
    request: Request
    study: Study
    """As it will be run."""
    labels: tuple[str, ...]


def run_sweep(
    request: Request,
    texts: Sequence[str],
    folder: Path,
    *,
    jobs: int | None,
    resume: bool,
    as_json: bool,
    open_report: bool,
) -> None:
    """Run the grid of `texts` in `folder` and show what came out; ends the program if not all completed.

    Raises:
        LeptonError: a value or a point is refused; nothing has been run, and nothing written.
    """
    axes = read_axes(texts)
    planned = _plan(request, axes)
    if (request.study.train.expected_batch is not None) and any(axis.key in _RESIZED_BY for axis in axes):
        say(
            f"train.expected_batch is {request.study.train.expected_batch:g} at every point, as study.toml "
            "says; left out there, it follows each point's sample rate and sites"
        )
    sweep = Sweep(
        status="running",
        labels=tuple(dict.fromkeys(label for point in planned for label in point.labels)),
        study_name=request.study.study.name,
        purpose=request.study.study.purpose,
        metric=planned[0].study.task.metric,
        axes=axes,
        points=tuple(
            SweepPoint(name=p.name, folder=f"points/{p.name}", values=p.values, study_id=p.study.id)
            for p in planned
        ),
        seeds=request.seeds,
        options=request.options(),
        command=this_command(),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=0.0,
    )
    if resume or folder.exists():
        sweep = _taken_up(sweep, folder)
    make_writable(folder)
    with locked(folder) as lock, sweep_display(sweep) as display:
        keeping = _Keeping(sweep, folder, display)
        todo = [point for point in sweep.points if point.status not in ("completed", "stopped")]
        commands = {p.name: _command(p, folder) for p in planned if p.name in {t.name for t in todo}}
        processes = Processes(folder=folder, jobs=jobs or _cores(), lock=lock, observer=keeping)
        processes.run(todo, commands)
        sweep = keeping.close(interrupted=processes.interrupted > 0)
    page = write_sweep_report(sweep, folder)
    if as_json:
        typer.echo(sweep.model_dump_json(indent=1))
    else:
        _summary(sweep, folder)
    if open_report:
        webbrowser.open(page.resolve().as_uri())
    _end(sweep, folder)


class _Keeping:
    """Keeps sweep.json as things go on, and tells the display."""

    def __init__(self, sweep: Sweep, folder: Path, display: SweepDisplay) -> None:
        self._sweep = sweep
        self._folder = folder
        self._display = display
        self._began = time.monotonic() - sweep.seconds
        self._write(sweep)

    def began(self, point: SweepPoint) -> None:
        self._replace(point)

    def ended(self, point: SweepPoint) -> None:
        self._replace(point)
        self._display.ended(point)

    def close(self, *, interrupted: bool) -> Sweep:
        whole = all(point.status == "completed" for point in self._sweep.points)
        status = "completed" if whole else "interrupted" if interrupted else "incomplete"
        self._write(self._sweep.model_copy(update={"status": status}))
        return self._sweep

    def _replace(self, point: SweepPoint) -> None:
        points = tuple(point if old.name == point.name else old for old in self._sweep.points)
        self._write(self._sweep.model_copy(update={"points": points}))
        self._display.show(self._sweep)

    def _write(self, sweep: Sweep) -> None:
        seconds = round(time.monotonic() - self._began, 2)
        self._sweep = sweep.model_copy(update={"seconds": seconds})
        write_results(self._sweep, self._folder / "sweep.json")


def _plan(request: Request, axes: Sequence[SweepAxis]) -> list[_Planned]:
    """All points, each as a simulation would take it.

    Raises:
        LeptonError: one of them it would refuse; or two would be the same, or not comparable.
    """
    tables: dict[object, dict[str, Table]] = {}
    planned: list[_Planned] = []
    for values in grid(axes):
        name = name_of(values)
        try:
            here = request.at(values)
            source = (Contract.of(here.study), here.how, here.sites)
            if source not in tables:
                tables[source] = here.tables()
            secagg: SecureRun | None = "functional" if here.study.secure_aggregation.enabled else None
            plan = replace(here, secagg=secagg).plan(tables[source], Path(os.devnull))
            study = check_plan(plan)
            labels = (*Guarantee.of(study).simulation_labels, *plan.labels)
        except LeptonError as error:
            raise type(error)(f"--sweep {name}: {error.message}", fix=error.fix) from None
        point = _Planned(name=name, values=values, request=here, study=study, labels=labels)
        for other in planned:
            if other.name == name or _same(other, point):
                raise ConfigError(f"--sweep: {other.name} and {name} are one point", fix="leave one out")
            if other.study.task.metric != study.task.metric:
                raise ConfigError(
                    "--sweep task.metric: points are compared by one metric", fix="leave it out"
                )
        planned.append(point)
    return planned


def _same(one: _Planned, other: _Planned) -> bool:
    here, there = one.request, other.request
    return (one.study.id, here.how, here.sites) == (other.study.id, there.how, there.sites)


def _taken_up(sweep: Sweep, folder: Path) -> Sweep:
    """The sweep with the points that an earlier start of it has run.

    Raises:
        ConfigError: the folder holds something else.
    """
    if (folder / "results.json").exists() or (folder / "checkpoint.safetensors").exists():
        raise ConfigError(f"{folder}: holds a run, not a sweep", fix="name another folder with --out")
    if not (folder / "sweep.json").exists():
        return sweep
    before = read_sweep(folder / "sweep.json")
    for what, found, wanted in (
        ("keys", _keys(before), _keys(sweep)),
        ("options", " ".join(before.options), " ".join(sweep.options)),
    ):
        if found != wanted:
            raise ConfigError(
                f"{folder}: holds another sweep: {what}: found {found!r}, asked for {wanted!r}",
                fix="the same command as before with --resume, or another folder with --out",
            )
    points = []
    for point in sweep.points:
        home = folder / point.folder
        if not (home / "results.json").exists():
            points.append(point)
            continue
        held = read_results(home / "results.json")
        if (held.study_id, held.seeds) != (point.study_id, sweep.seeds):
            raise ConfigError(
                f"{home}: holds a run of study {held.study_id[:16]} and seeds {held.seeds}, asked for "
                f"{point.study_id[:16]} and {sweep.seeds}",
                fix="the study.toml of before, or another folder with --out",
            )
        points.append(with_results(point, folder))
    return sweep.model_copy(update={"points": tuple(points), "seconds": before.seconds})


def _keys(sweep: Sweep) -> str:
    return ", ".join(axis.key for axis in sweep.axes)


def _command(planned: _Planned, folder: Path) -> list[str]:
    """The arguments of `lepton-fl` that run one point, from its own copy of the study."""
    home = make_writable(folder / "points" / planned.name)
    write_study(home / "study.toml", planned.study)
    request = planned.request
    words = ["simulate", str(home / "study.toml"), *request.options(), *request.cutting()]
    words += ["--baselines", str(request.baselines or folder / "baselines"), "--out", str(home)]
    if planned.study.secure_aggregation.enabled:
        words += ["--secagg", "functional"]
    if (home / "checkpoint.safetensors").exists():
        return [*words, "--resume"]
    # Interrupted before its first round: there is nothing to go on with.
    (home / "results.json").unlink(missing_ok=True)
    return words


def _summary(sweep: Sweep, folder: Path) -> None:
    arms = arms_of(sweep)
    keys = [axis.key for axis in sweep.axes]
    rows = [
        [
            *(shown(point.values[key]) for key in keys),
            *(_figure(point.arms.get(name)) for name in arms),
            "-" if point.gain is None or point.gain.mean is None else f"{point.gain.mean:+.3f}",
            "-" if point.epsilon is None else spent(point.epsilon),
            point.status,
        ]
        for point in sweep.points
    ]
    seeds = count(len(sweep.seeds), "seed")
    print_table(
        f"{sweep.study_name}: {sweep.metric.upper()} on held-out records, mean over the sites, {seeds}  "
        f"[{', '.join(sweep.labels)}]",
        [*keys, *(ARM[name] for name in arms), "gain", "epsilon", "status"],
        rows,
    )
    typer.echo(verdict(sweep))
    typer.echo(NOT_CHOSEN)
    typer.echo(f"report {folder / 'sweep.html'}   figures {folder / 'sweep.json'}")


def _figure(value: Interval | None) -> str:
    return "-" if value is None or value.mean is None else f"{value.mean:.3f}"


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end(sweep: Sweep, folder: Path) -> None:
    """Say which points did not complete, and end with the exit code that their simulation would have had."""
    missing = [point for point in sweep.points if point.status != "completed"]
    if not missing:
        return
    many = f"{len(missing)} of {len(sweep.points)} points did not complete"
    if sweep.status == "interrupted":
        fail(f"interrupted: {many}; what there is is in {folder}, go on with --resume", INTERRUPTED)
    first = missing[0]
    code = TooFewSites.exit_code if all(point.status == "stopped" for point in missing) else 1
    fail(f"{many}; {first.name}: {first.status}: {first.reason}", code)
