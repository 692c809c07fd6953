"""The models, by name. B records in a batch, F encoded features, H hidden units.

Without normalisation across records: a batch statistic would let one record move every other record's
gradient, and no clip bounds that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lepton_fl.errors import ConfigError
from lepton_fl.study import Study
from lepton_fl.tasks.registry import registered

ENTRY_POINTS = "lepton_fl.models"
MAX_PARAMETERS = 20_000_000
"""A site builds a study's model before it can refuse it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model that a study can name; register it under entry point group `lepton_fl.models`.

    `build(study, width)` gives an untrained module from `[B, width]` to `[B]` logits.
    """

    title: str
    build: Callable[[Study, int], nn.Module]


class _OneLogit(nn.Module):
    """[B, F] features to [B] logits."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x_BF: Tensor) -> Tensor:
        logit_B1: Tensor = self.layers(x_BF)
        return logit_B1.squeeze(-1)


def _logreg(_: Study, width: int) -> nn.Module:
    return _OneLogit(nn.Linear(width, 1))


def _mlp(study: Study, width: int) -> nn.Module:
    widths = [width, *study.model.hidden]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers.append(nn.Linear(before, after))
        if study.model.normalization == "layer":
            layers.append(nn.LayerNorm(after))
        # tanh: bounded activations bound the gradient, which suits clipping (Papernot et al. 2021).
        layers.append(nn.Tanh())
    return _OneLogit(*layers, nn.Linear(widths[-1], 1))


LOGREG = ModelSpec(title="logistic regression", build=_logreg)
MLP = ModelSpec(title="multi-layer perceptron, tanh", build=_mlp)
_BUILTIN = {"logreg": LOGREG, "mlp": MLP}


def registered_models() -> dict[str, ModelSpec]:
    """Every model that this installation can train, by the name a study uses."""
    return registered(ENTRY_POINTS, _BUILTIN, ModelSpec)


def build_model(study: Study, width: int, generator: torch.Generator) -> nn.Module:
    """The study's model with public initial weights, on the CPU, in float32.

    The last layer starts at zero and its bias at the log odds of the *declared* prevalence, so that the
    first steps are not spent on learning the base rate (it took AUPRC from .370 to .486 on rare fraud).

    Raises:
        ConfigError: no such model is installed, it has no parameters or too many, or it normalises across
            records.
    """
    models = registered_models()
    if study.model_name not in models:
        raise ConfigError.at(
            f"study {study.study.name}",
            "model.name",
            found=study.model_name,
            allowed=", ".join(["auto", *sorted(models)]),
        )
    # Shapes first, without memory for them.
    with torch.device("meta"):
        numbers = sum(p.numel() for p in models[study.model_name].build(study, width).parameters())
    if not numbers:
        raise ConfigError(f"study {study.study.name}: its model has no parameters to train")
    if numbers > MAX_PARAMETERS:
        raise ConfigError(
            f"study {study.study.name}: its model has {numbers:,} parameters, allowed: {MAX_PARAMETERS:,}"
        )
    # A plug-in's layers draw from the global generator; the same public start must come out everywhere.
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        model = models[study.model_name].build(study, width).float()
    _refuse_mixing(model)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for layer in linears:
            bound = 1 / math.sqrt(layer.in_features)
            layer.weight.uniform_(-bound, bound, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()
        if linears:
            linears[-1].weight.zero_()
            if study.task.prevalence is not None and linears[-1].bias is not None:
                share = study.task.prevalence
                linears[-1].bias.fill_(math.log(share / (1 - share)))
    return model


def _refuse_mixing(model: nn.Module) -> None:
    """Refuse what carries one record's trace to another's gradient or past the noise."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"model: layer {name!r} is {type(module).__name__}: BatchNorm mixes the records of a "
                "batch, so one record's influence cannot be bounded; use LayerNorm or none"
            )
    for name, _ in model.named_buffers():
        raise ConfigError(
            f"model: keeps a buffer {name!r} besides its parameters, and would carry it past clip and noise"
        )
