"""Gradients of units: against a plain loop over records in float64, and the bound they are clipped to."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from lepton_fl.training import bookkeeping

SIZES = [1, 7, 2, 1, 3, 5, 1, 4, 6, 1, 2, 1]


def clipped_sum(model, records, clip):
    """Sum over units of the clipped sum over their records: one backward pass for each record, float64."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    for unit in range(records.units):
        of_unit = [torch.zeros_like(p) for p in model.parameters()]
        for index in np.flatnonzero(records.unit_N == unit):
            x, y = (torch.from_numpy(a[[index]]).double() for a in (records.x_NF, records.y_N))
            logit = model(x)
            loss = torch.logaddexp(torch.zeros(()), -logit if y.item() else logit).sum()
            of_unit = [
                a + g for a, g in zip(of_unit, torch.autograd.grad(loss, model.parameters()), strict=True)
            ]
        norm = torch.sqrt(sum((g**2).sum() for g in of_unit)).item()
        factor = min(1.0, clip / norm) if norm else 1.0
        total = [t + factor * g for t, g in zip(total, of_unit, strict=True)]
    return total


def reference(model, records, plan):
    """`plan.steps` steps over all units, without noise: the change of each parameter, float64."""
    model = copy.deepcopy(model).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[plan.optimizer](
        model.parameters(), lr=plan.lr
    )
    for _ in range(plan.steps):
        for parameter, gradient in zip(
            model.parameters(), clipped_sum(model, records, plan.clip), strict=True
        ):
            parameter.grad = gradient / plan.expected_batch
        optimizer.step()
    return {name: (p.detach() - before[name]).numpy() for name, p in model.named_parameters()}


def assert_same(found, expected, atol=1e-5):
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol, err_msg=name)


@pytest.fixture(params=["logreg", "mlp", "layer-norm"])
def model(request, make_model):
    hidden = [] if request.param == "logreg" else [6, 3]
    return make_model(4, hidden, norm=request.param == "layer-norm")


@pytest.mark.parametrize("clip", [0.05, 0.7, 1e30])
def test_a_step_is_the_sum_of_clipped_units(model, make_records, plan, train, clip):
    """Units of 1 to 7 records: summed first, then clipped, whatever their size."""
    records = make_records(SIZES)
    one = plan(clip=clip)
    expected = reference(model, records, one)

    assert_same(train(model, records, one).delta, expected)


@pytest.mark.parametrize("rows", [32, 64, 96])
def test_blocks_change_nothing(model, make_records, plan, train, monkeypatch, rows):
    """However many records are held at once, the step is the same; one unit is more than a block of some."""
    records = make_records([*SIZES, 40, *SIZES])
    expected = reference(model, records, plan())
    monkeypatch.setattr(bookkeeping, "MOST_ROWS", rows)

    assert_same(
        train(model, records, plan(expected_batch=90.0)).delta, {n: v / 9 for n, v in expected.items()}
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_local_steps_are_steps(model, make_records, plan, train, optimizer):
    """Under fedavg a site takes several, each from where the last one led."""
    records = make_records(SIZES)
    several = plan(steps=5, optimizer=optimizer, lr=0.05)
    expected = reference(model, records, several)

    update = train(model, records, several)

    assert update.steps == 5
    assert_same(update.delta, expected, atol=1e-4)


def test_one_record_a_unit(model, make_records, plan, train):
    """The common case takes a short cut; it is the same step."""
    records = make_records([1] * 20)
    expected = reference(model, records, plan())

    assert_same(train(model, records, plan()).delta, expected)


def test_as_many_records_as_units_is_not_one_each(model, make_records, plan, train):
    """Two units of two records, two of none: each is clipped as one."""
    records = make_records([2, 0, 2, 0])
    expected = reference(model, records, plan(clip=0.05))

    assert_same(train(model, records, plan(clip=0.05)).delta, expected)


@pytest.mark.parametrize("units", [1, 6, 50])
def test_the_divisor_is_the_studys_and_not_the_batch(make_model, make_records, plan, train, units):
    """A site's own size is not public: the sum is divided by the same number at every site."""
    records = make_records([2] * units)
    by_10 = train(make_model(), records, plan(expected_batch=10.0)).delta
    by_40 = train(make_model(), records, plan(expected_batch=40.0)).delta

    assert_same(by_40, {name: value / 4 for name, value in by_10.items()}, atol=1e-6)


def test_units_add_up(make_model, one_hot, plan, train):
    """Ten times the units give ten times the step, not their mean."""
    few = train(make_model(40), one_hot(40), plan()).delta["0.bias"]
    many = train(make_model(400), one_hot(400), plan()).delta["0.bias"]

    assert many[0] / few[0] == pytest.approx(10, rel=0.1)


def test_a_gradient_that_is_not_finite_counts_as_zero(make_model, plan, train):
    """0 * inf is NaN: clipped as it is, one overflow would tell, without noise, that its record is there."""

    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(4, 1)
            nn.init.constant_(self.line.weight, 50.0)

        def forward(self, x_BF):
            return self.line(x_BF).squeeze(-1).exp()

    model = Steep()
    overflows, sound = np.ones((1, 4), np.float32), np.zeros((3, 4), np.float32)
    labels, owners = np.ones(4, np.float32), np.array([0, 0, 1, 2])
    mixed = SimpleNamespace(x_NF=np.concatenate([overflows, sound]), y_N=labels, unit_N=owners, units=3)
    alone = SimpleNamespace(x_NF=sound, y_N=labels[1:], unit_N=owners[1:], units=3)

    found, expected = (train(copy.deepcopy(model), records, plan()).delta for records in (mixed, alone))

    assert expected["line.bias"] != 0
    assert_same(found, expected)


def table(rows):
    return st.tuples(
        arrays(np.float32, (rows, 3), elements=st.floats(-100, 100, width=32)),
        arrays(np.float32, rows, elements=st.sampled_from([0.0, 1.0])),
    )


@given(
    base=table(6),
    unit=st.integers(1, 5).flatmap(table),
    clip=st.sampled_from([0.01, 0.5, 3.0]),
    hidden=st.sampled_from([(), (4,)]),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_unit_moves_the_sum_by_at_most_clip(make_model, plan, train, base, unit, clip, hidden):
    """The sensitivity that the noise is scaled to, for any records of the unit that joins or leaves."""
    (x, y), (more_x, more_y) = base, unit
    owner = np.array([0, 0, 1, 2, 2, 2])
    without = SimpleNamespace(x_NF=x, y_N=y, unit_N=owner, units=3)
    joined = SimpleNamespace(
        x_NF=np.concatenate([x, more_x]),
        y_N=np.concatenate([y, more_y]),
        unit_N=np.concatenate([owner, np.full(len(more_y), 3)]),
        units=4,
    )
    step = plan(clip=clip, expected_batch=1.0)
    deltas = [train(make_model(3, hidden), records, step).delta for records in (without, joined)]

    moved = np.sqrt(sum(((deltas[1][name] - deltas[0][name]) ** 2).sum() for name in deltas[0]))

    assert moved <= clip * (1 + 1e-4) + 1e-6
