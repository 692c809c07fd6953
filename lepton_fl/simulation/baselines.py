"""What the federation is compared with: each site's own gradient boosting, and the pool nobody may form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from lepton_fl.data import Table, pool
from lepton_fl.results import OwnArm
from lepton_fl.tasks.metrics import Metric, Scored, evaluate

Fit = Callable[[Table, Table], np.ndarray]
"""Trains on one table and scores another [N]."""

OWN_LABEL: dict[OwnArm, str] = {
    "local": "own gradient boosting, no privacy",
    "linear": "own logistic regression, no privacy",
}
POOLED_LABEL: dict[OwnArm, str] = {
    "local": "gradient boosting on all records in one place, no privacy",
    "linear": "logistic regression on all records in one place, no privacy",
}
FOLDS = 3


def boosting_scores(train: Table, test: Table, seed: int) -> np.ndarray:
    """Scores [N] of `test` by scikit-learn's HistGradientBoosting fitted to `train`.

    On the raw columns, missing values included, as a site would do without us. A site that has seen one
    class only scores every record alike.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    if len(np.unique(train.y_N)) < 2:
        return np.full(len(test), float(train.y_N[0]))
    # scikit-learn fails on a column without any value, as a small site may have.
    seen_C = ~np.isnan(train.raw_NC).all(axis=0)
    booster = HistGradientBoostingClassifier(
        categorical_features=np.asarray(train.raw_categorical)[seen_C],
        # On a few hundred rows its validation part would cost more than it saves.
        early_stopping=False,
        # Slow, small and shrunken trees: of the settings tried on heart, credit and ulb, one near the best on
        # all three. At scikit-learn's defaults (0.1, 31 leaves, no penalty) the hospitals' own AUC was .07
        # lower, the banks' on credit .026, and the AUPRC on card fraud .02, not .78: such a comparison
        # would flatter us.
        learning_rate=0.05,
        max_leaf_nodes=8,
        l2_regularization=10.0,
        random_state=seed % 2**32,
    )
    booster.fit(train.raw_NC[:, seen_C], train.y_N)
    score_N: np.ndarray = booster.predict_proba(test.raw_NC[:, seen_C])[:, 1]
    return score_N


def linear_scores(train: Table, test: Table) -> np.ndarray:
    """Scores [N] of `test` by scikit-learn's logistic regression on `train`, encoded as the study says.

    A few hundred rows are often better served by it than by boosting: a comparison without it would
    flatter us.
    """
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(train.y_N)) < 2:
        return np.full(len(test), float(train.y_N[0]))
    model = LogisticRegression(max_iter=2000).fit(train.x_NF, train.y_N)
    score_N: np.ndarray = model.predict_proba(test.x_NF)[:, 1]
    return score_N


def out_of_fold(train: Table, fit: Fit, rng: np.random.Generator) -> np.ndarray:
    """Scores [N] of the training records themselves, each by a model that has not seen its unit.

    `fit` trains on one table and scores another. A threshold or a calibration must not be set on scores of
    records that boosting knows by heart: they would promise what no held-out record keeps.
    """
    folds = min(FOLDS, train.units)
    if folds < 2:
        return np.full(len(train), float(train.y_N.mean()))
    # Units are dealt out in random order, those with positives first: each fold gets its share of them.
    shuffled_U = rng.permutation(train.units)
    order_U = shuffled_U[np.argsort(~train.positive_U[shuffled_U], kind="stable")]
    fold_U = np.empty(train.units, dtype=np.int64)
    fold_U[order_U] = np.arange(train.units) % folds
    fold_N = fold_U[train.unit_N]
    score_N = np.empty(len(train))
    for fold in range(folds):
        score_N[fold_N == fold] = fit(train.subset(fold_N != fold), train.subset(fold_N == fold))
    return score_N


def own_scores(sites: Mapping[str, tuple[Table, Table]], seed: int, kind: OwnArm) -> dict[str, Scored]:
    """Each site's held-out records, scored by a model of this kind on its own training records alone."""
    fit = _fits(seed)[kind]
    return {name: (test.y_N, fit(train, test)) for name, (train, test) in sites.items()}


def pooled_scores(sites: Mapping[str, tuple[Table, Table]], seed: int, kind: OwnArm) -> dict[str, Scored]:
    """Each site's held-out records, scored by a model of this kind on the training records of all sites."""
    everyone, fit = pool([train for train, _ in sites.values()]), _fits(seed)[kind]
    return {name: (test.y_N, fit(everyone, test)) for name, (_, test) in sites.items()}


def own_training_scores(
    sites: Mapping[str, tuple[Table, Table]], seed: int, kind: OwnArm
) -> dict[str, Scored]:
    """Each site's training records, scored by a model of this kind out of fold."""
    rng, fit = np.random.default_rng(seed), _fits(seed)[kind]
    return {name: (train.y_N, out_of_fold(train, fit, rng)) for name, (train, _) in sites.items()}


def pooled_training_scores(
    sites: Mapping[str, tuple[Table, Table]], seed: int, metric: Metric
) -> tuple[OwnArm, dict[str, Scored]]:
    """The kind of model that does better out of fold on the training records of all sites, and its scores.

    Whoever had all records would choose so, without a look at those held out. By one kind alone the pool
    would come out below what it can do, and the federation too near to it.
    """
    everyone = pool([train for train, _ in sites.values()])
    found = {
        kind: out_of_fold(everyone, fit, np.random.default_rng(seed)) for kind, fit in _fits(seed).items()
    }
    reached = {kind: evaluate(metric, everyone.y_N, score_N) for kind, score_N in found.items()}
    # Boosting where neither is defined: with one class only.
    kind: OwnArm = "linear" if reached["linear"] > reached["local"] else "local"
    ends = np.cumsum([len(train) for train, _ in sites.values()])[:-1]
    parts = np.split(found[kind], ends)
    named = zip(sites.items(), parts, strict=True)
    return kind, {name: (train.y_N, part) for (name, (train, _)), part in named}


def _fits(seed: int) -> dict[OwnArm, Fit]:
    return {"local": partial(boosting_scores, seed=seed), "linear": linear_scores}
