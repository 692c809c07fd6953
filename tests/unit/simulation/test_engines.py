"""The vectorised engine and the one that trains the sites one after another give the same run."""

import tomllib
from dataclasses import replace

import numpy as np
import pytest
import tomli_w
from torch import nn

from lepton_fl.errors import ConfigError, TooFewSites
from lepton_fl.results import read_results
from lepton_fl.simulation import Drop, simulate
from lepton_fl.simulation import run as run_module
from lepton_fl.simulation import stacked as engine
from lepton_fl.simulation.run import prepare
from lepton_fl.site import Deployed, Simulated
from lepton_fl.site.site import train_alone
from lepton_fl.tasks import models
from lepton_fl.tasks.arrays import flatten
from lepton_fl.tasks.models import ModelSpec
from lepton_fl.training import SimulationNoise, UnseededNoise

LOCAL = {"noise": "local"}
STEPS = {"strategy": "fedavg", "local_steps": 4, "optimizer": "adam", "lr": 0.05}
STUDIES = {
    "shared noise": {"secure_aggregation": {"min_survivors": 3}},
    "local noise": {"privacy": LOCAL, "secure_aggregation": {"enabled": False}},
    "no noise": {
        "privacy": {"noise": "none", "epsilon": None, "delta": None},
        "secure_aggregation": {"enabled": False},
    },
    "local steps": {"privacy": LOCAL, "train": STEPS},
    "fedprox, in clear": {
        "privacy": LOCAL,
        "train": {**STEPS, "strategy": "fedprox", "proximal_mu": 0.2},
        "secure_aggregation": {"enabled": False},
    },
}


def finished(study, splits, **options):
    """Model, and what every site was charged, of a run to its end."""
    run = prepare(study, splits, 0, **options)
    run.start()
    charged = {
        name: [
            {key: row[key] for key in row if key not in ("at", "run")}
            for row in site.ledger.history(site.budget.data_set)
        ]
        for name, site in run.sites.items()
    }
    run.close()
    return run, flatten(run.federation.model), charged


@pytest.mark.parametrize("name", STUDIES)
def test_both_engines_give_the_same_run(make_study, splits, name):
    """The model to 1e-5, the ledgers exactly, a site that is down in the second round included."""
    study = make_study(**STUDIES[name])
    drops = [Drop(site="b", first=2, last=2)]
    run, vectorised_L, charged = finished(study, splits, drops=drops)
    _, process_L, as_process = finished(study, splits, drops=drops, engine="process")

    assert run.engine == "vectorised"
    assert np.linalg.norm(vectorised_L - process_L) <= 1e-5 * np.linalg.norm(process_L)
    assert charged == as_process


@pytest.mark.parametrize("name", ["shared noise", "local steps"])
@pytest.mark.parametrize("way", ["vectorised", "process"])
def test_no_key_is_asked_for_twice_in_a_run(make_study, splits, name, way, monkeypatch):
    """Sampling, masks, rounding and noise of steps, rounding and noise of what is added up under masks."""
    asked = []
    key = SimulationNoise.key

    def recorded(noise, purpose, round=0):
        found = key(noise, purpose, round)
        # The trial of the vectorised engine is of no study.
        if noise._study_id:
            asked.append(found)
        return found

    monkeypatch.setattr(SimulationNoise, "key", recorded)
    finished(make_study(**STUDIES[name]), splits, engine=way)

    assert len(asked) > 3 * len(splits)
    assert len(set(asked)) == len(asked)


def test_a_round_is_trained_once_and_fetched_by_each_site(study, splits, monkeypatch):
    """Of all sites together, when the first of them is asked."""
    calls = []
    together = engine.train_together

    def recorded(stacked, arrays, parts, plan, round, **options):
        calls.append((round, [part.site for part in parts]))
        return together(stacked, arrays, parts, plan, round, **options)

    monkeypatch.setattr(engine, "train_together", recorded)
    finished(study, splits)

    assert calls == [(number, list("abcd")) for number in (1, 2, 3)]


def test_with_little_memory_fewer_updates_wait(study, splits, monkeypatch):
    calls = []
    together = engine.train_together

    def recorded(stacked, arrays, parts, *args, **options):
        calls.append([part.site for part in parts])
        return together(stacked, arrays, parts, *args, **options)

    monkeypatch.setattr(engine, "train_together", recorded)
    monkeypatch.setattr(engine, "_NUMBER", 1 << 20)
    _, few_L, _ = finished(study, splits, memory=12 << 20)
    monkeypatch.undo()
    _, all_L, _ = finished(study, splits)

    assert calls == [["a", "b"], ["c", "d"]] * 3
    assert np.linalg.norm(few_L - all_L) <= 1e-6 * np.linalg.norm(all_L)


def test_a_site_whose_policy_refuses_gives_nothing(make_study, splits, tmp_path):
    """With either engine: it is trained with the others in vain, and neither charged nor in the model."""
    study = make_study(secure_aggregation={"min_survivors": 3})
    models = []
    for name in ("vectorised", "process"):
        home = tmp_path / name
        prepare(study, splits, 0, folder=home).close()
        policy = tomllib.loads((home / "b" / "policy.toml").read_text())
        policy["require"]["min_rows"] = 10_000
        (home / "b" / "policy.toml").write_text(tomli_w.dumps(policy))
        run, model_L, charged = finished(study, splits, folder=home, engine=name)
        models.append(model_L)

        assert list(run.federation.refused) == ["b"]
        assert [name for name, rounds in charged.items() if not rounds] == ["b"]

    assert np.linalg.norm(models[0] - models[1]) <= 1e-5 * np.linalg.norm(models[1])


def test_the_protocol_and_its_sums_in_clear_give_one_model(study, splits):
    """Bit by bit, under this engine too."""
    _, masked_L, _ = finished(study, splits, masked=True)
    _, functional_L, _ = finished(study, splits)

    assert (masked_L == functional_L).all()


def test_a_resumed_run_is_the_run_that_was_not_stopped(make_study, splits, tmp_path):
    """Under the vectorised engine, local steps and all."""
    study = make_study(**STUDIES["local steps"])
    _, whole_L, _ = finished(study, splits)

    class Stop:
        def joined(self, *_):
            pass

        def round_done(self, *_):
            first.federation.stop()

    where = {"folder": tmp_path / "sites", "checkpoint": tmp_path / "checkpoint"}
    first = prepare(study, splits, 0, observer=Stop(), **where)
    first.start()
    first.close()
    run, resumed_L, _ = finished(study, splits, resume=True, **where)

    assert first.federation.done == 1
    assert run.federation.done == 3
    assert (resumed_L == whole_L).all()


def test_another_study_at_the_same_sites_is_trained_by_itself(make_study, splits):
    """What was made ready for one study is used for no other."""
    study, other = make_study(privacy=LOCAL), make_study(privacy=LOCAL, train={"lr": 0.3})
    run = prepare(study, splits, 0)
    stack = engine.Stack(other, run.sites, memory=1 << 28)
    site = run.sites["a"]
    bench = site.bench(study)
    plan = engine.LocalPlan.of(study, bench.guarantee, coordinates=bench.coordinates)
    assignment = engine.Assignment(study=study, run="0" * 32, round=1, cohort=tuple("abcd"))
    given = assignment, bench, run.federation.model, plan, site.noise.of(study.id)
    found, alone = stack.trainer("a")(*given), train_alone(*given)
    run.close()

    assert (flatten(found.delta) == flatten(alone.delta)).all()
    assert not stack._waiting


class Halves(nn.Module):
    """What cannot be stacked."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 1)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x_BF):
        return self.dropout(self.linear(x_BF)).squeeze(-1)


def test_a_model_that_cannot_be_stacked_is_trained_at_one_site_after_another(
    make_study, splits, monkeypatch, caplog
):
    """And it is said once, not for each run."""
    found = {**models._BUILTIN, "halves": ModelSpec(title="halves", build=lambda _, width: Halves(width))}
    monkeypatch.setattr(models, "_BUILTIN", found)
    study = make_study(privacy=LOCAL, model={"name": "halves"})
    run_module._say.cache_clear()
    run, model_L, _ = finished(study, splits)
    _, process_L, _ = finished(study, splits, engine="process")
    finished(study, splits)
    said = [record.message for record in caplog.records if "one after another" in record.message]

    assert run.engine == "process"
    assert (model_L == process_L).all()
    assert said == ["model halves: layer dropout is a Dropout; the sites are trained one after another"]


def frozen(width):
    layer = nn.Linear(width, 1)
    layer.bias.requires_grad_(False)
    return nn.Sequential(layer, nn.Flatten(0))


def test_a_model_that_no_site_can_train_is_told_of_in_a_site_s_own_words(heart_plan, monkeypatch):
    """The server hears the class of the error only; who simulates may hear all."""
    found = {**models._BUILTIN, "frozen": ModelSpec(title="frozen", build=lambda _, width: frozen(width))}
    monkeypatch.setattr(models, "_BUILTIN", found)
    plan = heart_plan()
    study = plan.study.model_copy(update={"model": plan.study.model.model_copy(update={"name": "frozen"})})

    with pytest.raises(
        TooFewSites, match=r"; site cleveland: model: parameter '0\.bias' is frozen"
    ) as caught:
        simulate(replace(plan, study=study))

    assert str(caught.value).endswith("(and 3 more sites)")


def test_too_little_memory_is_refused_before_anything_is_trained(study, splits):
    with pytest.raises(ConfigError, match=r"--memory: found '0 MiB.*the model at a") as caught:
        prepare(study, splits, 0, memory=100)

    assert "--engine process" in caught.value.fix


@pytest.mark.parametrize("name", ["vectorised", "process"])
def test_training_that_diverges_says_what_to_change(make_study, splits, name, monkeypatch):
    """One line, whichever engine."""
    # Two features do not diverge far.
    monkeypatch.setattr("lepton_fl.site.app.MAX_MAGNITUDE", 100.0)
    study = make_study(
        privacy={"noise": "none", "epsilon": None, "delta": None},
        train={**STEPS, "optimizer": "sgd", "local_steps": 3, "lr": 100.0, "expected_batch": 0.01},
        secure_aggregation={"enabled": False, "min_sites": 3},
    )
    run = prepare(study, splits, 0, engine=name)
    with pytest.raises(TooFewSites, match=r"training diverges: lower train\.lr") as caught:
        run.start()
    refused = run.sites["a"].refusals[0]
    run.close()

    assert "\n" not in str(caught.value)
    assert str(refused).startswith("study heart: training diverges: arrays: layers.0.")


@pytest.mark.parametrize("name", ["shared noise", "local steps"])
def test_what_is_to_be_masked_is_not_judged_by_its_size(make_study, splits, name, monkeypatch):
    """A refusal would tell the server of what a site's exact sum is."""
    monkeypatch.setattr("lepton_fl.site.app.MAX_MAGNITUDE", 1e-12)
    run, _, _ = finished(make_study(**STUDIES[name]), splits)

    assert not any(site.refusals for site in run.sites.values())


def test_the_results_name_the_engine(heart_plan):
    plan = heart_plan()
    simulate(plan)
    other = replace(plan, engine="process", out=plan.out.parent / "other")
    simulate(other)

    assert read_results(plan.out / "results.json").engine == "vectorised"
    assert read_results(other.out / "results.json").engine == "process"


def test_only_a_simulated_site_can_be_given_another_way_to_train(tmp_path):
    """A deployed one trains by itself, on its own table."""
    assert "train" in Simulated.__dataclass_fields__
    with pytest.raises(TypeError, match="train"):
        Deployed(noise=UnseededNoise(), ledger=None, train=lambda *_: None)
    deployed = Deployed.__new__(Deployed)
    with pytest.raises(AttributeError):
        object.__setattr__(deployed, "train", lambda *_: None)

    assert deployed.train is train_alone
