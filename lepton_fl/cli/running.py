"""Runs started from the command line: which tables, which folder, what is shown at the end."""

from __future__ import annotations

import logging
import re
import shlex
import sys
import webbrowser
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lepton_fl.cli.display import display_for
from lepton_fl.cli.terminal import INTERRUPTED, console, fail, print_table, say
from lepton_fl.data import Contract, Table, file_source, load_dataset, load_table, open_batches
from lepton_fl.errors import ConfigError, DataError, LeptonError
from lepton_fl.privacy import Guarantee
from lepton_fl.report import wording, write_report
from lepton_fl.results import ArmName, Engine, Interval, Results, SecureRun, SweepValue
from lepton_fl.study import NAME_PATTERN, Study

if TYPE_CHECKING:
    from lepton_fl.simulation import Plan

_ARMS: tuple[ArmName, ...] = ("local", "federated", "pooled")
_COLUMNS: dict[ArmName, str] = {
    "local": "own boosting",
    "linear": "own linear",
    "federated": "federated",
    "pooled": "pooled",
}
NATURAL = "natural"
"""The sites as they come, not cut."""
WIDE = 120
"""Columns of a terminal that a table with intervals needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What `simulate` was asked for, before a table is read."""

    study: Study
    data: Path | None
    dataset: str | None
    sites: int | None
    split: str | None
    compare: tuple[ArmName, ...]
    curve: tuple[float, ...]
    seeds: tuple[int, ...]
    drops: tuple[str, ...]
    baselines: Path | None
    public: Path | None = None
    policies: Path | None = None
    secagg: SecureRun | None = None
    engine: Engine = "vectorised"
    memory: int | None = None
    """MiB for the vectorised engine; None for its own default."""

    def __post_init__(self) -> None:
        if (self.data is None) == (self.dataset is None):
            raise typer.BadParameter("give exactly one of --data and --dataset")

    @property
    def how(self) -> str:
        """How the sites come to be."""
        return self.split or (NATURAL if self.sites is None else "iid")

    def at(self, values: Mapping[str, SweepValue]) -> Request:
        """The same at one point of a sweep.

        Raises:
            ConfigError: the study does not admit the values, or they are no split or number of sites.
        """
        from lepton_fl.simulation.sweep import SITES, SPLIT, study_at

        sites, split = values.get(SITES, self.sites), values.get(SPLIT, self.split)
        if SITES in values and (type(sites) is not int or sites < 1):
            raise ConfigError.at("command line", SITES, found=sites, allowed="whole numbers, at least 1")
        # The natural sites are as many as there are, whatever the other points of the sweep ask.
        number = None if (split == NATURAL and SPLIT in values) or sites is None else int(sites)
        how = None if split is None else str(split)
        return replace(self, study=study_at(self.study, values), sites=number, split=how)

    def tables(self) -> dict[str, Table]:
        """The sites' tables."""
        return read_tables(
            self.study,
            dataset_name=self.dataset,
            data=self.data,
            sites=self.sites,
            how=self.how,
            seed=self.seeds[0],
        )

    def plan(self, tables: Mapping[str, Table], out: Path, *, resume: bool = False) -> Plan:
        """What to simulate."""
        from lepton_fl.federation import PublicTable
        from lepton_fl.simulation import Drop, Plan

        return Plan(
            study=self.study,
            tables=tables,
            public=None if self.public is None else PublicTable(self.public, self.study),
            out=out,
            policies=self.policies,
            seeds=self.seeds,
            compare=self.compare,
            curve=self.curve,
            resume=resume,
            command=this_command(),
            cut=None if self.how == NATURAL else self.how,
            drops=tuple(Drop.parse(text) for text in self.drops),
            kept=self.baselines,
            secagg=self.secagg,
            engine=self.engine,
            **({} if self.memory is None else {"memory": self.memory << 20}),
        )

    def options(self) -> tuple[str, ...]:
        """All but the study, the folders and how the sites come to be, as `simulate` takes it."""
        source = ("--dataset", self.dataset) if self.data is None else ("--data", str(self.data))
        found = [*source, "--compare", ",".join(self.compare)]
        if self.curve:
            found += ["--curve", ",".join(f"{epsilon:g}" for epsilon in self.curve)]
        found += ["--seeds", str(len(self.seeds)), "--seed", str(self.seeds[0])]
        for drop in self.drops:
            found += ["--drop", drop]
        if self.public is not None:
            found += ["--public", str(self.public)]
        if self.engine != "vectorised":
            found += ["--engine", self.engine]
        if self.memory is not None:
            found += ["--memory", str(self.memory)]
        return tuple(str(word) for word in found)

    def cutting(self) -> tuple[str, ...]:
        """How the sites come to be, as `simulate` takes it."""
        return ("--split", self.how, *(() if self.sites is None else ("--sites", str(self.sites))))


def read_tables(
    study: Study,
    *,
    dataset_name: str | None,
    data: Path | None,
    sites: int | None,
    how: str,
    seed: int,
) -> dict[str, Table]:
    """The sites' tables: natural ones, or one table cut as `how` says."""
    contract = Contract.of(study)
    if data is not None:
        if not data.is_dir():
            raise ConfigError(f"{data}: not a folder", fix="--data FOLDER with one file for each site")
        found = sorted([*data.glob("*.csv"), *data.glob("*.parquet")])
        if not found:
            raise ConfigError(f"{data}: holds no CSV or Parquet file, one is expected for each site")
        for path in found:
            if not re.fullmatch(NAME_PATTERN, path.stem):
                raise DataError(
                    f"{path}: a site is called as its file, by letters, digits, '.', '_' and '-', at most 64",
                    fix="rename the file",
                )
        if len({path.stem for path in found}) < len(found):
            raise DataError(f"{data}: two files of one name: which of them is the site's?", fix="remove one")
        tables = {
            path.stem: load_table(contract, open_batches(file_source(path), contract), source=str(path))
            for path in found
        }
    else:
        tables = load_dataset(dataset_name or "", contract)
    if how == NATURAL:
        if sites is not None:
            raise typer.BadParameter("--split natural takes the sites as they are: leave --sites out")
        return tables
    if sites is None:
        raise typer.BadParameter(f"--split {how} needs --sites")
    from lepton_fl.simulation.run import arrange

    return arrange(tables, how, sites, seed)


def run_plan(plan: Plan, *, as_json: bool, open_report: bool) -> None:
    """Simulate, write the report, print the outcome; ends the program where the run did not complete."""
    from lepton_fl.cli.planning import promises
    from lepton_fl.simulation import simulate

    log = plan.out / "run.log"
    try:
        with logged_to(log):
            guarantee = Guarantee.of(plan.study)
            for sentence in promises(plan.study, len(plan.tables)):
                say(sentence)
            labels = ", ".join((*guarantee.simulation_labels, *plan.labels))
            with display_for(plan.study.task.metric, labels) as display:
                results = simulate(plan, display)
    except LeptonError:
        # Refused before anything was trained: there is no run to keep a folder for.
        if {path.name for path in plan.out.iterdir()} <= {log.name}:
            log.unlink(missing_ok=True)
            plan.out.rmdir()
        raise
    path = write_report(results, plan.out, "html")
    if as_json:
        typer.echo(results.model_dump_json(indent=1))
    else:
        _summary(results, plan.out)
    if open_report:
        webbrowser.open(path.resolve().as_uri())
    if results.status == "interrupted":
        fail(
            f"interrupted after {sum(1 for r in results.rounds if r.sites)} of {results.rounds_planned} "
            f"rounds; partial results are in {plan.out}",
            INTERRUPTED,
        )
    if results.status == "stopped":
        fail(f"too few sites stayed: {results.verdict} Partial results are in {plan.out}", 6)


def _summary(results: Results, folder: Path) -> None:
    by_name = {arm.arm: arm for arm in results.arms}
    # Intervals do not fit a narrow terminal; they are in the report in any case.
    brief = console().width < WIDE

    def figures(site: str | None) -> list[str]:
        """Each arm's figure at one site, or their mean."""
        found = []
        for name in _COLUMNS:
            arm = by_name.get(name)
            value = None if arm is None else arm.mean if site is None else arm.per_site.get(site)
            found.append("-" if arm is None else _figure(value, brief=brief))
        return found

    all_in = all(site.status == "took part" for site in results.sites)
    rows = []
    for site in results.sites:
        spent = (
            "-" if site.epsilon_spent is None else wording.spent_of(site.epsilon_spent, site.epsilon_allowed)
        )
        row = [site.site, str(site.train_units), *figures(site.site), spent]
        rows.append(row if all_in else [*row, site.status])
    rows.append(["mean", "", *figures(None), *([""] if all_in else ["", ""])])
    columns = ["site", "units", *_COLUMNS.values(), "epsilon spent"]
    intervals = "" if brief else ", 95 % intervals"
    print_table(
        f"{results.study_name}: {results.metric.upper()} on held-out records, "
        f"{wording.count(len(results.seeds), 'seed')}{intervals}  "
        f"[{', '.join(results.labels)}]",
        columns if all_in else [*columns, ""],
        rows,
        right=(1,),
    )
    if results.metric == "auprc":
        _recalls(results)
    typer.echo(results.verdict)
    typer.echo(f"{wording.guarantee(results.promise)}  [{', '.join(results.labels)}]")
    if results.model is not None:
        typer.echo(f"model sha256 {results.model.sha256}")
    typer.echo(f"report {folder / 'report.html'}   results {folder / 'results.json'}")


def _recalls(results: Results) -> None:
    """What a fraud desk asks first: how much is found at the false alarms that it can bear."""
    brief = console().width < WIDE
    found = {arm.arm: {r.fpr: r.mean for r in arm.recall} for arm in results.arms if arm.recall}
    rows = [
        [f"{100 * fpr:g} % FPR", *(_figure(recall.get(fpr), brief=brief) for recall in found.values())]
        for fpr in sorted({fpr for recall in found.values() for fpr in recall})
    ]
    if rows:
        print_table("Recall, mean of the sites", ["at", *(_COLUMNS[arm] for arm in found)], rows)


def _figure(value: Interval | None, *, brief: bool) -> str:
    if value is None or value.mean is None:
        return "not defined"
    if brief or value.low is None or value.high is None:
        return f"{value.mean:.3f}"
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def arms(text: str) -> tuple[ArmName, ...]:
    """`local,federated` as arms, in the order of a table.

    Raises:
        ConfigError: federated is not among them, or another is unknown.
    """
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    if "federated" not in wanted or not set(wanted) <= set(_ARMS):
        allowed = "federated, and any of local and pooled"
        raise ConfigError.at("command line", "--compare", found=text, allowed=allowed)
    return tuple(name for name in _ARMS if name in wanted)


def run_folder(out: Path | None, name: str, *, resume: bool) -> Path:
    if out is None:
        if resume:
            raise ConfigError("--resume needs the run to go on with", fix="--out RUN --resume")
        return next_run(Path("runs"), f"{name}-")
    if (out / "checkpoint.safetensors").exists() and not (out / "results.json").exists() and not resume:
        raise ConfigError(
            f"{out}: holds a run that was cut off", fix="go on with --resume, or name another folder"
        )
    if any((out / name).exists() for name in ("results.json", "sweep.json")) and not resume:
        raise ConfigError(
            f"{out}: holds a run already, and is not overwritten",
            fix="name another folder with --out, or go on with --resume",
        )
    return out


def next_run(parent: Path, prefix: str = "") -> Path:
    number = 1
    while (parent / f"{prefix}{number}").exists():
        number += 1
    return parent / f"{prefix}{number}"


def this_command() -> str:
    return shlex.join(["lepton-fl", *sys.argv[1:]])


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """The library's log goes to the run's folder: the terminal shows what a person must know."""
    logger = logging.getLogger("lepton_fl")
    level, propagate = logger.level, logger.propagate
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        # A handler left behind would open its file anew at the next line, in a folder that may be gone.
        logger.removeHandler(handler)
        handler.close()
        logger.setLevel(level)
        logger.propagate = propagate
