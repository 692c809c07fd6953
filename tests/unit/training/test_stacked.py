"""Many sites trained together get what each gets alone."""

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from lepton_fl.errors import ConfigError
from lepton_fl.privacy.lattice import Lattice
from lepton_fl.tasks.arrays import arrays_of, flatten
from lepton_fl.tasks.task import BINARY
from lepton_fl.training import stacked
from lepton_fl.training.local import NO_CLIP, LocalPlan, train_locally
from lepton_fl.training.noise import SimulationNoise
from lepton_fl.training.stacked import Part, Stacked, Unstackable, check_memory, train_together

FEATURES = 6
SIZES = {"a": 90, "b": 24, "c": 2, "d": 140}
"""Records by site: at c most batches are empty."""


class OneLogit(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x_BF):
        return self.layers(x_BF).squeeze(-1)


def logreg():
    return OneLogit(nn.Linear(FEATURES, 1))


def mlp():
    return OneLogit(
        nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 5, bias=False), nn.GELU(), nn.Linear(5, 1)
    )


def layer_norm():
    return OneLogit(
        nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.Tanh(), nn.LayerNorm(8, bias=False), nn.Linear(8, 1)
    )


@dataclass
class Records:
    x_NF: np.ndarray
    y_N: np.ndarray
    unit_N: np.ndarray
    units: int


def records(count, *, units=None):
    """So many records; of `units` with unequal numbers of them, where given."""
    draws = np.random.default_rng(count)
    units = units or count
    unit_N = np.concatenate([np.arange(units), draws.integers(0, units, count - units)])
    return Records(
        draws.uniform(-1, 1, (count, FEATURES)).astype(np.float32),
        draws.integers(0, 2, count).astype(np.float32),
        unit_N,
        units,
    )


def local(**changes):
    plan = LocalPlan(
        clip=0.7, lattice=None, sample_rate=0.2, expected_batch=15.0, steps=5, optimizer="sgd", lr=0.2
    )
    return replace(plan, **changes)


def lattice(coordinates):
    return Lattice.of(
        clip=0.7, noise_multiplier=1.0, coordinates=coordinates, cohort=1, shares=1, expected_batch=15.0
    )


def trained(model, plan, tables, *, arrays=None, memory=stacked.MEMORY):
    """What the sites get together, and what each gets alone."""
    arrays = arrays or start(model)
    parts = [Part.of(name, table, SimulationNoise(7, name), plan) for name, table in tables.items()]
    stack = Stacked(model, BINARY, features=FEATURES)
    together = train_together(stack, arrays, parts, plan, 3, memory=memory)
    alone = [train_locally(model, BINARY, arrays, part.table, plan, part.noise, 3) for part in parts]
    return together, alone


def start(model):
    draws = np.random.default_rng(5)
    return {
        name: draws.normal(scale=0.4, size=a.shape).astype(np.float32) for name, a in arrays_of(model).items()
    }


def check_equal(together, alone, *, tolerance=1e-5):
    for one, other in zip(together, alone, strict=True):
        mine_L, its_L = flatten(one.delta), flatten(other.delta)

        assert mine_L.dtype == its_L.dtype
        assert np.linalg.norm(mine_L - its_L) <= tolerance * np.linalg.norm(its_L)
        assert replace(one, delta={}) == replace(other, delta={})


PLANS = {
    "lock-step": {"gradient_only": True, "steps": 1},
    "sgd": {},
    "adam": {"optimizer": "adam"},
    "fedprox": {"optimizer": "adam", "proximal_mu": 0.5},
}
SUMS = {"lock-step without noise": PLANS["lock-step"], "not clipped": {"clip": NO_CLIP}}
UNITS = {
    "records": (1, {}),
    "sums": (3, {}),
    "two of each, their mean": (3, {"most_records": 2, "mean_of_records": True}),
}


def coordinates(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("plan", [*PLANS, *SUMS])
@pytest.mark.parametrize("build", [logreg, mlp, layer_norm])
def test_each_site_gets_what_it_gets_alone(build, plan):
    """To 1e-5, with sampling, rounding and noise under the same keys; and the same mechanism is stated."""
    model = build()
    noise = lattice(coordinates(model)) if plan in PLANS else None
    made = local(**{**PLANS, **SUMS}[plan], lattice=noise)
    together, alone = trained(model, made, {name: records(count) for name, count in SIZES.items()})

    check_equal(together, alone)


@pytest.mark.parametrize("units", ["sums", "two of each, their mean"])
@pytest.mark.parametrize("plan", ["lock-step", "adam"])
@pytest.mark.parametrize("build", [logreg, layer_norm])
def test_a_unit_of_many_records_is_clipped_once(build, plan, units):
    """As at a site alone, whatever the rules of units."""
    model = build()
    each, rules = UNITS[units]
    made = local(**PLANS[plan], **rules, lattice=lattice(coordinates(model)))
    tables = {name: records(count, units=max(1, count // each)) for name, count in SIZES.items()}
    together, alone = trained(model, made, tables)

    check_equal(together, alone)


def test_in_lock_step_the_integers_are_nearly_always_the_same():
    """Noise and rounding are drawn under the same keys, and sums agree to the last bits."""
    model = logreg()
    tables = {f"s{k}": records(60 + k) for k in range(8)}
    made = local(**PLANS["lock-step"], lattice=lattice(coordinates(model)))
    together, alone = trained(model, made, tables)
    same = [np.mean(flatten(a.delta) == flatten(b.delta)) for a, b in zip(together, alone, strict=True)]

    assert np.mean(same) > 0.99


@pytest.mark.parametrize("plan", ["lock-step", "adam"])
def test_a_step_without_any_record_is_a_step(plan):
    model = logreg()
    made = local(**PLANS[plan], sample_rate=1e-6, lattice=lattice(FEATURES + 1))
    together, alone = trained(model, made, {name: records(n) for name, n in SIZES.items()})

    check_equal(together, alone)
    assert all(np.abs(flatten(update.delta)).min() > 0 for update in together)


@pytest.mark.parametrize("units", ["records", "sums"])
def test_how_many_at_once_changes_nothing(monkeypatch, units):
    """Sites in one computation, and units of each of them in one pass."""
    model, made = layer_norm(), local(optimizer="adam")
    tables = {name: records(n, units=max(1, n // UNITS[units][0])) for name, n in SIZES.items()}
    whole, _ = trained(model, made, tables)
    monkeypatch.setattr(stacked, "SITES", 2)
    # Of a few units: numbers in and out of the layers, in bytes, for two sites.
    few, _ = trained(model, made, tables, memory=60_000)

    check_equal(few, whole, tolerance=1e-6)


@pytest.fixture
def passes(monkeypatch):
    """Sites and rows of each pass."""
    seen = []
    factors = Stacked.factors

    def recorded(self, x_KBF, y_KB):
        seen.append(y_KB.shape)
        return factors(self, x_KBF, y_KB)

    monkeypatch.setattr(Stacked, "factors", recorded)
    return seen


def test_little_of_a_pass_is_filled_up(passes):
    """Sites of very unequal sizes: rows computed, beside those sampled; and passes no more than it takes."""
    model, made = mlp(), local(sample_rate=0.5, steps=4)
    stack = Stacked(model, BINARY, features=FEATURES)
    # As for a model that is large enough for this to matter.
    stack.numbers, fill = 1, stacked._FILL // stack.size
    tables = {f"s{k}": records(20 * k) for k in range(1, 49)}
    parts = [Part.of(name, table, SimulationNoise(7, name), made) for name, table in tables.items()]
    passes.clear()
    train_together(stack, start(model), parts, made, 1)
    rows = sum(sites * rows for sites, rows in passes)
    sampled = made.steps * 0.5 * sum(len(table.y_N) for table in tables.values())

    assert rows <= sampled + 4 * sampled**0.5 + fill * len(passes)
    assert len(passes) <= made.steps * (1 + (48 * 480 - sampled / made.steps) // fill)


@pytest.mark.parametrize("fill", [0, 1 << 20])
def test_who_is_in_one_pass_changes_nothing(monkeypatch, passes, fill):
    """Sites of one number of units, or all with any."""
    model, made = layer_norm(), local(optimizer="adam", lattice=lattice(coordinates(layer_norm())))
    monkeypatch.setattr(stacked, "_FILL", fill * coordinates(model))
    passes.clear()
    together, alone = trained(model, made, {name: records(count) for name, count in SIZES.items()})

    check_equal(together, alone)
    assert (max(sites for sites, _ in passes) > 2) == bool(fill)


def test_little_memory_is_kept_to(passes):
    """By what is held for parameters and for records."""
    model, made = mlp(), local(sample_rate=1.0)
    stack = Stacked(model, BINARY, features=FEATURES)
    passes.clear()
    parts = [Part.of(str(k), records(200), SimulationNoise(7, str(k)), made) for k in range(9)]
    train_together(stack, start(model), parts, made, 1, memory=100_000)

    each = stacked._PER_ACTIVATION * stack.numbers
    assert max(sites * rows * each for sites, rows in passes) <= 50_000
    assert sum(sites * rows for sites, rows in passes) >= 9 * 200 * made.steps


def test_what_is_not_finite_counts_as_zero_and_is_counted():
    """As at a site alone: a table with an infinite record, one overflow in the parameters."""
    model = mlp()
    tables = {name: records(n) for name, n in SIZES.items()}
    tables["b"].x_NF[:5] = np.inf
    together, alone = trained(model, local(sample_rate=1.0, clip=0.1), tables)

    check_equal(together, alone)
    assert [update.not_finite for update in together] == [0, 25, 0, 0]


class Flattening(OneLogit):
    def forward(self, x_BF):
        return self.layers(x_BF.flatten(1)).squeeze(-1)


class Mixing(OneLogit):
    def forward(self, x_BF):
        return (self.layers(x_BF) - self.layers(x_BF).mean()).squeeze(-1)


def tied():
    layer = nn.Linear(FEATURES, FEATURES)
    return OneLogit(layer, nn.Tanh(), layer, nn.Linear(FEATURES, 1))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (OneLogit(nn.Linear(FEATURES, 4), nn.Dropout(0.5), nn.Linear(4, 1)), r"layers\.1 is a Dropout"),
        (OneLogit(nn.Unflatten(-1, (2, 3)), nn.Conv1d(2, 1, 3)), r"layers\.0 is a Unflatten"),
        (OneLogit(nn.Linear(FEATURES, 4), nn.ReLU(inplace=True), nn.Linear(4, 1)), r"layers\.1 is a ReLU"),
        (tied(), "shares parameters"),
        (Flattening(nn.Linear(FEATURES, 1)), "cannot be stacked"),
        (OneLogit(nn.Linear(FEATURES, 2)), "cannot be stacked|makes"),
    ],
)
def test_a_model_that_cannot_be_stacked_says_why(model, said):
    with pytest.raises(Unstackable, match=said):
        Stacked(model, BINARY, features=FEATURES)


@pytest.mark.parametrize("fault", ["gradient", "norm", "noise of the layer norm"])
def test_a_planted_fault_is_found_at_the_start(monkeypatch, fault):
    """The trial would not pass whatever is computed."""
    if fault == "gradient":
        outer = stacked.Outer
        monkeypatch.setattr(stacked, "Outer", lambda a, g, *at: outer(a, g * 1.001, *at))
    elif fault == "norm":
        monkeypatch.setattr(stacked, "clip_weights", lambda square, bound, clip: torch.ones_like(square))
    else:
        explicit = stacked.Explicit
        monkeypatch.setattr(stacked, "Explicit", lambda g, at: explicit(g.roll(1, -1), at))

    with pytest.raises(Unstackable, match="something else"):
        Stacked(layer_norm(), BINARY, features=FEATURES)


def test_the_trial_leaves_the_model_as_it_was():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    Stacked(model, BINARY, features=FEATURES)

    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_too_little_memory_names_the_flag_and_enough_of_it():
    model, made = mlp(), local()
    stack = Stacked(model, BINARY, features=FEATURES)
    parts = [Part.of("north", records(2000, units=1), SimulationNoise(1, "north"), made)]
    with pytest.raises(ConfigError, match="--memory: found '2 MiB'") as caught:
        check_memory(stack, parts, 1 << 20)
    check_memory(stack, parts, 8 << 20)

    assert "north" in caught.value.message
    assert caught.value.fix.startswith("--memory ")
