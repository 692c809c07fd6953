"""Early stopping, on what costs no privacy: a public table, or the aggregated updates themselves.

**Formal guarantee.** Both rules are functions of public records and of what the sites have released, so a run
that stops is post-processing of one that does not: the study's promise, calibrated to all rounds, holds. A
smaller one, of the rounds that were run, does not follow: when to stop depends on what was released.
There is no rule on a site's held-out records: each look at them would be a release, and nobody charges it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from lepton_fl.data import Contract, load_table, read_csv
from lepton_fl.errors import ConfigError, DataError
from lepton_fl.study import EarlyStopping, Study
from lepton_fl.tasks import Arrays, build_model, load_arrays, task_of
from lepton_fl.tasks.arrays import group_of, prefixed
from lepton_fl.tasks.metrics import evaluate
from lepton_fl.tasks.task import score


class PublicTable:
    """Records that anybody may see, on which the server may look at the model after each round.

    It reads its own file, under the study's contract: whoever names the file declares it public, and a site's
    `Table` cannot be taken for one.
    """

    def __init__(self, path: Path, study: Study) -> None:
        """Read the CSV file at `path`.

        Raises:
            DataError: it breaks the contract, or has records of one class only.
        """
        contract = Contract.of(study)
        table = load_table(contract, read_csv(path, contract), source=str(path))
        if not 0 < table.positives < len(table):
            raise DataError(
                f"{path}: {table.positives} of {len(table)} records are positive: "
                f"{study.task.metric} needs both classes"
            )
        self.x_NF, self.y_N, self.fingerprint = table.x_NF, table.y_N, table.fingerprint


class Stopping(Protocol):
    """A rule that is asked after each aggregated round."""

    def look(self, done: int, mean: Arrays, model: Arrays) -> str:
        """Why to stop after `done` rounds, the last of which made `model` of its updates' `mean`.

        Empty to go on.
        """

    def state(self) -> Arrays:
        """What a checkpoint must hold so that a resumed run stops where an unbroken one does."""

    def restore(self, state: Arrays) -> None:
        """Take up the state of a checkpoint."""


class OnPublicTable:
    """Stop once the metric on a public table has not risen for `patience` rounds.

    The model stays the last one. The best on so few records would be one chosen by luck as well.
    """

    def __init__(self, rule: EarlyStopping, study: Study, table: PublicTable) -> None:
        self._rule, self._table, self._metric = rule, table, study.task.metric
        self._task = task_of(study)
        self._model = build_model(study, table.x_NF.shape[1], torch.Generator())
        self._best, self._since = -math.inf, 0

    def look(self, done: int, mean: Arrays, model: Arrays) -> str:  # noqa: ARG002 - the other rule's
        rule = self._rule
        load_arrays(self._model, model)
        value = evaluate(self._metric, self._table.y_N, score(self._model, self._task, self._table.x_NF))
        if value > self._best + rule.tolerance:
            self._best, self._since = value, done
        if done < rule.min_rounds or done - self._since < rule.patience:
            return ""
        return (
            f"{self._metric} on the public table has not risen by more than {rule.tolerance:g} above "
            f"{self._best:.4f} for {rule.patience} rounds"
        )

    def state(self) -> Arrays:
        return {"best": np.asarray(self._best), "since": np.asarray(self._since)}

    def restore(self, state: Arrays) -> None:
        self._best, self._since = float(state["best"]), int(state["since"])


class OnUpdates:
    """Stop once the updates have come to point nowhere: their mean is short, beside what it was.

    After every `patience` rounds, the norm of the mean of these rounds' mean updates, before the server's
    own step, is held against the largest such norm so far; below `tolerance` of it, the run stops. A mean and
    not single updates: noise has no direction, so it falls by the root of `patience`, where progress does
    not. Blocks and not a sliding mean: all norms hold the noise of as many rounds, so averaging alone makes
    none of them shorter than another.

    Limits: what noise is left in the mean does not fall, so where it is more than `tolerance` of the first
    norms, as in a small federation at a low epsilon, the run goes to its last round. A model of very few
    numbers may, by luck, have a short block and stop too early; and a short mean says that the updates
    cancel, not that the model is good.
    """

    def __init__(self, rule: EarlyStopping) -> None:
        self._rule = rule
        self._sum: Arrays = {}
        self._largest = 0.0

    def look(self, done: int, mean: Arrays, model: Arrays) -> str:  # noqa: ARG002 - the other rule's
        rule = self._rule
        for name, array in mean.items():
            self._sum[name] = np.asarray(array + self._sum.get(name, 0.0))
        if done % rule.patience:
            return ""
        norm = math.sqrt(sum(float((self._sum[name] ** 2).sum()) for name in mean)) / rule.patience
        self._sum = {}
        self._largest = max(self._largest, norm)
        if done < rule.min_rounds or norm >= rule.tolerance * self._largest:
            return ""
        return (
            f"the mean update of the last {rule.patience} rounds has {norm / self._largest:.2f} of the "
            f"largest norm so far, less than {rule.tolerance:g}"
        )

    def state(self) -> Arrays:
        return {"largest": np.asarray(self._largest), **prefixed(sum=self._sum)}

    def restore(self, state: Arrays) -> None:
        self._largest = float(state["largest"])
        self._sum = group_of(state, "sum")


def stopping_of(study: Study, public: PublicTable | None) -> Stopping | None:
    """The study's rule; None where every round is to be run.

    Raises:
        ConfigError: the study asks for a public table and there is none, or there is one for nothing.
    """
    rule = study.train.early_stopping
    wanted = rule is not None and rule.signal == "public"
    if wanted and public is None:
        raise ConfigError(
            f"study {study.study.name}: train.early_stopping.signal = 'public' needs a public table",
            fix="--public FILE.csv, records that anybody may see",
        )
    if public is not None and not wanted:
        raise ConfigError(
            f"study {study.study.name}: a public table is given, and train.early_stopping does not read it",
            fix="leave --public out, or set train.early_stopping.signal = 'public'",
        )
    if rule is None:
        return None
    return OnUpdates(rule) if public is None else OnPublicTable(rule, study, public)
