"""What a backward pass that carries activations only says of each layer's parameters.

"Book-keeping" (Bu, Wang, Zha and Karypis 2023, "Differentially Private Optimization on Small Model at Large
Cost"): a layer's gradient of one record is a sum of outer products of what entered the layer and the gradient
of what left it. Norms and weighted sums follow from these two factors; the gradient itself is held only where
that is the cheaper.

... any leading dimensions (K models side by side, each with rows of its own), N rows (records, or units), T
positions in a row (time, pixels, the records of a unit), I inputs, O outputs, V words, P numbers of one
parameter. Factors are float32 or float64; what is computed from them is float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional
from torch.utils._pytree import tree_map

from lepton_fl.errors import ConfigError

HELD_AT_ONCE = 1 << 18
"""Numbers that are in float64 at once, to be added up: what a cache holds. Speed and memory only."""
WHOLE = 16
"""Of a matrix that is padded each side is a multiple of it: no vector instruction is left a remainder."""


class Factor(ABC):
    """The gradient of one parameter, or of a matrix and its bias, for each of N rows."""

    @property
    @abstractmethod
    def places(self) -> tuple[slice, ...]:
        """Where its parameters are in the flat gradient."""

    @abstractmethod
    def norms(self) -> tuple[Tensor, Tensor]:
        """Per row [..., N]: the squared norm, and the square of a bound on it that no cancelling makes small.

        The bound is not finite if any number in the row is not.
        """

    @abstractmethod
    def add_to(self, sum_L: Tensor, weight_N: Tensor) -> None:
        """Add to the flat gradient [..., L] the sum over the rows, weighted; in float64."""

    @abstractmethod
    def grouped(self, index_UR: Tensor, weight_UR: Tensor) -> Factor:
        """Rows put together: row u becomes the sum of the rows index_UR[u], weighted (0 for none)."""

    @abstractmethod
    def without(self, bad_N: Tensor) -> Factor:
        """The same, the gradients of these rows zero, whatever they were."""

    @abstractmethod
    def explicit(self) -> Iterator[Explicit]:
        """The same with each row's gradient written out."""

    @abstractmethod
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that it holds, rows in the dimension after the leading ones."""


@dataclass(frozen=True)
class Explicit(Factor):
    """Gradients written out."""

    gradient: Tensor
    """[..., N, P]"""
    where: slice
    bound_N: Tensor | None = None
    """Squares of bounds on the norms, where they are not those of the gradients."""

    @property
    def places(self) -> tuple[slice, ...]:
        return (self.where,)

    def norms(self) -> tuple[Tensor, Tensor]:
        square_N = _squares(self.gradient)
        return square_N, square_N if self.bound_N is None else self.bound_N

    def add_to(self, sum_L: Tensor, weight_N: Tensor) -> None:
        part = sum_L[..., self.where]
        at_once = max(1, HELD_AT_ONCE * self.gradient.shape[-2] // max(1, self.gradient.numel()))
        # Not all rows at once in float64, which may be much.
        for first in range(0, self.gradient.shape[-2], at_once):
            rows = slice(first, first + at_once)
            weight_1N = weight_N[..., None, rows]
            part.add_((weight_1N @ self.gradient[..., rows, :].double()).squeeze(-2))

    def grouped(self, index_UR: Tensor, weight_UR: Tensor) -> Explicit:
        rows = self.gradient[..., index_UR, :].double() * weight_UR[..., None]
        return Explicit(rows.sum(-2), self.where, _squares(rows).sqrt().sum(-1).square())

    def without(self, bad_N: Tensor) -> Explicit:
        return replace(self, gradient=self.gradient.masked_fill(bad_N[..., None], 0.0))

    def explicit(self) -> Iterator[Explicit]:
        yield self

    def parts(self) -> tuple[Tensor, ...]:
        return (self.gradient,)


@dataclass(frozen=True)
class Outer(Factor):
    """Of a matrix [O, I], and perhaps of its bias: the sum over t of g[t] outer a[t], and of g[t]."""

    a: Tensor
    """What entered, [..., N, T, I]."""
    g: Tensor
    """The gradient of what left, [..., N, T, O]."""
    weight: slice
    bias: slice | None

    @property
    def _with_bias(self) -> float:
        return 0.0 if self.bias is None else 1.0

    @property
    def places(self) -> tuple[slice, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def norms(self) -> tuple[Tensor, Tensor]:
        size_NT = _squares(self.a).add_(self._with_bias).mul_(_squares(self.g))
        if size_NT.shape[-1] == 1:
            size_N = size_NT[..., 0]
            return size_N, size_N
        return self._squared(), size_NT.sqrt().sum(-1).square()

    def _squared(self) -> Tensor:
        """Of rows of several positions: by T x T products, or by the gradients: whichever is cheaper."""
        positions, inputs, outputs = self.a.shape[-2], self.a.shape[-1], self.g.shape[-1]
        by_products = positions * (inputs + outputs) < inputs * outputs
        numbers = positions * (inputs + outputs) + (2 * positions**2 if by_products else inputs * outputs)
        at_once = max(1, HELD_AT_ONCE // numbers)
        parts = (x.flatten(0, -3).split(at_once) for x in (self.a, self.g))
        squares = []
        for a, g in zip(*(map(Tensor.double, x) for x in parts), strict=True):
            if by_products:
                squares.append(((a @ a.mT + self._with_bias) * (g @ g.mT)).sum((-2, -1)))
            else:
                of_bias = _squares(g.sum(-2)) * self._with_bias
                squares.append(_squares((g.mT @ a).flatten(-2)) + of_bias)
        # Rounding may leave a sum that cancels a little below zero.
        return torch.cat(squares).clamp(min=0.0).reshape(self.a.shape[:-2])

    def add_to(self, sum_L: Tensor, weight_N: Tensor) -> None:
        # In float64 for this product only: to keep it from the norms on costs more cache than time.
        a = self.a.double().flatten(-3, -2)
        g = self.g.to(torch.float64, copy=True).mul_(weight_N[..., None, None]).flatten(-3, -2)
        matrix = sum_L[..., self.weight].unflatten(-1, (g.shape[-1], a.shape[-1]))
        (matrix.addmm_ if matrix.dim() == 2 else matrix.baddbmm_)(g.mT, a)
        if self.bias is not None:
            sum_L[..., self.bias].add_(g.sum(-2))

    def grouped(self, index_UR: Tensor, weight_UR: Tensor) -> Outer:
        g = self.g[..., index_UR, :, :] * weight_UR[..., None, None].to(self.g.dtype)
        a = self.a[..., index_UR, :, :]
        return Outer(a.flatten(-3, -2), g.flatten(-3, -2), self.weight, self.bias)

    def without(self, bad_N: Tensor) -> Outer:
        # Both: 0 * inf is NaN.
        a, g = (x.masked_fill(bad_N[..., None, None], 0.0) for x in (self.a, self.g))
        return replace(self, a=a, g=g)

    def explicit(self) -> Iterator[Explicit]:
        # A batched product: what becomes of one row depends on that row alone.
        if self.a.shape[-1] < WHOLE < self.g.shape[-1]:
            # One of few columns is several times as slow as one of few rows, of which one may be the bias.
            product = functional.pad(self.a, (0, 1), value=1.0).mT @ self.g
            yield Explicit(product[..., :-1, :].mT.flatten(-2), self.weight)
            if self.bias is not None:
                yield Explicit(product[..., -1, :], self.bias)
            return
        yield Explicit((self.g.mT @ self.a).flatten(-2), self.weight)
        if self.bias is not None:
            yield Explicit(self.g.sum(-2), self.bias)

    def parts(self) -> tuple[Tensor, ...]:
        return self.a, self.g


@dataclass(frozen=True)
class Lookup(Factor):
    """Of a table of V words: the sum over t of g[t], each in the row of the table that index[t] names."""

    index: Tensor
    """[..., N, T]"""
    g: Tensor
    """[..., N, T, O]"""
    where: slice
    words: int

    @property
    def places(self) -> tuple[slice, ...]:
        return (self.where,)

    def norms(self) -> tuple[Tensor, Tensor]:
        size_NT = _squares(self.g)
        if size_NT.shape[-1] == 1:
            return size_NT[..., 0], size_NT[..., 0]
        g = self.g.double()
        same_NTT = self.index[..., :, None] == self.index[..., None, :]
        square_N = torch.where(same_NTT, g @ g.mT, 0.0).sum((-2, -1)).clamp(min=0.0)
        return square_N, size_NT.sqrt().sum(-1).square()

    def add_to(self, sum_L: Tensor, weight_N: Tensor) -> None:
        g = self.g.double() * weight_N[..., None, None]
        table = self._at_words(g.flatten(-3, -2), self.index.flatten(-2))
        sum_L[..., self.where].add_(table.flatten(-2))

    def _at_words(self, g: Tensor, index: Tensor) -> Tensor:
        table = g.new_zeros((*index.shape[:-1], self.words, g.shape[-1]))
        return table.scatter_add_(-2, index[..., None].expand_as(g), g)

    def grouped(self, index_UR: Tensor, weight_UR: Tensor) -> Lookup:
        g = self.g[..., index_UR, :, :] * weight_UR[..., None, None].to(self.g.dtype)
        index = self.index[..., index_UR, :].flatten(-2)
        return Lookup(index, g.flatten(-3, -2), self.where, self.words)

    def without(self, bad_N: Tensor) -> Lookup:
        return replace(self, g=self.g.masked_fill(bad_N[..., None, None], 0.0))

    def explicit(self) -> Iterator[Explicit]:
        yield Explicit(self._at_words(self.g, self.index).flatten(-2), self.where)

    def parts(self) -> tuple[Tensor, ...]:
        return self.index, self.g


def outer(a: Tensor, g: Tensor, weight: slice, bias: slice | None) -> Iterator[Factor]:
    """An outer product of [..., N, T, I] and [..., N, T, O], written out where that is the cheaper."""
    positions, inputs, outputs = a.shape[-2], a.shape[-1], g.shape[-1]
    factor = Outer(a, g, weight, bias)
    if _is_written_out(positions, inputs, outputs):
        yield from factor.explicit()
    else:
        yield factor


def _is_written_out(positions: int, inputs: int, outputs: int) -> bool:
    """Whether that is the cheaper, as measured, and not much more to hold.

    Products of single rows are float32, and twice as fast; but each entry is then read twice more.
    """
    entries, factors = inputs * outputs, positions * (inputs + outputs)
    cheaper = 24 * entries <= positions * entries + (2 * positions + 10) * factors
    return positions > 1 and cheaper and entries <= 4 * factors


def _squares(x: Tensor) -> Tensor:
    """Sums of squares over the last dimension."""
    if x.numel() <= 4 * HELD_AT_ONCE:
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
        return norm.square_()
    # Some at a time in float64: of many, what converts as it sums is several times as slow.
    rows = x.flatten(0, -2).split(max(1, HELD_AT_ONCE // x.shape[-1]))
    norms = [torch.linalg.vector_norm(part.double(), dim=-1) for part in rows]
    return torch.cat(norms).square_().reshape(x.shape[:-1])


# --- recording a pass ---


@dataclass
class Tape:
    """What the layers of one forward pass leave for its backward pass."""

    where: dict[int, slice]
    """By a parameter's id, its place in the flat gradient."""
    padded: bool = False
    """Whether matrices are multiplied with zeros around them, for kernels that treat rows of others alike."""
    _watched: list[tuple[Sequence[Tensor], list[int], Callable[..., Iterator[Factor]]]] = field(
        default_factory=list
    )

    def watch(self, outputs: Sequence[Tensor], make: Callable[..., Iterator[Factor]]) -> None:
        """Have `make(*gradients)` called with the gradients of the loss with respect to `outputs`."""
        versions = [output.requires_grad_()._version for output in outputs]
        self._watched.append((outputs, versions, make))

    def clear(self) -> None:
        """Forget the pass, and the records in it."""
        self._watched.clear()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, rows: slice | None = None) -> Tensor:
        """`functional.linear` of [N, ..., I] with these rows of a matrix, recorded."""
        if rows is None:
            y = self.product(x, weight, bias)
        else:
            y = self.product(x, weight[rows], None if bias is None else bias[rows])
        at = self.part(weight, rows), None if bias is None else self.part(bias, rows)
        self.watch([y], lambda g: outer(_positions(x), _positions(g), *at))
        return y

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`functional.linear`, not recorded."""
        outputs, inputs = (-size % WHOLE for size in weight.shape)
        if not self.padded or not (outputs or inputs):
            return functional.linear(x, weight, bias)
        # Where there is nothing to add, padding would be a copy.
        weight = functional.pad(weight, (0, inputs, 0, outputs))
        bias = functional.pad(bias, (0, outputs)) if outputs and bias is not None else bias
        y = functional.linear(functional.pad(x, (0, inputs)) if inputs else x, weight, bias)
        return y[..., : len(weight) - outputs].contiguous() if outputs else y

    def part(self, parameter: Tensor, rows: slice | None = None) -> slice:
        """Where these rows of a parameter are in the flat gradient; all of them by default."""
        start = self.where[id(parameter)].start
        if rows is None:
            return slice(start, start + parameter.numel())
        row = parameter.numel() // len(parameter)
        return slice(start + rows.start * row, start + rows.stop * row)

    def factors(self, loss: Tensor) -> list[Factor]:
        """One backward pass from the summed loss; a parameter that it does not use has no factor."""
        watched = self._watched.copy()
        self.clear()
        if not watched or not loss.requires_grad:
            return []
        outputs = [output for group, _, _ in watched for output in group]
        if [output._version for output in outputs] != [v for _, versions, _ in watched for v in versions]:
            raise ConfigError("model: what a layer gave is changed in place; write it to a new tensor")
        gradients: Iterator[Tensor | None] = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
        found: list[Factor] = []
        with torch.no_grad():
            for group, _, make in watched:
                given = list(islice(gradients, len(group)))
                if any(g is not None for g in given):
                    pairs = zip(given, group, strict=True)
                    found += make(*(torch.zeros_like(output) if g is None else g for g, output in pairs))
        return list(_merged(found))


def _positions(x: Tensor) -> Tensor:
    """[N, ..., I] as [N, T, I]."""
    x = x.detach()
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def _merged(found: list[Factor]) -> Iterator[Factor]:
    """The same, with a parameter that has several factors in one: a norm is of the whole gradient."""
    uses = Counter(place.start for factor in found for place in factor.places)
    shared: dict[int, list[Explicit]] = {}
    for factor in found:
        if all(uses[place.start] == 1 for place in factor.places):
            yield factor
        else:
            for part in factor.explicit():
                shared.setdefault(part.where.start, []).append(part)
    for parts in shared.values():
        yield Explicit(torch.stack([part.gradient for part in parts]).sum(0), parts[0].where)


# --- layers ---

Rule = Callable[..., Any]
"""A layer's forward pass that is recorded: (tape, module, *its arguments)."""


def _linear(tape: Tape, module: nn.Linear, x: Tensor) -> Tensor:
    return tape.linear(x, module.weight, module.bias)


def _convolution(tape: Tape, module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    y: Tensor = module._conv_forward(x, module.weight, module.bias)

    def make(g: Tensor) -> Iterator[Factor]:
        # The patches under each position, [N, *positions, I, *kernel]: a view of overlapping windows.
        padded = functional.pad(x.detach(), module._reversed_padding_repeated_twice).contiguous()
        of_rows, of_inputs, *of_pixels = padded.stride()
        by_position = [pixel * step for pixel, step in zip(of_pixels, module.stride, strict=True)]
        in_kernel = [pixel * step for pixel, step in zip(of_pixels, module.dilation, strict=True)]
        windows = padded.as_strided(
            (len(x), *g.shape[2:], padded.shape[1], *module.kernel_size),
            (of_rows, *by_position, of_inputs, *in_kernel),
        )
        positions, entries = g[0, 0].numel(), module.weight[0].numel()
        weight, bias = tape.part(module.weight), None if module.bias is None else tape.part(module.bias)
        if module.groups == 1 and _is_written_out(positions, entries, len(module.weight)):
            # Some rows at a time: what a cache holds is copied, and used, before it is the next rows' place.
            g, at_once = g.flatten(2), max(1, HELD_AT_ONCE // 2 // (positions * entries))
            gradient = g.new_empty(len(g), len(module.weight), entries)
            rows = (z.split(at_once) for z in (windows, g, gradient))
            for window, g_of_rows, out in zip(*rows, strict=True):
                torch.bmm(g_of_rows, window.reshape(len(window), positions, entries), out=out)
            yield Explicit(gradient.flatten(1), weight)
            if bias is not None:
                yield Explicit(g.sum(2), bias)
            return
        a = windows.reshape(len(x), positions, -1)
        g = g.flatten(2).mT
        if module.groups == 1:
            yield from outer(a, g, weight, bias)
            return
        # Each group has outputs and inputs of its own; written out, since such kernels are small.
        a, g = (z.unflatten(-1, (module.groups, -1)) for z in (a, g))
        yield Explicit(torch.einsum("ntgo,ntgi->ngoi", g, a).flatten(1), weight)
        if bias is not None:
            yield Explicit(g.sum(1).flatten(1), bias)

    tape.watch([y], make)
    return y


def _embedding(tape: Tape, module: nn.Embedding, index: Tensor) -> Tensor:
    y: Tensor = type(module).forward(module, index)

    def make(g: Tensor) -> Iterator[Factor]:
        flat = index.reshape(len(index), -1)
        g = g.reshape(*flat.shape, -1)
        if module.padding_idx is not None:
            g = g * (flat != module.padding_idx)[..., None]
        factor = Lookup(flat, g, tape.part(module.weight), module.num_embeddings)
        # A table of few words is written out: its norm is otherwise that of T x T products.
        if flat.shape[1] > 1 and module.num_embeddings <= 2 * flat.shape[1]:
            yield from factor.explicit()
        else:
            yield factor

    tape.watch([y], make)
    return y


def _layer_norm(tape: Tape, module: nn.LayerNorm, x: Tensor) -> Tensor:
    y, mean, rstd = torch.native_layer_norm(
        x, list(module.normalized_shape), module.weight, module.bias, module.eps
    )
    tape.watch([y], lambda g: _affine(tape, module, (x.detach() - mean).mul_(rstd), g, module.weight.numel()))
    return y


def _group_norm(tape: Tape, module: nn.GroupNorm, x: Tensor) -> Tensor:
    y: Tensor = type(module).forward(module, x)

    def make(g: Tensor) -> Iterator[Factor]:
        normed = functional.group_norm(x.detach(), module.num_groups, eps=module.eps)
        # Channels last, as a layer norm's are.
        normed, g = (z.reshape(len(z), module.num_channels, -1).mT for z in (normed, g))
        yield from _affine(tape, module, normed, g, module.num_channels)

    tape.watch([y], make)
    return y


def _affine(
    tape: Tape, module: nn.LayerNorm | nn.GroupNorm, normed: Tensor, g: Tensor, numbers: int
) -> Iterator[Factor]:
    for parameter, product in ((module.weight, normed.mul_(g)), (module.bias, g)):
        if parameter is not None:
            by_position = product.reshape(len(g), -1, numbers)
            once = by_position.shape[1] == 1
            yield Explicit(by_position[:, 0] if once else by_position.sum(1), tape.part(parameter))


def _recurrent(
    tape: Tape, module: nn.RNNBase, x: Tensor, first: Any = None
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
    """Layer by layer, and direction by direction."""
    x_NTI = x if module.batch_first else x.transpose(0, 1)
    directions = 2 if module.bidirectional else 1
    cells, lasts = isinstance(module, nn.LSTM), []
    for layer in range(module.num_layers):
        if layer and module.dropout:
            x_NTI = functional.dropout(x_NTI, module.dropout, module.training)
        outputs = []
        for direction in range(directions):
            name = f"l{layer}" + "_reverse" * direction
            at = layer * directions + direction
            if first is None:
                start = [x_NTI.new_zeros(len(x_NTI), module.hidden_size)] * 2
            else:
                start = [s[at] for s in (first if cells else (first,))]
            hidden, c = _through_time(tape, module, name, x_NTI.flip(1) if direction else x_NTI, start)
            outputs.append(hidden.flip(1) if direction else hidden)
            lasts.append((hidden[:, -1], c))
        x_NTI = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
    h, c = (torch.stack(last) for last in zip(*lasts, strict=True))
    return x_NTI if module.batch_first else x_NTI.transpose(0, 1), (h, c) if cells else h


def _through_time(
    tape: Tape, module: nn.RNNBase, name: str, x_NTI: Tensor, start: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """One layer in one direction: the hidden states [N, T, H], and the last state of the cells [N, H].

    K gates, each by itself in memory, so that what works on single numbers has them in one piece.
    """
    kind, width = _CELLS[module.mode], module.hidden_size
    rows, steps, _ = x_NTI.shape

    def whole(z: Tensor, *, sides: int) -> Tensor:
        # A width that is padded is that of a wider layer, of which the rest is zero, and stays so.
        of_each = [pad for size in reversed(z.shape[-sides:]) for pad in (0, -size % WHOLE)]
        return functional.pad(z, of_each) if tape.padded else z

    matrices, biases = [], []
    for which, turn in (("ih", kind.apart), ("hh", 0)):
        matrix = getattr(module, f"weight_{which}_{name}")
        bias = getattr(module, f"bias_{which}_{name}") if module.bias else matrix.new_zeros(len(matrix))
        matrices.append(whole(matrix.unflatten(0, (-1, width)).roll(turn, 0).mT, sides=2))
        biases.append(whole(bias.unflatten(0, (-1, 1, width)).roll(turn, 0), sides=1))
    h_NH, c_NH = (whole(z, sides=1) for z in (start[0], start[-1]))
    x_MI = whole(x_NTI, sides=1).transpose(0, 1).flatten(0, 1)
    gates_KTNH = torch.baddbmm(biases[0], x_MI.expand(len(matrices[0]), -1, -1), matrices[0])
    gates_KTNH = gates_KTNH.unflatten(1, (steps, rows))
    # What the recurrent matrix gives is nowhere whole: this stands for it, so that its gradient may be asked.
    recurrent_KTNH = gates_KTNH.new_zeros(()).expand_as(gates_KTNH)
    cell = kind(matrices[1], biases[1], gates_KTNH.detach(), h_NH.detach())

    def make(of_gates: Tensor, of_recurrent: Tensor | None = None) -> Iterator[Factor]:
        of_rows = of_gates if of_recurrent is None else of_recurrent
        before_NTH = cell.states[:-1, :, :width].transpose(0, 1).contiguous()
        yield from part("hh", before_NTH, of_rows)
        x = x_NTI.detach()
        if kind.apart:
            last = len(of_gates) - kind.apart
            yield from part("ih", x, of_gates[kind.apart :], slice(0, last * width))
            yield from part("ih", x, of_gates[: kind.apart], slice(last * width, len(of_gates) * width))
        else:
            yield from part("ih", x, of_gates)

    def part(which: str, a: Tensor, g_KTNH: Tensor, rows: slice | None = None) -> Iterator[Factor]:
        g = g_KTNH[..., :width].permute(2, 1, 0, 3).flatten(2)
        bias = tape.part(getattr(module, f"bias_{which}_{name}"), rows) if module.bias else None
        yield from outer(a, g, tape.part(getattr(module, f"weight_{which}_{name}"), rows), bias)

    tape.watch([gates_KTNH, recurrent_KTNH] if kind.apart else [gates_KTNH], make)
    through: Callable[..., tuple[Tensor, Tensor]] = _ThroughTime.apply
    hidden_TNH, c_NH = through(cell, gates_KTNH, recurrent_KTNH, h_NH, c_NH)
    return hidden_TNH[..., :width].transpose(0, 1), c_NH[:, :width]


class _ThroughTime(torch.autograd.Function):
    """A recurrence without a graph of its steps, and the gradient back through time."""

    @staticmethod
    def forward(
        ctx: Any, cell: _Cell, gates_KTNH: Tensor, _recurrent: Tensor, _h: Tensor, c_NH: Tensor
    ) -> tuple[Tensor, Tensor]:
        for step in range(gates_KTNH.shape[1]):
            c_NH = cell.forward(step, c_NH)
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        # Copies: what is given may be changed in place, and the way back needs what it was.
        return cell.states[1:].clone(), c_NH.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TNH: Tensor | None, c_NH: Tensor | None) -> tuple[Tensor | None, ...]:
        cell: _Cell = ctx.cell
        h_NH = torch.zeros_like(cell.states[0])
        c_NH = torch.zeros_like(h_NH) if c_NH is None else c_NH
        gates, steps, *shape = cell.gates.shape
        # One step is worked on where a cache holds it, and put with a row's others, as products want it.
        now = h_NH.new_empty(gates + cell.apart, *shape)
        g_NTKH = h_NH.new_empty(shape[0], steps, len(now), shape[1])
        for step in reversed(range(steps)):
            if g_TNH is not None:
                h_NH = h_NH + g_TNH[step]
            h_NH, c_NH = cell.backward(step, h_NH, c_NH, now)
            g_NTKH[:, step] = now.transpose(0, 1)
        g_KTNH = g_NTKH.permute(2, 1, 0, 3)
        return None, g_KTNH[:gates], g_KTNH[-gates:] if cell.apart else None, h_NH, c_NH


class _Cell(ABC):
    """The steps of one layer in one direction, and what they leave for the way back."""

    held = 0
    """Numbers of a step and a width that the way back needs, besides the hidden states."""
    apart = 0
    """For so many gates, the last ones, the recurrent matrix gives what is not just added to what the other
    gives, and has another gradient. Here they come first among what enters, and last among what recurs."""

    def __init__(self, matrix_KHH: Tensor, bias_K1H: Tensor, gates_KTNH: Tensor, h_NH: Tensor) -> None:
        self._matrix, self._bias, self.gates = matrix_KHH, bias_K1H, gates_KTNH
        self._steps = gates_KTNH.shape[1]
        self.states = h_NH.new_empty(self._steps + 1, *h_NH.shape)
        """[T + 1, N, H]: before the first step, and after each."""
        self.states[0] = h_NH
        self._held = h_NH.new_empty(self.held, self._steps, *h_NH.shape)

    def _recurrent(self, step: int) -> Tensor:
        """What the recurrent matrix gives, [K, N, H]."""
        return torch.baddbmm(self._bias, self.states[step].expand(len(self._matrix), -1, -1), self._matrix)

    def _before(self, g_KNH: Tensor) -> Tensor:
        """The gradient of a hidden state, by way of the recurrent matrix."""
        first, *more = zip(g_KNH, self._matrix.mT, strict=True)
        h_NH: Tensor = first[0] @ first[1]
        for g_NH, matrix_HH in more:
            h_NH.addmm_(g_NH, matrix_HH)
        return h_NH

    @abstractmethod
    def forward(self, step: int, c_NH: Tensor) -> Tensor:
        """Write the next hidden state; returns the next state of the cells."""

    @abstractmethod
    def backward(self, step: int, h_NH: Tensor, c_NH: Tensor, now_KNH: Tensor) -> tuple[Tensor, Tensor]:
        """Of the gradients of both states after a step, those before it; those of the gates are written."""


class _Rnn(_Cell):
    def forward(self, step: int, c_NH: Tensor) -> Tensor:
        torch.tanh(self.gates[0, step] + self._recurrent(step)[0], out=self.states[step + 1])
        return c_NH

    def backward(self, step: int, h_NH: Tensor, c_NH: Tensor, now_KNH: Tensor) -> tuple[Tensor, Tensor]:
        _tanh_backward(h_NH, self.states[step + 1], grad_input=now_KNH[0])
        return self._before(now_KNH), c_NH


class _Gru(_Cell):
    held = 4
    apart = 1

    def forward(self, step: int, c_NH: Tensor) -> Tensor:
        gates, recurrent = self.gates[:, step], self._recurrent(step)
        reset, update, new, given = self._held[:, step]
        torch.add(gates[1:], recurrent[:2], out=self._held[:2, step]).sigmoid_()
        given.copy_(recurrent[2])
        torch.addcmul(gates[0], reset, given, out=new).tanh_()
        torch.lerp(new, self.states[step], update, out=self.states[step + 1])
        return c_NH

    def backward(self, step: int, h_NH: Tensor, c_NH: Tensor, now_KNH: Tensor) -> tuple[Tensor, Tensor]:
        reset, update, new, given = self._held[:, step]
        kept, of_both = h_NH * update, now_KNH[1:3]
        of_new, of_reset, of_update, of_given = now_KNH
        _tanh_backward(h_NH - kept, new, grad_input=of_new)
        torch.mul(of_new, reset, out=of_given)
        torch.mul(of_new, given, out=of_reset)
        torch.sub(self.states[step], new, out=of_update).mul_(h_NH)
        _sigmoid_backward(of_both, self._held[:2, step], grad_input=of_both)
        return self._before(now_KNH[1:]).add_(kept), c_NH


class _Lstm(_Cell):
    held = 6

    def forward(self, step: int, c_NH: Tensor) -> Tensor:
        entry, forget, new, out, before, shown = self._held[:, step]
        torch.add(self.gates[:, step], self._recurrent(step), out=self._held[:4, step])
        self._held[:2, step].sigmoid_()
        new.tanh_()
        out.sigmoid_()
        before.copy_(c_NH)
        c_NH = (forget * c_NH).addcmul_(entry, new)
        torch.mul(out, torch.tanh(c_NH, out=shown), out=self.states[step + 1])
        return c_NH

    def backward(self, step: int, h_NH: Tensor, c_NH: Tensor, now_KNH: Tensor) -> tuple[Tensor, Tensor]:
        entry, forget, new, out, before, shown = self._held[:, step]
        of_entry, of_forget, of_new, of_out = now_KNH
        _tanh_backward(h_NH * out, shown, grad_input=of_out)
        c_NH = c_NH + of_out
        torch.mul(c_NH, new, out=of_entry)
        torch.mul(c_NH, before, out=of_forget)
        _tanh_backward(c_NH * entry, new, grad_input=of_new)
        _sigmoid_backward(h_NH * shown, out, grad_input=of_out)
        _sigmoid_backward(now_KNH[:2], self._held[:2, step], grad_input=now_KNH[:2])
        return self._before(now_KNH), c_NH * forget


_tanh_backward = torch.ops.aten.tanh_backward.grad_input
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_CELLS: dict[str, type[_Cell]] = {"RNN_TANH": _Rnn, "GRU": _Gru, "LSTM": _Lstm}


def _attention(
    tape: Tape,
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,  # noqa: ARG001 - a hint; the mask says it
) -> tuple[Tensor, Tensor | None]:
    width, heads = module.embed_dim, module.num_heads
    given = [z if module.batch_first else z.transpose(0, 1) for z in (query, key, value)]
    if query is key is value:
        projected = list(tape.linear(given[0], module.in_proj_weight, module.in_proj_bias).chunk(3, -1))
    else:
        projected = [
            tape.linear(z, module.in_proj_weight, module.in_proj_bias, rows=slice(at, at + width))
            for at, z in zip((0, width, 2 * width), given, strict=True)
        ]
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in projected)
    score_NHTT = q @ k.mT / math.sqrt(width // heads)
    if attn_mask is not None:
        added = _additive(attn_mask, score_NHTT)
        score_NHTT = score_NHTT + (added.unflatten(0, (-1, heads)) if added.dim() == 3 else added)
    if key_padding_mask is not None:
        score_NHTT = score_NHTT + _additive(key_padding_mask, score_NHTT)[:, None, None]
    weight_NHTT = functional.dropout(torch.softmax(score_NHTT, -1), module.dropout, module.training)
    seen = (weight_NHTT @ v).transpose(1, 2).flatten(2)
    y = tape.linear(seen, module.out_proj.weight, module.out_proj.bias)
    shown = None
    if need_weights:
        shown = weight_NHTT.mean(1) if average_attn_weights else weight_NHTT
    return y if module.batch_first else y.transpose(0, 1), shown


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """What forbids where it is true, as what is added to a score."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)


def written_out(tape: Tape, module: nn.Module, *given: Tensor) -> Any:
    """Any module: run on each record by itself, with parameters of the record's own."""
    rule = vars(module).pop("forward")
    try:
        each = {
            name: p.detach().expand(len(given[0]), *p.shape).requires_grad_()
            for name, p in module.named_parameters()
        }

        def one(parameters: dict[str, Tensor], *record: Tensor) -> Any:
            out = functional_call(module, parameters, tuple(x.unsqueeze(0) for x in record))
            return tree_map(lambda y: y.squeeze(0), out)

        for name, parameter in module.named_parameters():
            tape.watch([each[name]], partial(_explicit, where=tape.part(parameter)))
        return torch.vmap(one, randomness="different")(each, *given)
    finally:
        vars(module)["forward"] = rule


def _explicit(gradient: Tensor, *, where: slice) -> Iterator[Factor]:
    yield Explicit(gradient.flatten(1), where)


def _rule(module: nn.Module) -> Rule | None:
    """How this very class of layer is recorded, as it is set; a subclass may compute otherwise."""
    kind = type(module)
    if kind is nn.Linear:
        return _linear
    if kind in (nn.Conv1d, nn.Conv2d) and module.padding_mode == "zeros":
        return _convolution
    if kind is nn.Embedding and not (module.max_norm or module.sparse or module.scale_grad_by_freq):
        return _embedding
    if kind is nn.LayerNorm:
        return _layer_norm
    if kind is nn.GroupNorm:
        return _group_norm
    if kind in (nn.RNN, nn.GRU, nn.LSTM) and module.mode in _CELLS and not module.proj_size:
        return _recurrent
    if kind is nn.MultiheadAttention and not module.add_zero_attn:
        # Not with keys and values of other widths, or of its own.
        names = {name for name, _ in module.named_parameters(recurse=False)}
        return _attention if names <= {"in_proj_weight", "in_proj_bias"} else None
    return None


Named = tuple[str, nn.Module, Rule]


def rules_of(model: nn.Module, name: str = "") -> Iterator[Named]:
    """Name, module and rule of everything in a model that has parameters, outermost first."""
    rule = _rule(model)
    if rule is not None and not any(p is not None for p in model.parameters()):
        return
    if rule is not None:
        yield name, model, rule
    elif any(True for _ in model.parameters(recurse=False)):
        yield name, model, written_out
    else:
        for child_name, child in model.named_children():
            yield from rules_of(child, f"{name}.{child_name}" if name else child_name)


class Recorder:
    """A model whose calls are recorded, while it is asked to."""

    def __init__(self, model: nn.Module) -> None:
        self.rules = list(rules_of(model))
        self._in_place = [module for module in model.modules() if getattr(module, "inplace", False)]
        self._trained = [p for p in model.parameters() if p.requires_grad]

    @contextmanager
    def onto(self, tape: Tape) -> Iterator[None]:
        """Within, a call of the model is recorded on `tape`; afterwards the model is as it was."""
        try:
            for _, module, rule in self.rules:
                vars(module)["forward"] = partial(rule, tape, module)
            for module in self._in_place:
                vars(module)["inplace"] = False
            for parameter in self._trained:
                parameter.requires_grad_(False)
            yield
        finally:
            tape.clear()
            for _, module, _ in self.rules:
                vars(module).pop("forward", None)
            for module in self._in_place:
                vars(module)["inplace"] = True
            for parameter in self._trained:
                parameter.requires_grad_()
