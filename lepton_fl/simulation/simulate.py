"""`lepton-fl simulate`: a run that is charged, rehearsals on other seeds, and what it is compared with."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

import lepton_fl
from lepton_fl.data import Table
from lepton_fl.errors import ConfigError, DataError, LeptonError, PolicyRefused, TooFewSites
from lepton_fl.federation import PublicTable, stopping_of
from lepton_fl.federation.loop import RoundReport
from lepton_fl.privacy import epsilon as composed_epsilon
from lepton_fl.results import (
    Arm,
    ArmName,
    CurvePoint,
    Engine,
    Interval,
    ModelFile,
    OwnArm,
    Promise,
    Results,
    RoundSummary,
    SecureRun,
    SecureSums,
    SiteSummary,
    read_results,
    write_results,
)
from lepton_fl.secure_rounds import check_protectable, exposures, noise_factor, what_hides, what_leaves
from lepton_fl.simulation.baselines import (
    OWN_LABEL,
    POOLED_LABEL,
    own_scores,
    own_training_scores,
    pooled_scores,
    pooled_training_scores,
)
from lepton_fl.simulation.grid import Drop
from lepton_fl.simulation.judge import first_seed, recalls
from lepton_fl.simulation.kept import kept_scores
from lepton_fl.simulation.run import (
    Run,
    Scorer,
    Splits,
    check_drops,
    mean_metric,
    prepare,
    split_sites,
    write_study,
)
from lepton_fl.study import OperatingPoint, Study, check_delta, override
from lepton_fl.tasks import Arrays
from lepton_fl.tasks.arrays import size_of
from lepton_fl.tasks.metrics import RESAMPLES, Bootstrap, Scored, evaluate
from lepton_fl.tasks.model_file import write_model
from lepton_fl.tasks.operating import DEFAULT_FPR
from lepton_fl.training.stacked import MEMORY

log = logging.getLogger(__name__)

CURVE_SEEDS = 3
"""Seeds, at most, for each point of the utility curve: its shape is what is read, not its last digit."""
MASKED_PAIRS = 30_000
"""Pairs of sites, over all rounds, up to which a charged run has the protocol in full: at 2 ms or 3 for each
(simulations/benchmarks/secure_rounds.md) about a minute at most."""
FUNCTIONAL = "no masks: the simulator formed the sums"
"""Label of every result with sums of secure aggregation that its protocol did not form."""
LOOKS = 25
"""How often, at most, a run's progress is measured on held-out records."""


class Display(Protocol):
    """Is told how a simulation goes on; the command line draws it."""

    def stage(self, title: str, total: int) -> None:
        """A part of the work begins, of so many steps."""

    def advance(self) -> None:
        """One step of the current stage is done."""

    def joined(self, cohort: tuple[str, ...], refused: Mapping[str, str]) -> None:
        """The cohort of the charged run stands."""

    def round(self, summary: RoundSummary, planned: int, allowed: float | None) -> None:
        """A round of the charged run is done; `allowed` is the study's epsilon."""


class Silent:
    """Shows nothing."""

    def stage(self, title: str, total: int) -> None: ...
    def advance(self) -> None: ...
    def joined(self, cohort: tuple[str, ...], refused: Mapping[str, str]) -> None: ...
    def round(self, summary: RoundSummary, planned: int, allowed: float | None) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to simulate, and where it goes."""

    study: Study
    tables: Mapping[str, Table]
    """Site to table, all under the study's contract."""
    out: Path
    policies: Path | None = None
    """Folder of SITE/{policy.toml, ledger.db}; in `out` by default."""
    seeds: tuple[int, ...] = (0,)
    """The first is the charged run's; the others are rehearsals."""
    compare: tuple[ArmName, ...] = ("local", "federated", "pooled")
    curve: tuple[float, ...] = ()
    """Epsilons at which to rehearse, for the utility curve."""
    resume: bool = False
    public: PublicTable | None = None
    """What the study's early stopping looks at; never a site's records."""
    command: str = ""
    bootstrap: int = RESAMPLES
    cut: str | None = None
    """How one table was cut into these sites (`iid`); None where each is an institution's own."""
    drops: tuple[Drop, ...] = ()
    """Suffered by the charged run and by the rehearsals alike."""
    kept: Path | None = None
    """Folder where the baselines' scores are kept for other runs on the same records."""
    secagg: SecureRun | None = None
    """How the charged run forms its sums; by default in full up to `MASKED_PAIRS`. Rehearsals: functional."""
    engine: Engine = "vectorised"
    """How the sites are trained, in the charged run and in the rehearsals."""
    memory: int = MEMORY
    """Bytes that the vectorised engine may use."""

    @property
    def sums(self) -> SecureRun | None:
        """How the charged run's sums are formed; None where the study has no secure aggregation."""
        if not self.study.secure_aggregation.enabled:
            return None
        pairs = math.comb(len(self.tables), 2) * self.study.train.rounds
        return self.secagg or ("full" if pairs <= MASKED_PAIRS else "functional")

    @property
    def labels(self) -> tuple[str, ...]:
        """What a reader must know of the sums and the sites before any figure."""
        found = []
        if self.sums == "functional":
            found.append(FUNCTIONAL)
        elif self.sums == "full":
            rehearsed = len(self.seeds) > 1 or self.curve
            suite = self.study.secure_aggregation.suite
            found.append(f"secure aggregation ({suite}) ran{', but for rehearsals' if rehearsed else ''}")
        if self.cut is not None:
            found.append(f"artificial sites: one table cut {len(self.tables)} ways ({self.cut})")
        if self.drops:
            found.append(f"simulated drops: {', '.join(map(str, self.drops))}")
        return tuple(found)


def freeze(study: Study, tables: Mapping[str, Table]) -> Study:
    """The study with its expected batch filled in from the simulated sites, where it declares none."""
    if study.train.expected_batch is not None:
        return study
    units = float(np.mean([table.units for table in tables.values()]))
    if study.evaluation.split == "unit":
        units *= 1 - study.evaluation.test_fraction
    batch = study.train.sample_rate * units
    return override(study, {"train.expected_batch": float(f"{batch:.3g}")})


def check(study: Study, splits: Splits, public: PublicTable | None = None) -> None:
    """Refuse a study that these sites are too few or too small for, or that lacks its public table.

    Raises:
        TooFewSites: fewer sites than the study's smallest cohort.
        ConfigError: delta is not below one over the units of the smallest site, `public` is not what the
            study's early stopping asks, or a cohort cannot be protected against the study's colluders.
    """
    stopping_of(study, public)
    check_protectable(study)
    least = study.needed(len(splits))
    if len(splits) < least:
        raise TooFewSites(
            f"study {study.study.name}: {len(splits)} sites, secure_aggregation.min_sites asks {least}",
            fix="give more sites, or lower secure_aggregation.min_sites in study.toml",
        )
    if not any(train.positives or test.positives for train, test in splits.values()):
        raise DataError(
            f"no record at any site has {study.task.target} = {study.task.positive!r}, the study's positive",
            fix="set task.positive in study.toml to the value that counts as positive",
        )
    smallest = min(splits, key=lambda name: splits[name][0].units)
    check_delta(study, splits[smallest][0].units, smallest)


def check_plan(plan: Plan) -> Study:
    """The study as `simulate` would run it, or the refusal it would meet. Nothing is trained or written.

    The sites' policies and budgets are not asked.

    Raises:
        TooFewSites, ConfigError, DataError: as `simulate`.
    """
    study = freeze(plan.study, plan.tables)
    splits = split_sites(plan.tables, study, plan.seeds[0])
    _check_all(plan, study, splits)
    prepare(study, splits, plan.seeds[0], engine=plan.engine, memory=plan.memory).close()
    return study


def _check_all(plan: Plan, study: Study, splits: Splits) -> None:
    check(study, splits, plan.public)
    check_drops(plan.drops, study, splits)
    if plan.secagg is not None and plan.sums is None:
        raise ConfigError.at(
            "command line", "--secagg", found=plan.secagg, allowed="a study with secure_aggregation.enabled"
        )
    for name, table in plan.tables.items():
        if plan.public is not None and plan.public.fingerprint == table.fingerprint:
            raise DataError(f"site {name}: its table is the public one: no run may stop on what judges it")


def simulate(plan: Plan, display: Display | None = None) -> Results:
    """Run `plan`, write OUT/{study.toml, results.json, model.safetensors, checkpoint}, return the results.

    The first seed's run is charged to the sites' ledgers like a real one. All other seeds, the curve and
    the baselines are rehearsals: their ledgers forget, and their models are kept by nobody. On records
    that are not the reader's own to look at, each would have cost as much as the first.

    An interrupt ends the work early and is no error: what there is so far is written and says so.

    Raises:
        PolicyRefused, BudgetExhausted: the sites' policies or budgets do not allow the run.
        TooFewSites: too few sites take part or stay.
        ConfigError: the study does not fit the sites, or `out` holds another run.
    """
    # Sums in the same order everywhere, and small matrices are slower on two threads than on one.
    torch.set_num_threads(1)
    return _Simulation(plan, display or Silent()).run()


@dataclass
class _Simulation:
    plan: Plan
    display: Display
    rounds: list[RoundSummary] = field(default_factory=list)
    scored: dict[ArmName, list[dict[str, Scored]]] = field(default_factory=dict)
    """Held-out records of every seed so far."""
    trained: dict[ArmName, dict[str, Scored]] = field(default_factory=dict)
    """Training records of the first seed: what a site sets its threshold and its calibration on."""
    pooled_kind: OwnArm = "local"
    """Of the model on all records in one place."""
    curve: list[CurvePoint] = field(default_factory=list)
    status: Literal["completed", "interrupted", "stopped"] = "completed"
    labels: tuple[str, ...] = ()
    """Of the part of the run before this one: its rounds are in the results too."""

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.started = datetime.now(UTC)
        self.study = freeze(self.plan.study, self.plan.tables)
        self.seed = self.plan.seeds[0]
        self.splits = split_sites(self.plan.tables, self.study, self.seed)
        _check_all(self.plan, self.study, self.splits)
        width = next(iter(self.splits.values()))[0].x_NF.shape[1]
        self.scorer = Scorer(self.study, width)
        out = self.plan.out
        if self.plan.resume:
            if not (out / "checkpoint.safetensors").exists():
                raise ConfigError(f"{out}: holds no checkpoint to resume from", fix="leave --resume out")
            if (out / "results.json").exists():
                before = read_results(out / "results.json")
                if before.status == "completed":
                    raise ConfigError(f"{out}: holds a completed run", fix="name another folder with --out")
                self.rounds += before.rounds
                self.labels = before.labels
        self.main = prepare(
            self.study,
            self.splits,
            self.seed,
            folder=self.plan.policies or out / "sites",
            make_policies=self.plan.policies is None,
            checkpoint=out / "checkpoint.safetensors",
            resume=self.plan.resume,
            observer=self,
            public=self.plan.public,
            drops=self.plan.drops,
            masked=self.plan.sums == "full",
            engine=self.plan.engine,
            memory=self.plan.memory,
        )

    def run(self) -> Results:
        out = self.plan.out
        try:
            try:
                self._charged_run()
                self._rehearse()
            except KeyboardInterrupt:
                self.status = "interrupted"
            results = self._results()
        finally:
            self.main.close()
        out.mkdir(parents=True, exist_ok=True)
        write_results(results, out / "results.json")
        return results

    def _charged_run(self) -> None:
        federation = self.main.federation
        self.display.stage("training", self.study.train.rounds - federation.done)
        try:
            self.main.start()
        except PolicyRefused:
            # The server hears the public part only; here the sites' own reasons can be shown.
            raise _first_refusal(self.main) from None
        except TooFewSites as error:
            if federation.done == 0:
                raise _with_own_words(error, self.main) from None
            self.status = "stopped"
        self.scored["federated"] = [self.scorer(federation.model, self.splits)]

    def _rehearse(self) -> None:
        if self.status != "completed":
            return
        plan = self.plan
        baselines = [arm for arm in plan.compare if arm != "federated"]
        if not baselines and len(plan.seeds) == 1 and not plan.curve:
            return
        kinds = self._curve_kinds()
        again, curve_seeds = len(plan.seeds) - 1, plan.seeds[:CURVE_SEEDS]
        self.display.stage(
            "comparing",
            again + len(baselines) * (len(plan.seeds) + 1) + len(plan.curve) * len(kinds) * len(curve_seeds),
        )
        splits = {seed: split_sites(plan.tables, self.study, seed) for seed in plan.seeds}
        for seed in plan.seeds[1:]:
            try:
                self.scored["federated"].append(self._rehearsal(self.study, splits[seed], seed))
            except TooFewSites as error:
                # The charged run came through: resumed without the sites that a rehearsal loses again.
                log.warning("no rehearsal of seed %d and after: %s", seed, error)
                break
            self.display.advance()
        if "pooled" in baselines:
            found = pooled_training_scores(self.splits, self.seed, self.study.task.metric)
            self.pooled_kind, self.trained["pooled"] = found
            self.display.advance()
        for seed in plan.seeds:
            if "local" in baselines:
                for kind in OWN_LABEL:
                    self._baseline(kind, seed, splits[seed], partial(own_scores, splits[seed], seed, kind))
                self.display.advance()
            if "pooled" in baselines:
                compute = partial(pooled_scores, splits[seed], seed, self.pooled_kind)
                self._baseline("pooled", seed, splits[seed], compute, self.pooled_kind)
                self.display.advance()
        if "local" in baselines:
            for kind in OWN_LABEL:
                self.trained[kind] = own_training_scores(self.splits, self.seed, kind)
            self.display.advance()
        for epsilon in plan.curve:
            for noise in kinds:
                scored, variant = [], self._variant(epsilon, noise)
                try:
                    for seed in curve_seeds:
                        scored.append(self._rehearsal(variant, splits[seed], seed))
                        self.display.advance()
                except TooFewSites as error:
                    # Shared noise needs sites that local noise can do without.
                    log.warning("no point at epsilon %g, %s noise: %s", epsilon, noise, error)
                    continue
                _, mean, _ = self._bootstrap({"federated": scored}).judge("federated")
                self.curve.append(CurvePoint(epsilon=epsilon, noise=noise, mean=mean, seeds=len(scored)))

    def _baseline(
        self,
        arm: ArmName,
        seed: int,
        splits: Splits,
        compute: Callable[[], dict[str, Scored]],
        kind: OwnArm | None = None,
    ) -> None:
        found = kept_scores(self.plan.kept, f"{arm}-{kind}" if kind else arm, splits, seed, compute)
        self.scored.setdefault(arm, []).append(found)

    def _curve_kinds(self) -> list[Literal["local", "shared"]]:
        # Shares of noise add up only within one step.
        if self.study.train.strategy != "lockstep":
            return ["local"]
        try:
            check_protectable(override(self.study, {"secure_aggregation.enabled": True}))
        except ConfigError as error:
            log.warning("no points with shared noise: %s", error)
            return ["local"]
        return ["local", "shared"]

    def _variant(self, epsilon: float, noise: Literal["local", "shared"]) -> Study:
        changes: dict[str, object] = {"privacy.epsilon": epsilon, "privacy.noise": noise}
        if noise == "shared":
            changes["secure_aggregation.enabled"] = True
        # The model stays the one that is judged, also where `auto` would choose another.
        return override(self.study, {**changes, "model.name": self.study.model_name})

    def _rehearsal(self, study: Study, splits: Splits, seed: int) -> dict[str, Scored]:
        if study.id == self.study.id and seed == self.seed:
            return self.scored["federated"][0]
        plan = self.plan
        run = prepare(
            study,
            splits,
            seed,
            drops=plan.drops,
            public=plan.public,
            engine=plan.engine,
            memory=plan.memory,
        )
        try:
            run.start()
            return self.scorer(run.federation.model, splits)
        finally:
            run.close()

    # Observer of the charged run.

    def joined(self, cohort: tuple[str, ...], refused: Mapping[str, str]) -> None:
        # Not before: a run that every site refuses leaves nothing behind.
        self.plan.out.mkdir(parents=True, exist_ok=True)
        write_study(self.plan.out / "study.toml", self.study)
        self.display.joined(cohort, refused)

    def round_done(self, report: RoundReport, model: Arrays) -> None:
        planned, federation = self.study.train.rounds, self.main.federation
        stride = max(1, planned // LOOKS)
        last = federation.done == planned or federation.stopped_early
        look = report.number % stride == 0 or last
        metric = epsilon = None
        # A round that was lost has no model of its own to look at.
        if look and report.sites:
            scored = self.scorer(model, self.splits)
            metric = mean_metric([evaluate(self.study.task.metric, *s) for s in scored.values()])
            epsilon = self.main.guarantee.epsilon_after(report.number)
        summary = RoundSummary(
            round=report.number,
            sites=report.sites,
            dropped=dict(report.dropped),
            seconds=report.seconds,
            epsilon=epsilon,
            metric=metric,
        )
        self.rounds.append(summary)
        self.display.round(summary, planned, self.study.privacy.epsilon)
        if report.sites:
            self.display.advance()

    # Results.

    def _results(self) -> Results:
        study, federation = self.study, self.main.federation
        if "federated" not in self.scored and federation.done > 0:
            self.scored["federated"] = [self.scorer(federation.model, self.splits)]
        if "federated" in self.scored:
            # As it is: with noise it knows them hardly better than other records.
            own = {name: (train, train) for name, (train, _) in self.splits.items()}
            self.trained["federated"] = self.scorer(federation.model, own)
        bootstrap = self._bootstrap(self.scored)
        point = study.task.operating_point or OperatingPoint(fpr=DEFAULT_FPR[study.task.metric])
        arms = self._arms(bootstrap, point)
        best, gains, difference = self._gains(arms, bootstrap)
        return Results(
            status=self.status,
            verdict=self._verdict(arms, gains, difference),
            labels=self._labels(),
            study_id=study.id,
            study_name=study.study.name,
            purpose=study.study.purpose,
            run_id=federation.run_id,
            metric=study.task.metric,
            operating_point=point,
            operating_point_agreed=study.task.operating_point is not None,
            strategy=study.train.strategy,
            engine=self.main.engine,
            model=self._model_file() if federation.done else None,
            promise=self._promise(),
            secure_aggregation=self._secure_sums(),
            rounds_planned=study.train.rounds,
            stopped_early=federation.stopped_early or None,
            rounds=tuple(self.rounds),
            sites=tuple(self._site(name, best.get(name), gains.get(name)) for name in sorted(self.splits)),
            arms=arms,
            pooled=federation.pooled,
            gain=difference,
            curve=tuple(self.curve),
            seeds=self.plan.seeds,
            bootstrap=bootstrap.resamples,
            command=self.plan.command,
            data_sha256=_data_sha256(self.plan.tables),
            versions=_versions(),
            hardware=f"{platform.machine()}, {os.cpu_count()} CPU cores, {platform.system()}",
            started=self.started.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - self.began, 2),
        )

    def _bootstrap(self, arms: Mapping[ArmName, list[dict[str, Scored]]]) -> Bootstrap[ArmName]:
        return Bootstrap(
            self.study.task.metric,
            arms,
            seed=self.seed,
            resamples=self.plan.bootstrap,
            same_records=self.study.evaluation.split == "time",
        )

    def _arms(self, bootstrap: Bootstrap[ArmName], point: OperatingPoint) -> tuple[Arm, ...]:
        noise = self.main.guarantee.sentence()
        about: dict[ArmName, tuple[str, str]] = {
            "local": (OWN_LABEL["local"], "records never leave the site; the model is not private"),
            "linear": (OWN_LABEL["linear"], "records never leave the site; the model is not private"),
            "federated": (f"federated {self.study.model_name}", noise),
            "pooled": (
                POOLED_LABEL[self.pooled_kind],
                "none: every site's records are shown to whoever pools them",
            ),
        }
        arms = []
        for name, (label, privacy) in about.items():
            wanted = "local" if name == "linear" else name
            if wanted in self.plan.compare and self.scored.get(name):
                per_site, mean, all_records = bootstrap.judge(name)
                arms.append(
                    Arm(
                        arm=name,
                        label=label,
                        privacy=privacy,
                        per_site=per_site,
                        mean=mean,
                        seeds=len(self.scored[name]),
                        all_records=all_records,
                        recall=recalls(bootstrap, name),
                        first_seed=first_seed(
                            self.seed, self.scored[name][0], self.trained.get(name, {}), point
                        ),
                    )
                )
        return tuple(arms)

    def _gains(
        self, arms: tuple[Arm, ...], bootstrap: Bootstrap[ArmName]
    ) -> tuple[dict[str, OwnArm], dict[str, Interval], Interval | None]:
        """Each site's better own model, and federated minus it: by site, and their mean."""
        if not all(self.scored.get(name) for name in ("federated", "local", "linear")):
            return {}, {}, None
        by_name = {arm.arm: arm.per_site for arm in arms}
        best: dict[str, OwnArm] = {
            site: "linear" if _below(by_name["local"][site].mean, by_name["linear"][site].mean) else "local"
            for site in self.splits
        }
        per_site, mean = bootstrap.gain("federated", best)
        return best, per_site, mean

    def _verdict(self, arms: tuple[Arm, ...], gains: dict[str, Interval], difference: Interval | None) -> str:
        done, planned = self.main.federation.done, self.study.train.rounds
        if done == 0:
            return "No round was completed: there is no model."
        why = self.main.federation.stopped_early
        early = f"Stopped early at round {done} of {planned}: {why}. "
        start = early if why else "" if done == planned else f"Stopped after {done} of {planned} rounds. "
        by_name = {arm.arm: arm.mean for arm in arms}
        name = self.study.task.metric.upper()
        ours = by_name.get("federated")
        if ours is None or ours.mean is None:
            return start + f"{name} is not defined: no site has both classes among its held-out records."
        if difference is None or difference.mean is None:
            return start + f"Federated {name} {ours.mean:.3f} on held-out records."
        low, high = difference.low or 0.0, difference.high or 0.0
        sure = {1: "better", -1: "worse"}.get(difference.side or 0, "not clearly different")
        parts = [
            (
                f"{start}Federated {name} {ours.mean:.3f}; own gradient boosting "
                f"{by_name['local'].mean or float('nan'):.3f}, own logistic regression "
                f"{by_name['linear'].mean or float('nan'):.3f}."
            ),
            (
                f"Against the better of the two at each site: {sure}, {difference.mean:+.3f} "
                f"[{low:+.3f}, {high:+.3f}]."
            ),
        ]
        for said, sites in _by_advice(gains).items():
            if sites:
                parts.append(f"{said}: {', '.join(sites)}.")
        return " ".join(parts)

    def _labels(self) -> tuple[str, ...]:
        labels = (*self.main.guarantee.simulation_labels, *self.plan.labels)
        labels = tuple(dict.fromkeys((*labels, *self.labels)))
        curve_only = self.plan.sums is None and any(point.noise == "shared" for point in self.curve)
        return (*labels, f"{FUNCTIONAL} (shared-noise curve)") if curve_only else labels

    def _promise(self) -> Promise:
        study, guarantee = self.study, self.main.guarantee
        event, numbers = guarantee.event, size_of(self.main.federation.model)
        return Promise(
            epsilon=study.privacy.epsilon,
            delta=study.privacy.delta,
            unit=guarantee.unit,
            unit_said=guarantee.unit_said,
            holds_against=guarantee.holds_against,
            noise=study.privacy.noise,
            clip=study.privacy.clip,
            noise_multiplier=None if event is None else event.noise_multiplier,
            sample_rate=study.train.sample_rate,
            steps=study.charged_steps,
            leaves=what_leaves(study, numbers, len(self.splits)),
            epsilon_against={
                seen.against: seen.epsilon
                for seen in exposures(guarantee, coordinates=numbers, sites=len(self.splits))
            },
        )

    def _secure_sums(self) -> SecureSums | None:
        if self.plan.sums is None:
            return None
        return SecureSums(
            ran=self.plan.sums,
            suite=self.study.secure_aggregation.suite,
            hides=what_hides(self.study, len(self.splits)),
            noise_factor=noise_factor(self.study, len(self.splits)),
        )

    def _model_file(self) -> ModelFile:
        arrays = self.main.federation.model
        digest = write_model(self.plan.out / "model.safetensors", self.study, arrays, self._labels())
        return ModelFile(
            name=self.study.model_name,
            file="model.safetensors",
            parameters=size_of(arrays),
            sha256=digest,
        )

    def _site(self, name: str, best: OwnArm | None, gained: Interval | None) -> SiteSummary:
        train, test = self.splits[name]
        site, federation = self.main.sites[name], self.main.federation
        budget, delta = site.budget, self.study.privacy.delta
        run_events = site.ledger.events(budget.data_set, run=federation.run_id)
        return SiteSummary(
            site=name,
            train_units=train.units,
            train_positives=train.positives,
            test_records=len(test),
            test_positives=test.positives,
            epsilon_run=None if delta is None else composed_epsilon(run_events, delta),
            epsilon_spent=site.ledger.spent(budget.data_set, budget.delta_total),
            epsilon_allowed=budget.epsilon_total,
            delta_total=budget.delta_total,
            data_set=budget.data_set,
            released_exact=site.ledger.released(budget.data_set, run=federation.run_id),
            own_best=best,
            gain=gained,
            status=federation.refused.get(name, "took part"),
        )


def _by_advice(gains: dict[str, Interval]) -> dict[str, list[str]]:
    """The sites by what the paired interval of their gain says."""
    words = {1: "Gains", 0: "No clear difference", -1: "Keep your own model"}
    return {
        said: [site for site, value in gains.items() if value.side == side] for side, said in words.items()
    }


def _below(ours: float | None, theirs: float | None) -> bool:
    return ours is not None and theirs is not None and ours < theirs


def _first_refusal(run: Run) -> LeptonError:
    """The refusing sites' own words: the first in full, and how many more refused."""
    refusing = [site for site in run.sites.values() if site.refusals]
    first = refusing[0].refusals[0]
    more = f" (and {len(refusing) - 1} more sites)" if len(refusing) > 1 else ""
    # Not made anew: errors of the protocol have a phase and a culprit too.
    first.message = f"site {refusing[0].name}: {first.message}{more}"
    return first


def _with_own_words(error: TooFewSites, run: Run) -> TooFewSites:
    """The same with what the first refusing site says itself, if one refused: it may be the model's fault."""
    if not any(site.refusals for site in run.sites.values()):
        return error
    first = _first_refusal(run)
    return TooFewSites(f"{error.message}; {first.message}", fix=first.fix or error.fix)


def _data_sha256(tables: Mapping[str, Table]) -> str:
    digest = hashlib.sha256(b"lepton-fl/tables/1\n")
    for name in sorted(tables):
        digest.update(f"{name} {tables[name].fingerprint}\n".encode())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {"lepton_fl": lepton_fl.__version__, "python": sys.version.split()[0]}
    for package in ("flwr", "opacus", "torch", "scikit-learn", "dp-accounting", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
