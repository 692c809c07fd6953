"""Training on another device gives, bit by bit, what it gives on the CPU, and waits for it once in a step.

test_other_device.py runs these in a process of their own, which knows the device "other" from its start.
"""

import copy
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import other_device
import pytest
import torch
from torch import Tensor, nn

from lepton_fl.errors import ConfigError
from lepton_fl.privacy.lattice import Lattice
from lepton_fl.tasks import arrays_of, load_arrays
from lepton_fl.tasks.task import BINARY, score
from lepton_fl.training import LocalPlan, SimulationNoise, UnseededNoise, bookkeeping, layers, train_locally
from lepton_fl.training.bookkeeping import Bookkeeper
from lepton_fl.training.local import NO_CLIP
from lepton_fl.training.noise import _STATE, drawing

other_device.load(Path(os.environ["OTHER_DEVICE"]))
OTHER = torch.device("other", 0)

FEATURES = 16
UPLOADS_OF_A_BLOCK = 2
"""Which records, and their weights."""


class Shaped(nn.Module):
    """Records as something else than vectors, and what comes of them as one logit."""

    def __init__(self, shape: tuple[int, ...], *layers: nn.Module, outputs: int) -> None:
        super().__init__()
        self.shape, self.layers, self.last = shape, nn.Sequential(*layers), nn.Linear(outputs, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        y = self.layers(x_BF.unflatten(1, self.shape))
        return self.last(y.flatten(1)).squeeze(-1)


class First(nn.Module):
    """Of what a layer gives, the first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Words(nn.Module):
    """Every feature is one of two words."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(2, 3), nn.Linear(3 * FEATURES, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.last(self.table((x_BF > 0.5).long()).flatten(1).tanh()).squeeze(-1)


class Gated(nn.Linear):
    """A layer without a rule."""

    def forward(self, x_BF: Tensor) -> Tensor:
        return nn.functional.linear(x_BF, self.weight.tanh(), self.bias)


class Steadfast(nn.Module):
    """Makes a tensor of its own, on the CPU wherever the records are."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(FEATURES, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.last(x_BF * torch.ones(FEATURES)).squeeze(-1)


class Masked(nn.Module):
    """Dropout by masks that the CPU draws as the device would, where it stood when the round began."""

    stood = [0, 0]

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.p:
            return x
        kept = torch.empty_like(x).bernoulli_(1 - self.p, generator=other_device.generator(*self.stood))
        self.stood[1] += other_device.OFFSET
        return x * (kept / (1 - self.p))


def mlp(*between: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 12), nn.LayerNorm(12), nn.Tanh(), *between, nn.Linear(12, 1), nn.Flatten(0)
    )


MODELS = {
    "mlp": mlp,
    "convolution": lambda: Shaped(
        (1, 4, 4), nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), outputs=64
    ),
    "grouped convolution": lambda: Shaped((2, 8), nn.Conv1d(2, 4, 3, groups=2), nn.Tanh(), outputs=24),
    "gru": lambda: Shaped((4, 4), First(nn.GRU(4, 5, batch_first=True)), outputs=20),
    "lstm": lambda: Shaped((4, 4), First(nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True)), outputs=40),
    "transformer": lambda: Shaped(
        (2, 8),
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True, batch_first=True),
        outputs=16,
    ),
    "embedding": Words,
    "no rule": lambda: nn.Sequential(Gated(FEATURES, 4), nn.Linear(4, 1), nn.Flatten(0)),
}


@dataclass
class Records:
    x_NF: np.ndarray
    y_N: np.ndarray
    unit_N: np.ndarray
    units: int


def records(sizes: list[int]) -> Records:
    """Units of so many records, among each other."""
    rng = np.random.default_rng(1)
    unit_N = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    x_NF = rng.uniform(-1, 1, (len(unit_N), FEATURES)).astype(np.float32)
    return Records(x_NF, (rng.random(len(unit_N)) < 0.3).astype(np.float32), unit_N, len(sizes))


ALONE = records([1] * 60)
SEVERAL = records([1, 2, 3, 5, 9] * 8)
PLAN = LocalPlan(
    clip=0.5,
    lattice=Lattice.of(
        clip=0.5, noise_multiplier=1.0, coordinates=500, cohort=1, shares=1, expected_batch=30.0
    ),
    sample_rate=0.5,
    expected_batch=30.0,
    steps=3,
    optimizer="sgd",
    lr=0.5,
)


def made(name: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name]()


def trained(model, table, plan, *, noise=None):
    noise = noise or SimulationNoise(1, "north")
    return train_locally(model, BINARY, arrays_of(model), table, plan, noise, 1)


def assert_alike(model, table, plan):
    """The same update from a copy on the CPU and one on the device; returns the latter."""
    there = copy.deepcopy(model).to(OTHER)
    one, other = trained(model, table, plan), trained(there, table, plan)
    assert {parameter.device.type for parameter in there.parameters()} == {"other"}
    assert any(array.any() for array in one.delta.values())
    for name, array in one.delta.items():
        np.testing.assert_array_equal(array, other.delta[name])
    assert replace(one, delta={}) == replace(other, delta={})
    return other


# --- the device itself ---


def test_it_is_another_device():
    """As on a GPU, what is computed from tensors of both is refused, an index too."""
    here, there, one = torch.ones(3, 3), torch.ones(3, 3, device=OTHER), torch.tensor([1])

    for mixed, *given in ((torch.add, here, there), (torch.mm, there, here), (torch.take, there, one)):
        with pytest.raises(RuntimeError, match="same device"):
            mixed(*given)
    with pytest.raises(RuntimeError, match="same device"):
        there[one]
    with pytest.raises(TypeError, match="to numpy"):
        np.asarray(there)


# --- updates ---


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("table", [ALONE, SEVERAL], ids=["one record each", "several records"])
def test_the_update_is_the_cpus(name, table):
    """With noise on it, which the same key draws."""
    assert_alike(made(name), table, PLAN)


@pytest.mark.parametrize(
    "changes",
    [
        {"most_records": 2},
        {"most_records": 3, "mean_of_records": True},
        {"optimizer": "adam", "lr": 0.01},
        {"proximal_mu": 0.3},
        {"lattice": None},
        {"lattice": None, "clip": NO_CLIP},
        {"gradient_only": True, "steps": 1},
        {"sample_rate": 1e-9},
    ],
    ids=" ".join,
)
def test_the_update_is_the_cpus_under_every_plan(changes):
    """Of units with several records."""
    assert_alike(made("mlp"), SEVERAL, replace(PLAN, **changes))


def test_a_unit_of_more_records_than_a_block(monkeypatch):
    """Its gradient is written out, block by block."""
    monkeypatch.setattr(bookkeeping, "MOST_ROWS", 32)

    assert_alike(made("mlp"), records([100, 1, 40, 3]), replace(PLAN, sample_rate=1.0))


def test_padded_matrices(monkeypatch):
    """Where rows of a block round differently."""
    alike = bookkeeping._Trial.rows_alike
    monkeypatch.setattr(
        bookkeeping._Trial,
        "rows_alike",
        lambda self, rows, *, padded=False: padded and alike(self, rows, padded=padded),
    )

    assert_alike(made("mlp"), ALONE, PLAN)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("sizes", [[1] * 60, [1, 2, 3, 5, 9] * 3], ids=["one record each", "several records"])
def test_what_is_not_finite_is_zero_and_counted(value, sizes, caplog):
    """And said once, of the CPU's update and of the device's."""
    table = records(sizes)
    table.x_NF[7, 2] = value
    plan = replace(PLAN, sample_rate=1.0)

    with caplog.at_level(logging.WARNING):
        found = assert_alike(made("mlp"), table, plan).not_finite

    assert found == plan.steps
    assert sum("not finite" in record.message for record in caplog.records) == 2


def test_a_second_round_begins_where_the_first_ended():
    """The table is put on the device once, and the model is as plain as before."""
    model = made("mlp").to(OTHER)
    trained(model, ALONE, PLAN)
    other_device.counts()

    trained(model, ALONE, PLAN)

    # The received parameters, and three steps.
    uploads = len(list(model.parameters())) + PLAN.steps * (UPLOADS_OF_A_BLOCK + 1)
    assert other_device.counts()["copies from the CPU"] == uploads
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_scores_are_the_cpus():
    """Records are judged where the model lies."""
    model = made("transformer")

    one, other = score(model, BINARY, ALONE.x_NF), score(model.to(OTHER), BINARY, ALONE.x_NF)

    np.testing.assert_array_equal(one, other)


def test_parameters_come_and_go():
    """What was loaded is what is read."""
    model, arrays = made("mlp").to(OTHER), arrays_of(made("mlp"))
    arrays = {name: array + 1 for name, array in arrays.items()}

    load_arrays(model, arrays)

    for name, array in arrays_of(model).items():
        np.testing.assert_array_equal(array, arrays[name])


# --- what is waited for ---


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("table", [ALONE, SEVERAL], ids=["one record each", "several records"])
def test_a_step_waits_once(name, table):
    """For its sum; two steps more are two sums more. Nothing else is asked of the device."""
    model = made(name).to(OTHER)
    trained(model, table, PLAN)

    def asked(steps):
        other_device.counts()
        trained(model, table, replace(PLAN, steps=steps))
        return other_device.counts()

    few, many = asked(1), asked(3)
    waits = ("copies to the CPU", "numbers read", "aten::nonzero", "aten::masked_select", "aten::equal")
    more = {what: many.get(what, 0) - few.get(what, 0) for what in waits}
    assert more == {**dict.fromkeys(waits, 0), "copies to the CPU": 2}


def test_the_sum_is_float64_on_the_device(monkeypatch):
    """Until it is whole."""
    sums = []
    add_to = layers.Outer.add_to
    monkeypatch.setattr(
        layers.Outer,
        "add_to",
        lambda self, sum_L, weight_N: (sums.append(sum_L), add_to(self, sum_L, weight_N)),
    )

    trained(made("mlp").to(OTHER), ALONE, PLAN)

    assert sums
    assert {(total.device.type, total.dtype) for total in sums} == {("other", torch.float64)}


# --- the trial ---


def test_a_device_that_computes_something_else_is_refused(monkeypatch):
    """Its gradients are held against the CPU's, in float64."""
    tanh = torch.tanh
    monkeypatch.setattr(torch, "tanh", lambda x: tanh(x) * (1.001 if x.device.type == "other" else 1.0))

    with pytest.raises(ConfigError, match="off by"):
        trained(made("mlp").to(OTHER), ALONE, PLAN)


def test_the_judge_is_float64_on_the_cpu():
    """Whatever the model is."""
    trial = bookkeeping._Trial(made("mlp").to(OTHER), BINARY, (torch.zeros(1, FEATURES), torch.zeros(1)))

    judges = {(parameter.device.type, parameter.dtype) for parameter in trial._reference.parameters()}
    assert judges == {("cpu", torch.float64)}


def test_a_model_that_stays_on_the_cpu_is_refused_in_one_line():
    """Naming what torch says of it."""
    with pytest.raises(ConfigError, match=r"cannot be trained record by record: .*same device"):
        trained(Steadfast().to(OTHER), ALONE, PLAN)


# --- masks ---


def test_masks_are_of_the_devices_generator(monkeypatch):
    """Bit by bit those of a model on the CPU that draws them as the device does."""
    began = []
    monkeypatch.setattr(
        torch.other,
        "set_rng_state",
        lambda state, at=None, do=torch.other.set_rng_state: (
            began.append(state.numpy().view("<u8").tolist()),
            do(state, at),
        ),
    )
    there, here = mlp(nn.Dropout(0.5)), mlp(Masked(0.5))
    here.load_state_dict(there.state_dict())

    other = trained(there.to(OTHER), ALONE, PLAN)
    Masked.stood[:] = began[0]
    one = trained(here, ALONE, PLAN)

    assert Masked.stood[1] > began[0][1] + 2 * other_device.OFFSET
    for name, array in one.delta.items():
        np.testing.assert_array_equal(array, other.delta[name])


def test_masks_are_secret_and_of_each_site():
    """Whatever anybody seeded; afterwards the generators stand where they stood."""

    def masked(noise):
        torch.manual_seed(3)
        model = mlp(nn.Dropout(0.5)).to(OTHER)
        torch.manual_seed(1)
        before = torch.get_rng_state(), torch.other.get_rng_state()
        update = trained(model, ALONE, replace(PLAN, lattice=None, sample_rate=1.0), noise=noise)
        for one, other in zip(before, (torch.get_rng_state(), torch.other.get_rng_state()), strict=True):
            assert torch.equal(one, other)
        return np.concatenate([a.ravel() for a in update.delta.values()])

    assert (masked(UnseededNoise()) != masked(UnseededNoise())).any()
    assert (masked(SimulationNoise(0, "a")) != masked(SimulationNoise(0, "b"))).any()
    assert (masked(SimulationNoise(0, "a")) == masked(SimulationNoise(0, "a"))).all()


def test_all_of_the_state_is_the_keys():
    """The key of Philox and where it stands: no bit of them is always the same, but for those that must."""
    found, words = [], []
    for n in range(200):
        with drawing(bytes([n] * 32), OTHER):
            found.append(torch.other.get_rng_state().numpy().view("<u8"))
            words.append(torch.get_rng_state()[_STATE].numpy().view("<u8"))
    seeds, offsets = np.array(found).T
    halves = np.concatenate([seeds & 0xFFFFFFFF, seeds >> 32])

    assert np.bitwise_or.reduce(seeds) == 2**64 - 1
    assert np.bitwise_and.reduce(seeds) == 0
    assert np.bitwise_or.reduce(offsets) == 2**62 - 4
    assert np.bitwise_and.reduce(offsets) == 0
    # And none of them is the CPU's as well.
    assert not np.isin(halves, np.concatenate(words)).any()


@pytest.mark.parametrize("draws", [True, False])
def test_where_a_state_is_laid_out_otherwise_no_model_may_draw(monkeypatch, draws):
    """One that draws nothing may be trained."""
    monkeypatch.setattr(
        torch.other, "get_rng_state", lambda at=None, do=torch.other.get_rng_state: torch.cat([do(at)] * 2)
    )
    monkeypatch.setattr(
        torch.other, "set_rng_state", lambda state, at=None, do=torch.other.set_rng_state: do(state[:16], at)
    )
    model = mlp(nn.Dropout(0.5) if draws else nn.Identity()).to(OTHER)

    if not draws:
        assert trained(model, ALONE, PLAN).steps == PLAN.steps
        return
    with pytest.raises(ConfigError, match="draws on other"):
        trained(model, ALONE, PLAN)


def test_rows_are_alike_there():
    """So no matrix is padded and no record computed by itself, as on the CPU."""
    like = torch.zeros(1, FEATURES), torch.zeros(1)

    one = Bookkeeper.of(made("mlp"), BINARY, like=like, expected=30.0)
    other = Bookkeeper.of(made("mlp").to(OTHER), BINARY, like=like, expected=30.0)

    assert (one.rows, one.padded) == (other.rows, other.padded)
