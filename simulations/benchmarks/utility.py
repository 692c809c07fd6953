"""What privacy costs: shared noise, local noise and one trusted curator at the same epsilon.

    lepton-fl data get ulb
    python simulations/benchmarks/utility.py --resume utility.jsonl --write docs/utility.md

Every run is the library's own, sites with ledgers and a server, with the sums of secure aggregation formed
without masks, which changes no bit of a model. A finished run is a line of the file behind `--resume`: the
command may be stopped at any time, and given again goes on; `--data`, `--seeds` and the other choices do a
part. The table is of what the file holds, and says how many seeds each figure has.

The last table is of simulated cards (simulations/cards.py), whose customers have many payments: what the unit
costs, a payment or a customer, at one epsilon.

A seed draws the held-out quarter (of ULB the last fifth in time is held out, whatever the seed; of the
cards the payments too), who is at which site, the first parameters and every noise. All arms of a seed have
the same held-out records, and the same records to train on: an arm is where they are, and how much noise.

N = records.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import math
import statistics
import sys
import tomllib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from lepton_fl.cli.texts import study_text
from lepton_fl.config import parse
from lepton_fl.data import Contract, Table, load_dataset, load_table, partition, pool, split
from lepton_fl.data.read import batches
from lepton_fl.privacy import Guarantee
from lepton_fl.simulation.run import Scorer, prepare
from lepton_fl.study import Study, override
from lepton_fl.tasks.metrics import evaluate
from lepton_fl.training import SimulationNoise

sys.path.insert(0, str(Path(__file__).parents[1]))
import cards

SEEDS = 12
SITES = (4, 10)
EPSILONS = (0.5, 1.0, 3.0)
COLLUDERS = 1
MARKER = "<!-- written by simulations/benchmarks/utility.py -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One public table, and the study on it: chosen once, by the curator at epsilon 1, for all arms."""

    title: str
    figures: tuple[str, ...]
    changes: dict[str, object]
    z_scores: bool = False
    """Features by the mean and deviation of all training records, as no site may: for comparison."""


EVERY = {"train.rounds": 200, "train.spare_rounds": 0, "model.name": "logreg", "train.optimizer": "adam"}
SMALL = {"train.sample_rate": 0.1, "privacy.delta": 1e-5}
CASES = {
    "cancer": Case(
        title="breast cancer",
        figures=("accuracy", "auc"),
        changes=SMALL | {"privacy.clip": 0.3, "train.lr": 0.1},
    ),
    "cancer-z": Case(
        title="breast cancer, z-scores",
        figures=("accuracy", "auc"),
        changes=SMALL | {"privacy.clip": 0.3, "train.lr": 0.03},
        z_scores=True,
    ),
    "heart": Case(
        title="heart disease",
        figures=("accuracy", "auc"),
        changes=SMALL | {"privacy.clip": 0.3, "train.lr": 0.03},
    ),
    "ulb": Case(title="card fraud (ULB)", figures=("auprc",), changes={}),
    "cards": Case(title="simulated cards", figures=("auprc",), changes={"privacy.delta": 1e-5}),
}
CUSTOMERS, BANKS, CARDS_EPSILON = 8000, 4, 3.0
OF_CUSTOMERS = {"privacy.unit": "customer_id"}
UNITS: dict[str, dict[str, object]] = {
    "record": {"privacy.unit": "record"},
    "customer, sum": OF_CUSTOMERS,
    "customer, mean": OF_CUSTOMERS | {"privacy.unit_gradient": "mean"},
    "customer, sum of 8": OF_CUSTOMERS | {"privacy.max_records_per_unit": 8},
}
"""Arms of the cards; all with shared noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One figure of the table, but for its seeds."""

    data: str
    arm: str
    """shared, local, curator or none; of the cards, one of `UNITS` or none."""
    sites: int = 1
    epsilon: float = 0.0
    """0 without noise."""


def cells(data: Sequence[str], sites: Sequence[int], epsilons: Sequence[float]) -> Iterator[Cell]:
    """All of the table, the quick ones first."""
    for name in data:
        if name == "cards":
            yield Cell(data=name, arm="none", sites=BANKS)
            for arm in UNITS:
                yield Cell(data=name, arm=arm, sites=BANKS, epsilon=CARDS_EPSILON)
            continue
        yield Cell(data=name, arm="none")
        for epsilon in epsilons:
            yield Cell(data=name, arm="curator", epsilon=epsilon)
        for n in sites:
            for epsilon in epsilons:
                for arm in ("shared", "local"):
                    yield Cell(data=name, arm=arm, sites=n, epsilon=epsilon)


def study_of(cell: Cell, batch: float) -> Study:
    """The study of one cell, whose sites have expected batches of so many units."""
    case = CASES[cell.data]
    template = "fraud" if cell.data == "cards" else cell.data.removesuffix("-z")
    raw = tomllib.loads(study_text(template, epsilon=1.0))
    if cell.data == "cards":
        raw["features"] |= tomllib.loads(cards.COLUMNS)["features"]
    agreed = parse(Study, raw, file=f"{template}.study.toml")
    together = cell.arm == "shared" or cell.arm in UNITS
    noise = "shared" if together else "none" if cell.arm == "none" else "local"
    changes = {
        **EVERY,
        **case.changes,
        **UNITS.get(cell.arm, {}),
        "train.expected_batch": batch,
        "privacy.noise": noise,
        "secure_aggregation.enabled": together,
        "secure_aggregation.min_sites": cell.sites,
        "secure_aggregation.colluders": COLLUDERS if together else 0,
    }
    if cell.arm == "none":
        changes = {key: value for key, value in changes.items() if key != "privacy.delta"}
    else:
        changes["privacy.epsilon"] = cell.epsilon
    return override(agreed, changes)


@lru_cache(maxsize=len(CASES))
def whole(data: str, seed: int) -> Table:
    """The table, its natural sites in one; the cards are drawn."""
    contract = Contract.of(study_of(Cell(data=data, arm="none"), 1.0))
    if data != "cards":
        return pool(list(load_dataset(data.removesuffix("-z"), contract).values()))
    header, rows = cards.payments(CUSTOMERS, np.random.default_rng(seed))
    return load_table(contract, batches(header, rows, contract, source=data), source=data)


def by_record(table: Table) -> Table:
    """The same records, each a unit."""
    return replace(table, unit_N=np.arange(len(table)), units=len(table), key_U=table.key_U[table.unit_N])


def run(cell: Cell, seed: int) -> dict[str, float]:
    """Accuracy, AUC and average precision on held-out records, of one run."""
    rule = study_of(cell, 1.0)
    table = whole(cell.data, seed if cell.data == "cards" else 0)
    train, test = split(table, rule.evaluation, SimulationNoise(seed, "utility").key("split"))
    if CASES[cell.data].z_scores:
        mean_F, spread_F = train.x_NF.mean(0), train.x_NF.std(0)
        train, test = (replace(part, x_NF=(part.x_NF - mean_F) / spread_F) for part in (train, test))
    parts = partition(train, "iid", cell.sites, np.random.default_rng(seed))
    if rule.privacy.unit == "record":
        parts = [by_record(part) for part in parts]
    units = sum(part.units for part in parts)
    study = study_of(cell, rule.train.sample_rate * units / cell.sites)
    splits = {f"site-{number:02d}": (part, test) for number, part in enumerate(parts, start=1)}
    started = prepare(study, splits, seed)
    try:
        started.start()
    finally:
        started.close()
    scored = Scorer(study, train.x_NF.shape[1])(started.federation.model, {"test": (train, test)})
    y_N, score_N = scored["test"]
    return {
        "accuracy": float(np.mean((score_N >= 0.5) == (y_N == 1))),
        "auc": evaluate("auc", y_N, score_N),
        "auprc": evaluate("auprc", y_N, score_N),
    }


def factor(cell: Cell) -> str:
    """By what the noise is divided, and what that makes it, of a curator's."""
    if cell.arm in ("none", "curator"):
        return {"none": "no noise", "curator": "1"}[cell.arm]
    guarantee = Guarantee.of(study_of(cell, 1.0))
    shares = guarantee.shares(cell.sites)
    return f"{math.sqrt(cell.sites / shares):.2f} = sqrt({cell.sites} / {shares})"


def finished(path: Path) -> dict[tuple[Cell, int], dict[str, float]]:
    """The runs of the file, by cell and seed; empty where there is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return {(Cell(**line["cell"]), line["seed"]): line["figures"] for line in found}


def table(done: dict[tuple[Cell, int], dict[str, float]], wanted: Sequence[Cell]) -> Iterator[str]:
    """Markdown: for each data set and federation a line by arm, mean and standard error in each cell."""
    epsilons = sorted({cell.epsilon for cell in wanted if cell.epsilon})
    if not epsilons:
        return
    yield (
        f"| data | figure | noise | noise on the sum, of a curator's "
        f"| {' | '.join(f'epsilon {e:g}' for e in epsilons)} |"
    )
    yield "|---" * (4 + len(epsilons)) + "|"
    for data, arm, sites in dict.fromkeys((cell.data, cell.arm, cell.sites) for cell in wanted):
        rows = [Cell(data=data, arm=arm, sites=sites, epsilon=e) for e in epsilons if arm != "none"]
        rows = rows or [Cell(data=data, arm=arm, sites=sites)]
        where = "no privacy" if arm == "none" else f"{arm}, {sites} sites" if sites > 1 else arm
        for name in CASES[data].figures:
            said = [figure(done, cell, name) for cell in rows]
            texts = [CASES[data].title, name, where, factor(rows[0]), *said]
            yield f"| {' | '.join(texts)}{' |' * (len(epsilons) - len(said))} |"


def figure(done: dict[tuple[Cell, int], dict[str, float]], cell: Cell, name: str) -> str:
    """Mean and standard error over the seeds, in per cent, their number; and what it is above the curator's.

    Of cards it is what is above a record as the unit. The difference is taken seed by seed, and so without
    the chance of who was held out.
    """
    arm, sites = ("record", BANKS) if cell.arm in UNITS else ("curator", 1)
    base = replace(cell, arm=arm, sites=sites)
    by_seed = {seed: 100 * figures[name] for (of, seed), figures in done.items() if of == cell}
    bases = {seed: 100 * figures[name] for (of, seed), figures in done.items() if of == base}
    if len(by_seed) < 2:
        return "-"
    said = f"{with_error(by_seed.values())} ({len(by_seed)})"
    shared = [value - bases[seed] for seed, value in by_seed.items() if seed in bases]
    return said if base == cell or len(shared) < 2 else f"{said}, {with_error(shared, sign='+')}"


def with_error(values: Collection[float], *, sign: str = "") -> str:
    """Mean ± standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):{sign}.1f} ± {error:.1f}"


def numbers(text: str) -> tuple[float, ...]:
    """`0.5,1,3`."""
    return tuple(float(part) for part in text.split(","))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--resume", type=Path, default=Path("utility.jsonl"), help="file of finished runs")
    options.add_argument("--data", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    options.add_argument("--sites", type=numbers, default=SITES)
    options.add_argument("--epsilon", type=numbers, default=EPSILONS)
    options.add_argument("--seeds", type=int, default=SEEDS, help="0 only writes the table")
    options.add_argument("--write", type=Path, help="put the tables at the end of this page, docs/utility.md")
    asked = options.parse_args()
    torch.set_num_threads(1)
    data = asked.data.split(",")
    wanted = list(cells(data, [int(n) for n in asked.sites], asked.epsilon))
    done = finished(asked.resume)
    for seed in range(asked.seeds):
        for cell in wanted:
            if (cell, seed) in done:
                continue
            done[cell, seed] = run(cell, seed)
            line = {"cell": asdict(cell), "seed": seed, "figures": done[cell, seed]}
            with asked.resume.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), file=sys.stderr)
    parts = [[cell for cell in wanted if (cell.data == "cards") is of_cards] for of_cards in (False, True)]
    text = "\n".join(line for part in parts if part for line in (*table(done, part), ""))
    if asked.write is None:
        print(text, end="")
    else:
        kept, marker, _ = asked.write.read_text().partition(MARKER)
        asked.write.write_text(f"{kept}{marker}\n\n{text}")


if __name__ == "__main__":
    main()
