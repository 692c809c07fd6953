"""DP-SGD at one site, with Opacus. N records, U units, B records in a batch, F features, L parameters.

Opacus computes per-record gradients (hooks) and takes the steps; what is ours is what it leaves to its loader
and engine, and what measurements showed to go wrong there: exact Poisson sampling at the study's own rate,
units of several records, clipped sums whose rounding is bounded, noise that is drawn on integers from a
secure stream, the public divisor, and a statement of the mechanism that really ran.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from lepton_fl.errors import ConfigError
from lepton_fl.privacy.accounting import DiscreteGaussian
from lepton_fl.privacy.discrete_gaussian import sample
from lepton_fl.privacy.guarantee import Guarantee
from lepton_fl.privacy.lattice import Lattice
from lepton_fl.study import Study
from lepton_fl.tasks.arrays import Arrays, arrays_of, load_arrays, unflatten
from lepton_fl.tasks.task import TaskSpec
from lepton_fl.training.noise import Noise
from lepton_fl.training.sampling import PoissonSampler
from lepton_fl.training.units import RecordsOfUnits

MICRO_BATCH_UNITS = 2048
"""Units, and records, whose gradients are held at once. Speed and memory only: the result is the same."""
HELD_NUMBERS = 50_000_000
"""Numbers in the gradients held at once, where the model is large."""
SUMMED_NUMBERS = 1 << 22
"""Numbers that are in float64 at once, to be added up."""
NO_CLIP = 1e30
"""Above any gradient, and finite."""


class Trainable(Protocol):
    """What training needs of a site's table."""

    @property
    def x_NF(self) -> np.ndarray: ...
    @property
    def y_N(self) -> np.ndarray: ...
    @property
    def unit_N(self) -> np.ndarray: ...
    @property
    def units(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPlan:
    """One round of training at one site. Every number is the study's; none is the site's own."""

    clip: float
    """L2 bound on one unit's summed gradient; `NO_CLIP` without privacy."""
    lattice: Lattice | None
    """What integers each step's sum becomes, and the noise on them; None if noise is not training's job."""
    sample_rate: float
    expected_batch: float
    """Public divisor of the summed gradient, in units."""
    steps: int
    optimizer: Literal["sgd", "adam"]
    lr: float
    proximal_mu: float = 0.0
    """Pull of each step towards the received model (FedProx); 0 for none."""
    gradient_only: bool = False
    """Lock-step: the update is minus the one step's mean gradient, whole, in float64."""

    @classmethod
    def of(cls, study: Study, guarantee: Guarantee, *, coordinates: int) -> LocalPlan:
        """What the study asks of a site in one round, of a model of so many parameters.

        Raises:
            ConfigError: the study declares no expected batch.
        """
        train = study.train
        if train.expected_batch is None:
            raise ConfigError(
                f"study {study.study.name}: train.expected_batch is not declared, and a site's own size "
                "is not public",
                fix="set train.expected_batch to sample_rate x the units of a typical site",
            )
        private, local = guarantee.event is not None, study.privacy.noise == "local"
        return cls(
            clip=study.privacy.clip if private else NO_CLIP,
            lattice=guarantee.lattice(coordinates=coordinates, cohort=1) if private and local else None,
            sample_rate=train.sample_rate,
            expected_batch=train.expected_batch,
            steps=train.local_steps,
            optimizer=train.optimizer,
            lr=train.lr,
            proximal_mu=train.proximal_mu or 0.0,
            # The server holds the optimizer.
            gradient_only=train.strategy == "lockstep",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalUpdate:
    """What a round of local training gives, and the mechanism that gave it."""

    delta: Arrays
    """Trained minus received parameters, float32; in lock-step minus the mean gradient, float64."""
    steps: int
    """Steps taken, empty batches included."""
    sampling_rate: float
    clip: float
    lattice: Lattice | None
    """Of the noise in `delta`; None where this site added none."""

    def is_within(self, event: DiscreteGaussian, *, local_noise: bool) -> bool:
        """Whether what ran costs no more than `event`."""
        noise = (
            event
            if self.lattice is None
            else self.lattice.event(
                sampling_rate=event.sampling_rate, steps=event.steps, sampler_distance=event.sampler_distance
            )
        )
        return (
            self.steps <= event.steps
            and self.sampling_rate <= event.sampling_rate
            and self.clip <= event.clip
            and (not local_noise or self.lattice is not None)
            and noise.noise_multiplier >= event.noise_multiplier
        )


def train_locally(
    model: nn.Module,
    task: TaskSpec,
    arrays: Arrays,
    table: Trainable,
    plan: LocalPlan,
    noise: Noise,
    round: int,
) -> LocalUpdate:
    """`plan.steps` steps of DP-SGD from `arrays` on `table`.

    **Formal guarantee.** Each step releases the sum over sampled units of clip(sum over the unit's records of
    the gradient), as integers on the plan's lattice with a discrete Gaussian on each, divided by a public
    constant; each unit is sampled independently with probability `sample_rate`. A step whose batch is empty
    is a step like any other, noise included. So the update is the `steps`-fold composition of the
    Poisson-subsampled mechanism of docs/accounting.md under adding or removing one unit (Abadi et al. 2016,
    Algorithm 1). Without a lattice the sum is exact, and is for secure aggregation to hide. FedProx's pull
    (Li et al. 2020, eq. 2) changes none of this: it is added to what a step released, and computed from the
    received model and from the steps released before, never from a record.

    Raises:
        ProtocolError: `arrays` do not fit the model or are not finite.
    """
    load_arrays(model, arrays)
    model.train()
    x_NF, y_N = torch.from_numpy(table.x_NF), torch.from_numpy(table.y_N)
    sampler = PoissonSampler(table.units, plan.sample_rate, noise.key("sample", round))
    records = RecordsOfUnits(table.unit_N, table.units)
    hooks = GradSampleHooks(model, loss_reduction="sum")
    optimizer = _LatticeOptimizer(_inner_optimizer(model, plan), plan, noise, round)
    if plan.proximal_mu:
        optimizer.attach_step_hook(_pull(model, plan.proximal_mu))
    taken = 0
    try:
        for step in range(plan.steps):
            sampled = torch.from_numpy(sampler.draw(step))
            # At least one chunk: an empty batch still makes its noisy step.
            chunks = torch.split(sampled, _units_at_once(model)) or (sampled,)
            for number, chunk in enumerate(chunks, start=1):
                index_B, owner_B = records.of(chunk)
                optimizer.zero_grad(set_to_none=True)
                _attach_unit_gradients(model, task, x_NF, y_N, index_B, owner_B, len(chunk))
                optimizer.signal_skip_step(do_skip=number < len(chunks))
                optimizer.step()
            taken += 1
    finally:
        hooks.cleanup()
        _forget_records(model)
    if plan.gradient_only:
        delta = unflatten(-optimizer.mean_L, arrays)
    else:
        trained = arrays_of(model)
        delta = {name: trained[name] - arrays[name].astype(np.float32) for name in trained}
    return LocalUpdate(
        delta=delta,
        # Of the loop, the sampler and the optimizer that ran, not of the plan.
        steps=taken,
        sampling_rate=sampler.rate,
        clip=optimizer.max_grad_norm,
        lattice=optimizer.lattice,
    )


class _LatticeOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """Opacus's optimizer with sums of bounded error, and noise on integers."""

    def __init__(self, inner: torch.optim.Optimizer, plan: LocalPlan, noise: Noise, round: int) -> None:
        super().__init__(
            inner,
            noise_multiplier=0.0,
            max_grad_norm=plan.clip,
            expected_batch_size=plan.expected_batch,
            loss_reduction="mean",
        )
        self.lattice = plan.lattice
        self.mean_L: NDArray[np.float64] = np.empty(0)
        """The last step's gradient, with its noise."""
        self._noise = noise
        self._round = round
        self._steps = 0

    def clip_and_accumulate(self) -> None:
        """Add the units' gradients to the sum, each of them clipped.

        In float64: adding one unit to a sum in float32 would change the rounding errors of all the others by
        more than the slack that the noise accounts for (docs/accounting.md).
        """
        flat = [p.grad_sample.flatten(1) for p in self.params]
        norms = [torch.linalg.vector_norm(g, dim=1, dtype=torch.float64) for g in flat]
        norm_U = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        factor_U = (self.max_grad_norm / norm_U).clamp(max=1.0)
        # A unit without a gradient.
        factor_U[norm_U == 0] = 0.0
        for p, gradient in zip(self.params, flat, strict=True):
            total = p.new_zeros(gradient.shape[1], dtype=torch.float64)
            at_once = max(1, SUMMED_NUMBERS // gradient.shape[1])
            for part, factor in zip(gradient.split(at_once), factor_U.split(at_once), strict=True):
                total += factor @ part.double()
            p.summed_grad = total if p.summed_grad is None else p.summed_grad + total

    def add_noise(self) -> None:
        """Turn the sum into integers, add the noise to them, and go on with what they stand for."""
        sum_L = torch.cat([p.summed_grad for p in self.params]).numpy()
        if self.lattice is not None:
            sum_L = noised(sum_L, self.lattice, self._noise, f"step {self._steps}", self._round)
        self._steps += 1
        self.mean_L = sum_L / self.expected_batch_size
        at = 0
        for p in self.params:
            part_L = torch.from_numpy(sum_L[at : at + p.numel()])
            p.grad = part_L.reshape(p.shape).to(p.dtype)
            at += p.numel()


def noised(
    sum_L: NDArray[np.float64], lattice: Lattice, noise: Noise, purpose: str, round: int
) -> NDArray[np.float64]:
    """A sum of clipped gradients as a multiple of 1 / scale, with one discrete Gaussian share on it.

    What the integers stand for is exact in float64; what is computed from it costs no privacy.
    """
    quantiser = lattice.quantiser()
    words_L = quantiser.encode(sum_L, weight=1, rounding_key=noise.key(f"rounding {purpose}", round))
    drawn_L = sample(lattice.share, len(words_L), key=noise.key(f"noise {purpose}", round))
    return (words_L.view(np.int32) + drawn_L) / lattice.scale


def _forget_records(model: nn.Module) -> None:
    """Drop what Opacus leaves of the records: the sum before its noise, and inputs of a broken-off step."""
    for parameter in model.parameters():
        parameter.grad = None
        vars(parameter).pop("summed_grad", None)
    for module in model.modules():
        vars(module).pop("activations", None)
        vars(module).pop("max_batch_len", None)


def _inner_optimizer(model: nn.Module, plan: LocalPlan) -> torch.optim.Optimizer:
    if plan.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=plan.lr)
    return torch.optim.SGD(model.parameters(), lr=plan.lr)


def _pull(model: nn.Module, mu: float) -> Callable[[DPOptimizer], None]:
    """Adds the gradient of mu/2 |w - received|^2, FedProx's proximal term; `model` holds the received w.

    To be called where Opacus has clipped, noised and divided: inside the clip it would take the records'
    share of it, and the noise would hide what needs no hiding.
    """
    received = [parameter.detach().clone() for parameter in model.parameters()]

    @torch.no_grad()
    def pull(_: DPOptimizer) -> None:
        for parameter, start in zip(model.parameters(), received, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=mu)

    return pull


def _units_at_once(model: nn.Module) -> int:
    """Units whose gradients are held at once: by the model's size alone, which is public."""
    numbers = sum(p.numel() for p in model.parameters())
    return max(1, min(MICRO_BATCH_UNITS, HELD_NUMBERS // numbers))


def _attach_unit_gradients(
    model: nn.Module,
    task: TaskSpec,
    x_NF: Tensor,
    y_N: Tensor,
    index_B: Tensor,
    owner_B: Tensor,
    units: int,
) -> None:
    """Give each parameter the gradients [units, ...] of the sampled units, as Opacus's `grad_sample`.

    A unit's gradient is the sum over its records. What is not finite counts as zero, jointly over all
    parameters, per record and again per unit: 0 * inf is NaN, so a single overflow that a server provoked
    by its choice of parameters would otherwise say, without noise, that a certain record is there.
    """
    parameters = list(model.parameters())
    sums = [torch.zeros((units, *p.shape), dtype=p.dtype) for p in parameters]
    # By records too: one unit may own any number of them, and memory that runs out would say so.
    at_once = _units_at_once(model)
    for index_C, owner_C in zip(index_B.split(at_once), owner_B.split(at_once), strict=True):
        if not len(index_C):
            continue
        # An input that requires grad: torch warns of a backward hook without one.
        x_CF = x_NF[index_C].requires_grad_()
        task.loss(model(x_CF), y_N[index_C]).backward()
        per_record = [_taken(p, len(index_C)) for p in parameters]
        _zero_unless_finite(per_record)
        for total, gradient in zip(sums, per_record, strict=True):
            total.index_add_(0, owner_C, gradient)
    _zero_unless_finite(sums)
    for parameter, total in zip(parameters, sums, strict=True):
        parameter.grad_sample = total  # type: ignore[attr-defined]


def _taken(parameter: nn.Parameter, records: int) -> Tensor:
    """The per-record gradients that Opacus attached, taken off again; zero where the loss used none of it."""
    found: Tensor | None = parameter.grad_sample  # type: ignore[attr-defined]
    parameter.grad_sample = None  # type: ignore[attr-defined]
    return parameter.new_zeros((records, *parameter.shape)) if found is None else found


def _zero_unless_finite(gradients: list[Tensor]) -> None:
    """Zero each row that is not finite in every parameter, in place; rows are records or units."""
    # A row's sum of magnitudes is not finite if any of it is not, or if its norm would overflow.
    total_R = torch.stack([g.abs().flatten(1).sum(1) for g in gradients]).sum(0)
    bad_R = ~torch.isfinite(total_R)
    if bad_R.any():
        for gradient in gradients:
            gradient[bad_R] = 0.0
