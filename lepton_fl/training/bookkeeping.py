"""Sums of clipped gradients by book-keeping: one forward and one backward pass, of activations only.

S sampled units, B their records, M rows of a block, U units of a block, R records of a unit, F features, L
parameters. docs/accounting.md ("slack") says what each choice of precision here is for.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor, nn

from lepton_fl.errors import ConfigError
from lepton_fl.tasks.task import BINARY, TaskSpec, device_of
from lepton_fl.training.device import CPU, sent, whole_precision
from lepton_fl.training.layers import Factor, Recorder, Tape, written_out

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Between a gradient by book-keeping and the record's own backward pass, relative."""
ROWS = 32
"""A block has a multiple of it, or one: no vector instruction is left a remainder that rounds otherwise."""
MOST_ROWS = 2048
HELD_NUMBERS = 1 << 26
"""Numbers that the factors of one block hold, about."""
CANCELLED = 2.0**-8
"""Of the largest that a unit's gradient could be, given its factors: where they cancel to less, it is clipped
as if it were that long, since what is left may be rounding."""


def clip_weights(square_U: Tensor, bound_U: Tensor, clip: float) -> Tensor:
    """What each unit's gradient is multiplied by, given its squared norm and the square of a bound on it.

    At most clip / norm, and at most 1; 0 where the bound is not finite.
    """
    longest_U = square_U.sqrt()
    if bound_U is not square_U:
        longest_U = torch.maximum(longest_U, CANCELLED * bound_U.sqrt())
    # NaN stays what it is up to here, and infinity has become 0.
    return longest_U.clamp_(min=clip).reciprocal_().mul_(clip).nan_to_num_(nan=0.0)


def norms(factors: Sequence[Factor]) -> tuple[Tensor, Tensor]:
    """Squared norms over all parameters, and the squares of bounds on them, [..., N]; one tensor if equal."""
    squares, bounds = zip(*(factor.norms() for factor in factors), strict=True)
    square = sum(squares[1:], squares[0])
    if all(map(is_, squares, bounds)):
        return square, square
    return square, sum(bounds[1:], bounds[0])


@torch.no_grad()
def flattened(model: nn.Module) -> nn.Parameter:
    """All parameters in one, [L], of which the model's become views: a step is then of one vector."""
    parameters = list(model.parameters())
    flat_L = torch.cat([parameter.flatten() for parameter in parameters])
    parts = flat_L.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part.view(parameter.shape)
    return nn.Parameter(flat_L)


@dataclass
class Bookkeeper:
    """What a model's gradients are made of, record by record, for blocks of one fixed number of rows.

    Guarantee: what is said of a record by `Bookkeeper.of`'s is, bit by bit, a function of the record and the
    parameters: in blocks of one shape the arithmetic of a row depends neither on where it stands nor on
    what else is in the block. It is tried; where it does not hold, matrices are padded; where that does not
    help, a block is one record. More precision would not do: a deep network at parameters that a server
    chose makes of the last bit of a float64 another gradient.
    """

    model: nn.Module
    task: TaskSpec
    rows: int
    """M, of every block."""
    padded: bool = False
    """Whether matrices have zeros around them, where their sides are not whole."""
    numbers: int = 1
    """That a record's factors hold, about."""

    def __post_init__(self) -> None:
        self.where, at = dict[int, slice](), 0
        """By a parameter's id, its place in the flat gradient, in the model's order."""
        for parameter in self.model.parameters():
            self.where[id(parameter)] = slice(at, at + parameter.numel())
            at += parameter.numel()
        self.size = at
        """L."""
        self._tape, self._recorder = Tape(self.where, self.padded), Recorder(self.model)
        self._is_recording = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        task: TaskSpec,
        *,
        like: tuple[Tensor, Tensor],
        expected: float,
        rate: float = 0.0,
    ) -> Bookkeeper:
        """For records like these [N, F], [N], about so many in a step at this rate, tried on a random batch.

        Raises:
            ConfigError: the model cannot be trained record by record.
        """
        kinds = {parameter.dtype for parameter in model.parameters()}
        if not kinds:
            raise ConfigError("model: it has no parameters to train")
        if len(kinds) > 1:
            raise ConfigError(
                f"model: parameters of {len(kinds)} types ({_said(kinds)}); they must be of one"
            )
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                raise ConfigError(f"model: parameter {name!r} is frozen, and noise would move it")
        trial = _Trial(model, task, like)
        numbers = trial.check_gradients()
        rows = _rows(expected, rate, numbers)
        padded = not trial.rows_alike(rows)
        if padded:
            trial.check_gradients(padded=True)
            if not trial.rows_alike(rows, padded=True):
                log.warning("model: rows of a block round differently: each record is computed by itself")
                rows = 1
        kept = cls(model, task, rows, padded, numbers)
        for name, module, rule in kept._recorder.rules:
            if rule is written_out:
                log.warning(
                    "model: layer %r (%s) has no closed form: gradients of single records are written out",
                    name,
                    type(module).__name__,
                )
        return kept

    @property
    def memory(self) -> int:
        """Bytes that a block takes, about: its factors, in float32 and float64, and what made them."""
        return self.rows * self.numbers * (4 + 8 + 4) + 2 * 8 * self.size

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within, `factors` may be asked; the model's parameters do not require grad. May be nested."""
        if self._is_recording:
            yield
            return
        self._is_recording = True
        try:
            with self._recorder.onto(self._tape), torch.enable_grad():
                yield
        finally:
            self._is_recording = False

    def factors(self, x_BF: Tensor, y_B: Tensor) -> list[Factor]:
        """Of the summed loss of at most `rows` records; the rows of a block that are left are zero."""
        left = self.rows - len(x_BF)
        if left:
            x_BF, y_B = (torch.cat([z, z.new_zeros((left, *z.shape[1:]))]) for z in (x_BF, y_B))
        return self._tape.factors(self.task.loss(self.model(x_BF), y_B))


@dataclass
class ClippedSum:
    """Adds up the gradients of units, each of them clipped once, in float64."""

    bookkeeper: Bookkeeper
    clip: float
    not_finite: int = 0
    """Records so far whose gradient is not finite, and so counts as zero. For the site's own eyes.

    Those found on another device are in it after `collect`."""

    def __post_init__(self) -> None:
        self.device = device_of(self.bookkeeper.model)
        """Where the sum is formed, and what is asked of as little as can be: it would be waited for."""
        self._found_there = torch.zeros((), dtype=torch.int64, device=self.device)

    def __call__(
        self,
        x_NF: Tensor,
        y_N: Tensor,
        index_B: Tensor,
        owner_B: Tensor | None,
        weight_B: Tensor | None,
        units: int,
    ) -> Tensor:
        """The sum [L] over so many units; record index_B[b] is of unit owner_B[b] (ascending).

        Without owners record b is the only one of unit b; without weights all weigh 1. The sum is formed
        where the model and the table lie, and stays there; who is in it is known on the CPU.

        **Formal guarantee.** One more unit moves it by at most clip * (1 + slack) in L2 norm, whatever its
        records and the parameters (docs/accounting.md). A unit's gradient is the weighted sum over its
        records. What is not finite counts as zero, jointly over all parameters: 0 * inf is NaN, so an
        overflow that a server provoked by its choice of parameters would otherwise say, without noise, that
        a certain record is there.
        """
        sum_L = self._zeros(self.bookkeeper.size)
        rows = self.bookkeeper.rows
        weight_B = torch.ones(len(index_B)) if weight_B is None else weight_B
        with self.bookkeeper.recording():
            if owner_B is None:
                for index_C, weight_C in zip(index_B.split(rows), weight_B.split(rows), strict=True):
                    there_C = sent(index_C, self.device)
                    self._add(sum_L, x_NF[there_C], y_N[there_C], weight_C, None)
                return sum_L
            count_U = torch.bincount(owner_B, minlength=units)
            for first, last, start, stop in _blocks(count_U, rows):
                index_C, weight_C = sent(index_B[start:stop], self.device), weight_B[start:stop]
                if len(index_C) > rows:
                    sum_L += self._one(x_NF, y_N, index_C, weight_C)
                elif len(index_C):
                    self._add(sum_L, x_NF[index_C], y_N[index_C], weight_C, count_U[first:last])
        return sum_L

    def _add(
        self, sum_L: Tensor, x_CF: Tensor, y_C: Tensor, weight_C: Tensor, count_U: Tensor | None
    ) -> None:
        """A block of whole units of so many records each; None for one."""
        factors, square_M, bound_M = self._finite(x_CF, y_C)
        if not factors:
            return
        if count_U is None:
            own_M = self._of_block(weight_C)
            own_square_M = own_M.square()
            scaled_M = square_M * own_square_M
            scaled_bound_M = scaled_M if bound_M is square_M else bound_M * own_square_M
            _add_weighted(sum_L, factors, clip_weights(scaled_M, scaled_bound_M, self.clip).mul_(own_M))
            return
        start_U = torch.cumsum(count_U, 0) - count_U
        # Units of about as many records at a time: padded to a number that is the unit's own affair.
        room_U = 1 << torch.ceil(torch.log2(count_U.double())).long()
        for room in torch.unique(room_U[count_U > 0]).tolist():
            of_room = (room_U == room) & (count_U > 0)
            place_R = torch.arange(room)
            there_UR = place_R < count_U[of_room][:, None]
            index_UR = torch.where(there_UR, start_U[of_room][:, None] + place_R, 0)
            weight_UR = torch.where(there_UR, weight_C[index_UR], 0.0)
            index_UR, weight_UR = sent(index_UR, self.device), sent(weight_UR, self.device)
            grouped = [factor.grouped(index_UR, weight_UR) for factor in factors]
            _add_weighted(sum_L, grouped, clip_weights(*norms(grouped), self.clip))

    def _one(self, x_NF: Tensor, y_N: Tensor, index_C: Tensor, weight_C: Tensor) -> Tensor:
        """One unit of more records than a block has, its gradient written out."""
        sum_L, bound = self._zeros(self.bookkeeper.size), self._zeros(())
        rows = self.bookkeeper.rows
        for start in range(0, len(index_C), rows):
            index = index_C[start : start + rows]
            factors, _, bound_M = self._finite(x_NF[index], y_N[index])
            if factors:
                weight_M = self._of_block(weight_C[start : start + rows])
                _add_weighted(sum_L, factors, weight_M)
                bound += weight_M @ bound_M.sqrt()
        return sum_L * clip_weights(sum_L.square().sum(), bound.square(), self.clip)

    def _finite(self, x_CF: Tensor, y_C: Tensor) -> tuple[list[Factor], Tensor, Tensor]:
        """Factors and norms, those of records that are not finite made zero."""
        factors = self.bookkeeper.factors(x_CF, y_C)
        if not factors:
            none = self._zeros(0)
            return factors, none, none
        square_M, bound_M = norms(factors)
        # A sum of what is not negative: finite if all are, and nothing overflowed. Another device is not
        # asked, which would be waited for: there the few, if any, are overwritten in any case.
        if self.device == CPU and math.isfinite(bound_M.sum().item()):
            return factors, square_M, bound_M
        bad_M = ~torch.isfinite(bound_M)
        self._found_there += bad_M[: len(x_CF)].sum()
        if self.device == CPU:
            self.collect()
        for known_M in (square_M, bound_M):
            known_M.masked_fill_(bad_M, 0.0)
        return [factor.without(bad_M) for factor in factors], square_M, bound_M

    def collect(self) -> None:
        """Count in `not_finite` what was found where the sum is formed, which is waited for."""
        found = int(self._found_there)
        if found and not self.not_finite:
            # Not how many, and once a round.
            log.warning("training: gradients of some records are not finite; they count as zero")
        self.not_finite += found
        self._found_there.zero_()

    def _zeros(self, shape: int | tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def _of_block(self, weight_C: Tensor) -> Tensor:
        """Weights of all rows of a block, those of the rows that are left zero."""
        weight_M = torch.zeros(self.bookkeeper.rows, dtype=torch.float64)
        weight_M[: len(weight_C)] = weight_C
        return sent(weight_M, self.device)


@dataclass
class PlainSum:
    """Adds up gradients that are not to be clipped, by ordinary backward passes, without looking at each."""

    clipped: ClippedSum
    """Whose clip is above any gradient: what it gives is this, but for rounding."""

    def __call__(
        self,
        x_NF: Tensor,
        y_N: Tensor,
        index_B: Tensor,
        owner_B: Tensor | None,
        weight_B: Tensor | None,
        units: int,
    ) -> Tensor:
        """As `ClippedSum`, where every weight is 1; what is not finite counts as zero here too."""
        kept = self.clipped.bookkeeper
        parameters = list(kept.model.parameters())
        sum_L = torch.zeros(kept.size, dtype=torch.float64, device=self.clipped.device)
        for index_C in index_B.split(kept.rows):
            if not len(index_C):
                continue
            there_C = sent(index_C, self.clipped.device)
            with torch.enable_grad():
                loss = kept.task.loss(kept.model(x_NF[there_C]), y_N[there_C])
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            for gradient, where in zip(found, kept.where.values(), strict=True):
                if gradient is not None:
                    sum_L[where].add_(gradient.flatten())
        sum_L = sum_L.cpu()
        if math.isfinite(sum_L.sum()):
            return sum_L
        # A record's is not, or all of them together are too large for the parameters' type.
        return self.clipped(x_NF, y_N, index_B, owner_B, weight_B, units)


def _add_weighted(sum_L: Tensor, factors: Sequence[Factor], weight_N: Tensor) -> None:
    for factor in factors:
        factor.add_to(sum_L, weight_N)


def _blocks(count_U: Tensor, rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Units and records (first, last, start, stop) of each block: whole units that fit, or one alone."""
    end_U = torch.cumsum(count_U, 0)
    first = start = 0
    while first < len(count_U):
        last = max(first + 1, int(torch.searchsorted(end_U, start + rows, right=True)))
        stop = int(end_U[last - 1])
        yield first, last, start, stop
        first, start = last, stop


def lacks_memory(error: Exception) -> bool:
    """Whether the machine had no more of it; torch has no class of its own for that."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _rows(expected: float, rate: float, numbers: int) -> int:
    """Of a block, from public numbers alone: the study's batch and rate, and what a record's factors hold."""
    # Two standard deviations of a binomial number above its mean: seldom a second block.
    usual = expected + 2 * math.sqrt(expected * (1 - rate))
    rows = min(ROWS * math.ceil(usual / ROWS), MOST_ROWS, HELD_NUMBERS // numbers // ROWS * ROWS)
    return max(ROWS, rows)


def tried_on(device: torch.device) -> str:
    """What comes of the trial of a small network on this device, in one line.

    Raises:
        ConfigError: it computes something else than the CPU does, or nothing.
    """
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(30, 64), nn.Tanh(), nn.Linear(64, 1), nn.Flatten(0))
    like = torch.empty(0, 30), torch.empty(0)
    try:
        with whole_precision(device):
            kept = Bookkeeper.of(model.to_empty(device=device), BINARY, like=like, expected=256.0)
    except RuntimeError as error:
        raise ConfigError(f"device {device}: {str(error).splitlines()[0]}") from error
    how = "each by itself" if kept.rows == 1 else "rows alike" + ", matrices padded" * kept.padded
    return f"on trial: gradients are the CPU's, {how}"


def _said(kinds: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))


class _Trial:
    """A model's copy with random parameters: at a start of zeros, nothing would show."""

    def __init__(self, model: nn.Module, task: TaskSpec, like: tuple[Tensor, Tensor]) -> None:
        self._task, (self._x, self._y) = task, like
        self._random = torch.Generator().manual_seed(1)
        self._device = device_of(model)
        # On the CPU, whose generator is the one that is seeded here.
        self._model = copy.deepcopy(model).to(CPU)
        for module in self._model.modules():
            # A drawn mask would be another for each pass.
            for name, value in (("p", 0.0), ("dropout", 0.0)):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, value)
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.normal_(
                    std=(1 + parameter[0].numel()) ** -0.5 if parameter.dim() > 1 else 1.0,
                    generator=self._random,
                )
        self._reference = self._model
        """Passes back by itself: on the CPU and, where it judges another device, in float64."""
        if self._device != CPU:
            self._reference = copy.deepcopy(self._model).double()
            self._model.to(self._device)
        # As they stand in memory when the model is trained.
        flattened(self._model)

    def _records(self, count: int) -> tuple[Tensor, Tensor]:
        """In the features' range; halves of 0 and 1 too, that may be somebody's indices."""
        x = torch.rand((count, *self._x.shape[1:]), generator=self._random)
        x = torch.where(x < 0.5, (4 * x).floor().clamp(max=1), 2 * x - 1)
        y = torch.randint(0, 2, (count, *self._y.shape[1:]), generator=self._random)
        return x.to(self._device, self._x.dtype), y.to(self._device, self._y.dtype)

    def check_gradients(self, *, padded: bool = False) -> int:
        """Hold each record of a small block against its own backward pass.

        Returns how many numbers a record's factors hold.

        Raises:
            ConfigError: they differ, or one of them cannot be had.
        """
        x, y = self._records(4)
        try:
            own = [self._own(x[[n]], y[[n]]) for n in range(len(x))]
            kept = Bookkeeper(self._model, self._task, ROWS, padded)
            with kept.recording():
                factors = kept.factors(x, y)
        except ConfigError:
            raise
        except Exception as error:
            if lacks_memory(error):
                raise
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ConfigError(f"model: cannot be trained record by record: {why}") from error
        square_M = norms(factors)[0].cpu() if factors else torch.zeros(ROWS, dtype=torch.float64)
        for n, own_L in enumerate(own):
            found_L = torch.zeros(kept.size, dtype=torch.float64, device=self._device)
            _add_weighted(found_L, factors, (torch.arange(ROWS, device=self._device) == n).double())
            size = float(own_L.norm())
            if not math.isfinite(size):
                raise ConfigError("model: at random parameters a record's loss or gradient is not finite")
            off = max(float((found_L.cpu() - own_L).norm()), abs(float(square_M[n]) ** 0.5 - size))
            if not off <= TOLERANCE * size:
                raise ConfigError(
                    f"model: gradients of single records are off by {off / (size or 1):.2g}, allowed "
                    f"{TOLERANCE:g}: a layer uses parameters other than by being called, or mixes records"
                )
        return max(1, sum(part.numel() for factor in factors for part in factor.parts()) // ROWS)

    def _own(self, x_1F: Tensor, y_1: Tensor) -> Tensor:
        parameters = list(self._reference.parameters())
        if self._device != CPU:
            x_1F, y_1 = (z.cpu().double() if z.is_floating_point() else z.cpu() for z in (x_1F, y_1))
        loss = self._task.loss(self._reference(x_1F), y_1)
        found: Sequence[Tensor | None] = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))
        return torch.cat([g.flatten() for g in flat]).double()

    def rows_alike(self, rows: int, *, padded: bool = False) -> bool:
        """Whether a row is treated alike, bit by bit, in other places and beside other rows."""
        kept = Bookkeeper(self._model, self._task, rows, padded)
        x, y = self._records(rows)
        others = self._records(rows)
        with kept.recording():
            here = kept.factors(x, y)
            for _ in range(2):
                order_M = torch.randperm(rows, generator=self._random).to(self._device)
                moved = order_M[: rows // 2 + 1]
                x_M, y_M = others[0].clone(), others[1].clone()
                x_M[moved], y_M[moved] = x[: len(moved)], y[: len(moved)]
                for one, other in zip(here, kept.factors(x_M, y_M), strict=True):
                    for a, b in zip(one.parts(), other.parts(), strict=True):
                        if not torch.equal(a[: len(moved)], b[moved]):
                            return False
        return True
