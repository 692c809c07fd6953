"""A task: the loss that is minimised and the metric that judges. B records in a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lepton_fl.errors import ConfigError
from lepton_fl.study import Study
from lepton_fl.tasks.registry import registered

ENTRY_POINTS = "lepton_fl.tasks"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """One kind of prediction problem; register it under entry point group `lepton_fl.tasks`."""

    title: str
    loss: Callable[[Tensor, Tensor], Tensor]
    """Sum over the batch of each record's loss, from [B] outputs and [B] targets. A sum and not a mean:
    each record's gradient must not depend on how many others were sampled."""
    score: Callable[[Tensor], Tensor]
    """[B] outputs to [B] scores in [0, 1]."""


def _binary_loss(logit_B: Tensor, y_B: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logit_B, y_B, reduction="sum")


BINARY = TaskSpec(title="binary classification", loss=_binary_loss, score=torch.sigmoid)
_BUILTIN = {"binary": BINARY}


def registered_tasks() -> dict[str, TaskSpec]:
    """Every task that this installation knows, by the kind a study uses."""
    return registered(ENTRY_POINTS, _BUILTIN, TaskSpec)


def task_of(study: Study) -> TaskSpec:
    """The study's task.

    Raises:
        ConfigError: no such task is installed.
    """
    tasks = registered_tasks()
    if study.task.kind not in tasks:
        raise ConfigError.at(
            f"study {study.study.name}",
            "task.kind",
            found=study.task.kind,
            allowed=", ".join(sorted(tasks)),
        )
    return tasks[study.task.kind]


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model lies."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@torch.no_grad()
def score(model: torch.nn.Module, task: TaskSpec, x_NF: np.ndarray) -> np.ndarray:
    """Scores in [0, 1] for N encoded records, float64 [N]; computed on the device where the model lies."""
    was_training = model.training
    model.eval()
    try:
        score_N = task.score(model(torch.from_numpy(x_NF).to(device_of(model))))
    finally:
        model.train(was_training)
    return score_N.double().cpu().numpy()
