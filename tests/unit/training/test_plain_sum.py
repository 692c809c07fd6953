"""Without privacy no gradient is looked at by itself, and what is trained is the same."""

from dataclasses import replace

import numpy as np
import pytest

from lepton_fl.tasks.arrays import flatten
from lepton_fl.training import bookkeeping, local
from lepton_fl.training.bookkeeping import ClippedSum
from lepton_fl.training.local import NO_CLIP

SIZES = (1, 3, 2, 1, 60, 4)
LARGE = 1e20
"""Above any gradient here too, but no `NO_CLIP`: by single gradients."""


@pytest.fixture
def looked_at(monkeypatch):
    """How many sums were formed of single gradients."""
    calls = []
    one_by_one = ClippedSum.__call__

    def counted(self, *args):
        calls.append(args)
        return one_by_one(self, *args)

    monkeypatch.setattr(ClippedSum, "__call__", counted)
    return calls


@pytest.mark.parametrize("lock_step", [False, True])
@pytest.mark.parametrize("most", [None, 2])
def test_plain_sums_are_those_of_single_gradients(
    make_model, make_records, plan, train, looked_at, lock_step, most
):
    """To rounding; whatever the units, in steps of several blocks, and one of none."""
    records = make_records(SIZES)
    steps = {"steps": 1, "gradient_only": True} if lock_step else {"steps": 4}
    made = plan(clip=NO_CLIP, sample_rate=0.7, most_records=most, lr=0.1, **steps)
    plain = train(make_model(hidden=[5], norm=True), records, made)
    plainly = len(looked_at)
    single = train(make_model(hidden=[5], norm=True), records, replace(made, clip=LARGE))
    mine_L, its_L = flatten(plain.delta), flatten(single.delta)

    assert (plainly, len(looked_at)) == (0, made.steps)
    assert np.linalg.norm(mine_L - its_L) <= 1e-6 * np.linalg.norm(its_L)
    assert replace(plain, delta={}, clip=LARGE) == replace(single, delta={})


def test_what_is_not_finite_counts_as_zero_without_privacy_too(
    make_model, make_records, plan, train, looked_at
):
    """One record in one step; the steps without it are plain."""
    records = make_records([1] * 40)
    records.x_NF[7] = np.inf
    made = plan(clip=NO_CLIP, sample_rate=0.5, steps=8, lr=0.1)
    found = train(make_model(), records, made)
    steps = len(looked_at)
    expected = train(make_model(), records, replace(made, clip=LARGE))

    assert 0 < steps < 8
    assert found.not_finite == expected.not_finite == steps
    assert np.allclose(flatten(found.delta), flatten(expected.delta), rtol=1e-5, atol=1e-7)


def test_a_mean_over_the_records_of_a_unit_is_weighted(make_model, make_records, plan, train, looked_at):
    """So it is of single gradients, without privacy too."""
    train(make_model(), make_records(SIZES), plan(clip=NO_CLIP, mean_of_records=True))

    assert len(looked_at) == 1


def test_a_clip_is_never_left_out(make_model, make_records, plan, train, monkeypatch):
    """Whatever it is: only a study without privacy has `NO_CLIP`."""
    monkeypatch.setattr(local, "PlainSum", None)

    assert train(make_model(), make_records(SIZES), plan(clip=1e4)).steps == 1
    with pytest.raises(TypeError):
        train(make_model(), make_records(SIZES), plan(clip=NO_CLIP))


def test_blocks_are_added_up(make_model, make_records, plan, train, monkeypatch):
    """A batch of more records than a block has."""
    records, made = make_records([1] * 100), plan(clip=NO_CLIP)
    whole = train(make_model(), records, made)
    monkeypatch.setattr(bookkeeping, "_rows", lambda *_: bookkeeping.ROWS)
    parts = train(make_model(), records, made)

    assert np.allclose(flatten(whole.delta), flatten(parts.delta), rtol=1e-5, atol=1e-7)
