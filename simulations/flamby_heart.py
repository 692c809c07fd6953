"""Fed-Heart-Disease as FLamby published it, through this library: accuracies to compare, as one table.

    python simulations/flamby_heart.py > heart.md

FLamby (Ogier du Terrail et al. 2022, NeurIPS Datasets and Benchmarks; code: owkin/FLamby, MIT licence) trains
a logistic regression on four hospitals. Preparation, initial weights, learning rates and numbers of steps
and rounds are FLamby's; sampling, averaging, clipping, noise and accounting are this library's. What that
changes is said in docs/reference.md.

N = records, F = 13 features, S = seeds.
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from lepton_fl.config import parse
from lepton_fl.data import Table
from lepton_fl.simulation.run import Scorer, prepare
from lepton_fl.study import Study
from lepton_fl.tasks import Arrays

HOSPITALS = ("cleveland", "hungary", "switzerland", "long-beach")
NUMBERS = ("age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak")
CODES = {"cp": ("2", "3", "4"), "restecg": ("1", "2")}
"""Indicators; the first code has none."""
NAMES = (*NUMBERS, *(f"{name}={code}" for name, codes in CODES.items() for code in codes))

ZERO_PRESSURE = {("long-beach", 33)}
NO_CHOLESTEROL = {("long-beach", row) for row in (107, 125, 155, 157, 164, 165, 181)}
"""heart.csv leaves a pressure or cholesterol empty where the original says 0, and where it says `?`. FLamby
keeps the zeros and drops the rows with `?`. Of the empty pressures one was 0. Of the empty cholesterols
Hungary's and these of Long Beach were `?`."""

BATCH, EPOCHS, UPDATES, ROUNDS = 4, 50, 100, 15
"""FLamby's common.py and fed_benchmark.py; 15 is get_nb_max_rounds(100) = 486 // 4 // 4 * 50 // 100."""

Part = tuple[np.ndarray, np.ndarray]
"""Features float32 [N, F] and labels [N]."""
Weights = Callable[[int], torch.nn.Linear]
"""A seed to the initial model."""
Accuracy = dict[str, float]
"""By hospital, and `pooled` for FLamby's `Pooled Test`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The benchmark's tables, each scaled by the mean and deviation of training rows."""

    sites: Mapping[str, tuple[Table, Table]]
    """Hospital to (train, test), scaled by that hospital's own training rows."""
    pooled: tuple[Table, Table]
    """All hospitals' rows, scaled by all training rows: so not the rows of `sites` once more."""


@cache
def data() -> Data:
    """The 740 complete rows, cut into 199/104, 172/89, 30/16 and 85/45 as FLamby's dataset.py does."""
    sides: tuple[list[Part], list[Part]] = ([], [])
    for hospital in HOSPITALS:
        x_NF, y_N = _rows(hospital)
        rarest = min((y_N == label).sum() for label in (0, 1))
        halves = train_test_split(
            np.arange(len(y_N)),
            test_size=1 - 0.66,
            train_size=0.66,
            random_state=43,
            stratify=y_N if rarest > 2 else None,
        )
        for side, index in zip(sides, halves, strict=True):
            side.append((x_NF[index], y_N[index]))
    pooled = [tuple(np.concatenate(arrays) for arrays in zip(*side, strict=True)) for side in sides]
    return Data(
        sites={name: _scaled(train, test) for name, train, test in zip(HOSPITALS, *sides, strict=True)},
        pooled=_scaled(*pooled),
    )


def _rows(hospital: str) -> Part:
    """A hospital's complete rows, in the file's order."""
    text = files("lepton_fl.data").joinpath("bundled", "heart.csv").read_text(encoding="utf-8")
    rows = [row for row in csv.DictReader(text.splitlines()) if row["hospital"] == hospital]
    x, y = [], []
    for number, row in enumerate(rows):
        if not row["trestbps"] and (hospital, number) in ZERO_PRESSURE:
            row["trestbps"] = "0"
        if not row["chol"] and hospital != "hungary" and (hospital, number) not in NO_CHOLESTEROL:
            row["chol"] = "0"
        if all(row[name] for name in (*NUMBERS, *CODES)):
            hot = [row[name] == code for name, codes in CODES.items() for code in codes]
            x.append([float(value) for value in (*(row[name] for name in NUMBERS), *hot)])
            y.append(float(row["disease"]))
    return np.array(x, dtype=np.float32), np.array(y, dtype=np.float32)


def _scaled(train: Part, test: Part) -> tuple[Table, Table]:
    mean_F, std_F = train[0].mean(0), train[0].std(0, ddof=1) + np.float32(1e-9)
    first, second = (_table((x_NF - mean_F) / std_F, y_N) for x_NF, y_N in (train, test))
    return first, second


def _table(x_NF: np.ndarray, y_N: np.ndarray) -> Table:
    return Table(
        x_NF=x_NF.astype(np.float32),
        y_N=y_N,
        unit_N=np.arange(len(y_N)),
        units=len(y_N),
        key_U=np.zeros((len(y_N), 16), dtype=np.uint8),
        time_N=None,
        raw_NC=x_NF.astype(np.float64),
        raw_categorical=(False,) * len(NAMES),
        feature_names=NAMES,
    )


def _study(sites: int, train: Mapping[str, object], privacy: Mapping[str, object]) -> Study:
    """A study of `sites` sites. Its columns are named only: the tables come ready."""
    raw = {
        "study": {"name": "fed-heart-disease"},
        "task": {"kind": "binary", "target": "disease"},
        "privacy": privacy,
        "secure_aggregation": {"enabled": sites > 1, "min_sites": sites},
        "train": {"strategy": "fedavg", "optimizer": "sgd", "spare_rounds": 0, **train},
        "model": {"name": "logreg"},
        "features": {"columns": {name: {"type": "float", "range": [-10, 10]} for name in NAMES}},
    }
    return parse(Study, raw, file="flamby_heart")


def _accuracy(
    study: Study, tables: Mapping[str, tuple[Table, Table]], seed: int, weights: Weights
) -> Accuracy:
    """Run `study` on `tables` from the given weights; share of right answers at threshold 1/2."""
    torch.set_num_threads(1)
    run = prepare(study, tables, seed)
    linear = weights(seed)
    values = (linear.weight.detach().numpy(), linear.bias.detach().numpy())
    run.federation.model = dict(zip(run.federation.model, values, strict=True))
    try:
        run.start()
    finally:
        run.close()
    model: Arrays = run.federation.model
    tests = {**data().sites, "pooled": data().pooled}
    scored = Scorer(study, len(NAMES))(model, tests)
    return {name: float(np.mean((score_N > 0.5) == y_N)) for name, (y_N, score_N) in scored.items()}


def benchmark_weights(seed: int) -> torch.nn.Linear:
    """FLamby's fed_benchmark.py seeds torch and builds its model at once."""
    torch.manual_seed(seed)
    return torch.nn.Linear(len(NAMES), 1)


def privacy_weights(seed: int) -> torch.nn.Linear:
    """FLamby's create_fed_heart_disease_dp_results.py builds a seed's model before it sets the seed.

    So torch's generator has the former seed and has served 21 runs. A run makes 322 iterators over training
    data, each of two draws (its own seed and its sampler's), and four over test data, of one.
    """
    torch.manual_seed(seed - 1)
    for _ in range(21 * (322 * 2 + 4)):
        torch.empty((), dtype=torch.int64).random_()
    return torch.nn.Linear(len(NAMES), 1)


def alone(seed: int, name: str) -> Accuracy:
    """Single-centric training: 50 epochs of Adam on one table, in batches of 4 on average."""
    table = data().pooled if name == "pooled" else data().sites[name]
    units = table[0].units
    train = {
        "rounds": 1,
        "local_steps": math.ceil(units / BATCH) * EPOCHS,
        "optimizer": "adam",
        "lr": 1e-3,
        "sample_rate": BATCH / units,
        "expected_batch": BATCH,
    }
    return _accuracy(_study(1, train, {"noise": "none"}), {name: table}, seed, benchmark_weights)


def federated(
    seed: int, train: Mapping[str, object], privacy: Mapping[str, object], weights: Weights
) -> Accuracy:
    """15 rounds of 100 steps at each hospital, in batches of 4 on average at a hospital of average size.

    Rate and divisor are public and the same everywhere. So a larger hospital's update is larger by itself,
    and the plain mean is, to first order in the learning rate, FLamby's mean weighted by records.
    """
    average = sum(table.units for table, _ in data().sites.values()) / len(HOSPITALS)
    common = {
        "rounds": ROUNDS,
        "local_steps": UPDATES,
        "sample_rate": BATCH / average,
        "expected_batch": BATCH,
    }
    study = _study(len(HOSPITALS), {**common, **train}, privacy)
    return _accuracy(study, data().sites, seed, weights)


def floored_batch() -> float:
    """The divisor that Opacus gave FLamby's private runs, as one for all hospitals.

    int(n / ceil(n / 4)) records, which is 3, 4, 3 and 3 instead of 4; their mean over all records, as
    divisors are averaged.
    """
    sizes = [table.units for table, _ in data().sites.values()]
    return sum(sizes) / sum(n / (n // math.ceil(n / BATCH)) for n in sizes)


def uncorrected(server_lr: float) -> float:
    """Flower's learning rate for steps as long, on average over the rounds, as FLamby's at `server_lr`.

    Flower corrects FedAdam's bias (with the number of the round plus one), FLamby does not: that alone
    makes FLamby's steps four to six times as long.
    """
    factors = [
        math.sqrt(1 - 0.999 ** (number + 1)) / (1 - 0.9 ** (number + 1)) for number in range(1, ROUNDS + 1)
    ]
    return server_lr * statistics.fmean(1 / factor for factor in factors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of the table."""

    label: str
    published_S: tuple[float, ...]
    """FLamby's accuracy by seed."""
    measure: Callable[[int], float]
    """Ours, from the same initial weights as FLamby's run of that seed."""
    first_seed: int = 42

    @property
    def seeds(self) -> range:
        """The seeds that both sides have."""
        return range(self.first_seed, self.first_seed + len(self.published_S))


def _pooled(label: str, right_S: tuple[int, ...], measure: Callable[[int], Accuracy]) -> Case:
    """Judged on `Pooled Test`, where FLamby's accuracies are whole numbers of its 254 rows."""
    published_S = tuple(right / 254 for right in right_S)
    return Case(label=label, published_S=published_S, measure=lambda seed: measure(seed)["pooled"])


def _averaging(label: str, right_S: tuple[int, ...], **train: object) -> Case:
    return _pooled(label, right_S, lambda s: federated(s, train, {"noise": "none"}, benchmark_weights))


def _private(label: str, published_S: tuple[float, ...], epsilon: float | None, divisor: float) -> Case:
    """DP-FedAvg, judged by the mean of the four hospitals. Seed 42 started from an unseeded generator."""
    noise = {"noise": "local", "epsilon": epsilon, "delta": 1e-4, "clip": 1.1}
    privacy = noise if epsilon else {"noise": "none"}

    def measure(seed: int) -> float:
        found = federated(seed, {"lr": 1e-3, "expected_batch": divisor}, privacy, privacy_weights)
        return statistics.fmean(found[name] for name in HOSPITALS)

    return Case(label=label, published_S=published_S, measure=measure, first_seed=43)


_NO_DP, _TEN, _ONE = (
    (0.6917500960338039, 0.742636007874772, 0.7326154806491885, 0.70388066599443),
    (0.6218780010563718, 0.7666879741669068, 0.732958201286853, 0.7014768198405839),
    (0.6038845673677133, 0.7534533155670795, 0.7071878301162009, 0.691064654758475),
)
_FEDADAM = {"strategy": "fedadam", "lr": 0.01, "server_lr": 0.01, "beta_2": 0.999, "tau": 1e-8}
CASES = {
    "pooled": _pooled("pooled", (201, 202, 202, 203, 202), lambda s: alone(s, "pooled")),
    "local-0": _pooled("local, Cleveland", (198, 197, 201, 199, 201), lambda s: alone(s, "cleveland")),
    "local-1": _pooled("local, Hungary", (182, 185, 190, 182, 184), lambda s: alone(s, "hungary")),
    "local-2": _pooled("local, Switzerland", (133, 130, 114, 107, 129), lambda s: alone(s, "switzerland")),
    "local-3": _pooled("local, Long Beach", (148, 149, 168, 147, 164), lambda s: alone(s, "long-beach")),
    "fedavg": _averaging("FedAvg", (191, 194, 194, 178, 193), lr=1e-3),
    "fedprox": _averaging(
        "FedProx", (191, 194, 194, 178, 193), strategy="fedprox", lr=1e-3, proximal_mu=0.01
    ),
    "fedyogi": _averaging(
        "FedYogi",
        (199, 195, 199, 203, 193),
        strategy="fedyogi",
        lr=0.003162,
        server_lr=0.01,
        beta_2=0.999,
        tau=1e-8,
    ),
    "fedadam": _averaging(
        "FedAdam, ours at the same step size",
        (197, 195, 198, 204, 195),
        **{**_FEDADAM, "server_lr": uncorrected(_FEDADAM["server_lr"])},
    ),
    "fedadam-corrected": _averaging(
        "FedAdam, ours at the same server_lr", (197, 195, 198, 204, 195), **_FEDADAM
    ),
    "fedadagrad": _averaging(
        "FedAdagrad, ours without momentum",
        (199, 195, 199, 203, 193),
        strategy="fedadagrad",
        lr=0.003162,
        server_lr=0.316228,
        tau=1e-8,
    ),
    "no-dp": _private("FedAvg of the privacy table", _NO_DP, None, BATCH),
    "dp-10": _private("DP-FedAvg, epsilon 10", _TEN, 10, floored_batch()),
    "dp-1": _private("DP-FedAvg, epsilon 1", _ONE, 1, floored_batch()),
    "dp-10-divisor-4": _private("DP-FedAvg, epsilon 10, ours divided by 4", _TEN, 10, BATCH),
    "dp-1-divisor-4": _private("DP-FedAvg, epsilon 1, ours divided by 4", _ONE, 1, BATCH),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Published and ours, mean over seeds."""

    published: float
    ours: float
    standard_error: float
    """Of the difference, from each side's spread over seeds."""
    paired_error: float
    """Of the difference, from the spread of the seeds' own differences: narrower, since a seed's initial
    weights are the same on both sides."""

    @classmethod
    def of(cls, published_S: tuple[float, ...], ours_S: tuple[float, ...]) -> Comparison:
        by_seed = [ours - published for published, ours in zip(published_S, ours_S, strict=True)]
        variances = statistics.variance(published_S) + statistics.variance(ours_S)
        return cls(
            published=statistics.fmean(published_S),
            ours=statistics.fmean(ours_S),
            standard_error=math.sqrt(variances / len(ours_S)),
            paired_error=math.sqrt(statistics.variance(by_seed) / len(by_seed)),
        )

    @property
    def difference(self) -> float:
        return self.ours - self.published


def measured(key: str, seed: int) -> float:
    """One accuracy; by name, so that another process can be asked for it."""
    return CASES[key].measure(seed)


def row(case: Case, ours_S: tuple[float, ...]) -> str:
    """A case's line of the table."""
    found = Comparison.of(case.published_S, ours_S)
    cells = [
        case.label,
        f"{found.published:.3f} ± {statistics.stdev(case.published_S):.3f}",
        f"{found.ours:.3f} ± {statistics.stdev(ours_S):.3f}",
        f"{found.difference:+.3f}",
        f"{found.standard_error:.3f}",
        f"{found.paired_error:.3f}",
        str(len(ours_S)),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    jobs = [(key, seed) for key, case in CASES.items() for seed in case.seeds]
    found: dict[str, list[float]] = {key: [] for key in CASES}
    with ProcessPoolExecutor() as pool:
        for (key, seed), value in zip(jobs, pool.map(measured, *zip(*jobs, strict=True)), strict=True):
            print(f"{key}, seed {seed}: {value:.4f}", file=sys.stderr)
            found[key].append(value)
    print("| training | published | ours | difference | standard error | paired by seed | seeds |")
    print("|---|---|---|---|---|---|---|")
    for key, case in CASES.items():
        print(row(case, tuple(found[key])))


if __name__ == "__main__":
    main()
