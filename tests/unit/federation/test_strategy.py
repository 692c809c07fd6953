"""The server's step is the optimizer it says it is, and goes on from its state as if never stopped."""

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from lepton_fl.federation.grids import CohortGrid
from lepton_fl.federation.strategy import Lockstep, StatelessFedAvg, expect, strategy_of
from lepton_fl.messages import METRICS, WEIGHT, from_record, to_record
from lepton_fl.simulation import InProcessGrid

NODES = [11, 12, 13]
START = {"w": np.array([[0.5, -1.0, 2.0]]), "b": np.array([0.1])}


def gradients(steps):
    """For each step, the gradient of each of three sites."""
    rng = np.random.default_rng(0)
    return [[{n: rng.normal(size=a.shape) for n, a in START.items()} for _ in NODES] for _ in range(steps)]


def run(strategy, model, steps, first=1):
    """Hand the sites' weights, as the round loop makes them, through the strategy."""
    expect(strategy, len(NODES))
    grid = CohortGrid(InProcessGrid({}), NODES)
    for number, sites in enumerate(steps, start=first):
        asked = list(strategy.configure_train(number, to_record(model), ConfigRecord(), grid))
        replies = []
        for message, gradient in zip(asked, sites, strict=True):
            weights = to_record({n: model[n] - gradient[n] for n in model})
            content = RecordDict({"arrays": weights, METRICS: MetricRecord({WEIGHT: 1.0})})
            replies.append(Message(content, reply_to=message))
        aggregate, _ = strategy.aggregate_train(number, replies)
        model = from_record(aggregate)
    return model


def torch_run(kind, lr, steps):
    """The same on torch's optimizer, fed the mean gradient."""
    model = {n: torch.tensor(a, requires_grad=True) for n, a in START.items()}
    optimizer = kind(model.values(), lr=lr)
    for sites in steps:
        for name, parameter in model.items():
            parameter.grad = torch.tensor(np.mean([gradient[name] for gradient in sites], axis=0))
        optimizer.step()
    return {n: p.detach().numpy() for n, p in model.items()}


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
def test_lockstep_is_torchs_optimizer(name, kind):
    """Over twenty steps on the mean gradient, to 1e-6."""
    steps = gradients(20)

    found = run(Lockstep(optimizer=name, lr=0.1), START, steps)

    expected = torch_run(kind, 0.1, steps)
    for key in START:
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_restored_lockstep_goes_on_identically(name):
    """Seven steps, a new process, five more: the same bits as twelve."""
    steps = gradients(12)
    before = Lockstep(optimizer=name, lr=0.1)
    half = run(before, START, steps[:7])
    after = Lockstep(optimizer=name, lr=0.1)
    after.restore(before.state())

    found = run(after, half, steps[7:], first=8)

    expected = run(Lockstep(optimizer=name, lr=0.1), START, steps)
    assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in expected.items()}


def test_a_state_is_not_changed_by_later_steps():
    """It is what a checkpoint will hold."""
    strategy = Lockstep(optimizer="adam", lr=0.1)
    run(strategy, START, gradients(2))
    state = strategy.state()
    kept = {n: a.tobytes() for n, a in state.items()}

    run(strategy, START, gradients(3), first=3)

    assert {n: a.tobytes() for n, a in state.items()} == kept


def test_fedavg_adds_the_mean_of_the_deltas():
    """To the model that was sent."""
    (sites,) = gradients(1)

    found = run(StatelessFedAvg(), START, [sites])

    for name, array in START.items():
        delta = np.mean([-gradient[name] for gradient in sites], axis=0)
        np.testing.assert_allclose(found[name], array + delta, rtol=1e-12)


def test_fedavg_has_no_state():
    """A resumed run needs the model only."""
    strategy = StatelessFedAvg()

    strategy.restore(strategy.state())

    assert strategy.state() == {}


@pytest.mark.parametrize(("name", "kind"), [("lockstep", Lockstep), ("fedavg", StatelessFedAvg)])
def test_a_study_names_its_strategy(make_study, name, kind):
    """And no other is taken for it."""
    assert type(strategy_of(make_study(train={"strategy": name}))) is kind


def test_a_strategy_asks_the_cohort_and_nobody_else():
    """Flower would sample from whatever is connected."""
    strategy = StatelessFedAvg()
    expect(strategy, len(NODES))
    grid = CohortGrid(InProcessGrid({}), NODES)

    asked = strategy.configure_train(1, to_record(START), ConfigRecord(), grid)

    assert sorted(message.metadata.dst_node_id for message in asked) == NODES
