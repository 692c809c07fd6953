"""Units of many records: which of them count in a step, what they weigh, and the gradient that they make."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleHooks
from scipy.stats import chisquare

from lepton_fl.errors import ConfigError
from lepton_fl.privacy import Guarantee
from lepton_fl.tasks.histogram import one_of_each
from lepton_fl.tasks.task import BINARY
from lepton_fl.training import LocalPlan, SimulationNoise, bookkeeping
from lepton_fl.training.units import RecordsOfUnits

SIZES = [1, 7, 2, 1, 3, 5, 1, 4, 6, 1, 2, 1]
EVERYBODY = torch.arange(len(SIZES))


def key(number):
    return number.to_bytes(32, "little")


def drawn(records, most, at):
    """Indices of the records that count, by unit."""
    index_B, owner_B, _ = RecordsOfUnits(records.unit_N, records.units, most=most).of(
        torch.arange(records.units), at
    )
    return [index_B[owner_B == unit].tolist() for unit in range(records.units)]


# --- which records ---


def test_all_records_count_where_there_is_no_cap(make_records):
    """Each by its own unit, each once."""
    records = make_records(SIZES)

    for unit, index in enumerate(drawn(records, None, key(1))):
        assert sorted(index) == np.flatnonzero(records.unit_N == unit).tolist()


@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_unit_has_no_more_records_than_the_cap(make_records, most):
    """Its own, none twice, and all of them where they are fewer."""
    records = make_records(SIZES)

    for unit, index in enumerate(drawn(records, most, key(1))):
        assert len(index) == len(set(index)) == min(SIZES[unit], most)
        assert set(records.unit_N[index]) == {unit}


def test_every_choice_of_records_is_as_likely_as_every_other(make_records):
    """The six pairs of four records, each beside the others' draws; two-sided, p from 1e-4 to 1 - 1e-4."""
    records = make_records([4, 9, 4])
    own = np.flatnonzero(records.unit_N == 2).tolist()

    found = Counter(tuple(sorted(drawn(records, 2, key(n))[2])) for n in range(6000))

    counts = [found[pair] for pair in itertools.combinations(own, 2)]
    assert sum(counts) == 6000
    assert 1e-4 < chisquare(counts).pvalue < 1 - 1e-4


def test_draws_of_two_units_are_independent(make_records):
    """A unit's words serve it alone: with shared words the two would choose alike."""
    records = make_records([2, 2])
    first = [np.flatnonzero(records.unit_N == unit)[0] for unit in (0, 1)]

    both = Counter(
        tuple(a[0] == f for a, f in zip(drawn(records, 1, key(n)), first, strict=True)) for n in range(4000)
    )

    assert 1e-4 < chisquare([both[a, b] for a in (True, False) for b in (True, False)]).pvalue < 1 - 1e-4


def test_the_order_of_asking_changes_nothing(make_records):
    """Parts of a sample, in whatever order, draw what the whole does under the same key."""
    records = make_records(SIZES)
    units = RecordsOfUnits(records.unit_N, records.units, most=2)
    whole, owner_B, _ = units.of(EVERYBODY, key(5))

    for part_S in (torch.tensor([8, 1, 5]), torch.tensor([1]), torch.tensor([3, 0])):
        index_B, of_B, _ = units.of(part_S, key(5))
        for place, unit in enumerate(part_S.tolist()):
            assert index_B[of_B == place].tolist() == whole[owner_B == unit].tolist()


def test_nobody_is_sampled(make_records):
    """An empty sample has no records, with a cap and without."""
    records = make_records(SIZES)

    for most in (None, 2):
        found = RecordsOfUnits(records.unit_N, records.units, most=most).of(EVERYBODY[:0], key(1))
        assert [len(part) for part in found] == [0, 0, 0]


def test_one_held_out_record_of_each_unit_is_within_any_cap(make_records):
    """The histogram of scores counts one of each unit, drawn evenly too: a cap of one, with the same law."""
    records = make_records([4, 9, 4])
    rng = np.random.default_rng(3)

    counted = Counter(one_of_each(records.unit_N, rng)[2] for _ in range(4000))
    trained = Counter(drawn(records, 1, key(n))[2][0] for n in range(4000))

    own = np.flatnonzero(records.unit_N == 2).tolist()
    for found in (counted, trained):
        assert 1e-4 < chisquare([found[index] for index in own]).pvalue < 1 - 1e-4


# --- what they weigh ---


@pytest.mark.parametrize("most", [None, 3])
def test_a_mean_weighs_one_over_the_records_that_count(make_records, most):
    """So the weights of a unit add up to one; those of a sum are one each."""
    records = make_records(SIZES)
    for mean in (False, True):
        units = RecordsOfUnits(records.unit_N, records.units, most=most, mean=mean)

        _, owner_B, weight_B = units.of(EVERYBODY, key(1))

        assert weight_B.dtype == torch.float32
        counts = [min(size, most or size) for size in SIZES]
        expected = torch.tensor([1 / counts[owner] if mean else 1.0 for owner in owner_B.tolist()])
        torch.testing.assert_close(weight_B, expected)


# --- the gradient that they make ---


def unit_gradients_by_hand(model, records, kept, *, mean):
    """Per parameter the gradients [units, ...]: a loop over records in float64, a backward pass for each."""
    model = model.double()
    units = []
    for index in kept:
        total = [torch.zeros_like(p) for p in model.parameters()]
        for record in index:
            x, y = (torch.from_numpy(a[[record]]).double() for a in (records.x_NF, records.y_N))
            logit = model(x)
            loss = torch.logaddexp(torch.zeros(()), -logit if y.item() else logit).sum()
            found = torch.autograd.grad(loss, model.parameters())
            total = [t + g / (len(index) if mean else 1) for t, g in zip(total, found, strict=True)]
        units.append(total)
    return [torch.stack(parameter) for parameter in zip(*units, strict=True)]


def unit_gradients_by_opacus(model, records, kept, *, mean):
    """The same from Opacus's per-record gradients, in float32."""
    hooks = GradSampleHooks(model, loss_reduction="sum")
    index = [record for unit in kept for record in unit]
    x, y = (torch.from_numpy(a[index]) for a in (records.x_NF, records.y_N))
    # An input that requires grad: torch warns of a backward hook without one.
    BINARY.loss(model(x.requires_grad_()), y).backward()
    found = [p.grad_sample.split([len(unit) for unit in kept]) for p in model.parameters()]
    hooks.cleanup()
    together = torch.mean if mean else torch.sum
    return [torch.stack([together(unit.double(), 0) for unit in parameter]) for parameter in found]


@pytest.mark.parametrize("oracle", [unit_gradients_by_hand, unit_gradients_by_opacus])
@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("most", [None, 1, 3])
def test_the_step_is_that_of_a_plain_loop_and_of_opacus(
    monkeypatch, make_model, make_records, plan, train, most, mean, rows, oracle
):
    """To 1e-5, however many rows a block has: each unit's sum or mean over what was drawn, clipped once."""
    if rows is not None:
        monkeypatch.setattr(bookkeeping, "ROWS", rows)
        monkeypatch.setattr(bookkeeping, "MOST_ROWS", rows)
    records, model = make_records(SIZES), make_model(4, (6,))
    kept = drawn(records, most, SimulationNoise(1, "north").key("records step 0", 1))
    gradients = oracle(make_model(4, (6,)), records, kept, mean=mean)
    norm_U = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    # Half of the units are clipped.
    step = plan(clip=norm_U.median().item(), most_records=most, mean_of_records=mean)

    update = train(model, records, step, seed=1, round=1)

    factor_U = (step.clip / norm_U).clamp(max=1.0)
    for found, gradient in zip(update.delta.values(), gradients, strict=True):
        expected = -(factor_U @ gradient.flatten(1)) / step.expected_batch
        np.testing.assert_allclose(found.flatten(), expected.detach().numpy(), rtol=0, atol=1e-5)


def test_every_step_draws_anew(make_model, make_records, plan, train):
    """Two rounds of the same step differ, since other records count in them; without a cap they do not."""
    records = make_records([6] * 5)
    for most, same in ((2, False), (None, True)):
        first, second = (
            train(make_model(4), records, plan(most_records=most), round=round).delta["0.weight"]
            for round in (1, 2)
        )
        assert np.array_equal(first, second) == same


def test_the_plan_is_the_studys(make_study):
    """Both keys reach the step."""
    study = make_study(
        privacy={"unit": "patient", "max_records_per_unit": 4, "unit_gradient": "mean"},
    )

    plan = LocalPlan.of(study, Guarantee.of(study), coordinates=10)

    assert plan.most_records == 4
    assert plan.mean_of_records


@pytest.mark.parametrize("wrong", [{"max_records_per_unit": 4}, {"unit_gradient": "mean"}])
def test_a_record_has_no_records(make_study, wrong):
    """Keys that nothing would read are refused."""
    with pytest.raises(ConfigError, match="units with many records"):
        make_study(privacy=wrong)
