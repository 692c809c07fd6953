"""What both ends compute for themselves: where two machines differ, a round is lost and none is opened."""

import numpy as np
import pytest

from lepton_fl import secure_rounds
from lepton_fl.messages import TRAIN
from lepton_fl.secure_rounds import update_bound
from lepton_fl.site import secure
from lepton_fl.tasks.arrays import flatten

VICTIM = 102


def differently(monkeypatch, change):
    """`between` under which one site computes the update's bound otherwise."""

    def between(message, call):
        if (message.metadata.message_type, message.metadata.dst_node_id) == (TRAIN, VICTIM):
            with monkeypatch.context() as patched:
                patched.setattr(secure_rounds, "update_bound", lambda study: change(update_bound(study)))
                # Of another machine: it has not what this process has worked out.
                patched.setattr(secure, "context_of", secure_rounds.context_of.__wrapped__)
                return call(message)
        return call(message)

    return between


@pytest.mark.parametrize(
    "change", [lambda b: 2 * b, lambda b: np.nextafter(b, 0)], ids=["twice", "last place"]
)
def test_a_machine_that_computes_another_bound(world, monkeypatch, change):
    """Its advert is of another context: the others have their sum, and nothing of it is opened."""
    replies = world.train(between=differently(monkeypatch, change))

    world.is_sum(replies, [101, 103, 104])
    assert world.judge(replies).dropped["bravo"] == f"BadPayload in advertise, by party {VICTIM}"
    assert not world.released(VICTIM)
    assert not [p for p in world.wire.tape if p.party == VICTIM and p.kind != TRAIN]


@pytest.mark.parametrize(
    ("lr", "bound"), [(0.25, 0.5), (0.5, 1.0), (0.500001, 2.0), (0.3, 1.0), (2.0**-20, 2.0**-19)]
)
def test_bound_is_the_next_power_of_two(make_world, lr, bound):
    """Exactly, at a power of two as well: without a logarithm, in which platforms may differ."""
    study = make_world(
        3,
        privacy={"noise": "none", "epsilon": None, "delta": None},
        train={"strategy": "fedavg", "optimizer": "sgd", "lr": lr},
        policy={"require": {"differential_privacy": False}},
    ).study

    assert update_bound(study) == bound


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_does_not_leave(world, monkeypatch, value):
    """Neither a mask nor an advert is made for it; the others have their sum."""
    real = flatten

    def between(message, call):
        if (message.metadata.message_type, message.metadata.dst_node_id) == (TRAIN, VICTIM):
            with monkeypatch.context() as patched:
                patched.setattr("lepton_fl.site.mods.flatten", lambda u: np.full_like(real(u), value))
                return call(message)
        return call(message)

    replies = world.train(between=between)

    world.is_sum(replies, [101, 103, 104])
    assert not [p for p in world.wire.tape if p.party == VICTIM and not p.reply.has_error()]
