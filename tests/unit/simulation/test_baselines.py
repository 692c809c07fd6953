"""Scores of training records that promise no more than held-out records keep."""

import tomllib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from lepton_fl.cli.texts import study_text
from lepton_fl.config import parse
from lepton_fl.data import Contract, load_dataset
from lepton_fl.simulation.baselines import (
    FOLDS,
    boosting_scores,
    linear_scores,
    out_of_fold,
    own_training_scores,
    pooled_training_scores,
)
from lepton_fl.simulation.run import split_sites
from lepton_fl.study import Study


@pytest.fixture
def by_unit(tables):
    """Site `d` with two records of each unit."""
    table = tables["d"]
    return table.subset(np.repeat(np.arange(len(table)), 2))


def test_every_record_is_scored_by_who_has_not_seen_its_unit(by_unit):
    """Both records of a unit are in one fold, and in no table that trains for it."""
    seen = []

    def fit(train, test):
        assert not {k.tobytes() for k in train.key_U} & {k.tobytes() for k in test.key_U}
        seen.append(len(test))
        return test.x_NF[:, 0].astype(float)

    score_N = out_of_fold(by_unit, fit, np.random.default_rng(0))

    assert len(seen) == FOLDS
    assert np.array_equal(score_N, by_unit.x_NF[:, 0])


def test_each_fold_has_its_share_of_positive_units(tables):
    """Rare positives dealt out at random would leave folds without any."""
    positives = []

    def fit(train, test):
        positives.append(test.positives)
        return np.zeros(len(test))

    out_of_fold(tables["d"], fit, np.random.default_rng(0))

    assert max(positives) - min(positives) <= 1


def test_one_unit_is_scored_by_the_base_rate(tables):
    """There is nobody else to learn from."""
    alone = tables["a"].subset(np.zeros(3, dtype=np.int64))

    assert set(out_of_fold(alone, linear_scores, np.random.default_rng(0))) == {alone.y_N[0]}


def test_boosting_knows_its_own_records_by_heart(splits):
    """Scored by the model that learnt them they are nearer to their labels than any other record."""
    train, _ = splits["d"]
    in_fold_N = boosting_scores(train, train, 0)

    y_N, score_N = own_training_scores(splits, 0, "local")["d"]

    assert np.array_equal(y_N, train.y_N)
    assert np.abs(in_fold_N - y_N).mean() < np.abs(score_N - y_N).mean() * 0.8


def test_boosting_is_no_straw_man_where_positives_are_rare():
    """One in five hundred, as card fraud: without a penalty on its leaves it ranks little above chance."""
    rng = np.random.default_rng(0)

    def made():
        y_N = (np.arange(20_000) < 40).astype(np.float32)
        raw_NC = rng.normal(size=(20_000, 20))
        raw_NC[:40, :4] += 2.0
        return SimpleNamespace(y_N=y_N, raw_NC=raw_NC, raw_categorical=(False,) * 20)

    train, test = made(), made()

    assert average_precision_score(test.y_N, boosting_scores(train, test, 0)) > 0.4


def test_boosting_is_no_straw_man_on_a_few_hundred_records():
    """Three hospitals' own, on two splits: at a rate of 0.1 with 31 leaves their mean AUC is .79."""
    raw = tomllib.loads(study_text("heart", epsilon=1.0))
    study = parse(Study, raw, file="study.toml")
    tables = load_dataset("heart", Contract.of(study))
    # Almost all of its patients are ill: a handful of held-out negatives tells of luck.
    del tables["switzerland"]

    found = [
        roc_auc_score(test.y_N, boosting_scores(train, test, 0))
        for seed in (0, 1)
        for train, test in split_sites(tables, study, seed).values()
    ]

    assert np.mean(found) > 0.81


def test_the_pool_takes_the_kind_of_model_that_its_training_records_favour(splits):
    """A line for what a line divides, trees for what none does; held-out labels are not looked at."""
    rng = np.random.default_rng(0)

    def kind_for(label):
        made = {}
        for site, (train, test) in splits.items():
            x_NF = rng.uniform(-1, 1, (len(train), train.x_NF.shape[1])).astype(np.float32)
            raw_NC = x_NF[:, : train.raw_NC.shape[1]].astype(np.float64)
            y_N = label(x_NF).astype(np.float32)
            made[site] = (replace(train, x_NF=x_NF, raw_NC=raw_NC, y_N=y_N), replace(test, y_N=1 - test.y_N))
        return pooled_training_scores(made, 0, "auc")[0]

    assert kind_for(lambda x_NF: x_NF[:, 0] + x_NF[:, 1] > 0) == "linear"
    assert kind_for(lambda x_NF: np.abs(x_NF[:, 0]) > 0.5) == "local"


def test_every_arm_scores_every_training_record(splits):
    """In the order of the site's own table."""
    _, pooled = pooled_training_scores(splits, 0, "auc")
    for scores in (own_training_scores(splits, 0, "linear"), pooled):
        for site, (train, _) in splits.items():
            y_N, score_N = scores[site]
            assert np.array_equal(y_N, train.y_N)
            assert score_N.shape == y_N.shape
            assert score_N[y_N == 1].mean() > score_N[y_N == 0].mean()
