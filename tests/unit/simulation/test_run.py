"""One simulated run: reproducible, the same as pooled training where nothing hides it, and accounted for."""

from dataclasses import replace

import numpy as np
import pytest

from lepton_fl.errors import DataError, TooFewSites
from lepton_fl.federation import Federation
from lepton_fl.federation.grids import SummingGrid
from lepton_fl.privacy import epsilon
from lepton_fl.simulation.run import FIRST_SITE_NODE, prepare
from lepton_fl.tasks import model_hash
from lepton_fl.training import train_locally


@pytest.fixture
def start():
    """Run to the end and close; the run, for what is left of it."""

    def go(*args, **more):
        run = prepare(*args, **more)
        try:
            run.start()
        finally:
            run.close()
        return run

    return go


def test_the_same_study_and_seed_give_the_same_model(start, study, splits):
    """Bit for bit."""
    first, second = start(study, splits, 7), start(study, splits, 7)

    assert model_hash(first.federation.model) == model_hash(second.federation.model)


def test_another_seed_gives_another_model(start, study, splits):
    """Samples and noise are drawn anew."""
    first, second = start(study, splits, 7), start(study, splits, 8)

    assert model_hash(first.federation.model) != model_hash(second.federation.model)


@pytest.mark.parametrize("noise", ["local", "shared"])
def test_the_order_of_the_sites_does_not_matter(start, make_study, splits, noise):
    """They are in order of name, however they were given."""
    study = make_study(privacy={"noise": noise})
    backwards = dict(reversed(splits.items()))

    first, second = start(study, splits, 7), start(study, backwards, 7)

    assert model_hash(first.federation.model) == model_hash(second.federation.model)


@pytest.mark.parametrize("summed", [True, False], ids=["summed", "each for itself"])
def test_without_noise_lockstep_is_pooled_gradient_descent(start, make_study, splits, summed):
    """Every record in every step, sites of different sizes: the logistic regression of the pool."""
    units, lr, steps = sum(len(train) for train, _ in splits.values()), 2.0, 12
    study = make_study(
        privacy={"noise": "none", "epsilon": None, "delta": None},
        secure_aggregation={"enabled": summed},
        train={
            "rounds": steps,
            "sample_rate": 1.0,
            "optimizer": "sgd",
            "lr": lr,
            # Each site divides by the same public number, and the server by the sites.
            "expected_batch": units / len(splits),
        },
        model={"name": "logreg"},
    )

    found = list(start(study, splits, 0).federation.model.values())

    x_NF = np.concatenate([train.x_NF for train, _ in splits.values()]).astype(np.float64)
    y_N = np.concatenate([train.y_N for train, _ in splits.values()])
    w_F, bias = np.zeros(2), 0.0
    for _ in range(steps):
        error_N = 1 / (1 + np.exp(-(x_NF @ w_F + bias))) - y_N
        w_F, bias = w_F - lr * error_N @ x_NF / units, bias - lr * error_N.mean()
    np.testing.assert_allclose(found[0], [w_F], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[1], [bias], rtol=0, atol=1e-5)
    assert np.abs(w_F).min() > 0.5


def test_local_and_shared_noise_are_charged_alike(start, make_study, splits, tmp_path):
    """Both promise sigma on what a site's records can move; they differ in whom it holds against."""
    spent = []
    for noise in ("local", "shared"):
        study = make_study(privacy={"noise": noise})
        run = prepare(study, splits, 0, folder=tmp_path / noise)
        run.start()
        spent.append([site.ledger.events(site.budget.data_set) for site in run.sites.values()])
        run.close()

    costs = [
        [[(e.noise_multiplier, e.sampling_rate, e.steps) for e in events] for events in sites]
        for sites in spent
    ]
    assert costs[0] == costs[1]
    assert epsilon(spent[0][0], 1e-3) < 4.0


def test_every_round_is_charged_at_every_site(study, splits, tmp_path):
    """In the site's own file."""
    run = prepare(study, splits, 0, folder=tmp_path)
    run.start()

    rounds = {n: [row["round"] for row in s.ledger.history(s.budget.data_set)] for n, s in run.sites.items()}
    run.close()

    assert rounds == {name: [1, 2, 3] for name in "abcd"}


def test_a_site_whose_training_fails_is_named_and_tried_again(make_study, splits, monkeypatch):
    """The run goes on with the others; what it was charged stays charged."""
    calls = []

    def fail_once(*args):
        calls.append(args[-1])
        if len(calls) == 2:
            raise RuntimeError("no memory for patient 4711")
        return train_locally(*args)

    monkeypatch.setattr("lepton_fl.site.site.train_locally", fail_once)
    study = make_study(secure_aggregation={"min_survivors": 3})
    reports = []

    class Keep:
        def joined(self, *_):
            pass

        def round_done(self, report, _):
            reports.append(report)

    run = prepare(study, splits, 0, observer=Keep(), engine="process")
    run.start()
    charged = run.sites["b"].ledger.history("b-ill")
    run.close()

    assert reports[0].dropped == {"b": "internal error at the site"}
    assert [r.sites for r in reports] == [("a", "c", "d"), tuple("abcd"), tuple("abcd")]
    assert [row["round"] for row in charged] == [1, 2, 3]


def test_a_killed_run_goes_on_within_what_was_reserved(study, splits, tmp_path):
    """Killed with round two charged: no number is charged twice, and the spare round is enough."""

    class Killing(SummingGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = list(self.inner.send_and_receive(messages, timeout=timeout))
            if first.federation.started == 2:
                raise KeyboardInterrupt
            return replies

    where = {"folder": tmp_path, "checkpoint": tmp_path / "checkpoint"}
    first = prepare(study, splits, 0, **where)
    with pytest.raises(KeyboardInterrupt):
        first.federation.run(Killing(first.grid))
    first.close()

    run = prepare(study, splits, 0, **where, resume=True)
    run.start()
    history = run.sites["a"].ledger.history("a-ill")
    run.close()

    assert isinstance(run.federation, Federation)
    assert [row["round"] for row in history] == [1, 2, 3, 4]
    assert {row["run"] for row in history} == {first.federation.run_id}


def test_tables_of_different_widths_are_refused(study, splits):
    """They are not of one contract."""
    train, test = splits["a"]
    splits = {**splits, "a": (replace(train, x_NF=train.x_NF[:, :1]), test)}

    with pytest.raises(DataError, match="2 different widths"):
        prepare(study, splits, 0)


def test_a_late_site_is_late_in_the_simulator_too(start, make_study, splits):
    """Its reply is left out, as the network would."""
    study = make_study(train={"deadline": 1e-9})

    with pytest.raises(TooFewSites, match="no answer before the deadline"):
        start(study, splits, 0)


def test_nodes_are_numbered_by_name(study, splits):
    """So that runs are repeatable."""
    run = prepare(study, dict(reversed(splits.items())), 0)
    run.close()

    assert run.federation.sites == {FIRST_SITE_NODE + i: name for i, name in enumerate("abcd")}


@pytest.mark.parametrize("noise", ["local", "shared"])
def test_every_site_is_charged_for_a_persons_other_sites(make_study, splits, noise):
    """A whole run, but for its spare rounds: within the study's epsilon, above one site's part of it."""
    study = make_study(privacy={"noise": noise, "max_sites_per_unit": 2})
    run = prepare(study, splits, 3)
    try:
        run.start()
        (event,) = run.sites["a"].ledger.events("a-ill")
        spent = run.sites["a"].ledger.spent("a-ill", study.privacy.delta)
    finally:
        run.close()

    rounds = study.train.rounds
    assert (event.sites_per_unit, event.steps) == {"shared": (2, rounds), "local": (1, 2 * rounds)}[noise]
    assert epsilon([replace(event, sites_per_unit=1, steps=rounds)], study.privacy.delta) < spent
    assert spent == pytest.approx(run.guarantee.epsilon_after(rounds), rel=1e-3)
    assert spent <= study.privacy.epsilon
