"""DP-SGD at one site, with Opacus. N records, B records in a batch, F features, L parameters.

Opacus takes the steps from the sums that it is given; what is ours is what it leaves to its loader and
engine, and what measurements showed to go wrong there: exact Poisson sampling at the study's own rate, fast
sums of clipped units whose rounding is bounded, noise that is drawn on integers from a secure stream, the
public divisor, and a statement of the mechanism that really ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from operator import is_
from typing import Literal, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from torch import Tensor, nn

from lepton_fl.errors import ConfigError
from lepton_fl.privacy.accounting import DiscreteGaussian
from lepton_fl.privacy.guarantee import Guarantee
from lepton_fl.privacy.lattice import Lattice
from lepton_fl.study import Study
from lepton_fl.tasks.arrays import Arrays, arrays_of, load_arrays, unflatten
from lepton_fl.tasks.task import TaskSpec, device_of
from lepton_fl.training.bookkeeping import Bookkeeper, ClippedSum, PlainSum, flattened, lacks_memory
from lepton_fl.training.device import sent, whole_precision
from lepton_fl.training.noise import Noise, drawing
from lepton_fl.training.noising import Noising
from lepton_fl.training.sampling import PoissonSampler
from lepton_fl.training.units import RecordsOfUnits

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
    """L2 bound on one unit's gradient; `NO_CLIP` without privacy, which no study can ask for."""
    lattice: Lattice | None
    """What integers each step's sum becomes, and the noise on them; None if noise is not training's job."""
    sample_rate: float
    expected_batch: float
    """Public divisor of the summed gradient, in units."""
    steps: int
    optimizer: Literal["sgd", "adam"]
    lr: float
    most_records: int | None = None
    """Records of one unit that count in a step, drawn anew for each; None for all."""
    mean_of_records: bool = False
    """A unit's gradient is the mean over these, not the sum; clipped once, either way."""
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
            most_records=study.privacy.max_records_per_unit,
            mean_of_records=study.privacy.unit_gradient == "mean",
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
    not_finite: int = 0
    """Records that counted as zero, their gradients not finite, over all steps. Never leaves the site."""

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
    """`plan.steps` steps of DP-SGD from `arrays` on `table`, on the device where `model` lies.

    On another device than the CPU are the table, the passes, clipping and the float64 sum of a step; who is
    sampled, rounding and noise are the CPU's on every device.

    **Formal guarantee.** Each step releases the sum over sampled units of clip(sum, or mean, over the unit's
    records, or `most_records` of them, of the gradient), as integers on the plan's lattice with a discrete
    Gaussian on each, divided by a public constant; each unit is sampled independently with probability
    `sample_rate`. A step whose batch is empty is a step like any other, noise included. So the update is the
    `steps`-fold composition of the Poisson-subsampled mechanism of docs/accounting.md under adding or
    removing one unit (Abadi et al. 2016, Algorithm 1). Without a lattice the sum is exact, and is for secure
    aggregation to hide. With `NO_CLIP` nothing is promised, and no gradient is looked at by itself. The
    pull of FedProx (Li et al. 2020, eq. 2) changes none of this: it is added to what a step released, and
    computed from the received model and the steps released before, never from a record.

    Raises:
        ProtocolError: `arrays` do not fit the model or are not finite.
        ConfigError: the model cannot be trained record by record, or not in this machine's memory.
    """
    load_arrays(model, arrays)
    model.train()
    device = device_of(model)
    with _enough_memory(f"the table on {device.type}"):
        ready = _Ready.of(model, table, plan)
    with _enough_memory("the trial of the model, on one block of the study's size"), whole_precision(device):
        bookkeeper = _bookkeeper(model, task, ready, plan)
    clipped = ClippedSum(bookkeeper, plan.clip)
    plain = plan.clip == NO_CLIP and not plan.mean_of_records
    summed = PlainSum(clipped) if plain else clipped
    sampler = PoissonSampler(table.units, plan.sample_rate, noise.key("sample", round), steps=plan.steps)
    noising = None
    if plan.lattice is not None:
        noising = Noising(plan.lattice, bookkeeper.size, [noise], round, steps=plan.steps)
    flat_L = flattened(model)
    optimizer = _LatticeOptimizer(flat_L, plan, noising)
    if plan.proximal_mu:
        optimizer.attach_step_hook(_pull(flat_L, plan.proximal_mu))
    taken = 0
    recording = nullcontext() if plain else bookkeeper.recording()
    needed = f"a step: a block of {bookkeeper.rows} records takes about {1 + (bookkeeper.memory >> 20)} MiB"
    masks = drawing(noise.key("masks", round), device)
    owner_B: Tensor | None
    weight_B: Tensor | None
    try:
        with _enough_memory(needed), whole_precision(device), recording, masks:
            for step in range(plan.steps):
                sampled_S = sampler.draw(step)
                if ready.records.one_each:
                    index_B, owner_B, weight_B = torch.from_numpy(ready.records.only(sampled_S)), None, None
                else:
                    key = noise.key(f"records step {step}", round)
                    index_B, owner_B, weight_B = ready.records.of(torch.from_numpy(sampled_S), key)
                sum_L = summed(ready.x_NF, ready.y_N, index_B, owner_B, weight_B, len(sampled_S))
                # Where the model is on another device, the one time in a step that it is waited for.
                optimizer.sum_L = sum_L.cpu().numpy()
                optimizer.step()
                taken += 1
        clipped.collect()
    finally:
        if noising is not None:
            noising.forget()
    if plan.gradient_only:
        delta = unflatten(-optimizer.mean_L, arrays)
    else:
        trained = arrays_of(model)
        delta = {name: trained[name] - arrays[name].astype(np.float32) for name in trained}
    return LocalUpdate(
        delta=delta,
        # Of the loop, the sampler, the sum and the optimizer that ran, not of the plan.
        steps=taken,
        sampling_rate=sampler.rate,
        clip=clipped.clip,
        lattice=noising.lattice if noising is not None else None,
        not_finite=clipped.not_finite,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    """What is made of a table once, for the model that is trained on it."""

    x_NF: Tensor
    y_N: Tensor
    records: RecordsOfUnits
    made_of: tuple[object, ...]
    numbers: tuple[int, int | None, bool, torch.device]

    @classmethod
    def of(cls, model: nn.Module, table: Trainable, plan: LocalPlan) -> _Ready:
        made_of = (table.x_NF, table.y_N, table.unit_N)
        device = device_of(model)
        numbers = (table.units, plan.most_records, plan.mean_of_records, device)
        found = _READY.get(model)
        if found is None or found.numbers != numbers or not all(map(is_, found.made_of, made_of)):
            found = cls(
                x_NF=torch.from_numpy(table.x_NF).to(device),
                y_N=torch.from_numpy(table.y_N).to(device),
                records=RecordsOfUnits(
                    table.unit_N, table.units, most=plan.most_records, mean=plan.mean_of_records
                ),
                made_of=made_of,
                numbers=numbers,
            )
            _READY[model] = found
        return found


_READY: WeakKeyDictionary[nn.Module, _Ready] = WeakKeyDictionary()
_TRIED: WeakKeyDictionary[nn.Module, tuple[object, int, bool, int]] = WeakKeyDictionary()
"""What came of a model's trial. Neither of the two may hold the model, which would then never be freed."""


def _bookkeeper(model: nn.Module, task: TaskSpec, ready: _Ready, plan: LocalPlan) -> Bookkeeper:
    """A model's, tried once for all tables of one form; and again at other threads, which divide a block."""
    like = (ready.x_NF, ready.y_N)
    expected, rate = plan.expected_batch, plan.sample_rate
    form = (task, expected, rate, torch.get_num_threads(), *((x.dtype, x.shape[1:], x.device) for x in like))
    known = _TRIED.get(model)
    if known is not None and known[0] == form:
        return Bookkeeper(model, task, *known[1:])
    made = Bookkeeper.of(model, task, like=like, expected=expected, rate=rate)
    _TRIED[model] = form, made.rows, made.padded, made.numbers
    return made


@contextmanager
def _enough_memory(what: str) -> Iterator[None]:
    """One line in place of what torch or numpy say where there is too little for `what`."""
    try:
        yield
    except Exception as error:
        if not lacks_memory(error):
            raise
        raise ConfigError(
            f"training: this machine has too little memory for {what}",
            fix="give this process more memory, or join studies with a smaller model or train.expected_batch",
        ) from None


class _LatticeOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]  # Opacus has no types
    """Opacus's optimizer for sums that are clipped already, with noise on integers."""

    def __init__(self, flat_L: nn.Parameter, plan: LocalPlan, noising: Noising | None) -> None:
        super().__init__(
            inner_optimizer([flat_L], plan),
            noise_multiplier=0.0,
            max_grad_norm=plan.clip,
            expected_batch_size=plan.expected_batch,
            loss_reduction="mean",
        )
        self.noising = noising
        self.sum_L: NDArray[np.float64] = np.empty(0)
        """The next step's clipped sum."""
        self._noised_L: NDArray[np.float64] = np.empty(0)
        self._flat_L = flat_L

    @property
    def mean_L(self) -> NDArray[np.float64]:
        """The last step's gradient, with its noise."""
        mean_L: NDArray[np.float64] = self._noised_L / self.expected_batch_size
        return mean_L

    def accumulate(self) -> None:
        """Nothing: `sum_L` is whole. In float64, and not in the parameters' own type, as Opacus would."""

    def add_noise(self) -> None:
        """Turn the sum into integers, add the noise to them, and go on with what they stand for."""
        sum_L, self.sum_L = self.sum_L, np.empty(0)
        if self.noising is not None:
            sum_L = self.noising(sum_L[np.newaxis])[0]
        self._noised_L = sum_L
        # A copy: Opacus divides it in place, and a float64 model's would be `_noised_L` itself.
        grad_L = torch.from_numpy(sum_L).to(self._flat_L.dtype, copy=True)
        self._flat_L.grad = sent(grad_L, self._flat_L.device)


def inner_optimizer(parameters: Iterable[nn.Parameter], plan: LocalPlan) -> torch.optim.Optimizer:
    if plan.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=plan.lr)
    return torch.optim.SGD(parameters, lr=plan.lr)


def _pull(flat_L: nn.Parameter, mu: float) -> Callable[[DPOptimizer], None]:
    """Adds the gradient of mu/2 |w - received|^2, FedProx's proximal term; `flat_L` holds the received w.

    To be called after clip, noise and division: inside the clip it would take the records' share of it, and
    the noise would hide what needs no hiding.
    """
    received_L = flat_L.detach().clone()

    def pull(_: DPOptimizer) -> None:
        if flat_L.grad is not None:
            flat_L.grad.add_(flat_L.detach() - received_L, alpha=mu)

    return pull
