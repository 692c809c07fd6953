"""The binary task: its loss and its score."""

import numpy as np
import pytest
import torch
from torch import nn

from lepton_fl.tasks import task_of
from lepton_fl.tasks.task import score


def test_the_loss_is_a_sum_over_records(make_study):
    """A mean would make a record's gradient depend on how many others were sampled."""
    task = task_of(make_study())
    logit_B, y_B = torch.tensor([0.5, -2.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])

    one_by_one = sum(task.loss(logit_B[[i]], y_B[[i]]) for i in range(3))

    assert task.loss(logit_B, y_B).item() == pytest.approx(one_by_one.item())


def test_scores_are_probabilities_in_double(make_study):
    """One for each record, in [0, 1]."""
    model = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
    x_NF = np.random.default_rng(1).normal(scale=50, size=(20, 2)).astype(np.float32)

    found = score(model, task_of(make_study()), x_NF)

    assert (found.dtype, found.shape) == (np.float64, (20,))
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_mode_of_the_model(make_study, training):
    """A model in training goes on training; dropout is off while it scores."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1), nn.Flatten(0)).train(training)
    x_NF = np.ones((30, 2), np.float32)

    found = score(model, task_of(make_study()), x_NF)

    assert len(set(found)) == 1
    assert model.training is training
