"""The server's step is the optimizer it says it is, and goes on from its state as if never stopped."""

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from lepton_fl.federation.grids import CohortGrid
from lepton_fl.federation.strategy import (
    Lockstep,
    ResumableFedAdagrad,
    ResumableFedAdam,
    ResumableFedAvgM,
    ResumableFedYogi,
    StatelessFedAvg,
    expect,
    rate_at,
    strategy_of,
)
from lepton_fl.messages import METRICS, WEIGHT, from_record, to_record
from lepton_fl.simulation import InProcessGrid

NODES = [11, 12, 13]
START = {"w": np.array([[0.5, -1.0, 2.0]]), "b": np.array([0.1])}


KINDS = {
    "lockstep": Lockstep,
    "fedavg": StatelessFedAvg,
    "fedprox": StatelessFedAvg,
    "fedavgm": ResumableFedAvgM,
    "fedadam": ResumableFedAdam,
    "fedyogi": ResumableFedYogi,
    "fedadagrad": ResumableFedAdagrad,
}


@pytest.fixture
def make_strategy(make_study):
    """A study's strategy, keys of its [train] changed."""

    def make(name, **train):
        mu = {"proximal_mu": 0.1} if name == "fedprox" else {}
        return strategy_of(make_study(train={"strategy": name, "lr": 0.1, **mu, **train}))

    return make


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
def test_lockstep_is_torchs_optimizer(make_strategy, name, kind):
    """Over twenty steps on the mean gradient, to 1e-6."""
    steps = gradients(20)

    found = run(make_strategy("lockstep", optimizer=name), START, steps)

    expected = torch_run(kind, 0.1, steps)
    for key in START:
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=1e-6)


def fedavgm(_, u, s):
    """Hsu et al. 2019, section 4.3: v = 0.9 v + gradient, w = w - lr v."""
    s["v"] = 0.9 * s.get("v", 0) - u
    return -0.5 * s["v"]


def fedadam(t, u, s):
    """Reddi et al. 2021, algorithm 2, with Adam's bias correction as Flower counts it."""
    s["m"] = 0.9 * s.get("m", 0) + 0.1 * u
    s["v"] = 0.99 * s.get("v", 0) + 0.01 * u**2
    rate = 0.5 * np.sqrt(1 - 0.99 ** (t + 1)) / (1 - 0.9 ** (t + 1))
    return rate * s["m"] / (np.sqrt(s["v"]) + 1e-3)


def fedyogi(_, u, s):
    """Reddi et al. 2021, algorithm 2."""
    v = s.get("v", np.zeros_like(u))
    s["m"] = 0.9 * s.get("m", 0) + 0.1 * u
    s["v"] = v - 0.01 * u**2 * np.sign(v - u**2)
    return 0.5 * s["m"] / (np.sqrt(s["v"]) + 1e-3)


def fedadagrad(_, u, s):
    """Reddi et al. 2021, algorithm 2, with beta_1 = 0 as in Flower."""
    s["v"] = s.get("v", 0) + u**2
    return 0.5 * u / (np.sqrt(s["v"]) + 1e-3)


@pytest.mark.parametrize("step", [fedavgm, fedadam, fedyogi, fedadagrad], ids=lambda step: step.__name__)
def test_a_strategy_is_its_papers(make_strategy, step):
    """Over twenty aggregations, at the paper's constants and server_lr 0.5."""
    steps = gradients(20)

    found = run(make_strategy(step.__name__, server_lr=0.5), START, steps)

    for name, array in START.items():
        model, state = array, {}
        for t, sites in enumerate(steps, start=1):
            model = model + step(t, -np.mean([gradient[name] for gradient in sites], axis=0), state)
        np.testing.assert_allclose(found[name], model, rtol=1e-12)


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_an_average_is_the_mean_of_the_deltas(make_strategy, name):
    """Added to the model that was sent; the proximal term is the sites' own affair."""
    (sites,) = gradients(1)

    found = run(make_strategy(name), START, [sites])

    for key, array in START.items():
        delta = np.mean([-gradient[key] for gradient in sites], axis=0)
        np.testing.assert_allclose(found[key], array + delta, rtol=1e-12)


def test_without_momentum_at_rate_one_fedavgm_is_fedavg(make_strategy):
    """As in Flower, which leaves its optimizer out then."""
    steps = gradients(5)

    found = run(make_strategy("fedavgm", server_momentum=0.0), START, steps)

    expected = run(make_strategy("fedavg"), START, steps)
    for key in START:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-12)


@pytest.mark.parametrize("stopped", [0, 1, 7, 11])
@pytest.mark.parametrize("name", KINDS)
def test_a_restored_strategy_goes_on_identically(make_strategy, name, stopped):
    """So many steps, a new process, the rest: the same bits as twelve at one go. Adam for lockstep."""
    steps = gradients(12)
    before = make_strategy(name, optimizer="adam")
    half = run(before, START, steps[:stopped])
    after = make_strategy(name, optimizer="adam")
    after.restore(before.state())

    found = run(after, half, steps[stopped:], first=stopped + 1)

    expected = run(make_strategy(name, optimizer="adam"), START, steps)
    assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in expected.items()}


@pytest.mark.parametrize("name", KINDS)
def test_a_state_is_not_changed_by_later_steps(make_strategy, name):
    """It is what a checkpoint will hold."""
    strategy = make_strategy(name, optimizer="adam")
    run(strategy, START, gradients(2))
    state = strategy.state()
    kept = {n: a.tobytes() for n, a in state.items()}

    run(strategy, START, gradients(3), first=3)

    assert {n: a.tobytes() for n, a in state.items()} == kept


@pytest.mark.parametrize("name", KINDS)
def test_a_strategy_computes_in_float64(make_strategy, name):
    """From a float32 model: its state does not lose what a round adds to it."""
    strategy = make_strategy(name, optimizer="adam")
    sent = {n: a.astype(np.float32) for n, a in START.items()}
    (sites,) = gradients(1)

    found = run(strategy, sent, [sites])

    assert {a.dtype for a in [*found.values(), *strategy.state().values()]} == {np.dtype(np.float64)}


@pytest.mark.parametrize("name", KINDS)
def test_a_study_names_its_strategy(make_strategy, name):
    """And no other is taken for it."""
    assert type(make_strategy(name)) is KINDS[name]


@pytest.mark.parametrize("name", KINDS)
def test_a_strategy_asks_the_cohort_and_nobody_else(make_strategy, name):
    """Flower would sample from whatever is connected."""
    strategy = make_strategy(name)
    expect(strategy, len(NODES))
    grid = CohortGrid(InProcessGrid({}), NODES)

    asked = list(strategy.configure_train(1, to_record(START), ConfigRecord(), grid))

    assert sorted(message.metadata.dst_node_id for message in asked) == NODES
    # Nothing of the strategy's own: a site reads the study.
    assert {tuple(message.content.config_records["config"]) for message in asked} == {("server-round",)}


# --- schedules ---


def rates(train):
    return [rate_at(train, train.lr, number) for number in range(1, train.rounds + 1)]


HALF = 0.5 + np.sqrt(0.5) / 2
SCHEDULES = {
    "constant": ({}, [1, 1, 1, 1]),
    "linear": ({"lr_schedule": "linear"}, [1, 3 / 4, 2 / 4, 1 / 4]),
    "cosine": ({"lr_schedule": "cosine"}, [1, HALF, 0.5, 1 - HALF]),
    "warm-up": ({"warmup_rounds": 3}, [1 / 4, 2 / 4, 3 / 4, 1]),
    "warm-up, then linear": (
        {"rounds": 6, "warmup_rounds": 2, "lr_schedule": "linear"},
        [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4],
    ),
    "warm-up, then cosine": (
        {"rounds": 5, "warmup_rounds": 1, "lr_schedule": "cosine"},
        [1 / 2, 1, HALF, 0.5, 1 - HALF],
    ),
    "one round": ({"rounds": 1, "lr_schedule": "cosine"}, [1]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_its_closed_form(make_study, name):
    """Of a rate of 0.5, over four rounds where not said otherwise; it never reaches zero."""
    changes, shares = SCHEDULES[name]

    found = rates(make_study(train={"rounds": 4, **changes}).train)

    np.testing.assert_allclose(found, [0.5 * share for share in shares], rtol=1e-12)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_the_servers_rate_is_scheduled(make_strategy, name):
    """One step at a quarter of the rate is a quarter of the step."""
    (sites,) = gradients(1)

    whole = run(make_strategy(name), START, [sites])
    part = run(make_strategy(name, rounds=4, warmup_rounds=3), START, [sites])

    for key, array in START.items():
        np.testing.assert_allclose(part[key] - array, (whole[key] - array) / 4, rtol=1e-9)


def test_a_lockstep_rate_is_scheduled(make_strategy):
    """lr itself, which is the server's there: two steps of SGD on a line."""
    steps = gradients(2)

    found = run(make_strategy("lockstep", rounds=2, optimizer="sgd", lr_schedule="linear"), START, steps)

    for key, array in START.items():
        first, second = (np.mean([gradient[key] for gradient in sites], axis=0) for sites in steps)
        np.testing.assert_allclose(found[key], array - 0.1 * first - 0.05 * second, rtol=1e-12)


def test_a_schedule_wakes_an_optimizer_that_flower_would_leave_out(make_strategy):
    """FedAvgM at rate 1 without momentum is an average to Flower; half of it is not."""
    (sites,) = gradients(1)

    found = run(make_strategy("fedavgm", server_momentum=0.0, warmup_rounds=1), START, [sites])

    for key, array in START.items():
        mean = np.mean([gradient[key] for gradient in sites], axis=0)
        np.testing.assert_allclose(found[key], array - mean / 2, rtol=1e-12)
