"""A made-up federation that every simulator is given, as one file of arrays. Needs numpy and torch alone.

K clients of 200 to 2,000 records each, N in all, F features; labels from a network that no client has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from models import FEATURES, auc, mlp
from numpy.typing import NDArray
from torch import Tensor, nn

FEWEST, MOST = 200, 2000
"""Records of a client."""
HELD_OUT = 20_000
STEPS = 20
"""Of a client in a round: an epoch in expectation."""
LR = 0.5
CLIP = 1.0
Array = NDArray[np.float32]


def records(count: int, draws: np.random.Generator) -> tuple[Array, Array]:
    """Features in [-1, 1], and labels that depend on them smoothly, not linearly, and not surely."""
    teacher = np.random.default_rng(0)
    hidden_FH, out_H = teacher.normal(size=(FEATURES, 16)), teacher.normal(size=16)
    x_NF = draws.uniform(-1, 1, size=(count, FEATURES)).astype(np.float32)
    logit_N = 2.0 * np.tanh(x_NF @ hidden_FH / 2) @ out_H
    y_N = draws.uniform(size=count) < 1 / (1 + np.exp(-logit_N))
    return x_NF, y_N.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Records, the model to begin with, and how to train."""

    x_NF: Array
    y_N: Array
    start_K: NDArray[np.int64]
    """Where each client's records begin, and the end of the last one's."""
    test_x_NF: Array
    test_y_N: Array
    model_L: Array
    """The first parameters, flat."""
    noise: float
    """Noise multiplier of a step."""

    @classmethod
    def make(cls, clients: int, *, model_L: Array, noise: float) -> Federation:
        """The same for the same number of clients."""
        draws = np.random.default_rng(clients)
        start_K = np.concatenate([[0], np.cumsum(draws.integers(FEWEST, MOST, size=clients, endpoint=True))])
        x_NF, y_N = records(int(start_K[-1]), draws)
        test_x_NF, test_y_N = records(HELD_OUT, draws)
        return cls(
            x_NF=x_NF,
            y_N=y_N,
            start_K=start_K,
            test_x_NF=test_x_NF,
            test_y_N=test_y_N,
            model_L=model_L,
            noise=noise,
        )

    def write(self, path: Path) -> None:
        """Into one file."""
        np.savez(path, **vars(self))

    @classmethod
    def read(cls, path: str) -> Federation:
        """From the file."""
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        return cls(**{**arrays, "noise": float(arrays["noise"])})

    @property
    def clients(self) -> int:
        """How many there are."""
        return len(self.start_K) - 1

    def records(self, client: int) -> tuple[Tensor, Tensor]:
        """Of one client."""
        part = slice(self.start_K[client], self.start_K[client + 1])
        return torch.from_numpy(self.x_NF[part]), torch.from_numpy(self.y_N[part])

    def model(self, model_L: Array | None = None) -> nn.Module:
        """With the first parameters, or those given."""
        model = mlp()
        flat_L = torch.from_numpy(self.model_L if model_L is None else model_L)
        nn.utils.vector_to_parameters(flat_L, model.parameters())
        # Views of one vector till now, which no optimizer should find.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model

    @torch.no_grad()
    def auc(self, model: nn.Module) -> float:
        """On records that no client has."""
        model.eval()
        return auc(model(torch.from_numpy(self.test_x_NF)), torch.from_numpy(self.test_y_N))
