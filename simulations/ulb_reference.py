"""Card fraud on ULB's payments: logistic regression as published, and through this library, as one table.

    lepton-fl data get ulb
    python simulations/ulb_reference.py > ulb.md

The Machine Learning Group of ULB (Dal Pozzolo et al. 2015) published 284,807 payments in order of time.
Training is on the first 80 %, the test on the other 56,962, of which 75 are frauds. The study is
that of `lepton-fl quickstart ulb`; its six banks are cut from one table at random, so they are artificial.

N = payments, F = features.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lepton_fl.cli.texts import study_text
from lepton_fl.config import parse
from lepton_fl.data import Contract, Table, load_dataset, partition, split
from lepton_fl.results import Interval
from lepton_fl.simulation.baselines import linear_scores
from lepton_fl.simulation.run import Scorer, prepare
from lepton_fl.study import Study, override
from lepton_fl.tasks.metrics import Bootstrap

BANKS = 6
SEEDS = (0, 1, 2, 3, 4)
PUBLISHED = {"auprc": 0.750, "auc": 0.980}
"""Of logistic regression on this split, with one set of test payments."""
NO_NOISE: dict[str, object] = {"privacy.noise": "none"}

Scores = Callable[[int], np.ndarray]
"""A seed to the test payments' scores [N]."""


@cache
def study() -> Study:
    """The study of `lepton-fl quickstart ulb`, at epsilon 1, with shared noise."""
    shipped = parse(Study, tomllib.loads(study_text("ulb", epsilon=1.0)), file="ulb.study.toml")
    return override(shipped, {"privacy.noise": "shared", "secure_aggregation.enabled": True})


@cache
def tables() -> tuple[Table, Table]:
    """Payments before the study's cutoff and from it on, as its contract encodes them."""
    table = load_dataset("ulb", Contract.of(study()))["ulb"]
    # By time no key is asked; the split takes one all the same.
    return split(table, study().evaluation, bytes(16))


def as_published(_: int) -> np.ndarray:
    """Scores [N] of scikit-learn's logistic regression on z-scores, with the logarithm of the amount."""
    amount = [name for name, _ in Contract.of(study()).columns].index("amount")
    features = [table.raw_NC.copy() for table in tables()]
    for raw_NC in features:
        raw_NC[:, amount] = np.log1p(raw_NC[:, amount])
    scaler = StandardScaler().fit(features[0])
    train_NF, test_NF = (scaler.transform(raw_NC) for raw_NC in features)
    model = LogisticRegression(max_iter=2000).fit(train_NF, tables()[0].y_N)
    score_N: np.ndarray = model.predict_proba(test_NF)[:, 1]
    return score_N


def as_encoded(_: int) -> np.ndarray:
    """Scores [N] of scikit-learn's logistic regression on the study's own encoding by public ranges."""
    return linear_scores(*tables())


def federated(seed: int, changes: dict[str, object]) -> np.ndarray:
    """Scores [N] of the study's model after a simulated run over artificial banks."""
    torch.set_num_threads(1)
    train, test = tables()
    agreed = override(study(), changes)
    banks = partition(train, "iid", BANKS, np.random.default_rng(seed))
    run = prepare(agreed, {f"bank-{i + 1}": (bank, test) for i, bank in enumerate(banks)}, seed)
    try:
        run.start()
    finally:
        run.close()
    scored = Scorer(agreed, train.x_NF.shape[1])(run.federation.model, {"test": (train, test)})
    return scored["test"][1]


CASES: dict[str, tuple[Scores, tuple[int, ...]]] = {
    "scikit-learn, z-scores, as published": (as_published, SEEDS[:1]),
    "scikit-learn, encoded by public ranges": (as_encoded, SEEDS[:1]),
    "six banks, no privacy": (partial(federated, changes=NO_NOISE), SEEDS),
    "six banks, epsilon 1, shared noise": (partial(federated, changes={}), SEEDS),
    "six banks, epsilon 1, local noise": (partial(federated, changes={"privacy.noise": "local"}), SEEDS),
}


def judged(score_SN: list[np.ndarray]) -> dict[str, Interval]:
    """Both metrics with 95 % intervals over seeds and test payments."""
    scored = [{"test": (tables()[1].y_N, score_N)} for score_N in score_SN]
    return {
        metric: Bootstrap(metric, {"case": scored}, seed=0, same_records=True).judge("case")[1]
        for metric in PUBLISHED
    }


def measured(label: str, seed: int) -> np.ndarray:
    """One case's scores [N]; by name, so that another process can be asked for it."""
    return CASES[label][0](seed)


def main() -> None:
    # Before the processes part, so that each has it.
    train, test = tables()
    counts = f"{len(train):,} payments to train on, {len(test):,} to test, {test.positives} of them fraud"
    print(counts, file=sys.stderr)
    jobs = [(label, seed) for label, (_, seeds) in CASES.items() for seed in seeds]
    found: dict[str, list[np.ndarray]] = {label: [] for label in CASES}
    with ProcessPoolExecutor() as pool:
        results = pool.map(measured, *zip(*jobs, strict=True))
        for (label, seed), score_N in zip(jobs, results, strict=True):
            print(f"{label}, seed {seed}", file=sys.stderr)
            found[label].append(score_N)
    print("| logistic regression | AUPRC [95 %] | less .750 | AUC [95 %] | less .980 | seeds |")
    print("|---|---|---|---|---|---|")
    for label, score_SN in found.items():
        cells = [label]
        for metric, value in judged(score_SN).items():
            cells += [f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"]
            cells += [f"{value.mean - PUBLISHED[metric]:+.3f}"]
        print(f"| {' | '.join(cells)} | {len(score_SN)} |")


if __name__ == "__main__":
    main()
