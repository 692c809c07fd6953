"""DP-SGD at many sites as one computation, for simulations: each site gets what `train_locally` gives it.

K sites, G of them in one pass, S sampled units of each (of the site with the most; rows of weight 0 fill up
the others), R records of a unit (likewise), B = S x R, F features, L parameters.
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
from lepton_fl.tasks.arrays import Arrays, arrays_of, flatten, unflatten
from lepton_fl.tasks.task import TaskSpec
from lepton_fl.training import noising, sampling
from lepton_fl.training.bookkeeping import clip_weights, norms
from lepton_fl.training.layers import Explicit, Factor, Outer, Tape
from lepton_fl.training.local import LocalPlan, LocalUpdate, Trainable, inner_optimizer, train_locally
from lepton_fl.training.noise import Noise, SimulationNoise
from lepton_fl.training.noising import Noising
from lepton_fl.training.sampling import PoissonSampler
from lepton_fl.training.units import RecordsOfUnits

SITES = 64
"""Most sites in one computation: from there on it is the processor's caches that count."""
_HELD = 1 << 20
"""Numbers in and out of layers in one pass, about: what a cache holds. Speed only, as the next."""
_FILL = 1 << 22
"""Parameters x rows that a pass may be filled up with: as much work as another pass costs."""
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
_PER_SITE = 4 * noising.AHEAD + sampling.AHEAD
"""Bytes of what is drawn for steps to come, at most, where parameters and units are few."""


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
        chunk_of = _Chunk(stacked, arrays, chunk_parts, plan, round, memory)
        try:
            found |= zip(chunk, chunk_of.train(), strict=True)
        finally:
            chunk_of.forget()
    return [found[k] for k in range(len(parts))]


def _sites_at_once(stacked: Stacked, parts: Sequence[Part], plan: LocalPlan, memory: int) -> int:
    """How many of the first parts fit, by half of the memory each for parameters and records."""
    room = memory // 2
    most = max(1, min(len(parts), SITES, room // (_PER_PARAMETER * stacked.size + _PER_SITE)))
    each = _PER_ACTIVATION * stacked.numbers
    # Units can be taken a few at a time, so this is for speed.
    while most > 1 and most * parts[most - 1].expected(plan.sample_rate) * each > room:
        most //= 2
    return most


def check_memory(stacked: Stacked, parts: Sequence[Part], memory: int) -> None:
    """That each of the sites fits in so many bytes, at least by itself; they are half of the flag's.

    Raises:
        ConfigError: the first by name does not.
    """
    for part in parts:
        kept = _PER_PARAMETER * stacked.size + _PER_SITE
        needed = 2 * max(kept, _PER_ACTIVATION * stacked.numbers * part.longest)
        if needed > memory:
            raise ConfigError.at(
                "command line",
                "--memory",
                found=f"{memory >> 19} MiB",
                allowed=f"at least {_mib(2 * needed)} MiB, half of them for the model at {part.site}",
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
            PoissonSampler(
                part.table.units, plan.sample_rate, part.noise.key("sample", round), steps=plan.steps
            )
            for part in parts
        ]
        self._noising = None
        if plan.lattice is not None:
            noises = [part.noise for part in parts]
            self._noising = Noising(plan.lattice, stacked.size, noises, round, steps=plan.steps)
        self._not_finite = np.zeros(len(parts), np.int64)
        self._sums = torch.empty((2, len(parts), stacked.size), dtype=torch.float64)
        """The clipped sums of a step, by how much was sampled and by site."""

    def train(self) -> list[LocalUpdate]:
        plan = self._plan
        received_L = torch.from_numpy(flatten(self._arrays).astype(np.float32))
        # One step from where all are: one set of parameters.
        alike = plan.steps == 1 and plan.gradient_only
        flat = nn.Parameter(
            received_L if alike else received_L.repeat(len(self._parts), 1), requires_grad=False
        )
        optimizer = inner_optimizer([flat], plan)
        taken, sum_KL = 0, np.empty(0)
        for step in range(plan.steps):
            sum_KL = self._clipped_sums(flat, step)
            if self._noising is not None:
                sum_KL = self._noising(sum_KL)
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
                lattice=self._noising.lattice if self._noising is not None else None,
                not_finite=int(not_finite),
            )
            for delta_L, sampler, not_finite in zip(delta_KL, self._samplers, self._not_finite, strict=True)
        ]

    def forget(self) -> None:
        """Drop the noise of steps that were not taken."""
        if self._noising is not None:
            self._noising.forget()

    def _clipped_sums(self, flat: Tensor, step: int) -> NDArray[np.float64]:
        """Of each site, at the parameters [K, L], or [L] for all; good until the next step."""
        sampled = [sampler.draw(step) for sampler in self._samplers]
        units_K = np.array([len(sampled_S) for sampled_S in sampled])
        # A site with many sampled units is next to another.
        order_K = np.argsort(-units_K, kind="stable")
        sampled = [sampled[k] for k in order_K]
        order = torch.from_numpy(order_K)
        if flat.dim() > 1:
            flat = flat.index_select(0, order)
        sum_KL = self._sums[0].zero_()
        for group in self._groups(units_K[order_K].tolist()):
            self._stacked.flat = flat[group] if flat.dim() > 1 else flat
            for batch in self._batches(order_K[group], sampled[group], step):
                self._add(sum_KL[group], order_K[group], *batch)
        return torch.index_select(sum_KL, 0, order.argsort(), out=self._sums[1]).numpy()

    def _groups(self, units_K: Sequence[int]) -> Iterator[slice]:
        """Neighbours for one pass, of numbers that descend: filling up costs no more than another pass."""
        most_rows = _HELD // (self._stacked.numbers * max(part.longest for part in self._parts))
        most_filled = _FILL // self._stacked.size
        first = filled = 0
        for at, units in enumerate(units_K):
            filled += units_K[first] - units
            if at > first and (filled > most_filled or (at + 1 - first) * units_K[first] > most_rows):
                yield slice(first, at)
                first, filled = at, 0
        if units_K[first]:
            yield slice(first, len(units_K))

    def _add(
        self,
        sum_GL: Tensor,
        group: NDArray[np.int64],
        x_GBF: Tensor,
        y_GB: Tensor,
        weight_GSR: Tensor,
    ) -> None:
        """The clipped gradients of a few units of each site in the group."""
        factors = self._stacked.factors(x_GBF, y_GB)
        if not factors:
            return
        square_GB, bound_GB = norms(factors)
        # What is not finite counts as zero: at a site alone, too.
        bad_GB = ~torch.isfinite(bound_GB)
        if bad_GB.any():
            self._not_finite[group] += (bad_GB & (weight_GSR.flatten(1) > 0)).sum(1).numpy()
            factors = [factor.without(bad_GB) for factor in factors]
            square_GB[bad_GB], bound_GB[bad_GB] = 0.0, 0.0
        if weight_GSR.shape[-1] > 1:
            index_SR = torch.arange(y_GB.shape[1]).reshape(weight_GSR.shape[1:])
            factors = [factor.grouped(index_SR, weight_GSR) for factor in factors]
            factor_GS = clip_weights(*norms(factors), self._plan.clip)
        else:
            factor_GS = clip_weights(square_GB, bound_GB, self._plan.clip) * weight_GSR[..., 0]
        for factor in factors:
            factor.add_to(sum_GL, factor_GS)

    def _batches(
        self, group: NDArray[np.int64], sampled: Sequence[NDArray[np.int64]], step: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Records [G, B, F] and labels [G, B] of a few units of each site, and weights [G, S, R]."""
        parts = [self._parts[k] for k in group]
        one_each = all(part.records.one_each for part in parts)
        # Where each unit has one record, none is left to be drawn.
        keys = [] if one_each else [part.noise.key(f"records step {step}", self._round) for part in parts]
        per_record = _PER_ACTIVATION * self._stacked.numbers * len(parts)
        longest = max(part.longest for part in parts)
        at_once = max(1, self._memory // 2 // (per_record * longest))
        for first in range(0, max(map(len, sampled)), at_once):
            units = [sampled_S[first : first + at_once] for sampled_S in sampled]
            yield _batch_of_ones(parts, units) if one_each else _batch(parts, units, keys)


def _batch_of_ones(
    parts: Sequence[Part], sampled: Sequence[NDArray[np.int64]]
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_batch`, of units that have one record each."""
    units = max(map(len, sampled))
    x_GBF = np.zeros((len(parts), units, parts[0].table.x_NF.shape[1]), np.float32)
    y_GB, weight_GB = np.zeros(x_GBF.shape[:2], np.float32), np.zeros(x_GBF.shape[:2])
    for part, sampled_S, x_BF, y_B, weight_B in zip(parts, sampled, x_GBF, y_GB, weight_GB, strict=True):
        index_S, count = part.records.only(sampled_S), len(sampled_S)
        x_BF[:count] = part.table.x_NF.take(index_S, axis=0)
        y_B[:count] = part.table.y_N.take(index_S)
        weight_B[:count] = 1.0
    return torch.from_numpy(x_GBF), torch.from_numpy(y_GB), torch.from_numpy(weight_GB[..., None])


def _batch(
    parts: Sequence[Part], sampled: Sequence[NDArray[np.int64]], keys: Sequence[bytes]
) -> tuple[Tensor, Tensor, Tensor]:
    found = [
        [array.numpy() for array in part.records.of(torch.from_numpy(sampled_S), key)]
        for part, sampled_S, key in zip(parts, sampled, keys, strict=True)
    ]
    units = max(map(len, sampled))
    counts = [np.bincount(owner_B, minlength=1) for _, owner_B, _ in found]
    records = max(int(count_S.max()) for count_S in counts)
    features = parts[0].table.x_NF.shape[1]
    x_GSRF = np.zeros((len(parts), units, records, features), np.float32)
    y_GSR = np.zeros(x_GSRF.shape[:-1], np.float32)
    weight_GSR = np.zeros(y_GSR.shape)
    for k, (part, (index_B, owner_B, weight_B), count_S) in enumerate(zip(parts, found, counts, strict=True)):
        # A record's number within its unit; owners come in order.
        within_B = np.arange(len(owner_B)) - (np.cumsum(count_S) - count_S)[owner_B]
        x_GSRF[k, owner_B, within_B] = part.table.x_NF[index_B]
        y_GSR[k, owner_B, within_B] = part.table.y_N[index_B]
        weight_GSR[k, owner_B, within_B] = weight_B
    x_GBF, y_GB = x_GSRF.reshape(len(parts), -1, features), y_GSR.reshape(len(parts), -1)
    return torch.from_numpy(x_GBF), torch.from_numpy(y_GB), torch.from_numpy(weight_GSR)
