"""Clipped sums by book-keeping: against Opacus, loops over records in float64, and faults planted."""

import copy
import dataclasses
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn import functional

from lepton_fl.errors import ConfigError
from lepton_fl.privacy.lattice import SLACK
from lepton_fl.tasks.task import BINARY
from lepton_fl.training import bookkeeping, layers
from lepton_fl.training.bookkeeping import Bookkeeper, ClippedSum, norms

CLIP = 0.7

# --- a small model for each kind of layer: [B, F] features to [B] logits ---


class Shaped(nn.Module):
    """Records as something else than vectors, and what comes of them as one logit."""

    def __init__(self, shape: tuple[int, ...], *layers: nn.Module, outputs: int) -> None:
        super().__init__()
        self.shape, self.layers, self.last = shape, nn.Sequential(*layers), nn.Linear(outputs, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        y = self.layers(x_BF.unflatten(1, self.shape))
        return self.last(y.flatten(1)).squeeze(-1)


class Words(nn.Module):
    """Two features of three are words, of which one may be twice in a record."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(2, 3, padding_idx=None), nn.Linear(7, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        words = self.table((x_BF[:, :2] > 0.5).long())
        return self.last(torch.cat([words.flatten(1).tanh(), x_BF[:, 2:3]], 1)).squeeze(-1)


class ManyWords(nn.Module):
    """More words than a record has, of which some may be twice in it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(9, 4), nn.Linear(4, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.last(self.table((x_BF * 4 + 4).long()).tanh().sum(1).tanh()).squeeze(-1)


class Padded(nn.Module):
    """The word 0 is nothing, and never learns."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(2, 4, padding_idx=0), nn.Linear(4, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.last(self.table((x_BF > 0.5).long()).sum(1).tanh()).squeeze(-1)


class Recurrent(nn.Module):
    """Four steps of three features."""

    def __init__(self, kind: type[nn.RNNBase], **how: object) -> None:
        super().__init__()
        self.core = kind(3, 5, **how)
        self.last = nn.Linear(10 if how.get("bidirectional") else 5, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        x_BTI = x_BF.unflatten(1, (4, 3))
        if self.core.batch_first:
            y_BTH = self.core(x_BTI)[0]
        else:
            y_BTH = self.core(x_BTI.transpose(0, 1))[0].transpose(0, 1)
        return self.last(y_BTH[:, -1] + y_BTH[:, 1]).squeeze(-1)


class Started(nn.Module):
    """Four steps of three features, from states that are made of the record, to the last states."""

    def __init__(self, kind: type[nn.RNNBase], **how: object) -> None:
        super().__init__()
        self.first, self.core, self.last = nn.Linear(12, 20), kind(3, 5, 2, **how), nn.Linear(15, 1)
        self.cells = kind is nn.LSTM

    def forward(self, x_BF: Tensor) -> Tensor:
        h, c = self.first(x_BF).tanh().unflatten(1, (2, 2, 5)).permute(1, 2, 0, 3)
        y_TBH, end = self.core(x_BF.unflatten(1, (4, 3)).transpose(0, 1), (h, c) if self.cells else h)
        h, c = end if self.cells else (end, end)
        return self.last(torch.cat([y_TBH[1], h[0], c[1]], 1)).squeeze(-1)


class Attention(nn.Module):
    """Four positions of eight features that look at each other, or at others."""

    def __init__(self, *, batch_first: bool = True, crossed: bool = False, masked: bool = False) -> None:
        super().__init__()
        self.core = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.crossed, self.masked, self.last = crossed, masked, nn.Linear(8, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        x = x_BF.unflatten(1, (4, 8))
        if not self.core.batch_first:
            x = x.transpose(0, 1)
        other = x.flip(-1) if self.crossed else x
        hidden, masks = torch.ones(4, 4, dtype=torch.bool).triu(1), {}
        if self.masked:
            gone = x_BF[:, ::8].abs() > 0.8
            gone[:, 0] = False
            masks = {"attn_mask": hidden, "key_padding_mask": gone}
        y = self.core(x, other, other, need_weights=False, **masks)[0]
        return self.last(y.sum(1 if self.core.batch_first else 0)).squeeze(-1)


class Twice(nn.Module):
    """One layer called twice: a gradient's norm is that of the sum of both."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.last = nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.last(self.core(self.core(x_BF).tanh()).tanh()).squeeze(-1)


class Raw(nn.Module):
    """Parameters of its own, used by its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(5, 3)), nn.Parameter(torch.zeros(3))

    def forward(self, x_BF: Tensor) -> Tensor:
        return (x_BF[:, :, None] * self.scale + self.shift).flatten(1)


class Tokens(nn.Module):
    """A layer without a rule below layers that have one."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.last = (
            Raw(),
            nn.Sequential(nn.Linear(15, 4), nn.ReLU(inplace=True), nn.Linear(4, 1)),
        )

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.last(self.tokens(x_BF)).squeeze(-1)


class Gated(nn.Linear):
    """A subclass that computes something else: its class's rule is not for it."""

    def forward(self, x_BF: Tensor) -> Tensor:
        return functional.linear(x_BF, self.weight.tanh(), self.bias)


def one_logit(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(0))


def transformer(**how: object) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **how)


MODELS = {
    "linear": (6, lambda: one_logit(nn.Linear(6, 1))),
    "no bias": (6, lambda: one_logit(nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False))),
    "mlp": (
        30,
        lambda: one_logit(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 1)),
    ),
    "layer norm": (6, lambda: one_logit(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))),
    "layer norm over two": (
        12,
        lambda: Shaped((3, 4), nn.LayerNorm((3, 4)), nn.LayerNorm(4, bias=False), outputs=12),
    ),
    "group norm": (24, lambda: Shaped((4, 6), nn.GroupNorm(2, 4), nn.Tanh(), outputs=24)),
    "group norm of vectors": (8, lambda: one_logit(nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.Linear(8, 1))),
    "positions": (24, lambda: Shaped((6, 4), nn.Linear(4, 5), nn.Tanh(), outputs=30)),
    "few positions": (16, lambda: Shaped((2, 8), nn.Linear(8, 9), nn.Tanh(), outputs=18)),
    "convolution in a line": (20, lambda: Shaped((2, 10), nn.Conv1d(2, 3, 4, 2, 1), nn.Tanh(), outputs=15)),
    "convolution": (
        72,
        lambda: Shaped(
            (2, 6, 6),
            nn.Conv2d(2, 4, 3, padding="same"),
            nn.Tanh(),
            nn.Conv2d(4, 3, (2, 3), (2, 1), (0, 1), (1, 2)),
            outputs=36,
        ),
    ),
    "grouped convolution": (
        72,
        lambda: Shaped((2, 6, 6), nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), outputs=64),
    ),
    "embedding": (3, Words),
    "embedding with padding": (4, Padded),
    "embedding of many words": (4, ManyWords),
    "gru": (12, lambda: Recurrent(nn.GRU, batch_first=True)),
    "deep gru in both directions": (12, lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True)),
    "lstm": (12, lambda: Recurrent(nn.LSTM)),
    "deep lstm without bias": (12, lambda: Recurrent(nn.LSTM, num_layers=2, bias=False, batch_first=True)),
    "lstm in both directions": (12, lambda: Recurrent(nn.LSTM, bidirectional=True)),
    "lstm from states to states": (12, lambda: Started(nn.LSTM)),
    "gru from states to states": (12, lambda: Started(nn.GRU)),
    "rnn from states to states": (12, lambda: Started(nn.RNN)),
    "gru of one step": (6, lambda: Shaped((1, 6), First(nn.GRU(6, 5, batch_first=True)), outputs=5)),
    "lstm of one step": (6, lambda: Shaped((1, 6), First(nn.LSTM(6, 5, batch_first=True)), outputs=5)),
    "attention": (32, Attention),
    "attention to others": (32, lambda: Attention(batch_first=False, crossed=True)),
    "masked attention": (32, lambda: Attention(masked=True)),
    "transformer": (32, lambda: Shaped((4, 8), transformer(norm_first=True, dropout=0.0), outputs=32)),
    "a layer twice": (6, Twice),
    "no rule": (5, Tokens),
    "a subclass": (6, lambda: one_logit(Gated(6, 4), nn.Linear(4, 1))),
    "rnn": (12, lambda: Shaped((4, 3), First(nn.RNN(3, 5, batch_first=True)), outputs=20)),
}
"""Features, and how it is made."""


class First(nn.Module):
    """Of what a layer gives, the first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def random_model(name: str, seed: int = 3) -> tuple[int, nn.Module]:
    """Features and a model at random weights, none of them zero."""
    features, make = MODELS[name]
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return features, model


# --- by hand, and by book-keeping ---


def records(features, count, seed=1):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.uniform(-1, 1, (count, features)).astype(np.float32))
    return x, torch.from_numpy((rng.random(count) < 0.5).astype(np.float32))


def written_out(model, x, y):
    """Each record's gradient [N, L], by a backward pass of its own in float64."""
    model = copy.deepcopy(model).double()
    rows = []
    for n in range(len(x)):
        loss = BINARY.loss(model(x[[n]].double()), y[[n]].double())
        found = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def clipped_by_hand(gradient_NL, owner_N, units, clip, weight_N=None):
    weight_N = torch.ones(len(gradient_NL)) if weight_N is None else weight_N
    unit_UL = torch.zeros(units, gradient_NL.shape[1], dtype=torch.float64)
    unit_UL.index_add_(0, owner_N, gradient_NL * weight_N.double()[:, None])
    norm_U = unit_UL.norm(dim=1)
    return (unit_UL * (clip / norm_U.clamp(min=clip))[:, None]).sum(0)


def keeper(model, x, y, expected=50.0):
    return Bookkeeper.of(model, BINARY, like=(x, y), expected=expected)


def summed(model, x, y, sizes, *, clip=CLIP, weight=None, expected=50.0):
    """What is summed over units of so many of the records, in order."""
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.long))
    weight = torch.ones(len(owner)) if weight is None else weight
    clipped = ClippedSum(keeper(model, x, y, expected), clip)
    return clipped(x, y, torch.arange(len(owner)), owner, weight, len(sizes))


def assert_close(found, expected, rel=1e-5):
    assert float((found - expected).norm()) <= rel * float(expected.norm())


# --- against one record at a time ---


@pytest.mark.parametrize("name", MODELS)
def test_each_kind_of_layer_against_a_loop(name):
    """One record a unit: the clipped sum to 1e-5, each norm to 1e-6, some of them clipped and some not."""
    features, model = random_model(name)
    x, y = records(features, 70)
    gradient = written_out(model, x, y)
    clip = float(gradient.norm(dim=1).median())

    found = summed(model, x, y, [1] * 70, clip=clip)

    assert_close(found, clipped_by_hand(gradient, torch.arange(70), 70, clip))
    kept = Bookkeeper(copy.deepcopy(model).double(), BINARY, 96)
    with kept.recording():
        square, bound = norms(kept.factors(x.double(), y.double()))
    torch.testing.assert_close(square[:70].sqrt(), gradient.norm(dim=1), rtol=1e-6, atol=1e-9)
    assert bool((bound[:70] >= square[:70] * (1 - 1e-6)).all())


@pytest.mark.parametrize("name", MODELS)
def test_units_of_many_records(name):
    """Summed by weight, then clipped once: units of none, of one, of some, and of more than a block has."""
    features, model = random_model(name)
    sizes = [1, 3, 0, 2, 40, 1, 7, 1, 5]
    x, y = records(features, sum(sizes))
    weight = torch.linspace(0.2, 1.5, sum(sizes))
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.long))
    by_hand = clipped_by_hand(written_out(model, x, y), owner, len(sizes), CLIP, weight)

    assert_close(summed(model, x, y, sizes, weight=weight, expected=10.0), by_hand)


@pytest.mark.parametrize("name", ["mlp", "layer norm", "convolution", "gru", "embedding"])
def test_blocks_change_nothing(name):
    """However the records are cut into blocks, the sum is the same."""
    features, model = random_model(name)
    sizes = [1] * 60 + [2, 5, 3]
    x, y = records(features, sum(sizes))

    few, many = (summed(model, x, y, sizes, expected=expected) for expected in (5.0, 200.0))

    assert_close(few, many, rel=1e-6)


@pytest.mark.parametrize("name", ["mlp", "gru"])
def test_nobody_is_zero(name):
    """A step that samples nobody, or units without records."""
    features, model = random_model(name)
    x, y = records(features, 3)

    assert not summed(model, x, y, []).any()
    assert not summed(model, x, y, [0, 0]).any()


LAYERS = {
    "linear": lambda: nn.Linear(8, 8),
    "narrow": lambda: nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 8)),
    "norm": lambda: nn.LayerNorm(8),
    "groups": lambda: nn.GroupNorm(2, 8),
    "positions": lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Linear(4, 4), nn.Flatten()),
    "line": lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 2, 3, padding=1), nn.Flatten()),
    "plane": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 2, (1, 3), padding="same"), nn.Flatten()
    ),
    "tanh": nn.Tanh,
    "relu": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
}


@given(
    names=st.lists(st.sampled_from(sorted(LAYERS)), max_size=5),
    sizes=st.lists(st.integers(0, 6), max_size=12),
    clip=st.sampled_from([1e-3, 0.5, 1e30]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25)
def test_random_models_against_vmap(names, sizes, clip, seed):
    """Any order of layers, any units: the sum of what torch.func says of each record, clipped."""
    torch.manual_seed(seed)
    model = one_logit(*(LAYERS[name]() for name in names), nn.Linear(8, 1))
    x, y = records(8, max(1, sum(sizes)), seed)
    parameters = {name: p.detach().double() for name, p in model.named_parameters()}
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False

    def loss(parameters, x, y):
        return BINARY.loss(torch.func.functional_call(plain, parameters, (x[None],)), y[None])

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x.double(), y.double())
    gradient = torch.cat([g.flatten(1) for g in found.values()], 1)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.long))

    by_hand = clipped_by_hand(gradient[: len(owner)], owner, len(sizes), clip)
    # In float64 all through: some of these models are all but singular, and float32 is tried above.
    total = ClippedSum(Bookkeeper(model.double(), BINARY, 32), clip)(
        x.double(), y.double(), torch.arange(len(owner)), owner, torch.ones(len(owner)), len(sizes)
    )
    assert float((total - by_hand).norm()) <= 1e-9 * max(float(by_hand.norm()), 1.0)


# --- what is the same by several ways ---


@pytest.mark.parametrize(
    "name", ["positions", "few positions", "convolution", "convolution in a line", "gru", "lstm", "attention"]
)
def test_written_out_or_not_the_sum_is_the_same(name, monkeypatch):
    """Which of the two is cheaper is no more than that."""
    features, model = random_model(name)
    x, y = records(features, 40)
    owner = torch.repeat_interleave(torch.arange(30), torch.tensor([1] * 27 + [5, 4, 4]))
    found = []
    for written in (True, False):
        monkeypatch.setattr(layers, "_is_written_out", lambda *_, written=written: written)
        kept = Bookkeeper(copy.deepcopy(model).double(), BINARY, 64)
        found.append(
            ClippedSum(kept, CLIP)(x.double(), y.double(), torch.arange(40), owner, torch.ones(40), 30)
        )

    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["convolution", "convolution in a line", "gru", "mlp"])
def test_what_is_held_at_once_changes_nothing(name, monkeypatch):
    """Of a record: bit by bit, its factors are the same; sums are so up to the order of additions."""
    features, model = random_model(name)
    x, y = records(features, 40)
    kept = Bookkeeper(model, BINARY, 64)
    factors, square = [], []
    for held in (1 << 18, 200):
        monkeypatch.setattr(layers, "HELD_AT_ONCE", held)
        with kept.recording():
            factors.append(kept.factors(x, y))
        square.append(norms(factors[-1])[0])

    for one, other in zip(*factors, strict=True):
        for a, b in zip(one.parts(), other.parts(), strict=True):
            assert torch.equal(a, b)
    torch.testing.assert_close(*square, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("kind", ["RNN_TANH", "GRU", "LSTM"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_way_back_through_time_against_finite_differences(kind, steps):
    """Of both outputs, with respect to the gates and to both states at the start."""
    torch.manual_seed(1)
    cell = layers._CELLS[kind]
    gates = {"RNN_TANH": 1, "GRU": 3, "LSTM": 4}[kind]
    matrix = torch.randn(gates, 4, 4, dtype=torch.float64)
    bias = torch.randn(gates, 1, 4, dtype=torch.float64)
    given = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((gates, steps, 2, 4), (2, 4), (2, 4))
    ]

    def run(gates_KTNH, h_NH, c_NH):
        through = cell(matrix, bias, gates_KTNH.detach(), h_NH.detach())
        added = torch.zeros(()).double().expand_as(gates_KTNH)
        return layers._ThroughTime.apply(through, gates_KTNH, added, h_NH, c_NH)

    assert torch.autograd.gradcheck(run, given)


class Residual(nn.Module):
    """What a recurrent layer gives is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.last = nn.GRU(3, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        x_BTI = x_BF.unflatten(1, (4, 3))
        y_BTH = self.core(x_BTI)[0]
        y_BTH += x_BTI
        return self.last(y_BTH[:, -1]).squeeze(-1)


def test_hidden_states_may_be_changed_in_place():
    """The way back has its own."""
    torch.manual_seed(1)
    model = Residual()
    x, y = records(12, 30)

    by_hand = clipped_by_hand(written_out(model, x, y), torch.arange(30), 30, CLIP)
    assert_close(summed(model, x, y, [1] * 30), by_hand)


# --- against Opacus ---

NOT_OF_OPACUS = {
    "a subclass": "no hook for it",
    "no rule": "no hook for it",
    "rnn": "no hook for it",
    "rnn from states to states": "no hook for it",
    "layer norm over two": "wants a bias",
    "transformer": "its norms before and after are not told apart",
    "embedding with padding": "gives the word that is nothing a gradient",
    "attention": "positions first, always",
    "attention to others": "positions first, always",
    "masked attention": "positions first, always",
}
"""What its hooks do not take, or not as torch does; the loop above is for these."""


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_OF_OPACUS])
def test_norms_are_those_of_opacus(name):
    """Its hooks, in float64; recurrent layers and attention in its own implementation of them."""
    features, model = random_model(name)
    x, y = records(features, 20)
    theirs = GradSampleModule(ModuleValidator.fix(copy.deepcopy(model)).double(), loss_reduction="sum")
    theirs.train()
    BINARY.loss(theirs(x.double().requires_grad_()), y.double()).backward()
    flat = [p.grad_sample.flatten(1) for p in theirs.parameters()]
    gradient = torch.cat(flat, 1)

    kept = Bookkeeper(copy.deepcopy(model).double(), BINARY, 32)
    with kept.recording():
        square, _ = norms(kept.factors(x.double(), y.double()))
    torch.testing.assert_close(square[:20].sqrt(), gradient.norm(dim=1), rtol=1e-6, atol=1e-9)
    if [p.shape for p in theirs.parameters()] == [p.shape for p in model.parameters()]:
        by_hand = clipped_by_hand(gradient.detach(), torch.arange(20), 20, CLIP)
        assert_close(summed(model, x, y, [1] * 20), by_hand)


# --- what is not finite ---


@pytest.mark.parametrize("name", ["mlp", "layer norm", "convolution", "gru", "lstm", "attention", "no rule"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_record_that_is_not_finite_is_zero_and_counted(name, value, caplog):
    """What is left is the sum without it, since it is zero in every factor."""
    features, model = random_model(name)
    x, y = records(features, 40)
    spoilt = x.clone()
    spoilt[[3, 9], 1] = float(value)
    kept = keeper(model, x, y)
    index, one = torch.arange(40), torch.ones(40)
    clipped = ClippedSum(kept, CLIP)

    found = clipped(spoilt, y, index, index, one, 40)

    assert clipped.not_finite == 2
    assert [r.getMessage() for r in caplog.records if "finite" in r.getMessage()] == [
        "training: gradients of some records are not finite; they count as zero"
    ]
    rest = torch.tensor([n for n in range(40) if n not in (3, 9)])
    assert_close(found, clipped_by_hand(written_out(model, x[rest], y[rest]), torch.arange(38), 38, CLIP))


def test_of_a_unit_the_other_records_count():
    """A record that is not finite takes nothing from the unit's others."""
    features, model = random_model("mlp")
    x, y = records(features, 6)
    x[2] = float("nan")
    others = torch.tensor([0, 1, 3, 4, 5])

    found = summed(model, x, y, [3, 3])

    by_hand = clipped_by_hand(
        written_out(model, x[others], y[others]), torch.tensor([0, 0, 1, 1, 1]), 2, CLIP
    )
    assert_close(found, by_hand)


# --- rounding ---


def others_moved(total, x, y):
    """L2 norm of what the last record changes in the sum of the others."""
    return float((total(x, y) - total(x[:-1], y[:-1]) - total(x[-1:], y[-1:])).norm())


def provoking(count, seed):
    """Parameters as large as a server may send, and records all but orthogonal to them."""
    rng = np.random.default_rng(seed)
    weight = rng.uniform(-1e6, 1e6, 13).astype(np.float32)
    x = rng.uniform(-1, 1, (count, 13))
    for _ in range(3):
        along = x @ weight.astype(np.float64) / np.square(weight, dtype=np.float64).sum()
        x = (x - along[:, None] * weight).astype(np.float32).astype(np.float64)
    model = one_logit(nn.Linear(13, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(weight[None]))
        model[0].bias.zero_()
    return model, torch.from_numpy(x).float(), torch.from_numpy((rng.random(count) < 0.5).astype(np.float32))


def plainly(model):
    """Float32 over a batch of any size, gradients of each record clipped to 1 and added in float64."""

    def total(x, y):
        g = torch.sigmoid(model(x)) - y
        row = torch.cat([g[:, None] * x, g[:, None]], 1).detach().double()
        return (row * (1 / row.norm(dim=1).clamp(min=1))[:, None]).sum(0)

    return total


@pytest.mark.parametrize("count", [260, 272, 400])
def test_parameters_chosen_to_provoke_rounding_provoke_none(count):
    """One more record changes nothing of the others, where in plain float32 it is many times the slack."""
    worst = {"plain": 0.0, "ours": 0.0}
    for seed in range(4):
        model, x, y = provoking(count, seed)
        kept = keeper(model, x, y, expected=float(count))

        def ours(x, y, kept=kept):
            index = torch.arange(len(x))
            return ClippedSum(kept, 1.0)(x, y, index, index, torch.ones(len(x)), len(x))

        worst["plain"] = max(worst["plain"], others_moved(plainly(model), x, y))
        worst["ours"] = max(worst["ours"], others_moved(ours, x, y))

    assert worst["plain"] > 10 * SLACK, "the probe has no power"
    assert worst["ours"] < 1e-9


def hostile(model, seed):
    """Parameters of any size up to 1e6, in place."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 10 ** (6 * torch.rand(p.shape)))
            p.clamp_(-1e6, 1e6)


@pytest.mark.parametrize(
    "name", ["mlp", "layer norm", "convolution", "gru", "lstm", "rnn", "attention", "embedding"]
)
def test_a_record_is_said_the_same_of_wherever_it_stands(name):
    """Bit by bit, at any parameters: so one more record changes nothing that is said of the others."""
    features, model = random_model(name)
    x, y = records(features, 200)
    kept = keeper(model, x, y, expected=90.0)
    for seed in range(3):
        hostile(model, seed)
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))[:90]
        with kept.recording():
            first, second = kept.factors(x[order[:80]], y[order[:80]]), kept.factors(x[order], y[order])
        for one, other in zip(first, second, strict=True):
            for a, b in zip(one.parts(), other.parts(), strict=True):
                assert torch.equal(a[:80].nan_to_num(), b[:80].nan_to_num())


def test_a_unit_whose_records_cancel_is_clipped_as_if_they_did_not():
    """What is left of records that cancel is rounding; its norm is not to be believed."""
    model = one_logit(nn.Linear(4, 1, bias=False))
    nn.init.zeros_(model[0].weight)
    x = torch.full((2, 4), 1e20)
    y = torch.tensor([0.0, 1.0])

    found = summed(model, x, y, [2])

    assert float(found.norm()) <= CLIP * (1 + SLACK)


# --- the trial at the start ---


def fails(model, features=6):
    x, y = records(features, 4)
    with pytest.raises(ConfigError) as caught:
        keeper(model, x, y)
    return str(caught.value)


@pytest.mark.parametrize("fault", ["norms", "sum", "bias"])
def test_a_wrong_rule_is_found(fault, monkeypatch):
    """One per cent off is a hundred times too much."""
    features, model = random_model("mlp")
    own = {"norms": layers.Outer.norms, "sum": layers.Outer.add_to}
    if fault == "norms":
        monkeypatch.setattr(layers.Outer, "norms", lambda s: tuple(1.01 * n for n in own["norms"](s)))
    elif fault == "sum":
        monkeypatch.setattr(layers.Outer, "add_to", lambda s, to, w: own["sum"](s, to, 1.01 * w))
    else:
        monkeypatch.setattr(
            layers.Outer, "add_to", lambda s, to, w: own["sum"](dataclasses.replace(s, bias=None), to, w)
        )

    assert "off by" in fails(model, features)


class Borrowed(nn.Module):
    """A layer's matrix used without calling the layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x):
        return self.last(x @ self.first.weight).squeeze(-1)


class Mixing(nn.Module):
    """Each record's output depends on the others."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(6, 1)

    def forward(self, x):
        return self.line(x - x.mean(0)).squeeze(-1)


class InPlace(nn.Module):
    """What a layer gave is overwritten."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x):
        y = self.first(self.first(x))
        return self.last(y.mul_(2.0)).squeeze(-1)


class Broken(nn.Module):
    """Cannot be run at all."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(7, 1)

    def forward(self, x):
        return self.line(x).squeeze(-1)


class Nowhere(nn.Module):
    """What it gives is no number."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(6, 1)

    def forward(self, x):
        return self.line(x).squeeze(-1) * math.nan


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Borrowed, "off by"),
        (Mixing, "off by"),
        (InPlace, "in place"),
        (Broken, "cannot be trained"),
        (Nowhere, "not finite"),
    ],
)
def test_a_model_that_no_record_can_be_told_apart_in_is_refused(kind, says):
    """In one line, before anything is trained."""
    message = fails(kind())

    assert says in message
    assert "\n" not in message


def test_a_frozen_parameter_is_refused():
    """Noise would move it, and no record did."""
    _, model = random_model("mlp")
    model[0].weight.requires_grad_(False)

    assert "frozen" in fails(model, 30)


def test_a_layer_without_a_rule_is_said_once(caplog):
    """By name; the others keep theirs."""
    features, model = random_model("no rule")
    x, y = records(features, 4)
    with caplog.at_level(logging.WARNING):
        keeper(model, x, y)

    assert [r.getMessage() for r in caplog.records if "closed form" in r.getMessage()] == [
        "model: layer 'tokens' (Raw) has no closed form: gradients of single records are written out"
    ]
    assert isinstance(model.tokens, Raw)


def test_dropout_is_no_fault():
    """It is off in the trial, and drawn anew for each record in training."""
    model = one_logit(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 1))
    x, y = records(6, 40)

    assert summed(model, x, y, [1] * 40).norm() > 0
    assert model[1].p == 0.5


@pytest.mark.parametrize("name", MODELS)
def test_padded_matrices_are_the_same_matrices(name):
    """What zeros are put around, and taken off, gives the gradients that it gave."""
    features, model = random_model(name)
    x, y = records(features, 30)
    plain, padded = (
        ClippedSum(Bookkeeper(copy.deepcopy(model).double(), BINARY, 32, padded), CLIP)(
            x.double(), y.double(), torch.arange(30), torch.arange(30), torch.ones(30), 30
        )
        for padded in (False, True)
    )

    torch.testing.assert_close(padded, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_a_sum_leaves_its_factors_as_they_were(name, dtype):
    """It is added to what is there, and the same factors give the same sum again."""
    features, model = random_model(name)
    x, y = records(features, 30)
    kept = Bookkeeper(copy.deepcopy(model).to(dtype), BINARY, 32)
    with kept.recording():
        factors = kept.factors(x.to(dtype), y.to(dtype))
    weight = torch.rand(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    once, twice = (torch.zeros(kept.size, dtype=torch.float64) for _ in range(2))
    for total, times in ((once, 1), (twice, 2)):
        for _ in range(times):
            bookkeeping._add_weighted(total, factors, weight)

    assert once.norm() > 0
    torch.testing.assert_close(twice, 2 * once, rtol=1e-12, atol=1e-12)


def test_a_padded_model_pads_only_where_a_side_is_not_whole(monkeypatch):
    """Zeros around a matrix that needs none would be two copies a pass."""
    features, padded, pad = 16, [], nn.functional.pad
    model = one_logit(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1))
    x, y = records(features, 30)
    kept = Bookkeeper(model, BINARY, 32, True)
    monkeypatch.setattr(
        layers.functional, "pad", lambda z, sides: padded.append(tuple(z.shape)) or pad(z, sides)
    )
    with kept.recording():
        kept.factors(x, y)

    assert padded == [(1, 16), (1,)]


@pytest.mark.parametrize(
    ("expected", "rate", "rows"),
    [(256, 1.0, 256), (256, 0.01, 288), (10, 0.5, 32), (4096, 1.0, 2048), (1 << 20, 0.01, 2048)],
)
def test_the_rows_of_a_block_are_of_public_numbers(expected, rate, rows):
    """Two standard deviations of a binomial number above its mean; beyond the most, several blocks."""
    found = bookkeeping._rows(expected, rate, 1)

    assert found % bookkeeping.ROWS == 0
    assert found == rows


def test_where_rows_round_differently_matrices_are_padded(monkeypatch):
    """And tried again."""
    monkeypatch.setattr(bookkeeping._Trial, "rows_alike", lambda *_, padded=False: padded)
    features, model = random_model("mlp")
    kept = keeper(model, *records(features, 30))

    assert kept.padded
    assert kept.rows > 1


@pytest.mark.parametrize("sizes", [[1] * 30, [3, 1, 0, 20, 6]])
def test_where_that_does_not_help_each_record_is_by_itself(sizes, monkeypatch, caplog):
    """Which is slow, and said."""
    monkeypatch.setattr(bookkeeping._Trial, "rows_alike", lambda *_, **__: False)
    features, model = random_model("mlp")
    x, y = records(features, 30)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    with caplog.at_level(logging.INFO):
        found = summed(model, x, y, sizes)

    assert keeper(model, x, y).rows == 1
    assert_close(found, clipped_by_hand(written_out(model, x, y), owner, len(sizes), CLIP))
    assert "each record is computed by itself" in caplog.text


def test_a_deep_network_makes_nothing_of_the_last_bit():
    """Narrow layers, whose rows some processors round differently, at parameters that cancel on all records.

    Each layer makes of the last bit of the one before some 10^5 times as much, so that float64 would not do:
    one unit more moved the sum by four clips.
    """
    random = torch.Generator().manual_seed(0)
    model = one_logit(
        *[nn.Linear(13, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()],
        nn.Linear(8, 1),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1e5, 1e5, generator=random) if parameter.dim() > 1 else parameter.zero_()
        model[0].weight.uniform_(-1e6, 1e6, generator=random)
        model[0].weight[:, 6:12] = -model[0].weight[:, :6]
        model[0].weight[:, 12] = 0
        model[-2].weight.mul_(1e-4)
    x = 2 * torch.rand(600, 13, generator=random) - 1
    x[:, 6:12] = x[:, :6]
    y = (torch.rand(600, generator=random) < 0.5).float()
    clipped = ClippedSum(keeper(model, x, y, expected=300.0), 1.0)

    def of(index):
        return clipped(x, y, index, torch.arange(len(index)), torch.ones(len(index)), len(index))

    whole = of(torch.arange(600))
    assert float(whole.norm()) > 0
    for left_out in (0, 1, 300):
        without = of(torch.cat([torch.arange(left_out), torch.arange(left_out + 1, 600)]))
        assert float((whole - without).norm()) <= 1 + SLACK
