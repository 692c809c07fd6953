"""Strategies: how the accepted updates become the next model. Flower's own where it has one.

Each is post-processing of what the sites released, with equal weights: it costs no privacy. To Flower's each
adds `state` and `restore`, without which a run that was stopped could not go on as if it had not been. All
compute in float64; the round loop makes the model float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi
from flwr.serverapp.strategy.fedopt import FedOpt

from lepton_fl.messages import from_record, to_record
from lepton_fl.study import STRATEGY_KEYS, Study, Train
from lepton_fl.tasks.arrays import Arrays, group_of, prefixed

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
"""Adam's constants as in Kingma and Ba 2015."""

Rate = Callable[[int], float]
"""The number of an aggregation, from 1, to the server's learning rate in it."""


class Strategy(Protocol):
    """What the round loop asks of a strategy: Flower's interface, and to be stopped and taken up again."""

    fraction_train: float
    min_train_nodes: int
    min_available_nodes: int

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each site; `server_round` is the number of the round, lost ones counted."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next model; `server_round` is the number of the aggregation, lost rounds not counted."""

    def state(self) -> Arrays:
        """What a checkpoint must hold so that a resumed run goes on as if it had not stopped."""

    def restore(self, state: Arrays) -> None:
        """Take up the state of a checkpoint."""


class Lockstep(FedAvg):
    """One step of the server's optimizer for each round: distributed DP-SGD.

    Sites send deltas of minus their noisy mean gradient, so the aggregate differs from the model that was
    sent by minus the cohort's gradient. Adam with bias correction (Kingma and Ba 2015), or plain SGD.
    """

    def __init__(self, *, optimizer: Literal["sgd", "adam"], rate: Rate) -> None:
        super().__init__()
        self._optimizer = optimizer
        self._rate = rate
        self._sent: Arrays = {}
        self._first: Arrays = {}
        self._second: Arrays = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._sent = from_record(arrays, copy=False)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        mean, metrics = super().aggregate_train(server_round, replies)
        if mean is None:
            return None, metrics
        gradient = {n: self._sent[n].astype(np.float64) - a for n, a in from_record(mean, copy=False).items()}
        step = {n: self._step(n, g, server_round) for n, g in gradient.items()}
        return to_record({n: self._sent[n] - step[n] for n in step}), metrics

    def _step(self, name: str, gradient: np.ndarray, number: int) -> np.ndarray:
        rate = self._rate(number)
        if self._optimizer == "sgd":
            return np.asarray(rate * gradient)
        zero = np.zeros_like(gradient)
        first = BETA_1 * self._first.get(name, zero) + (1 - BETA_1) * gradient
        second = BETA_2 * self._second.get(name, zero) + (1 - BETA_2) * gradient**2
        self._first[name], self._second[name] = first, second
        corrected = first / (1 - BETA_1**number)
        scale = np.sqrt(second / (1 - BETA_2**number)) + EPSILON
        return np.asarray(rate * corrected / scale)

    def state(self) -> Arrays:
        """Adam's moments."""
        return prefixed(first=self._first, second=self._second)

    def restore(self, state: Arrays) -> None:
        """Take up Adam's moments."""
        self._first, self._second = group_of(state, "first"), group_of(state, "second")


class StatelessFedAvg(FedAvg):
    """Flower's FedAvg, with the empty state that it has. Of fedprox too.

    Flower's FedProx adds to FedAvg a `proximal-mu` in each message, which a server could change from one
    site or round to the next. A site takes it from the study instead, so nothing is left to add.
    """

    def state(self) -> Arrays:
        """Nothing: the model is all there is."""
        return {}

    def restore(self, state: Arrays) -> None:
        """Nothing to take up."""


class ResumableFedAvgM(FedAvgM):
    """Flower's FedAvgM (Hsu et al. 2019): SGD with momentum on minus the mean update."""

    def __init__(self, *, rate: Rate, server_momentum: float) -> None:
        super().__init__(server_momentum=server_momentum)
        # Flower decides here, by rate 1 and momentum 0, to leave the optimizer out; ours may change.
        self.server_opt = True
        self._rate = rate

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        # Flower goes on from its own last result, in float64; the sites, and a resumed run, from float32.
        self.current_arrays = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.server_learning_rate = self._rate(server_round)
        return super().aggregate_train(server_round, replies)

    def state(self) -> Arrays:
        """The momentum, by place: Flower keeps a list in the order of the model's names."""
        return {str(place): array for place, array in enumerate(self.momentum_vector or [])}

    def restore(self, state: Arrays) -> None:
        """Take up the momentum."""
        self.momentum_vector = [state[str(place)] for place in range(len(state))] or None


class _Adaptive(FedOpt):
    """What Flower's FedAdam, FedYogi and FedAdagrad (Reddi et al. 2021) lack to be resumed and scheduled.

    As in Flower, v begins at 0 and not at tau^2, and FedAdam corrects its bias with the number of the
    aggregation plus one, where Kingma and Ba (2015) do with the number.
    """

    def __init__(self, *, rate: Rate, **constants: float) -> None:
        super().__init__(**constants)  # type: ignore[arg-type]  # the floats among the parent's parameters
        self._rate = rate

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.eta = self._rate(server_round)
        return super().aggregate_train(server_round, replies)

    def state(self) -> Arrays:
        """The means of past updates and of their squares."""
        return prefixed(m=self.m_t or {}, v=self.v_t or {})

    def restore(self, state: Arrays) -> None:
        """Take up the means."""
        self.m_t, self.v_t = group_of(state, "m"), group_of(state, "v")


class ResumableFedAdam(_Adaptive, FedAdam):
    """Flower's FedAdam."""


class ResumableFedYogi(_Adaptive, FedYogi):
    """Flower's FedYogi."""


class ResumableFedAdagrad(_Adaptive, FedAdagrad):
    """Flower's FedAdagrad."""


_STEPPING: dict[str, Callable[..., Strategy]] = {
    "fedavgm": ResumableFedAvgM,
    "fedadam": ResumableFedAdam,
    "fedyogi": ResumableFedYogi,
    "fedadagrad": ResumableFedAdagrad,
}


def strategy_of(study: Study) -> Strategy:
    """The study's strategy."""
    train = study.train
    if train.strategy == "lockstep":
        return Lockstep(optimizer=train.optimizer, rate=partial(rate_at, train, train.lr))
    if train.strategy not in _STEPPING:
        return StatelessFedAvg()
    # All are there: a study is refused without what its strategy reads.
    constants = {key: float(getattr(train, key)) for key in STRATEGY_KEYS[train.strategy]}
    server_lr = constants.pop("server_lr")
    return _STEPPING[train.strategy](rate=partial(rate_at, train, server_lr), **constants)


def rate_at(train: Train, full: float, number: int) -> float:
    """The server's learning rate in aggregation `number` = 1, 2, ..., rounds, by the study's schedule.

    After n of w warm-up rounds it is (n + 1) / (w + 1) of `full`; then it falls from `full` by a line, or by
    half a wave of the cosine (Loshchilov and Hutter 2017, eq. 5), to reach 0 one round after the last. It
    depends on what was aggregated and on nothing else, so neither a lost round nor a new process shifts it.
    """
    before, warmup = number - 1, train.warmup_rounds
    if before < warmup:
        return full * (before + 1) / (warmup + 1)
    gone = (before - warmup) / (train.rounds - warmup)
    match train.lr_schedule:
        case "constant":
            return full
        case "linear":
            return full * (1 - gone)
        case "cosine":
            return full * (1 + math.cos(math.pi * gone)) / 2


def expect(strategy: Strategy, sites: int) -> None:
    """Fix the number of sites of the next round: all of the cohort, no more and no fewer."""
    strategy.fraction_train = 1.0
    strategy.min_train_nodes = sites
    strategy.min_available_nodes = sites
