"""Opacus as a peer of the speed benchmarks: its step in each of its modes, its sampling, its way of an epoch.

Runs in the peer's environment: nothing of ours but models.py and worker.py.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import torch
import worker
from federation import CLIP, LR, STEPS, Federation
from models import median_norm, model_of, records_of
from opacus import PrivacyEngine
from opacus.data_loader import DPDataLoader
from opacus.grad_sample.utils import prepare_module
from opacus.layers import DPGRU
from opacus.optimizers import get_optimizer_class
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# What it says of its generator is known: it is no privacy, and this is a benchmark.
warnings.filterwarnings("ignore", module="opacus")
warnings.filterwarnings("ignore", module="torch")


class Step:
    """Opacus's step of DP-SGD in one of its modes, on the same batch again and again."""

    def __init__(self, case: str, batch: int, mode: str, noise: float) -> None:
        model = model_of(case)
        self.x_BF, self.y_B = records_of(case, batch)
        self.index_B = torch.arange(batch)
        clip = median_norm(model, self.x_BF[:64], self.y_B[:64])
        for name, module in model.named_children():
            if isinstance(module, nn.GRU):
                private = DPGRU(module.input_size, module.hidden_size, batch_first=True)
                private.load_state_dict(module.state_dict())
                setattr(model, name, private)
        of_ghost = {"max_grad_norm": clip, "use_ghost_clipping": True} if mode == "ghost" else {}
        self.module = prepare_module(model, mode, batch_first=True, loss_reduction="mean", **of_ghost)
        self.optimizer = get_optimizer_class("flat", False, mode)(
            torch.optim.SGD(model.parameters(), lr=1e-3),
            noise_multiplier=noise,
            max_grad_norm=clip,
            expected_batch_size=batch,
            loss_reduction="mean",
        )
        self.loss: Any = nn.BCEWithLogitsLoss()
        if mode == "ghost":
            self.loss = DPLossFastGradientClipping(self.module, self.optimizer, self.loss, "mean")

    def backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        x_BF, y_B = self.x_BF[self.index_B], self.y_B[self.index_B]
        self.loss(self.module(x_BF), y_B).backward()

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self.backward()
            self.optimizer.step()

    def clipped_sum(self) -> dict[str, Tensor]:
        """By parameter."""
        self.backward()
        self.optimizer.pre_step()
        batch = self.optimizer.expected_batch_size
        return {
            name.removeprefix("_module."): p.grad * batch
            for name, p in self.module.named_parameters()
            if p.grad is not None
        }


@cache
def _timed(case: str, batch: int, mode: str, noise: float, seconds: float) -> worker.Timed:
    return worker.Timed(Step(case, batch, mode, noise), seconds)


def step(case: str, batch: int, mode: str, noise: float, seconds: float) -> dict[str, Any]:
    """CPU and wall seconds of a step."""
    return _timed(case, batch, mode, noise, seconds)()


def clipped(case: str, batch: int, mode: str, path: str) -> dict[str, Any]:
    """The clipped sum, without noise, written to `path`."""
    found = Step(case, batch, mode, 0.0).clipped_sum()
    np.savez(path, **{name: total.detach().numpy() for name, total in found.items()})
    return {}


def forget() -> dict[str, Any]:
    """Drop what is kept of the cases so far."""
    _timed.cache_clear()
    return {}


# Sampling


class Epoch:
    """Batches of a table by Opacus's loader: Poisson sampling."""

    def __init__(self, rows: int, features: int, batch: int) -> None:
        table = TensorDataset(torch.rand(rows, features), torch.rand(rows))
        self.loader = DPDataLoader.from_data_loader(DataLoader(table, batch_size=batch))
        self.sampled = self.steps = 0

    def __call__(self, epochs: int) -> None:
        for _ in range(epochs):
            for x_BF, _ in self.loader:
                self.sampled += len(x_BF)
                self.steps += 1


# A client's epoch, for the simulations: this peer's, pfl's and Flower's


def private_epoch(model: nn.Module, x_NF: Tensor, y_N: Tensor, noise: float) -> None:
    """An epoch of DP-SGD on `model`, in place, as Opacus's tutorials have it."""
    model.train()
    private, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LR),
        # It samples at the rate of one over the number of batches.
        data_loader=DataLoader(TensorDataset(x_NF, y_N), batch_size=-(-len(y_N) // STEPS)),
        noise_multiplier=noise,
        max_grad_norm=CLIP,
    )
    loss = nn.BCEWithLogitsLoss()
    for x_BF, y_B in loader:
        optimizer.zero_grad(set_to_none=True)
        loss(private(x_BF), y_B).backward()
        optimizer.step()
    private.to_standard_module()


def simulate(path: str, rounds: int) -> dict[str, Any]:
    """Clients one after another, and the mean of their models."""
    federation = Federation.read(path)
    model = federation.model()
    for round in range(1, rounds + 1):
        received_L = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
        total_L = np.zeros_like(received_L)
        for client in range(federation.clients):
            local = federation.model(received_L)
            private_epoch(local, *federation.records(client), federation.noise)
            total_L += nn.utils.parameters_to_vector(local.parameters()).detach().numpy()
        model = federation.model(total_L / federation.clients)
        worker.say(round=round)
    return {"auc": federation.auc(model)}


if __name__ == "__main__":
    worker.serve(
        step=step, clipped=clipped, forget=forget, sampling=worker.sampling(Epoch), simulate=simulate
    )
