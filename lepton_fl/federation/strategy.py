"""Strategies: how the accepted updates become the next model. Flower's own where it has one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from lepton_fl.messages import from_record, to_record
from lepton_fl.study import Study
from lepton_fl.tasks.arrays import Arrays

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
"""Adam's constants as in Kingma and Ba 2015."""


class Lockstep(FedAvg):
    """One step of the server's optimizer for each round: distributed DP-SGD.

    Sites send deltas of minus their noisy mean gradient, so the aggregate differs from the model that was
    sent by minus the cohort's gradient. Adam with bias correction (Kingma and Ba 2015), or plain SGD.
    Post-processing of what the sites released: costs no privacy.
    """

    def __init__(self, *, optimizer: Literal["sgd", "adam"], lr: float) -> None:
        super().__init__()
        self._optimizer = optimizer
        self._lr = lr
        self._sent: Arrays = {}
        self._steps = 0
        self._first: Arrays = {}
        self._second: Arrays = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._sent = from_record(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        mean, metrics = super().aggregate_train(server_round, replies)
        if mean is None:
            return None, metrics
        gradient = {n: self._sent[n].astype(np.float64) - a for n, a in from_record(mean).items()}
        self._steps += 1
        return to_record({n: self._sent[n] - self._step(n, g) for n, g in gradient.items()}), metrics

    def _step(self, name: str, gradient: np.ndarray) -> np.ndarray:
        if self._optimizer == "sgd":
            return np.asarray(self._lr * gradient)
        zero = np.zeros_like(gradient)
        first = BETA_1 * self._first.get(name, zero) + (1 - BETA_1) * gradient
        second = BETA_2 * self._second.get(name, zero) + (1 - BETA_2) * gradient**2
        self._first[name], self._second[name] = first, second
        corrected = first / (1 - BETA_1**self._steps)
        scale = np.sqrt(second / (1 - BETA_2**self._steps)) + EPSILON
        return np.asarray(self._lr * corrected / scale)

    def state(self) -> Arrays:
        """What a checkpoint must hold so that a resumed run goes on as if it had not stopped."""
        return {
            "steps": np.asarray(self._steps),
            **{f"first/{name}": array for name, array in self._first.items()},
            **{f"second/{name}": array for name, array in self._second.items()},
        }

    def restore(self, state: Arrays) -> None:
        """Take up the state of a checkpoint."""
        self._steps = int(state["steps"])
        self._first = _under(state, "first/")
        self._second = _under(state, "second/")


class StatelessFedAvg(FedAvg):
    """Flower's FedAvg, with the empty state that it has."""

    def state(self) -> Arrays:
        """Nothing: the model is all there is."""
        return {}

    def restore(self, state: Arrays) -> None:
        """Nothing to take up."""


Strategy = Lockstep | StatelessFedAvg


def strategy_of(study: Study) -> Strategy:
    """The study's strategy."""
    train = study.train
    if train.strategy == "lockstep":
        return Lockstep(optimizer=train.optimizer, lr=train.lr)
    return StatelessFedAvg()


def expect(strategy: Strategy, sites: int) -> None:
    """Fix the number of sites of the next round: all of the cohort, no more and no fewer."""
    strategy.fraction_train = 1.0
    strategy.min_train_nodes = sites
    strategy.min_available_nodes = sites


def _under(state: Arrays, prefix: str) -> Arrays:
    return {n.removeprefix(prefix): a for n, a in state.items() if n.startswith(prefix)}
