"""DP-SGD at many sites as one computation, for simulations: each site gets what `train_locally` gives it.

K sites, S sampled units of each (of the site with the most; rows of weight 0 fill up the others), R records
of a unit (likewise), B = S x R, F features, L parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from lepton_fl.errors import ConfigError
from lepton_fl.privacy.discrete_gaussian import samples
from lepton_fl.privacy.lattice import Lattice
from lepton_fl.tasks.arrays import Arrays, arrays_of, flatten, unflatten
from lepton_fl.tasks.task import TaskSpec
from lepton_fl.training.bookkeeping import clip_weights, norms
from lepton_fl.training.layers import Explicit, Factor, Outer, Tape
from lepton_fl.training.local import LocalPlan, LocalUpdate, Trainable, inner_optimizer, train_locally
from lepton_fl.training.noise import Noise, SimulationNoise
from lepton_fl.training.sampling import PoissonSampler
from lepton_fl.training.units import RecordsOfUnits

SITES = 64
"""Most sites in one computation: from there on it is the processor's caches that count."""
MEMORY = 1 << 30
"""Bytes, for who names no other."""
TOLERANCE = 1e-4
"""Between the two ways to train, relative to the length of the update: beyond, the slow one is taken."""

_ELEMENTWISE = (
    nn.Identity,
    nn.Tanh,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
)
_PER_PARAMETER = 64
"""Bytes that a parameter of a site takes at most: itself, gradient, sum, integer, noise, Adam's moments."""
_PER_ACTIVATION = 24
"""Bytes that a record's number in or out of a layer takes at most: itself, its gradient, both in float64."""


class Unstackable(Exception):
    """A model that cannot be trained at many sites at once; says which of its layers, or why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One site's table, made ready for all rounds."""

    site: str
    table: Trainable
    records: RecordsOfUnits
    longest: int
    """Records of one unit in a step, at most."""
    noise: Noise

    @classmethod
    def of(cls, site: str, table: Trainable, noise: Noise, plan: LocalPlan) -> Self:
        """Group the table's records by unit, for plans with these rules of units."""
        longest = int(np.bincount(table.unit_N).max())
        return cls(
            site=site,
            table=table,
            records=RecordsOfUnits(
                table.unit_N, table.units, most=plan.most_records, mean=plan.mean_of_records
            ),
            longest=min(longest, plan.most_records or longest),
            noise=noise,
        )

    def expected(self, rate: float) -> float:
        """Records in a step, on average."""
        return rate * len(self.table.y_N)


class Stacked:
    """A model as many models side by side, from [K, B, F] to [K, B]: same layers, parameters of their own.

    Linear layers, layer norms and what works on each number by itself, in modules whose `forward` does not
    care about dimensions in front.
    """

    def __init__(self, model: nn.Module, task: TaskSpec, *, features: int) -> None:
        """Rebuild the model, of so many features; hold a round at two random sites against `train_locally`.

        Raises:
            Unstackable: a layer is of another kind, or the two give something else.
        """
        self.template = arrays_of(model)
        self.flat = torch.empty(0)
        """All parameters, one after another: [K, L], or [L] where they are the same in all models."""
        self.tape = Tape({})
        self._task, self._features = task, features
        self._where: dict[int, _Place] = {}
        self.numbers = 0
        """In and out of all layers, for one record."""
        at = 0
        for parameter in model.parameters():
            self._where[id(parameter)] = slice(at, at + parameter.numel()), parameter.shape
            at += parameter.numel()
        self.size = at
        self._model = self._rebuilt(model, "")
        if self._where:
            raise Unstackable("the model shares parameters between its layers")
        self._try(model)

    def factors(self, x_KBF: Tensor, y_KB: Tensor) -> list[Factor]:
        """Of each record's loss, at the parameters `flat`."""
        self.tape = Tape({})
        output_KB = self._model(x_KBF)
        if output_KB.shape != y_KB.shape:
            raise Unstackable(f"the model makes {list(output_KB.shape)} of {list(x_KBF.shape)}")
        return self.tape.factors(self._task.loss(output_KB.flatten(), y_KB.flatten()))

    def _rebuilt(self, module: nn.Module, name: str) -> nn.Module:
        if type(module) is nn.Linear:
            self.numbers += module.in_features + module.out_features
            return _Linear(self, self._take(module, "weight"), self._take(module, "bias"))
        if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
            self.numbers += 2 * module.normalized_shape[0]
            return _LayerNorm(self, module.eps, self._take(module, "weight"), self._take(module, "bias"))
        elementwise = type(module) in _ELEMENTWISE and not getattr(module, "inplace", False)
        # Not `named_children`, which names a layer that is used twice once.
        children = {key: child for key, child in module._modules.items() if child is not None}
        if not elementwise and (not children or list(module.parameters(recurse=False))):
            raise Unstackable(f"layer {name or 'of the model'} is a {type(module).__name__}")
        found = copy.copy(module)
        found._modules = {
            key: self._rebuilt(child, f"{name}.{key}" if name else key) for key, child in children.items()
        }
        return found

    def _take(self, layer: nn.Module, name: str) -> _Place | None:
        parameter = getattr(layer, name)
        if parameter is None:
            return None
        if id(parameter) not in self._where:
            raise Unstackable("the model shares parameters between its layers")
        return self._where.pop(id(parameter))

    def _try(self, model: nn.Module) -> None:
        """A random round at two sites, of a copy of the model: one has a unit of two records."""
        try:
            draws = np.random.default_rng(1)
            arrays: Arrays = {
                name: draws.normal(scale=0.5, size=array.shape).astype(np.float32)
                for name, array in self.template.items()
            }
            plan = LocalPlan(
                clip=0.5,
                lattice=None,
                sample_rate=1.0,
                expected_batch=4.0,
                steps=2,
                optimizer="sgd",
                lr=0.1,
            )
            parts = [
                Part.of(
                    str(units),
                    _random_table(draws, self._features, units),
                    SimulationNoise(1, str(units)),
                    plan,
                )
                for units in (3, 5)
            ]
            together = train_together(self, arrays, parts, plan, 1)
            alone = [
                train_locally(copy.deepcopy(model), self._task, arrays, part.table, plan, part.noise, 1)
                for part in parts
            ]
        except Unstackable:
            raise
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else ""
            raise Unstackable(
                f"its forward pass cannot be stacked: {type(error).__name__}: {said}"
            ) from error
        for update, expected in zip(together, alone, strict=True):
            mine_L, its_L = flatten(update.delta), flatten(expected.delta)
            off = float(np.linalg.norm(mine_L - its_L))
            if not off <= TOLERANCE * float(np.linalg.norm(its_L)):
                raise Unstackable(f"side by side it trains to something else, {off:.2g} away")


@dataclass(frozen=True, slots=True)
class _Random:
    """A table for the trial."""

    x_NF: NDArray[np.float32]
    y_N: NDArray[np.float32]
    unit_N: NDArray[np.int64]
    units: int


def _random_table(draws: np.random.Generator, features: int, units: int) -> _Random:
    x_NF = draws.uniform(-1, 1, (units + 1, features)).astype(np.float32)
    y_N = draws.integers(0, 2, units + 1).astype(np.float32)
    return _Random(x_NF, y_N, np.minimum(np.arange(units + 1), units - 1), units)


_Place = tuple[slice, torch.Size]
"""Of a parameter: where it is in the flat vector, and its shape."""


class _Layer(nn.Module):
    def __init__(self, stack: Stacked, weight: _Place | None, bias: _Place | None) -> None:
        super().__init__()
        self._stack, self._weight, self._bias = stack, weight, bias

    def _parameter(self, place: _Place) -> Tensor:
        """[K, *shape], or just the shape."""
        where, shape = place
        flat = self._stack.flat[..., where]
        return flat.reshape(*flat.shape[:-1], *shape)


class _Linear(_Layer):
    _weight: _Place

    def forward(self, x_KBI: Tensor) -> Tensor:
        weight = self._parameter(self._weight)
        bias = None if self._bias is None else self._parameter(self._bias)
        if weight.dim() == 2:
            y_KBO = functional.linear(x_KBI, weight, bias)
        elif bias is None:
            y_KBO = x_KBI @ weight.mT
        else:
            y_KBO = torch.baddbmm(bias[:, None], x_KBI, weight.mT)
        at = self._weight[0], None if self._bias is None else self._bias[0]

        def made(g_KBO: Tensor) -> Iterator[Factor]:
            yield Outer(x_KBI.detach()[..., None, :], g_KBO[..., None, :], *at)

        self._stack.tape.watch([y_KBO], made)
        return y_KBO


class _LayerNorm(_Layer):
    def __init__(self, stack: Stacked, eps: float, weight: _Place | None, bias: _Place | None) -> None:
        super().__init__(stack, weight, bias)
        self._eps = eps

    def forward(self, x_KBH: Tensor) -> Tensor:
        normed_KBH = functional.layer_norm(x_KBH, x_KBH.shape[-1:], eps=self._eps)
        y_KBH = normed_KBH
        if self._weight is not None:
            y_KBH = y_KBH * self._parameter(self._weight).unsqueeze(-2)
        if self._bias is not None:
            y_KBH = y_KBH + self._parameter(self._bias).unsqueeze(-2)

        def made(g_KBH: Tensor) -> Iterator[Factor]:
            if self._weight is not None:
                yield Explicit(normed_KBH.detach() * g_KBH, self._weight[0])
            if self._bias is not None:
                yield Explicit(g_KBH, self._bias[0])

        if self._weight is not None:
            self._stack.tape.watch([y_KBH], made)
        return y_KBH


def train_together(
    stacked: Stacked,
    arrays: Arrays,
    parts: Sequence[Part],
    plan: LocalPlan,
    round: int,
    *,
    memory: int = MEMORY,
) -> list[LocalUpdate]:
    """What `train_locally` gives each of the sites, in their order.

    Guarantee: the same up to the rounding of floating point, and under the same keys: who is sampled, how
    sums are rounded and the noise on them are bit by bit those of the site trained alone.

    `memory`, in bytes, is kept to where `check_memory` has passed.
    """
    # Sites of about a size together: those with fewer records are filled up.
    order = sorted(range(len(parts)), key=lambda k: parts[k].expected(plan.sample_rate))
    found: dict[int, LocalUpdate] = {}
    while order:
        count = _sites_at_once(stacked, [parts[k] for k in order], plan, memory)
        chunk, order = order[:count], order[count:]
        chunk_parts = [parts[k] for k in chunk]
        found |= zip(chunk, _Chunk(stacked, arrays, chunk_parts, plan, round, memory).train(), strict=True)
    return [found[k] for k in range(len(parts))]


def _sites_at_once(stacked: Stacked, parts: Sequence[Part], plan: LocalPlan, memory: int) -> int:
    """How many of the first parts fit, by half of the memory each for parameters and records."""
    room = memory // 2
    most = max(1, min(len(parts), SITES, room // (_PER_PARAMETER * stacked.size)))
    each = _PER_ACTIVATION * stacked.numbers
    # Units can be taken a few at a time, so this is for speed.
    while most > 1 and most * parts[most - 1].expected(plan.sample_rate) * each > room:
        most //= 2
    return most


def check_memory(stacked: Stacked, parts: Sequence[Part], memory: int) -> None:
    """That each of the sites fits in so many bytes, at least by itself.

    Raises:
        ConfigError: the first by name does not.
    """
    for part in parts:
        needed = 2 * max(_PER_PARAMETER * stacked.size, _PER_ACTIVATION * stacked.numbers * part.longest)
        if needed > memory:
            raise ConfigError.at(
                "command line",
                "--memory",
                found=f"{memory >> 20} MiB for training",
                allowed=f"at least {_mib(needed)} MiB, for the model at {part.site}",
                fix=f"--memory {_mib(2 * needed)}, or --engine process",
            )


def _mib(size: int) -> int:
    return -(-size // (1 << 20))


class _Chunk:
    """One round at a few sites."""

    def __init__(
        self,
        stacked: Stacked,
        arrays: Arrays,
        parts: Sequence[Part],
        plan: LocalPlan,
        round: int,
        memory: int,
    ) -> None:
        self._stacked, self._arrays, self._parts = stacked, arrays, parts
        self._plan, self._round, self._memory = plan, round, memory
        self._samplers = [
            PoissonSampler(part.table.units, plan.sample_rate, part.noise.key("sample", round))
            for part in parts
        ]
        self._not_finite = np.zeros(len(parts), np.int64)

    def train(self) -> list[LocalUpdate]:
        plan, stacked = self._plan, self._stacked
        received_L = torch.from_numpy(flatten(self._arrays).astype(np.float32))
        # One step from where all are: one set of parameters.
        alike = plan.steps == 1 and plan.gradient_only
        flat = nn.Parameter(
            received_L if alike else received_L.repeat(len(self._parts), 1), requires_grad=False
        )
        optimizer = inner_optimizer([flat], plan)
        taken, sum_KL = 0, np.empty(0)
        for step in range(plan.steps):
            stacked.flat = flat
            sum_KL = self._clipped_sums(step)
            if plan.lattice is not None:
                sum_KL = self._noised(sum_KL, plan.lattice, step)
            taken += 1
            if alike:
                break
            # In this order and precision at a site alone, too.
            flat.grad = torch.from_numpy(sum_KL).float().div_(plan.expected_batch)
            if plan.proximal_mu:
                flat.grad.add_(flat - received_L, alpha=plan.proximal_mu)
            optimizer.step()
        if plan.gradient_only:
            delta_KL: NDArray[np.float64] | NDArray[np.float32] = -(sum_KL / plan.expected_batch)
        else:
            delta_KL = (flat - received_L).numpy()
        return [
            LocalUpdate(
                delta=unflatten(delta_L, self._arrays),
                steps=taken,
                sampling_rate=sampler.rate,
                clip=plan.clip,
                lattice=plan.lattice,
                not_finite=int(not_finite),
            )
            for delta_L, sampler, not_finite in zip(delta_KL, self._samplers, self._not_finite, strict=True)
        ]

    def _clipped_sums(self, step: int) -> NDArray[np.float64]:
        sum_KL = torch.zeros((len(self._parts), self._stacked.size), dtype=torch.float64)
        sampled = [sampler.draw(step) for sampler in self._samplers]
        for x_KBF, y_KB, weight_KSR in self._batches(sampled, step):
            factors = self._stacked.factors(x_KBF, y_KB)
            if not factors:
                continue
            square_KB, bound_KB = norms(factors)
            # What is not finite counts as zero: at a site alone, too.
            bad_KB = ~torch.isfinite(bound_KB)
            if bad_KB.any():
                self._not_finite += (bad_KB & (weight_KSR.flatten(1) > 0)).sum(1).numpy()
                factors = [factor.without(bad_KB) for factor in factors]
                square_KB[bad_KB], bound_KB[bad_KB] = 0.0, 0.0
            if weight_KSR.shape[-1] > 1:
                index_SR = torch.arange(y_KB.shape[1]).reshape(weight_KSR.shape[1:])
                factors = [factor.grouped(index_SR, weight_KSR) for factor in factors]
                factor_KS = clip_weights(*norms(factors), self._plan.clip)
            else:
                factor_KS = clip_weights(square_KB, bound_KB, self._plan.clip) * weight_KSR[..., 0]
            for factor in factors:
                factor.add_to(sum_KL, factor_KS)
        return sum_KL.numpy()

    def _batches(
        self, sampled: Sequence[NDArray[np.int64]], step: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Records [K, B, F] and labels [K, B] of a few units of each site, and weights [K, S, R]."""
        one_each = all(part.records.one_each for part in self._parts)
        # Where each unit has one record, none is left to be drawn.
        keys = (
            [] if one_each else [part.noise.key(f"records step {step}", self._round) for part in self._parts]
        )
        per_record = _PER_ACTIVATION * self._stacked.numbers * len(self._parts)
        longest = max(part.longest for part in self._parts)
        at_once = max(1, self._memory // 2 // (per_record * longest))
        for first in range(0, max(map(len, sampled), default=0), at_once):
            units = [sampled_S[first : first + at_once] for sampled_S in sampled]
            yield self._batch_of_ones(units) if one_each else self._batch(units, keys)

    def _batch_of_ones(self, sampled: Sequence[NDArray[np.int64]]) -> tuple[Tensor, Tensor, Tensor]:
        """As `_batch`, of units that have one record each."""
        units = max(map(len, sampled))
        x_KBF = np.zeros((len(sampled), units, self._parts[0].table.x_NF.shape[1]), np.float32)
        y_KB, weight_KB = np.zeros(x_KBF.shape[:2], np.float32), np.zeros(x_KBF.shape[:2])
        for part, sampled_S, x_BF, y_B, weight_B in zip(
            self._parts, sampled, x_KBF, y_KB, weight_KB, strict=True
        ):
            index_S, count = part.records.only(sampled_S), len(sampled_S)
            x_BF[:count] = part.table.x_NF.take(index_S, axis=0)
            y_B[:count] = part.table.y_N.take(index_S)
            weight_B[:count] = 1.0
        return torch.from_numpy(x_KBF), torch.from_numpy(y_KB), torch.from_numpy(weight_KB[..., None])

    def _batch(
        self, sampled: Sequence[NDArray[np.int64]], keys: Sequence[bytes]
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = [
            [array.numpy() for array in part.records.of(torch.from_numpy(sampled_S), key)]
            for part, sampled_S, key in zip(self._parts, sampled, keys, strict=True)
        ]
        units = max(map(len, sampled))
        counts = [np.bincount(owner_B, minlength=1) for _, owner_B, _ in found]
        records = max(int(count_S.max()) for count_S in counts)
        features = self._parts[0].table.x_NF.shape[1]
        x_KSRF = np.zeros((len(self._parts), units, records, features), np.float32)
        y_KSR = np.zeros(x_KSRF.shape[:-1], np.float32)
        weight_KSR = np.zeros(y_KSR.shape)
        for k, (part, (index_B, owner_B, weight_B), count_S) in enumerate(
            zip(self._parts, found, counts, strict=True)
        ):
            # A record's number within its unit; owners come in order.
            within_B = np.arange(len(owner_B)) - (np.cumsum(count_S) - count_S)[owner_B]
            x_KSRF[k, owner_B, within_B] = part.table.x_NF[index_B]
            y_KSR[k, owner_B, within_B] = part.table.y_N[index_B]
            weight_KSR[k, owner_B, within_B] = weight_B
        x_KBF, y_KB = x_KSRF.reshape(len(x_KSRF), -1, features), y_KSR.reshape(len(y_KSR), -1)
        return torch.from_numpy(x_KBF), torch.from_numpy(y_KB), torch.from_numpy(weight_KSR)

    def _noised(self, sum_KL: NDArray[np.float64], lattice: Lattice, step: int) -> NDArray[np.float64]:
        """As `noised`, for each site under its own keys."""
        noises, round = [part.noise for part in self._parts], self._round
        word_KL = lattice.quantiser().encode_each(
            sum_KL, weight=1, rounding_keys=[noise.key(f"rounding step {step}", round) for noise in noises]
        )
        keys = [noise.key(f"noise step {step}", round) for noise in noises]
        drawn_KL = samples(lattice.share, word_KL.shape[1], keys=keys)
        drawn_KL += word_KL.view(np.int32)
        return drawn_KL / lattice.scale
