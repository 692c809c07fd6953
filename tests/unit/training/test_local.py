"""A round of local training: who is sampled, what runs on nothing, and what it says of itself."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lepton_fl.errors import ConfigError, ProtocolError
from lepton_fl.privacy import Guarantee
from lepton_fl.privacy.lattice import SLACK, Lattice
from lepton_fl.tasks import arrays_of, load_arrays
from lepton_fl.tasks.task import BINARY
from lepton_fl.training import LocalPlan, LocalUpdate, SimulationNoise, UnseededNoise, train_locally
from lepton_fl.training.bookkeeping import Bookkeeper
from lepton_fl.training.local import NO_CLIP
from lepton_fl.training.noise import _STATE, drawing


def lattice_of(noise_multiplier, clip):
    """Of a model of a few hundred parameters."""
    return Lattice.of(
        clip=clip,
        noise_multiplier=noise_multiplier,
        coordinates=300,
        cohort=1,
        shares=1,
        expected_batch=10.0,
    )


def sampled(train, make_model, records, step, rounds):
    """Rounds x units: whose weight moved in which round."""
    model = make_model(records.units)
    start = arrays_of(model)
    moved = []
    for round in range(rounds):
        noise = SimulationNoise(1, "north")
        update = train_locally(model, BINARY, start, records, step, noise, round)
        moved.append(update.delta["0.weight"][0] != 0)
    return np.array(moved)


# --- sampling ---


def test_the_rate_is_the_studys(train, make_model, one_hot, plan):
    """1000 units at 0.6: a loader of batches of 600 would sample at 1/2."""
    taken = sampled(train, make_model, one_hot(1000), plan(sample_rate=0.6), rounds=40)

    # Four standard deviations of the mean of 40,000 draws.
    assert taken.mean() == pytest.approx(0.6, abs=4 * np.sqrt(0.24 / taken.size))


def test_rate_one_takes_everybody(train, make_model, one_hot, plan):
    """200 units at 1: all of them, each round."""
    assert sampled(train, make_model, one_hot(200), plan(sample_rate=1.0), rounds=3).all()


def test_the_batch_size_is_binomial(train, make_model, one_hot, plan):
    """Poisson sampling, not batches of one size: the size varies by exactly units * q * (1 - q)."""
    units, q, rounds = 200, 0.3, 400
    taken = sampled(train, make_model, one_hot(units), plan(sample_rate=q), rounds)

    sizes = taken.sum(axis=1)
    variance = units * q * (1 - q)
    assert sizes.mean() == pytest.approx(units * q, abs=4 * np.sqrt(variance / rounds))
    assert sizes.var() == pytest.approx(variance, rel=4 * np.sqrt(2 / rounds))


def test_units_are_sampled_independently(train, make_model, one_hot, plan):
    """Each as often as any other, no pair together more or less often, no memory of the last round."""
    q, rounds = 0.3, 400
    taken = sampled(train, make_model, one_hot(200), plan(sample_rate=q), rounds)

    z = (taken - q) / np.sqrt(q * (1 - q))
    by_unit = z.sum(axis=0) / np.sqrt(rounds)
    assert np.abs(by_unit).max() < 4.5
    neighbours = (z[:, 1:] * z[:, :-1]).mean()
    over_time = (z[1:] * z[:-1]).mean()
    assert abs(neighbours) < 4 / np.sqrt(z.size)
    assert abs(over_time) < 4 / np.sqrt(z.size)


def test_steps_of_one_round_sample_anew(train, make_model, one_hot, plan):
    """Under fedavg each local step draws its own batch."""
    units, q = 1000, 0.2
    taken = sampled(train, make_model, one_hot(units), plan(sample_rate=q, steps=4), rounds=5)

    assert taken.mean() == pytest.approx(1 - (1 - q) ** 4, abs=0.03)


def test_a_unit_comes_with_all_its_records(make_model, plan, train, make_records):
    """Sampled are units; at no time a part of one."""
    records = make_records([3] * 50)
    records.x_NF = np.eye(150, dtype=np.float32)
    moved = train(make_model(150), records, plan(sample_rate=0.4)).delta["0.weight"][0] != 0

    by_unit = [set(moved[records.unit_N == unit]) for unit in range(50)]
    assert {len(seen) for seen in by_unit} == {1}
    assert 5 < sum(seen == {True} for seen in by_unit) < 45


# --- steps on nothing ---


def norm_of(update):
    return np.sqrt(sum((value**2).sum() for value in update.delta.values()))


def test_an_empty_batch_is_a_noisy_step(make_model, make_records, plan, train):
    """Left out, it would be charged and not taken, and tell that nobody was sampled."""
    update = train(
        make_model(), make_records([1] * 5), plan(sample_rate=1e-12, noise_multiplier=1.0, steps=3)
    )

    assert update.steps == 3
    assert all((value != 0).all() for value in update.delta.values())


def test_a_table_without_units_is_trained_on_all_the_same(make_model, make_records, plan, train):
    """What leaves is noise and nothing but."""
    update = train(make_model(4, [3]), make_records([]), plan(noise_multiplier=1.0))

    assert all((value != 0).all() for value in update.delta.values())


def test_without_units_and_noise_nothing_moves(make_model, make_records, plan, train):
    """The sum over nobody is zero."""
    assert norm_of(train(make_model(), make_records([]), plan())) == 0


def test_noise_reaches_a_parameter_that_no_record_moves(make_records, plan, train):
    """A layer outside the graph has gradient zero, and zero has to be hidden as well."""

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 1), nn.Linear(2, 2)

        def forward(self, x_BF):
            return self.used(x_BF).squeeze(-1)

    update = train(Idle(), make_records([1] * 5), plan(noise_multiplier=1.0))

    assert (update.delta["idle.weight"] != 0).all()


# --- streams ---


def test_the_same_seed_gives_the_same_update(make_model, make_records, plan, train):
    """To the bit."""
    noisy, records = plan(noise_multiplier=1.0, sample_rate=0.5), make_records([2] * 20)

    one, other = (train(make_model(), records, noisy).delta for _ in range(2))

    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_each_party_purpose_round_and_seed_has_its_own_stream():
    """Equal noise at two sites, in two rounds or in two studies would cancel out of a difference."""
    streams = {
        SimulationNoise(seed, party).of(study).key(purpose, round)
        for seed in (0, 1)
        for party in ("north", "south")
        for study in ("s", "t")
        for purpose in ("sample", "noise")
        for round in (0, 1, 11)
    }

    assert len(streams) == 48


def test_unseeded_noise_never_repeats():
    """Each stream is seeded by the operating system, that of one name asked for twice too."""
    noise = UnseededNoise().of("s")

    assert noise.key("noise", 1) != noise.key("noise", 1)


# --- what may be trained, and what is left ---


def malformed(arrays):
    first = next(iter(arrays))
    yield "lacking", {name: a for name, a in arrays.items() if name != first}
    yield "extra", {**arrays, "more": np.zeros(1, np.float32)}
    yield "renamed", {("x" if name == first else name): a for name, a in arrays.items()}
    yield "shape", {**arrays, first: arrays[first].T.copy()}
    yield "scalar", {**arrays, first: np.float32(0).reshape(())}
    yield "nan", {**arrays, first: arrays[first] * np.float32("nan")}
    yield "inf", {**arrays, first: arrays[first] + np.float32("inf")}
    yield "integers", {**arrays, first: arrays[first].astype(np.int64)}
    yield "complex", {**arrays, first: arrays[first].astype(np.complex64)}
    yield "objects", {**arrays, first: arrays[first].astype(object)}
    yield "beyond float32", {**arrays, first: arrays[first].astype(np.float64) + 1e300}


def test_malformed_arrays_are_refused_and_the_model_is_untouched(make_model, make_records, plan):
    """A peer's parameters are checked in full before the first is taken."""
    model = make_model()
    before = arrays_of(model)
    for what, arrays in malformed(before):
        with pytest.raises(ProtocolError):
            train_locally(model, BINARY, arrays, make_records([1]), plan(), SimulationNoise(1, "n"), 1)

        after = arrays_of(model)
        assert all(np.array_equal(after[name], before[name]) for name in before), what


def left_behind(model, untrained):
    for parameter in model.parameters():
        yield from vars(parameter)
        yield from [] if parameter.grad is None else ["grad"]
    for module, plain in zip(model.modules(), untrained.modules(), strict=True):
        yield from (hook for name in vars(module) if name.endswith("_hooks") for hook in vars(module)[name])
        yield from set(vars(module)) - set(vars(plain))


def test_nothing_is_left(make_model, make_records, plan, train):
    """No hook, no factor of a record, no sum before its noise: the next round starts from a plain model."""
    model = make_model(4, [3])
    train(model, make_records([2] * 5), plan(noise_multiplier=1.0, steps=2))

    assert list(left_behind(model, make_model(4, [3]))) == []


def test_a_model_and_its_records_are_freed(make_model, make_records, plan, train):
    """What is prepared once for a model keeps neither alive."""
    model, records = make_model(4, [3]), make_records([2] * 5)
    train(model, records, plan())
    model_seen, records_seen = weakref.ref(model), weakref.ref(records.x_NF)

    del model, records
    gc.collect()

    assert model_seen() is None
    assert records_seen() is None


class Trap(nn.Module):
    """A layer that fails once it is set."""

    def __init__(self):
        super().__init__()
        self.line, self.is_set = nn.Linear(4, 1), False

    def forward(self, x_BF):
        y_B = self.line(x_BF).squeeze(-1)
        if self.is_set:
            raise RuntimeError("caught")
        return y_B


def test_nothing_is_left_after_a_failure(make_records, plan, train):
    """An interrupted round leaves no record's input behind, and no layer that would keep more."""
    model, records = Trap(), make_records([1] * 5)
    train(model, records, plan())
    model.is_set = True

    with pytest.raises(RuntimeError, match="caught"):
        train(model, records, plan())
    assert list(left_behind(model, Trap())) == []
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_is_trained_round_after_round(make_model, make_records, plan, train):
    """The same module serves every round of a site; two rounds are two independent updates."""
    model, records = make_model(), make_records([1] * 10)
    first = arrays_of(model)
    train(model, records, plan())
    again = train_locally(model, BINARY, first, records, plan(), SimulationNoise(1, "n"), 2)

    fresh = train(make_model(), records, plan())
    assert all(np.allclose(again.delta[n], fresh.delta[n], atol=1e-7) for n in fresh.delta)


# --- the plan and the statement of what ran ---


def test_lockstep_sends_the_gradient(make_study):
    """The optimizer and its rate are the server's: a site's delta is minus its gradient."""
    study = make_study(train={"optimizer": "adam", "lr": 0.3})
    plan = LocalPlan.of(study, Guarantee.of(study), coordinates=100)

    assert plan.gradient_only
    assert plan.steps == 1


def test_fedavg_trains_with_the_studys_optimizer(make_study):
    """Each site takes the study's steps at the study's rate."""
    study = make_study(train={"strategy": "fedavg", "optimizer": "adam", "lr": 0.3, "local_steps": 4})
    plan = LocalPlan.of(study, Guarantee.of(study), coordinates=100)

    assert (plan.optimizer, plan.lr, plan.steps) == ("adam", 0.3, 4)


def test_local_noise_is_the_guarantees(make_study):
    """Rate, clip and noise are those that were accounted for."""
    study = make_study(privacy={"clip": 0.25})
    guarantee = Guarantee.of(study)
    plan = LocalPlan.of(study, guarantee, coordinates=100)

    assert plan.lattice == guarantee.lattice(coordinates=100, cohort=1)
    event = guarantee.discrete(plan.lattice, sampler_distance=2.0**-90)
    assert event.noise_multiplier == pytest.approx(guarantee.event.noise_multiplier, abs=1e-6)
    assert (plan.clip, plan.sample_rate, plan.expected_batch) == (0.25, 0.1, 20.0)


def test_shared_noise_is_not_the_trainings_to_add_but_clipping_is(make_study):
    """It is added to the encoded sum; the bound on a unit is kept here."""
    study = make_study(privacy={"noise": "shared", "clip": 0.25})
    plan = LocalPlan.of(study, Guarantee.of(study), coordinates=100)

    assert (plan.lattice, plan.clip) == (None, 0.25)


def test_without_noise_nothing_is_clipped(make_study):
    """`none` is the comparison without privacy."""
    study = make_study(privacy={"noise": "none", "epsilon": None, "delta": None, "clip": 0.25})
    plan = LocalPlan.of(study, Guarantee.of(study), coordinates=100)

    assert (plan.lattice, plan.clip) == (None, NO_CLIP)


def test_an_undeclared_batch_is_refused(make_study):
    """A site would else have to tell its own size."""
    study = make_study(train={"expected_batch": None})

    with pytest.raises(ConfigError, match="expected_batch is not declared"):
        LocalPlan.of(study, Guarantee.of(study), coordinates=100)


def test_an_update_states_the_plan_that_ran(make_model, make_records, plan, train):
    """Steps, rate, noise and clip as they were."""
    step = plan(noise_multiplier=1.5, sample_rate=0.5, steps=2)
    update = train(make_model(), make_records([1] * 5), step)

    assert (update.steps, update.sampling_rate, update.lattice, update.clip) == (2, 0.5, step.lattice, 0.5)
    assert {value.dtype for value in update.delta.values()} == {np.dtype(np.float32)}


LATTICE = lattice_of(1.0, clip=0.5)
CHARGED = LATTICE.event(sampling_rate=0.1, steps=2, sampler_distance=2.0**-90)


@pytest.mark.parametrize(
    ("ran", "within"),
    [
        ({}, True),
        ({"steps": 1}, True),
        ({"steps": 3}, False),
        ({"sampling_rate": 0.11}, False),
        ({"lattice": lattice_of(1.1, clip=0.5)}, True),
        ({"lattice": lattice_of(0.99, clip=0.5)}, False),
        ({"lattice": replace(LATTICE, scale=2 * LATTICE.scale)}, False),
        ({"lattice": None}, False),
        ({"clip": 0.6}, False),
    ],
    ids=lambda given: str(given)[:30],
)
def test_what_ran_is_within_what_was_charged(ran, within):
    """More steps, a higher rate, less noise or a wider clip than charged are not."""
    usual = {"delta": {}, "steps": 2, "sampling_rate": 0.1, "lattice": LATTICE, "clip": 0.5}
    update = LocalUpdate(**{**usual, **ran})

    assert update.is_within(CHARGED, local_noise=True) is within


def test_noise_that_is_not_the_sites_to_add_is_not_asked_of_it():
    """Under shared noise the site's own training adds none; the rest is checked all the same."""
    update = LocalUpdate(delta={}, steps=2, sampling_rate=0.1, lattice=None, clip=0.5)

    assert update.is_within(CHARGED, local_noise=False)
    assert not update.is_within(replace(CHARGED, clip=0.4), local_noise=False)


def test_a_whole_gradient_keeps_its_digits(make_model, make_records, plan, train):
    """What secure aggregation rounds to its own integers must not have been rounded before."""
    records = make_records([1] * 40)
    steps = plan(expected_batch=3.0)

    whole, stepped = (
        train(make_model(), records, replace(steps, gradient_only=only)).delta for only in (True, False)
    )

    for name in whole:
        assert whole[name].dtype == np.float64
        np.testing.assert_allclose(whole[name], stepped[name], rtol=0, atol=1e-6)


class InFloat64(nn.Module):
    """A model whose parameters are of the type in which sums are formed."""

    def __init__(self, model):
        super().__init__()
        self.model = model.double()

    def forward(self, x):
        return self.model(x.double())


@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
def test_a_gradient_of_float64_is_divided_once(make_model, make_records, plan, train, noise_multiplier):
    """Opacus divides in place what it is given, which must not be what is kept of the sum."""
    records, step = make_records([1] * 40), plan(noise_multiplier=noise_multiplier, gradient_only=True)

    wide = train(InFloat64(make_model()), records, step).delta
    usual = train(make_model(), records, step).delta

    # An integer may be rounded the other way.
    off = 2.0 / (step.lattice.scale * step.expected_batch) if step.lattice else 1e-7
    for name, found in usual.items():
        np.testing.assert_allclose(wide[f"model.{name}"], found, rtol=0, atol=off)


def test_a_noisy_gradient_lies_on_the_lattice(make_model, make_records, plan, train):
    """Integers over the scale, whatever the records are: nothing is in the last bits (Mironov 2012)."""
    step = plan(noise_multiplier=1.0, gradient_only=True)

    delta = train(make_model(4, [3]), make_records([1] * 40), step).delta

    integers = [value * step.expected_batch * step.lattice.scale for value in delta.values()]
    for found in integers:
        np.testing.assert_allclose(found, np.round(found), rtol=0, atol=1e-6)


def test_adding_a_unit_moves_a_sum_by_its_clip(make_model, make_records, plan, train):
    """To far better than the slack that the noise allows for: sums are in float64."""
    many = make_records([1] * 3000)
    many.x_NF *= 1000
    step = plan(gradient_only=True, clip=1e-3, expected_batch=1.0)

    def total(units):
        fewer = replace(many, x_NF=many.x_NF[:units], y_N=many.y_N[:units], unit_N=many.unit_N[:units])
        fewer.units = units
        delta = train(make_model(), fewer, step).delta
        return np.concatenate([value.ravel() for value in delta.values()])

    for units in (2999, 2000, 65):
        moved = np.linalg.norm(total(units) - total(units - 1))

        assert moved <= 1e-3 * (1 + SLACK / 4)


# --- the proximal term ---


def stepped(model, records, plan, train, mu):
    """Parameters after `plan.steps` single steps, the pull towards the first added by hand."""
    start = now = arrays_of(model)
    for _ in range(plan.steps):
        delta = train(model, records, replace(plan, steps=1)).delta
        now = {n: a + delta[n] - np.float32(plan.lr * mu) * (a - start[n]) for n, a in now.items()}
        load_arrays(model, now)
    return now


@pytest.mark.parametrize("units", [5, 100])
def test_the_pull_is_the_gradient_of_the_proximal_term(make_model, make_records, plan, train, units):
    """mu (w - received) at each step, once, however many blocks the step is cut into."""
    records, steps = make_records([1] * units), plan(steps=4, lr=0.5)
    model = make_model(4, [3])
    start = arrays_of(model)

    update = train(model, records, replace(steps, proximal_mu=0.8))

    load_arrays(model, start)
    expected = stepped(model, records, steps, train, 0.8)
    for name, delta in update.delta.items():
        np.testing.assert_allclose(start[name] + delta, expected[name], rtol=0, atol=1e-6)


def test_the_pull_is_outside_of_clip_and_noise(make_model, make_records, plan, train):
    """The noise is what it is without, though the pull is far beyond the clip: post-processing."""
    mu, noisy = 1.5, plan(noise_multiplier=100.0, sample_rate=1e-12, lr=0.5)

    def moved(steps, mu=0.0):
        update = train(make_model(), make_records([1] * 5), replace(noisy, steps=steps, proximal_mu=mu))
        return update.delta["0.weight"].astype(np.float64)

    # The same stream of noise in each run: the third step's alone is the difference of three and two.
    noise = [moved(1), moved(2) - moved(1), moved(3) - moved(2)]

    pulled = np.zeros_like(noise[0])
    for step in noise:
        pulled = pulled - noisy.lr * mu * pulled + step
    np.testing.assert_allclose(moved(3, mu), pulled, rtol=0, atol=1e-4)
    assert np.linalg.norm(mu * moved(2, mu)) > noisy.clip


def test_a_pulled_round_states_the_same_mechanism(make_model, make_records, plan, train):
    """It is charged as one without."""
    steps = plan(noise_multiplier=1.5, sample_rate=0.5, steps=2)

    with_pull, without = (
        train(make_model(), make_records([1] * 5), replace(steps, proximal_mu=mu)) for mu in (0.5, 0.0)
    )

    assert replace(with_pull, delta={}) == replace(without, delta={})


def test_the_pull_is_the_studys(make_study):
    """From the bytes that the site pinned, for fedprox alone."""
    prox = make_study(train={"strategy": "fedprox", "proximal_mu": 0.25, "local_steps": 3})
    plain = make_study(train={"strategy": "fedavg", "local_steps": 3})

    found = [LocalPlan.of(study, Guarantee.of(study), coordinates=100) for study in (prox, plain)]

    assert found == [replace(found[1], proximal_mu=0.25), found[1]]
    assert found[1].proximal_mu == 0.0


def test_a_model_is_tried_at_the_threads_that_it_is_trained_with(
    make_model, make_records, plan, train, monkeypatch
):
    """Once for each number of them."""
    tried, of, records = [], Bookkeeper.of, make_records([1] * 5)

    def counted(*given, **named):
        tried.append(torch.get_num_threads())
        return of(*given, **named)

    monkeypatch.setattr(Bookkeeper, "of", counted)
    model = make_model()
    for threads in (1, 1, 3, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        train(model, records, plan())

    assert tried == [1, 3]


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1))

    def forward(self, x_BF):
        return self.layers(x_BF).squeeze(-1)


def test_what_a_model_draws_is_of_the_sites_own_keys(make_records, plan):
    """And not of torch's generator, whose draws everybody knows where nobody seeds it."""
    records, model = make_records([1] * 30), Dropping()
    arrays = arrays_of(model)

    def dropped(noise, round=1):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        update = train_locally(model, BINARY, arrays, records, plan(), noise, round)
        assert torch.equal(torch.get_rng_state(), before)
        return np.concatenate([a.ravel() for a in update.delta.values()])

    assert (dropped(UnseededNoise()) != dropped(UnseededNoise())).any()
    assert (dropped(SimulationNoise(0, "a")) != dropped(SimulationNoise(0, "b"))).any()
    assert (dropped(SimulationNoise(0, "a")) == dropped(SimulationNoise(0, "a"))).all()


def test_draws_of_a_key_are_uniform_and_no_others():
    """The whole state of torch's generator, as it lays it out."""

    def drawn(key):
        with drawing(key):
            return torch.rand(100_000, dtype=torch.float64)

    one, other = drawn(bytes(32)), drawn(bytes([1] * 32))
    assert abs(float(one.mean()) - 0.5) < 5 / (12 * 100_000) ** 0.5
    assert not (one == other).any()
    assert torch.equal(one, drawn(bytes(32)))
    state = torch.Generator().manual_seed(7).get_state()[_STATE].numpy().view(np.uint64)
    assert state[0] == 7
    assert (state < 1 << 32).all()
    assert len(np.unique(state)) == 624


class Drawn(nn.Module):
    """Remembers what it drew."""

    def __init__(self):
        super().__init__()
        self.line, self.drawn = nn.Linear(4, 1), []

    def forward(self, x_BF):
        self.drawn.append(torch.rand(8))
        return self.line(x_BF).squeeze(-1)


def test_masks_of_each_step_are_secret_and_others(make_records, plan, train):
    """One secret state a round, that each step goes on with; nothing of what is drawn comes a second time."""
    model, records = Drawn(), make_records([1] * 5)
    train(model, records, plan())

    found = []
    for seed, round in ((1, 1), (1, 2), (2, 1)):
        model.drawn.clear()
        torch.manual_seed(7)
        train(model, records, plan(steps=3), seed=seed, round=round)
        found += model.drawn

    known = torch.rand(1_000, generator=torch.Generator().manual_seed(7))
    assert len(found) == 9
    assert len({tuple(drawn.tolist()) for drawn in found}) == 9
    assert not torch.isin(torch.cat(found), known).any()


def test_a_round_leaves_the_parameters_as_they_travel(make_model, make_records, plan, train):
    """They are views of one vector then, and still what their names say."""
    model = make_model(4, [3])
    start = arrays_of(model)
    update = train(model, make_records([1] * 5), plan(steps=2))

    for name, trained in arrays_of(model).items():
        np.testing.assert_array_equal(trained - start[name], update.delta[name])


def test_parameters_of_several_types_are_refused(make_model, make_records, plan, train):
    """They cannot be one vector."""
    model = make_model(4, [3])
    model[0].double()

    with pytest.raises(ConfigError, match=r"of 2 types \(float32, float64\)"):
        train(model, make_records([1] * 5), plan())


def test_a_model_without_parameters_is_refused(make_records, plan, train):
    """There is nothing to release, and nothing to hide."""
    with pytest.raises(ConfigError, match="no parameters to train"):
        train(nn.Sequential(nn.Flatten(0)), make_records([1] * 5), plan())


FAULTS = {
    "torch": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 1099511627776 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "numpy": MemoryError("Unable to allocate 1.00 TiB for an array"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("tried", [False, True])
def test_too_little_memory_is_one_line(fault, tried, make_model, make_records, plan, train, monkeypatch):
    """It says what a block takes and what helps, in the trial and in a step; nothing is left of the round."""
    model, records = make_model(4, [3]), make_records([1] * 5)
    if tried:
        train(model, records, plan())

    def refused(*_):
        raise FAULTS[fault]

    monkeypatch.setattr(Bookkeeper, "factors", refused)
    with pytest.raises(ConfigError) as caught:
        train(model, records, plan())

    assert caught.value.exit_code == 3
    assert "too little memory for " in caught.value.message
    assert ("block of 32 records takes about 1 MiB" in caught.value.message) is tried
    assert "\n" not in str(caught.value)
    assert "more memory" in caught.value.fix
    assert list(left_behind(model, make_model(4, [3]))) == []
