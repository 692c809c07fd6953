"""What a run leaves for people and programs: results.json, a sweep's sweep.json, and their schemas.

`docs/results.schema.json` and `docs/sweep.schema.json` are generated from these models; a test keeps each
the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError

from lepton_fl.config import Strict
from lepton_fl.errors import ConfigError
from lepton_fl.files import write_atomic
from lepton_fl.study import OperatingPoint

ArmName = Literal["local", "linear", "federated", "pooled"]
"""local, linear: a site's own gradient boosting and logistic regression, on its own records alone."""
OwnArm = Literal["local", "linear"]
SecureRun = Literal["full", "functional"]
"""full: by the protocol of secure aggregation. functional: the same integers and noise, added up in clear."""
Engine = Literal["vectorised", "process"]
"""How a simulation trains its sites: all of a round together, or one after another."""
SweepValue = bool | int | float | str


class Interval(Strict):
    """A figure over seeds and resampled test rows. None where it is not defined."""

    mean: float | None
    """Mean over the seeds."""
    low: float | None = None
    """2.5th percentile of the bootstrap over seeds and test rows."""
    high: float | None = None
    """97.5th percentile."""

    @property
    def side(self) -> Literal[-1, 0, 1] | None:
        """On which side of zero the whole interval lies; 0 where it holds zero, None where there is none."""
        if self.low is None or self.high is None:
            return None
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def wilson(hits: float, of: float) -> Interval:
    """A share with its 95 % score interval (Wilson 1927); over the records, not over seeds."""
    if of <= 0:
        return Interval(mean=None)
    z = 1.959964
    share = hits / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return Interval(mean=share, low=max(0.0, middle - half), high=min(1.0, middle + half))


class SiteSummary(Strict):
    """One institution of the run. Counts appear because the data are simulated or public."""

    site: str
    train_units: int
    train_positives: int
    """Positive records in the training part."""
    test_records: int
    test_positives: int
    epsilon_run: float | None
    """What this run cost at this site, at the study's delta."""
    epsilon_spent: float | None
    """All studies on this data set so far, composed, at the policy's delta_total."""
    epsilon_allowed: float
    delta_total: float
    data_set: str
    """The data-set id that the site's policy names: what the budget belongs to."""
    released_exact: tuple[str, ...] = ()
    """What left this site without noise. Printed in red."""
    own_best: OwnArm | None = None
    """The better of the site's own models on the held-out records: chosen with hindsight, in its favour."""
    gain: Interval | None = None
    """Federated minus `own_best` at this site, paired by seed and held-out record."""
    status: str = "took part"
    """`took part`, or why it was left out."""


class RoundSummary(Strict):
    """One round of the main run."""

    round: Annotated[int, Field(ge=1)]
    sites: tuple[str, ...]
    """Sites whose updates entered the aggregate."""
    dropped: dict[str, str] = {}
    """Site to reason, for those left out."""
    seconds: float
    epsilon: float | None
    """Spent so far at each site that took part in every round, at the study's delta."""
    metric: float | None = None
    """Mean over sites of the study's metric on held-out records; only where it was looked at."""


class RecallAt(Strict):
    """The highest recall of any threshold at which at most `fpr` of the negatives are called positive.

    A property of the ranking on the held-out records, so it carries no threshold anywhere. Not defined
    where there are fewer than 1 / fpr negatives.
    """

    fpr: float
    per_site: dict[str, Interval]
    mean: Interval
    """Mean over the sites where it is defined."""
    all_records: Interval
    """Over all held-out records as one list."""


class Curve(Strict):
    """Thresholds from the highest score down, thinned to what a chart can show. Columns of one length."""

    fpr: tuple[float, ...]
    recall: tuple[float, ...]
    precision: tuple[float, ...]


class TopRecords(Strict):
    """Of the `records` with the highest scores, how many are positive."""

    records: int
    positives: float
    """Records of one score come in random order: an expectation where the last of them are tied."""

    @property
    def precision(self) -> Interval:
        """Share of positives, with its Wilson interval."""
        return wilson(self.positives, self.records)


class Bin(Strict):
    """Records of neighbouring scores."""

    records: int
    positives: int
    score: float
    """Mean score: the share of positives that the model promises."""

    @property
    def observed(self) -> Interval:
        """Share of positives, with its Wilson interval."""
        return wilson(self.positives, self.records)


class Calibration(Strict):
    """Whether a score is the share of positives that it says."""

    bins: tuple[Bin, ...]
    """Equal numbers of records, lowest scores first."""
    expected_error: float
    """Expected calibration error: |score - observed| over the bins, weighted by records."""
    log_loss: float
    """Nats for each record."""
    brier: float


class Confusion(Strict):
    """Held-out records by what they are and what they are called."""

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int

    @property
    def records(self) -> int:
        """All of them."""
        return self.true_positives + self.false_positives + self.false_negatives + self.true_negatives

    @property
    def recall(self) -> Interval:
        """With its Wilson interval, as those below."""
        return wilson(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def fpr(self) -> Interval:
        """False positive rate: share of the negatives that are called positive."""
        return wilson(self.false_positives, self.false_positives + self.true_negatives)

    @property
    def precision(self) -> Interval:
        """Share of positives among those called positive."""
        return wilson(self.true_positives, self.true_positives + self.false_positives)

    def cost(self, false_negative: float, false_positive: float) -> float:
        """Cost of each record, on average."""
        return (false_negative * self.false_negatives + false_positive * self.false_positives) / self.records

    @classmethod
    def total(cls, parts: Iterable[Confusion]) -> Confusion:
        """The counts of several, added up."""
        counts = [list(part.model_dump().values()) for part in parts]
        return cls(**dict(zip(cls.model_fields, map(sum, zip(*counts, strict=True)), strict=True)))


class Bounded(Strict):
    """A figure that was computed from counts by bin of the score, and how far it may be off."""

    value: float | None = None
    """None where it is not shown."""
    low: float | None = None
    high: float | None = None
    """Between them lies the figure of the records: for certain where the counts are exact; noise, by its law,
    in 95 of 100 cases."""
    withheld: str = ""
    """Why it is not shown."""


class Pooled(Strict):
    """Figures of the model on all sites' held-out records, from one sum of their histograms of scores."""

    release: Literal["dp", "exact"]
    """exact: left without noise, and is named in red. dp: noise was added, and charged."""
    sites: int
    """In the sum. Under dp a site whose policy releases nothing is in it, and adds noise but no record."""
    epsilon: float | None
    """Of the histograms alone, at the study's delta; it is within the study's own. None for exact ones."""
    metric: Bounded
    """The study's."""
    recall: dict[str, Bounded]
    """By false positive rate: of the highest edge of a bin at which no more negatives are above it."""


class FirstSeed(Strict):
    """An arm's scores of all held-out records of one seed: the first, whose run is the charged one."""

    seed: int
    records: int
    positives: int
    curve: Curve | None
    """None where the records are of one class."""
    top: tuple[TopRecords, ...]
    calibration: Calibration
    """As the model scores."""
    recalibrated: Calibration | None = None
    """After each site has scaled the scores by two numbers fitted to its own training records (Platt)."""
    at_point: dict[str, Confusion | None] = {}
    """Each site at the operating point, under a threshold set on its own training records alone.

    None where these records cannot set one. Empty where it was not evaluated.
    """


class Arm(Strict):
    """One way to get a model, judged on the same held-out records as the others."""

    arm: ArmName
    label: str
    privacy: str
    """What protects the records in this arm, in words."""
    per_site: dict[str, Interval]
    mean: Interval
    """Mean over the sites where the metric is defined."""
    seeds: int
    all_records: Interval | None = None
    """The metric over all held-out records as one list. Of the sites' own models this list holds scores
    of different models, which were never meant to be compared with each other."""
    recall: tuple[RecallAt, ...] = ()
    first_seed: FirstSeed | None = None


class CurvePoint(Strict):
    """Utility at one epsilon."""

    epsilon: float
    noise: Literal["local", "shared"]
    mean: Interval
    seeds: int


class Promise(Strict):
    """The study's promise, with what was computed from it."""

    epsilon: float | None
    delta: float | None
    unit: str
    unit_said: str = ""
    """What the unit is, and what it is not, in one sentence; empty in files of earlier releases."""
    holds_against: str
    noise: Literal["local", "shared", "none"]
    clip: float
    noise_multiplier: float | None
    sample_rate: float
    steps: int
    """Steps that the noise covers, spare rounds included."""
    leaves: str = ""
    """What leaves a site in each round, in one sentence; empty in files of earlier releases."""
    epsilon_against: dict[str, float] = {}
    """Epsilon of the whole training at `delta` by who looks, where that makes a difference: under shared
    noise, in the smallest sum."""


class SecureSums(Strict):
    """How the sums of a run with secure aggregation came about."""

    ran: SecureRun
    suite: str
    hides: str
    """What it promises a site of this cohort, and what its noise is."""
    noise_factor: float | None
    """Shared noise on the sum, nobody missing, over what a trusted curator would add; None: not shared."""


class ModelFile(Strict):
    name: str
    file: str
    """Relative to the run's folder."""
    parameters: int
    sha256: str
    """Over name, type, shape and bytes of every tensor in order of name."""


class Results(Strict):
    """A run: what was asked, what came out, and how to get it again."""

    format: Literal["lepton-fl/results/1"] = "lepton-fl/results/1"
    status: Literal["completed", "interrupted", "stopped"]
    """interrupted: by the user. stopped: too few sites, or refused in mid-run."""
    verdict: str
    labels: tuple[str, ...]
    """What a reader must know before any figure: SIMULATED, simulation noise, how sums were formed."""
    study_id: str
    study_name: str
    purpose: str
    run_id: str
    metric: Literal["auc", "auprc"]
    operating_point: OperatingPoint | None = None
    """Where `Arm.first_seed.at_point` stands: the study's, or the report's own choice."""
    operating_point_agreed: bool = False
    """The study names it."""
    strategy: str
    engine: Engine = "process"
    """How the sites were trained: together (vectorised), or one after another."""
    model: ModelFile | None
    promise: Promise
    secure_aggregation: SecureSums | None = None
    """None: the study has none."""
    rounds_planned: int
    stopped_early: str | None = None
    """By which rule the run, completed, ended before the planned rounds; the last of `rounds` says where."""
    rounds: tuple[RoundSummary, ...]
    sites: tuple[SiteSummary, ...]
    arms: tuple[Arm, ...]
    pooled: Pooled | None = None
    """What the sites' own histograms told the server: None where the study releases none, or none came."""
    gain: Interval | None = None
    """Federated minus each site's `own_best`, mean over sites, paired by seed and held-out record."""
    curve: tuple[CurvePoint, ...] = ()
    seeds: tuple[int, ...]
    bootstrap: int
    """Resamples behind every interval: fewer where records are many."""
    command: str
    data_sha256: str | None = None
    """Over the sites' names and encoded tables, so that a second run can tell whether it read the same."""
    versions: dict[str, str]
    hardware: str
    started: str
    """ISO 8601, UTC."""
    seconds: float


class SweepAxis(Strict):
    """What is varied: a dotted key of the study, or `split` or `sites`."""

    key: str
    values: tuple[SweepValue, ...]


def shown(value: SweepValue) -> str:
    """A value as one types it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


class SweepPoint(Strict):
    """One point of the grid: a whole simulation, in a folder of its own."""

    name: str
    """`KEY=VALUE,...`, as in the name of its folder."""
    folder: str
    """Relative to the sweep's."""
    values: dict[str, SweepValue]
    study_id: str
    status: Literal["left", "running", "completed", "stopped", "interrupted", "refused", "killed"] = "left"
    """left: not begun, or ended before anything was kept. stopped: too few sites. refused: by the site's
    policies, the data or an error. killed: its process was."""
    reason: str = ""
    """Why it did not complete."""
    arms: dict[ArmName, Interval] = {}
    """The study's metric, mean over the sites; empty before the point has results."""
    gain: Interval | None = None
    """Federated minus each site's better own model, mean over sites, paired by seed and record."""
    epsilon: float | None = None
    """What the charged run cost at the site where it cost most, at the study's delta."""
    rounds: int = 0
    """Rounds that were aggregated."""
    seconds: float | None = None


class Sweep(Strict):
    """Simulations over a grid of keys. Each figure is also in the results.json of its point."""

    format: Literal["lepton-fl/sweep/1"] = "lepton-fl/sweep/1"
    status: Literal["running", "completed", "interrupted", "incomplete"]
    """incomplete: some point did not complete. running also where the program that ran it was killed."""
    labels: tuple[str, ...]
    """What a reader must know before any figure."""
    study_name: str
    purpose: str
    metric: Literal["auc", "auprc"]
    axes: tuple[SweepAxis, ...]
    points: tuple[SweepPoint, ...]
    seeds: tuple[int, ...]
    options: tuple[str, ...]
    """What all points share, as given to `lepton-fl simulate`."""
    command: str
    started: str
    """ISO 8601, UTC."""
    seconds: float


_Kept = TypeVar("_Kept", Results, Sweep)


def write_results(results: Results | Sweep, path: Path) -> None:
    """Write atomically: a reader sees the old file or the whole new one."""
    write_atomic(path, (results.model_dump_json(indent=1) + "\n").encode("utf-8"))


def read_results(path: Path) -> Results:
    """The results in the file at `path`.

    Raises:
        ConfigError: there is no such file, or it is not of this format.
    """
    return _read(Results, path, fix="lepton-fl simulate study.toml --out RUN, then name that folder")


def read_sweep(path: Path) -> Sweep:
    """The sweep in the file at `path`.

    Raises:
        ConfigError: there is no such file, or it is not of this format.
    """
    return _read(Sweep, path)


def _read(kind: type[_Kept], path: Path, *, fix: str = "") -> _Kept:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", fix=fix) from None
    except ValidationError:
        named = kind.model_fields["format"].default
        raise ConfigError(f"{path}: not a file of format {named}") from None


def schema() -> str:
    """JSON schema of results.json."""
    return json.dumps(Results.model_json_schema(), indent=1, sort_keys=True) + "\n"


def sweep_schema() -> str:
    """JSON schema of sweep.json."""
    return json.dumps(Sweep.model_json_schema(), indent=1, sort_keys=True) + "\n"
