"""The models of the speed benchmarks, and records for them. Needs torch alone: every peer reads it.

B records in a batch, F features, T tokens or time steps, D width. No model normalises across records. Each
gives one logit a record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

FEATURES = 30
"""Of a table."""
STEPS, CHANNELS = 32, 8
"""Of a series: 32 steps of 8 numbers."""
SIDE = 28
"""Of an image of one channel."""


def linear() -> nn.Module:
    """[B, F] to [B], logistic regression."""
    return nn.Sequential(nn.Linear(FEATURES, 1), nn.Flatten(0))


def mlp() -> nn.Module:
    """Two hidden layers, tanh."""
    return nn.Sequential(
        nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(0)
    )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD + self.inner(x_BD)


def resnet(width: int = 128, blocks: int = 3) -> nn.Module:
    """Tabular ResNet (Gorishniy et al. 2021, eq. 2), with LayerNorm for their BatchNorm."""
    return nn.Sequential(
        nn.Linear(FEATURES, width),
        *(_Residual(width) for _ in range(blocks)),
        nn.LayerNorm(width),
        nn.ReLU(),
        nn.Linear(width, 1),
        nn.Flatten(0),
    )


class _Attention(nn.Module):
    """Of linears and two products, which every way to per-record gradients knows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (
            layer(x_BTD).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weight = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        return self.out((weight @ v).transpose(1, 2).flatten(2))


class FTTransformer(nn.Module):
    """A token for each feature, and one that is read out (Gorishniy et al. 2021, section 3.3)."""

    def __init__(self, width: int = 32, blocks: int = 2, heads: int = 4) -> None:
        super().__init__()
        # A token is x * weight + bias; as embeddings, which every way to per-record gradients knows.
        self.weight = nn.Embedding(FEATURES + 1, width)
        self.bias = nn.Embedding(FEATURES + 1, width)
        self.attentions = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), _Attention(width, heads)) for _ in range(blocks)
        )
        self.forwards = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
            )
            for _ in range(blocks)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 1), nn.Flatten(0))

    def forward(self, x_BF: Tensor) -> Tensor:
        x_BT = functional.pad(x_BF, (1, 0), value=1.0)
        token_BT = torch.arange(FEATURES + 1, device=x_BF.device).repeat(len(x_BF), 1)
        x_BTD = x_BT.unsqueeze(-1) * self.weight(token_BT) + self.bias(token_BT)
        for attention, forward in zip(self.attentions, self.forwards, strict=True):
            x_BTD = x_BTD + attention(x_BTD)
            x_BTD = x_BTD + forward(x_BTD)
        logit_B: Tensor = self.head(x_BTD[:, 0])
        return logit_B


class GRU(nn.Module):
    """One layer over the series, read out at its end."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.gru = nn.GRU(CHANNELS, width, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        state_BTD, _ = self.gru(x_BF.unflatten(1, (STEPS, CHANNELS)))
        logit_B1: Tensor = self.head(state_BTD[:, -1])
        return logit_B1.squeeze(-1)


def cnn() -> nn.Module:
    """Opacus's own example for MNIST (Papernot et al. 2021), with one logit."""
    return nn.Sequential(
        nn.Unflatten(1, (1, SIDE, SIDE)),
        nn.Conv2d(1, 16, 8, stride=2, padding=3),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 1),
        nn.Flatten(0),
    )


def cifar_cnn() -> nn.Module:
    """pfl-research's `simple_cnn` for CIFAR10, ten classes, without its dropout."""
    return nn.Sequential(
        nn.Unflatten(1, (3, 32, 32)),
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(14 * 14 * 64, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model that is measured."""

    title: str
    build: Callable[[], nn.Module]
    features: int


CASES = {
    "linear": Case(title="logistic regression", build=linear, features=FEATURES),
    "mlp": Case(title="MLP 30-64-32-1", build=mlp, features=FEATURES),
    "resnet": Case(title="tabular ResNet 128x3", build=resnet, features=FEATURES),
    "ft": Case(title="FT-Transformer 32x2", build=FTTransformer, features=FEATURES),
    "gru": Case(title="GRU 64, 32 steps", build=GRU, features=STEPS * CHANNELS),
    "cnn": Case(title="CNN 28x28", build=cnn, features=SIDE * SIDE),
}


def model_of(case: str) -> nn.Module:
    """With the same parameters in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return CASES[case].build()


def records_of(case: str, count: int) -> tuple[Tensor, Tensor]:
    """[count, F] features in [-1, 1] and labels, the same in every process."""
    draws = torch.Generator().manual_seed(2)
    x_BF = torch.rand(count, CASES[case].features, generator=draws) * 2 - 1
    return x_BF, torch.randint(0, 2, (count,), generator=draws).float()


def median_norm(model: nn.Module, x_BF: Tensor, y_B: Tensor) -> float:
    """Of one record's gradient: a clip at which every second record is clipped."""
    norms = []
    for at in range(len(y_B)):
        loss = functional.binary_cross_entropy_with_logits(model(x_BF[at : at + 1]), y_B[at : at + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(torch.stack([g.norm() for g in gradients]).norm())
    return float(torch.stack(norms).median())


def auc(score_N: Tensor, y_N: Tensor) -> float:
    """Area under the ROC curve, of scores without ties."""
    rank_N = torch.empty(len(score_N), dtype=torch.float64)
    rank_N[score_N.argsort()] = torch.arange(1, len(score_N) + 1, dtype=torch.float64)
    positives = int((y_N == 1).sum())
    above = rank_N[y_N == 1].sum() - positives * (positives + 1) / 2
    return float(above / (positives * (len(y_N) - positives)))
