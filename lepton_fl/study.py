"""The study: everything the federation agreed on, frozen, and the digest that names it.

Two files that say the same have the same canonical bytes: keys in another order, comments, `3` for `3.0`,
a default spelt out. The SHA-256 of those bytes is the study id,
which every message of a run carries and every agent pins.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from datetime import UTC, date, datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lepton_fl.config import Array, Strict, load, parse
from lepton_fl.errors import ConfigError, VerificationFailed

CANONICAL_PREFIX = b"lepton-fl/study/1\n"
"""Domain separation: the digest of a study can be the digest of nothing else."""

LOGREG_BELOW_UNITS = 10_000
"""Below this many units in the smallest cohort `auto` chooses nothing but logistic regression."""

MAX_STEPS = 1_000_000
"""Steps of DP-SGD in one study, all rounds together."""

EXACT_BINS = 4096
"""Bins of a histogram of scores without noise: so many that what is computed from it is close."""
NOISY_BINS = {"auc": 16, "auprc": 32}
"""Few, since each has noise of its own; what came closest over simulated scores of 300 to 200,000 records."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Delta = Annotated[float, Field(ge=1e-10, lt=1)]
"""Of differential privacy; from what accounting can resolve."""
Scalar = str | int | bool


class About(Strict):
    """What the study is called and for."""

    name: Name
    purpose: str = ""
    """Free text, shown to the privacy officer before approval."""


class OperatingPoint(Strict):
    """Where on the ROC curve the model is meant to be used: one of three forms."""

    fpr: Fraction | None = None
    """False positive rate that the desk can bear."""
    alerts_per_day: Annotated[int, Field(gt=0)] | None = None
    """Not evaluated: no study says how many records a day has."""
    cost_fn: Positive | None = None
    """Cost of one missed positive; needs `cost_fp`."""
    cost_fp: Positive | None = None

    @model_validator(mode="after")
    def _one_form(self) -> OperatingPoint:
        if (self.cost_fn is None) != (self.cost_fp is None):
            raise ValueError("cost_fn and cost_fp go together")
        forms = [self.fpr, self.alerts_per_day, self.cost_fn]
        if sum(f is not None for f in forms) != 1:
            raise ValueError("give exactly one of fpr, alerts_per_day, cost_fn with cost_fp")
        return self


class Task(Strict):
    """One prediction problem."""

    kind: Name
    """`binary`, or a plug-in's; see `lepton_fl.tasks`."""
    target: str
    """Name of the label's column."""
    positive: Scalar = 1
    """The label's value that counts as positive; every other value is negative."""
    metric: Literal["auc", "auprc"] = "auc"
    operating_point: OperatingPoint | None = None
    prevalence: Fraction | None = None
    """Share of positives declared in public (a statistic of the field, never counted at the sites).

    The model's output bias starts at its log odds; without it the bias starts at zero.
    """


class Privacy(Strict):
    """What the owner of one unit's records is promised. Every field changes it.

    Neighbouring relation: add or remove one unit. A unit is all records of one person *at one site*; with
    `max_sites_per_unit` = m, the units of one person at up to m sites.
    """

    unit: str = "record"
    """`record`, or the column that names whose record it is; refused where a site lacks it."""
    epsilon: Annotated[float, Field(gt=0, le=100)] | None = None
    delta: Delta | None = None
    """Refused where delta >= 1 / units of the smallest site, and below what accounting can resolve."""
    clip: Annotated[float, Field(ge=1e-4, le=1e4)] = 1.0
    """L2 bound on one unit's gradient. Bounded, so that noise and sum are of numbers float32 holds."""
    max_records_per_unit: Annotated[int, Field(ge=1)] | None = None
    """Of a unit with more records at a site that many count in a step, drawn anew for each; None: all."""
    unit_gradient: Literal["sum", "mean"] = "sum"
    """What a unit's records that count make its gradient, before the clip."""
    max_sites_per_unit: Annotated[int, Field(ge=1, le=100)] = 1
    """Sites at which one person may have a unit: epsilon and delta are promised for all of these together."""
    noise: Literal["local", "shared", "none"] = "local"
    """local: each site adds all of it. shared: each adds a part, under secure aggregation.
    none: no privacy at all; sites refuse it unless their policy says otherwise."""

    @model_validator(mode="after")
    def _promise_is_whole(self) -> Privacy:
        if self.noise != "none" and (self.epsilon is None or self.delta is None):
            raise ValueError(f"noise = {self.noise!r} needs both epsilon and delta")
        if self.noise == "none" and (self.epsilon is not None or self.delta is not None):
            raise ValueError("noise = 'none' promises nothing: leave epsilon and delta out")
        return self

    @model_validator(mode="after")
    def _records_are_of_units(self) -> Privacy:
        if self.unit == "record" and (self.max_records_per_unit is not None or self.unit_gradient != "sum"):
            raise ValueError(
                "max_records_per_unit and unit_gradient are of units with many records: unit = 'record' has "
                "one; name a column, or leave them out"
            )
        return self


class SecureAggregation(Strict):
    """How many sites hide one another. The threshold is computed, never configured."""

    enabled: bool = True
    min_sites: Annotated[int, Field(ge=1)] = 3
    colluders: Annotated[int, Field(ge=0)] = 1
    """Members assumed to collude with the server."""
    min_survivors: Literal["all"] | Annotated[int, Field(ge=1)] = "all"
    """Sites that must still be there at the end of a round; of each group, where there are groups."""
    suite: Literal["LSA1", "LSA1-PQ"] = "LSA1"
    """LSA1-PQ: masks also hold against a later quantum computer; some 2.5 kB more for each pair of sites."""
    sessions: bool = True
    """Whether rounds resume the keys of a round before; false: fresh keys in each, at several times the cost.

    Rounds in groups, which are drawn anew, have fresh keys in any case.
    """
    deadline: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """Seconds that sites have for each exchange after training."""
    group_size: Annotated[int, Field(ge=5)] | None = None
    """Fewest sites in a group, each of which is summed by itself; drawn anew every round. None: one sum."""
    combine: Literal["mean", "median", "trimmed-mean", "geometric-median"] = "mean"
    """What becomes of the groups' means; all but the mean bound what a poisoned group can do."""
    trim: Annotated[int, Field(ge=1)] | None = None
    """Of trimmed-mean: groups that are left out at each end, coordinate by coordinate."""

    @model_validator(mode="after")
    def _survivors_fit(self) -> SecureAggregation:
        if not isinstance(self.min_survivors, int):
            return self
        if self.group_size is None and self.min_survivors < self.min_sites:
            raise ValueError(f"min_survivors = {self.min_survivors} is below min_sites = {self.min_sites}")
        if self.group_size is not None and not 3 <= self.min_survivors <= self.group_size:
            raise ValueError(
                f"min_survivors = {self.min_survivors}: of each group, so 3 to group_size = {self.group_size}"
            )
        return self

    @model_validator(mode="after")
    def _groups_fit(self) -> SecureAggregation:
        if (self.trim is not None) != (self.combine == "trimmed-mean"):
            raise ValueError("trim and combine = 'trimmed-mean' go together: give both or neither")
        if self.group_size is None:
            if self.combine != "mean":
                raise ValueError(f"combine = {self.combine!r} is of groups: it needs group_size")
            return self
        if not self.enabled:
            raise ValueError(f"group_size = {self.group_size} needs enabled = true: groups are summed")
        if self.min_sites < self.group_size * self.least_groups:
            raise ValueError(
                f"min_sites = {self.min_sites} makes {self.min_sites // self.group_size} groups of "
                f"group_size = {self.group_size}, combine = {self.combine!r} needs {self.least_groups}: "
                f"allowed from {self.group_size * self.least_groups} on"
            )
        return self

    @property
    def least_groups(self) -> int:
        """Fewest groups of which `combine` means anything: more than twice those that may be poisoned."""
        return 1 if self.combine == "mean" else 2 * (self.trim or 1) + 1


class EarlyStopping(Strict):
    """When to end a run before its last round: a rule on what is public, or was released and charged already.

    Never on a site's held-out records. The noise stays calibrated for all rounds; those that are not run are
    not charged.
    """

    signal: Literal["public", "updates"]
    """public: the study's metric on a public table at the server. updates: the length of their mean."""
    patience: Annotated[int, Field(ge=1)]
    """Rounds without a rise of the metric; rounds whose updates are averaged."""
    tolerance: Annotated[float, Field(ge=0, lt=1)]
    """A rise of the metric that does not count; the share of the largest mean update below which to stop."""
    min_rounds: Annotated[int, Field(ge=1)] = 1
    """Aggregated rounds before which the run does not stop."""

    @model_validator(mode="after")
    def _updates_never_vanish(self) -> EarlyStopping:
        if self.signal == "updates" and self.tolerance == 0:
            raise ValueError(
                "tolerance = 0: no mean update is shorter than that; signal = 'updates' needs more"
            )
        return self

    @property
    def earliest(self) -> int:
        """Rounds after which it can stop at the earliest: there must be something to compare with."""
        if self.signal == "public":
            return max(self.min_rounds, self.patience + 1)
        return self.patience * max(2, math.ceil(self.min_rounds / self.patience))


_ADAPTIVE = {"beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}
STRATEGY_KEYS: dict[str, dict[str, float | None]] = {
    "lockstep": {},
    "fedavg": {},
    "fedavgm": {"server_lr": 1.0, "server_momentum": 0.9},
    "fedprox": {"proximal_mu": None},
    "fedadam": {"server_lr": 0.1, **_ADAPTIVE},
    "fedyogi": {"server_lr": 0.01, **_ADAPTIVE},
    "fedadagrad": {"server_lr": 0.1, "tau": 1e-3},
}
"""The keys of [train] that one strategy reads and another does not, with their defaults; None must be given.

Flower's defaults, but for the momentum, which is Hsu et al.'s (2019): Flower's 0 is plain fedavg.
"""


class Train(Strict):
    """How the model is trained. All of it is public; none of it is counted at a site."""

    strategy: Literal["lockstep", "fedavg", "fedavgm", "fedprox", "fedadam", "fedyogi", "fedadagrad"] = (
        "lockstep"
    )
    """lockstep: a round is one DP-SGD step of every site. The others: `local_steps` at each site, and the
    server averages (fedavg, fedprox) or takes a step of its own optimizer along the average."""
    rounds: Annotated[int, Field(ge=1, le=1_000_000)]
    sample_rate: Annotated[float, Field(ge=1e-6, le=1)]
    """Poisson, per unit and step."""
    expected_batch: Annotated[float, Field(ge=0.01, le=1e9)] | None = None
    """Public divisor of a site's summed gradient, in units; the same at every site.

    Usually sample_rate times the units of a typical site. The simulator fills it in from its data; a
    deployed study must declare it, since a site's own size is not public.
    """
    local_steps: Annotated[int, Field(ge=1, le=10_000)] = 1
    optimizer: Literal["sgd", "adam"] = "adam"
    """Of the server under lockstep, of each site under every other strategy."""
    lr: Annotated[float, Field(gt=0, le=100)]
    """Learning rate of `optimizer`."""
    server_lr: Annotated[float, Field(gt=0, le=100)] | None = None
    """Learning rate of the server along the sites' mean update."""
    server_momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    beta_1: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the mean of past updates."""
    beta_2: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the mean of their squares."""
    tau: Annotated[float, Field(ge=1e-10, le=1)] | None = None
    """Added to the root of that mean: the larger, the less adaptive."""
    proximal_mu: Annotated[float, Field(gt=0, le=100)] | None = None
    """How strongly a site's local steps are pulled back towards the model it received."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the server's rate falls over `rounds`: `lr` of lockstep, else `server_lr`."""
    warmup_rounds: Annotated[int, Field(ge=0)] = 0
    """Rounds over which the server's rate rises to its full height first."""
    early_stopping: EarlyStopping | None = None
    """None: every round is run."""
    spare_rounds: Annotated[int, Field(ge=0)] | None = None
    """Rounds the noise also covers, for those lost to a crash; 5 % of `rounds` by default."""
    deadline: Annotated[float, Field(gt=0, le=604_800)] = 600.0
    """Seconds that a round may take before the sites that have not answered are dropped."""

    @model_validator(mode="after")
    def _size_is_bounded(self) -> Train:
        # A site computes the cost of a study before it can refuse it.
        if self.spare_rounds is not None and self.spare_rounds > self.rounds:
            raise ValueError(f"spare_rounds = {self.spare_rounds}: at most as many as rounds")
        if self.charged_rounds * self.local_steps > MAX_STEPS:
            raise ValueError(
                f"{self.charged_rounds} rounds (spare included) of {self.local_steps} local_steps: "
                f"at most {MAX_STEPS:,} steps in all"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_strategy(cls, raw: Any) -> Any:
        # Here and not where they are used: a default that is spelt out must not change the study's id.
        if not isinstance(raw, dict) or not isinstance(strategy := raw.get("strategy"), str):
            return raw
        defaults = STRATEGY_KEYS.get(strategy, {})
        return {**raw, **{key: value for key, value in defaults.items() if raw.get(key) is None}}

    @model_validator(mode="after")
    def _keys_are_read(self) -> Train:
        read = STRATEGY_KEYS[self.strategy]
        for key in sorted({key for keys in STRATEGY_KEYS.values() for key in keys}):
            value = getattr(self, key)
            if value is None and key in read:
                raise ValueError(f"strategy = {self.strategy!r} needs {key}")
            if value is not None and key not in read:
                readers = ", ".join(name for name, keys in STRATEGY_KEYS.items() if key in keys)
                raise ValueError(
                    f"{key} = {value:g}: strategy = {self.strategy!r} does not read it; allowed for {readers}"
                )
        return self

    @model_validator(mode="after")
    def _schedule_is_of_a_rate(self) -> Train:
        if self.warmup_rounds >= self.rounds:
            raise ValueError(
                f"warmup_rounds = {self.warmup_rounds}: must be fewer than the {self.rounds} rounds"
            )
        scheduled = self.lr_schedule != "constant" or self.warmup_rounds > 0
        if scheduled and self.strategy != "lockstep" and self.server_lr is None:
            raise ValueError(
                f"lr_schedule = {self.lr_schedule!r}, warmup_rounds = {self.warmup_rounds}: the server has "
                f"no rate of its own under strategy = {self.strategy!r}"
            )
        return self

    @model_validator(mode="after")
    def _stops_before_the_end(self) -> Train:
        rule = self.early_stopping
        if rule is not None and rule.earliest >= self.rounds:
            raise ValueError(
                f"early_stopping: stops after round {rule.earliest} at the earliest, and there are "
                f"{self.rounds} rounds"
            )
        return self

    @model_validator(mode="after")
    def _lockstep_is_one_step(self) -> Train:
        if self.strategy == "lockstep" and self.local_steps != 1:
            raise ValueError(
                f"local_steps = {self.local_steps}: a lockstep round is exactly one step; "
                "use strategy = 'fedavg', or another, for several"
            )
        return self

    @property
    def charged_rounds(self) -> int:
        """Rounds that the noise is calibrated for: `rounds` and the spare ones."""
        spare = math.ceil(0.05 * self.rounds) if self.spare_rounds is None else self.spare_rounds
        return self.rounds + spare


class Model(Strict):
    """Which model; registered names only, see `lepton_fl.tasks.models`."""

    name: Name = "auto"
    hidden: Annotated[Array[Annotated[int, Field(ge=1, le=4096)]], Field(max_length=8)] = (32,)
    """Widths of the hidden layers, for models that have them."""
    normalization: Literal["none", "layer"] = "none"

    @field_validator("normalization", mode="before")
    @classmethod
    def _no_batch_statistics(cls, value: Any) -> Any:
        if isinstance(value, str) and "batch" in value.lower():
            raise ValueError(
                f"found {value!r}: BatchNorm mixes the records of a batch, so one record's influence "
                "cannot be bounded; allowed: 'none', 'layer'"
            )
        return value


class FloatColumn(Strict):
    """A number with a public range, from the definition of the field and not from the sites' rows."""

    type: Literal["float"]
    range: Annotated[tuple[float, float], Field(strict=False)]
    """Inclusive; values beyond are moved to the bound and counted."""
    transform: Literal["none", "log1p"] = "none"
    missing: Literal["refuse", "flag"] = "refuse"
    """flag: a missing value becomes the middle of the range, and one more feature says so."""
    identifier: Literal["refuse", "allow"] = "refuse"
    """allow: keep a column although nearly every value in it is unique."""

    @model_validator(mode="after")
    def _range_is_usable(self) -> FloatColumn:
        low, high = self.range
        if not low < high:
            raise ValueError(f"range [{low}, {high}]: the first must be below the second")
        if self.transform == "log1p" and low <= -1:
            raise ValueError(f"range [{low}, {high}]: log1p needs a range above -1")
        return self


class CategoryColumn(Strict):
    """A code from a public vocabulary, or hashed; never built from the sites' rows."""

    type: Literal["category"]
    vocabulary: str | Array[Scalar] | None = None
    """A literal list, or the name of a public code list (`iso18245`)."""
    hash: Annotated[int, Field(ge=2, le=65_536)] | None = None
    """Instead of a vocabulary: the number of signed-hash features."""
    missing: Literal["refuse", "flag"] = "refuse"
    identifier: Literal["refuse", "allow"] = "refuse"

    @model_validator(mode="after")
    def _one_source(self) -> CategoryColumn:
        if (self.vocabulary is None) == (self.hash is None):
            raise ValueError("give exactly one of vocabulary and hash")
        if isinstance(self.vocabulary, tuple):
            codes = [str(v) for v in self.vocabulary]
            if not codes or len(set(codes)) != len(codes):
                raise ValueError("vocabulary must list distinct codes, at least one")
        return self


Column = Annotated[FloatColumn | CategoryColumn, Field(discriminator="type")]


class Features(Strict):
    """The schema contract, the same at every site."""

    scaling: Literal["bounds"] = "bounds"
    """bounds: the public ranges, at no privacy cost."""
    columns: Annotated[dict[str, Column], Field(min_length=1)]


class Evaluation(Strict):
    """Which of a site's records are held out to judge the model: each by a rule that reads no other."""

    test_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Of the units, in expectation; not used where `split = "time"`."""
    split: Literal["unit", "time"] = "unit"
    """unit: those whose keyed hash falls below `test_fraction`, each with all its records. time: the
    records from `cutoff` on."""
    time_column: str | None = None
    cutoff: float | str | None = None
    """A number, or an ISO 8601 date or time (UTC where it names no zone), read as the cells of
    `time_column` are. Public: it comes from the calendar, never from the records."""
    release: Literal["none", "dp", "exact"] = "none"
    """What sites release of the result on these records, under secure aggregation: a histogram of scores by
    label, in one sum over the cohort. dp: with noise. exact: if every site's policy allows it."""
    share: Fraction | None = None
    """Of `privacy.epsilon`, for what is released with noise; the noise of training makes room for it."""

    @model_validator(mode="after")
    def _share_is_of_noise(self) -> Evaluation:
        if (self.share is not None) != (self.release == "dp"):
            raise ValueError("release = 'dp' and share go together: give both or neither")
        return self

    @field_validator("cutoff", mode="before")
    @classmethod
    def _one_form_of_time(cls, value: Any) -> Any:
        # One instant has many spellings, and the study must have one id.
        text = value.isoformat() if isinstance(value, date) else value
        if not isinstance(text, str):
            return value
        text = text.strip()
        if math.isfinite(number := read_number(text)):
            return number
        try:
            return _moment(text).astimezone(UTC).isoformat()
        except (ValueError, OverflowError):
            raise ValueError(
                f"found {text!r}, allowed: a finite number, or an ISO 8601 date or time such as "
                "'2026-01-31' or '2026-01-31T12:00:00Z'"
            ) from None

    @model_validator(mode="after")
    def _time_needs_a_column_and_a_cutoff(self) -> Evaluation:
        wanted = self.split == "time"
        if (self.time_column is not None) != wanted or (self.cutoff is not None) != wanted:
            raise ValueError("split = 'time', time_column and cutoff go together: give all three or none")
        return self

    @property
    def cutoff_number(self) -> float | None:
        """The cutoff as a table's times are: a number as it is, a date or time as POSIX seconds."""
        return read_instant(self.cutoff) if isinstance(self.cutoff, str) else self.cutoff


def read_number(text: str) -> float:
    """`text` as a number with a decimal point; NaN where it is none. May be infinite."""
    try:
        # float() would read the literal 1_000; whoever writes it means something else.
        return float(text) if "_" not in text else math.nan
    except ValueError:
        return math.nan


def read_instant(text: str) -> float:
    """POSIX seconds of an ISO 8601 date or time; NaN where it is none.

    A time without a zone counts as UTC: the result must not depend on the machine's own zone.
    """
    try:
        return _moment(text).timestamp()
    except ValueError:
        return math.nan


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class Study(Strict):
    """Everything the federation agreed on. See docs/study.md for each key."""

    study: About
    task: Task
    privacy: Privacy
    secure_aggregation: SecureAggregation = SecureAggregation()
    train: Train
    model: Model = Model()
    features: Features
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="before")
    @classmethod
    def _one_form_of_text(cls, raw: Any) -> Any:
        try:
            return _one_form(raw)
        except RecursionError:
            raise ValueError("tables or arrays are nested too deeply") from None

    @model_validator(mode="after")
    def _parts_agree(self) -> Study:
        if self.privacy.noise == "shared":
            if self.train.strategy != "lockstep":
                raise ValueError(
                    f"privacy.noise = 'shared' needs train.strategy = 'lockstep', found "
                    f"{self.train.strategy!r}: parts of the noise add up only within one step; else set "
                    "noise = 'local'"
                )
            if not self.secure_aggregation.enabled:
                raise ValueError(
                    "privacy.noise = 'shared' needs secure_aggregation.enabled = true: a site's own "
                    "part of the noise does not protect its update"
                )
            secure = self.secure_aggregation
            least = self.survivors(secure.group_size or secure.min_sites)
            if least <= secure.colluders:
                raise ValueError(
                    f"privacy.noise = 'shared': secure_aggregation.colluders = {secure.colluders} of "
                    f"{least} sites leaves no honest part of the noise"
                )
        release = self.evaluation.release
        if release != "none" and not self.secure_aggregation.enabled:
            raise ValueError(
                f"evaluation.release = {release!r} needs secure_aggregation.enabled = true: without it each "
                "site's own policy says whether its own figure leaves"
            )
        if release == "dp" and self.privacy.noise == "none":
            raise ValueError(
                "evaluation.release = 'dp' needs privacy.noise = 'local' or 'shared': 'none' has no epsilon "
                "of which evaluation.share could be a share"
            )
        taken = {self.task.target, self.privacy.unit, self.evaluation.time_column}
        if clash := sorted(set(self.features.columns) & taken):
            raise ValueError(
                f"features.columns.{clash[0]}: also the target, the unit or the time column; "
                "a model must not see it"
            )
        return self

    @cached_property
    def canonical(self) -> bytes:
        """The bytes that are hashed: versioned prefix, then JSON with sorted keys, no white space.

        Defaults are written out, text is NFC, numbers are Python's shortest exact form, so the bytes
        say what the study means and not how its file was typed.
        """
        text = json.dumps(
            _one_form(self.model_dump(mode="json")),
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
            allow_nan=False,
        )
        return CANONICAL_PREFIX + text.encode("utf-8")

    @cached_property
    def id(self) -> str:
        """SHA-256 of the canonical bytes, 64 hexadecimal digits."""
        return hashlib.sha256(self.canonical).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Study) and self.id == other.id

    def __hash__(self) -> int:
        # Not of every field, each time that something is looked up by the study.
        return hash(self.id)

    @property
    def score_bins(self) -> int:
        """How many bins the study's histograms of scores have; 0 where it releases none."""
        match self.evaluation.release:
            case "exact":
                return EXACT_BINS
            case "dp":
                return NOISY_BINS[self.task.metric]
            case _:
                return 0

    @property
    def charged_steps(self) -> int:
        """Steps of DP-SGD at one site that the noise is calibrated for."""
        return self.train.charged_rounds * self.train.local_steps

    @property
    def evaluation_round(self) -> int:
        """The number of the one sum of histograms: beyond those of training, and the same whenever asked."""
        return self.train.charged_rounds + 1

    @property
    def metrics_epsilon(self) -> float | None:
        """Epsilon of the histogram of scores, at the study's delta; None where none has noise."""
        share, epsilon = self.evaluation.share, self.privacy.epsilon
        return None if share is None or epsilon is None else share * epsilon

    @property
    def model_name(self) -> str:
        """The model, with `auto` resolved from public figures alone.

        Logistic regression at epsilon below 3 or below 10,000 units in the smallest admissible
        cohort; otherwise the MLP. (Measured on five public tables: more capacity is lost to noise.)
        """
        if self.model.name != "auto":
            return self.model.name
        site_units = (self.train.expected_batch or 0) / self.train.sample_rate
        few = site_units * self.secure_aggregation.min_sites < LOGREG_BELOW_UNITS
        tight = self.privacy.epsilon is not None and self.privacy.epsilon < 3
        return "logreg" if few or tight else "mlp"

    def needed(self, cohort: int) -> int:
        """Sites that must be there for a cohort of this size to begin a round.

        Not only the smallest cohort: a round that cannot keep its survivors is lost, and charged.
        """
        return max(self.secure_aggregation.min_sites, self.quorum(cohort))

    def groups(self, cohort: int) -> int:
        """Sums that a cohort of this size makes."""
        size = self.secure_aggregation.group_size
        return 1 if size is None else max(1, cohort // size)

    def least_sums(self, cohort: int) -> int:
        """Of them, those that a round must have to be aggregated: more than half, and enough to combine."""
        return max(self.groups(cohort) // 2 + 1, self.secure_aggregation.least_groups)

    def quorum(self, cohort: int) -> int:
        """Sites, of a cohort of this size, that a round must keep to be aggregated."""
        size = self.secure_aggregation.group_size
        return self.survivors(cohort) if size is None else self.least_sums(cohort) * self.survivors(size)

    def survivors(self, sites: int) -> int:
        """Sites, of so many whose updates become one sum, that must be in it.

        `min_survivors` is what secure aggregation needs, and shared noise; without it every update is
        whole by itself, and the smallest cohort is enough.
        """
        if not self.secure_aggregation.enabled:
            return self.secure_aggregation.min_sites
        wanted = self.secure_aggregation.min_survivors
        return sites if wanted == "all" else wanted


def load_study(path: Path) -> Study:
    """The study in the TOML file at `path`, or a ConfigError."""
    return load(Study, path)


def parse_canonical(data: bytes, study_id: str) -> Study:
    """The study in canonical bytes received from a peer: digest first, then parsed, then re-encoded.

    Raises:
        VerificationFailed: the bytes are not those that `study_id` names.
        ConfigError: they are, and are still no study this release understands.
    """
    if hashlib.sha256(data).hexdigest() != study_id:
        raise VerificationFailed("study: the bytes received do not have the study id they came with")
    if not data.startswith(CANONICAL_PREFIX):
        raise ConfigError("study: made for another format than lepton-fl/study/1")
    try:
        raw = json.loads(data[len(CANONICAL_PREFIX) :])
    except (ValueError, RecursionError):
        raise ConfigError("study: canonical bytes are not JSON") from None
    if not isinstance(raw, dict):
        raise ConfigError("study: canonical bytes hold no table")
    study = parse(Study, raw, file="study received")
    if study.canonical != data:
        raise VerificationFailed("study: the bytes received are not in canonical form")
    return study


def check_delta(study: Study, units: int, site: str) -> None:
    """Refuse delta >= 1 / units: at that delta one unit of the site may be published whole.

    Raises:
        ConfigError: with the bound to go below.
    """
    delta = study.privacy.delta
    if delta is not None and delta * units >= 1:
        raise ConfigError(
            f"study {study.study.name}: privacy.delta: found {delta:g}, allowed: below 1/{units} = "
            f"{1 / units:.3g}, one over the training units of the smallest site ({site})",
            fix="lower privacy.delta in study.toml",
        )


def check_deployable(study: Study, file: str) -> None:
    """Refuse a study that cannot be trained by sites of which nobody knows how large they are.

    Raises:
        ConfigError: the divisor of a site's gradient is not declared.
    """
    if study.train.expected_batch is None:
        raise ConfigError.at(
            file,
            "train.expected_batch",
            found="nothing",
            allowed="a number, before anyone can approve what will be trained",
            fix="set it to sample_rate x the units of a typical site",
        )


def override(study: Study, changes: dict[str, Any]) -> Study:
    """A study with dotted keys replaced, checked anew: `{"privacy.epsilon": 3.0}`."""
    raw = study.model_dump(mode="json", exclude_none=True)
    _leave_strategy(raw["train"], changes.get("train.strategy", study.train.strategy))
    if changes.get("privacy.noise") == "none":
        raw["privacy"] = {k: v for k, v in raw["privacy"].items() if k not in ("epsilon", "delta")}
        if study.evaluation.release == "dp":
            raw["evaluation"] = {k: v for k, v in raw["evaluation"].items() if k not in ("release", "share")}
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        table = raw
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"study {study.study.name}: {dotted}: {part!r} is a value, not a table")
        if value is None:
            table.pop(last, None)
        else:
            table[last] = value
    return parse(Study, raw, file=f"study {study.study.name}")


def _leave_strategy(train: dict[str, Any], following: Any) -> None:
    """Take out of [train] what was filled in for its strategy, and what the `following` cannot read."""
    if following == train["strategy"]:
        return
    read = STRATEGY_KEYS.get(str(following), {})
    for key, default in STRATEGY_KEYS[train["strategy"]].items():
        if key not in read or train[key] == default:
            train.pop(key, None)


def _one_form(value: Any) -> Any:
    """Text in Unicode's composed form and no negative zero: what means the same is the same."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, dict):
        table = {_one_form(k): _one_form(v) for k, v in value.items()}
        if len({str(key).strip() for key in table}) < len(value):
            raise ValueError("two keys read the same and are typed differently; keep one")
        return table
    if isinstance(value, list):
        return [_one_form(v) for v in value]
    if isinstance(value, float):
        return value + 0.0
    return value
