"""Which model a study gets, its first weights, and what may be plugged in."""

import math

import pytest
import torch
from torch import nn

from lepton_fl.errors import ConfigError
from lepton_fl.tasks import ModelSpec, TaskSpec, arrays_of, build_model, registered_models, registered_tasks

PLUGIN = ModelSpec(title="a plug-in", build=lambda study, width: nn.Sequential(nn.Linear(width, 1)))


def build(study, width=3, seed=1):
    return build_model(study, width, torch.Generator().manual_seed(seed))


def linears(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


# --- first weights ---


@pytest.mark.parametrize("name", ["logreg", "mlp"])
@pytest.mark.parametrize("share", [0.0017, 0.5, 0.9])
def test_the_first_score_is_the_declared_prevalence(make_study, name, share):
    """For any record: no step is spent on learning the base rate."""
    model = build(make_study(model={"name": name}, task={"prevalence": share}))

    logit_B = model(torch.randn(5, 3))

    assert logit_B.shape == (5,)
    assert torch.sigmoid(logit_B).tolist() == pytest.approx([share] * 5, rel=1e-5)
    assert linears(model)[-1].bias.item() == pytest.approx(math.log(share / (1 - share)), abs=1e-6)


def test_without_a_declared_prevalence_the_first_score_is_a_half(make_study):
    """Nothing is counted at the sites to do better."""
    assert torch.sigmoid(build(make_study())(torch.ones(1, 3))).item() == 0.5


def test_hidden_layers_start_at_random_from_the_given_generator(make_study):
    """The same generator, the same bits; another, others. torch's global one is not asked."""
    study = make_study(model={"name": "mlp"})
    torch.manual_seed(1)
    one = arrays_of(build(study, seed=1))
    torch.manual_seed(2)
    same, other = arrays_of(build(study, seed=1)), arrays_of(build(study, seed=2))

    assert all((one[name] == same[name]).all() for name in one)
    assert (one["layers.0.weight"] != other["layers.0.weight"]).any()
    assert len(set(one["layers.0.weight"].ravel().tolist())) == one["layers.0.weight"].size


def test_the_mlp_has_the_studys_widths(make_study):
    """And layer normalisation where asked."""
    model = build(make_study(model={"name": "mlp", "hidden": [8, 5], "normalization": "layer"}))

    assert [(m.in_features, m.out_features) for m in linears(model)] == [(3, 8), (8, 5), (5, 1)]
    assert sum(isinstance(m, nn.LayerNorm) for m in model.modules()) == 2


# --- auto ---


@pytest.mark.parametrize(
    ("epsilon", "batch", "min_sites", "chosen"),
    [
        (3.0, 500.0, 2, "mlp"),  # 10,000 units in the smallest cohort
        (3.0, 499.0, 2, "logreg"),
        (3.0, 250.0, 4, "mlp"),
        (2.99, 50_000.0, 4, "logreg"),
        (8.0, None, 4, "logreg"),  # unknown is taken for few
    ],
)
def test_auto_is_resolved_from_public_figures(make_study, epsilon, batch, min_sites, chosen):
    """Epsilon, expected batch over rate, and the least number of sites; no site's own size."""
    study = make_study(
        privacy={"epsilon": epsilon},
        train={"expected_batch": batch, "sample_rate": 0.1},
        secure_aggregation={"min_sites": min_sites},
    )

    assert study.model_name == chosen
    assert len(linears(build(make_study(model={"name": chosen})))) == (2 if chosen == "mlp" else 1)


def test_auto_without_noise_asks_for_units_only(make_study):
    """No epsilon is not a small one."""
    study = make_study(
        privacy={"noise": "none", "epsilon": None, "delta": None}, train={"expected_batch": 5e4}
    )

    assert study.model_name == "mlp"


def test_a_named_model_is_taken_at_its_word(make_study):
    """Whatever `auto` would say."""
    assert make_study(model={"name": "mlp"}).model_name == "mlp"


def test_an_unknown_model_lists_those_installed(make_study):
    """At the site that lacks it."""
    with pytest.raises(ConfigError, match=r"model.name: found 'mpl', allowed: auto, logreg, mlp"):
        build(make_study(model={"name": "mpl"}))


# --- plug-ins ---


def test_a_plug_in_is_found_by_its_entry_point(install, make_study):
    """Installed on purpose, named by the study."""
    install("lepton_fl.models", ours=PLUGIN)

    assert registered_models()["ours"] is PLUGIN
    assert len(linears(build(make_study(model={"name": "ours"})))) == 1


def test_a_plug_in_without_parameters_is_refused(install, make_study):
    """Before noise for no coordinate is calibrated."""
    install("lepton_fl.models", ours=ModelSpec(title="nothing", build=lambda *_: nn.Flatten(0)))

    with pytest.raises(ConfigError, match="its model has no parameters to train"):
        build(make_study(model={"name": "ours"}))


def test_a_plug_in_of_another_group_is_no_model(install):
    """A task does not become a model by its name."""
    install("lepton_fl.tasks", ours=PLUGIN)

    assert sorted(registered_models()) == ["logreg", "mlp"]


@pytest.mark.parametrize("name", ["logreg", "mlp"])
def test_a_plug_in_cannot_take_a_built_in_name(install, name):
    """A policy that allows `logreg` allows ours."""
    install("lepton_fl.models", **{name: PLUGIN})

    with pytest.raises(ConfigError, match=f"'{name}' is built in"):
        registered_models()


def test_a_task_cannot_take_a_built_in_name_either(install):
    """The loss decides what a gradient is."""
    install("lepton_fl.tasks", binary=TaskSpec(title="t", loss=lambda a, b: a.sum(), score=torch.sigmoid))

    with pytest.raises(ConfigError, match="'binary' is built in"):
        registered_tasks()


def test_a_plug_in_that_cannot_be_imported_is_named(install):
    """One line, whatever it raised."""
    install("lepton_fl.models", ours=RuntimeError("no such library"))

    with pytest.raises(ConfigError, match=r"a_package:ours.*cannot be loaded: no such library"):
        registered_models()


def test_a_plug_in_of_another_kind_is_named(install):
    """A class, or a task, among the models."""
    install("lepton_fl.models", ours=ModelSpec)

    with pytest.raises(ConfigError, match=r"a_package:ours.*is no ModelSpec"):
        registered_models()


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(1), nn.BatchNorm2d(1), nn.SyncBatchNorm(1)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_plug_in_with_batch_norm_is_refused(install, make_study, layer):
    """Wherever it hides: it would mix the records of a batch, and no clip bounds that."""
    hidden = ModelSpec(
        title="t", build=lambda study, width: nn.Sequential(nn.Linear(width, 1), nn.Sequential(layer))
    )
    install("lepton_fl.models", ours=hidden)

    with pytest.raises(ConfigError, match=r"layer '1.0' is .*BatchNorm.*cannot be bounded"):
        build(make_study(model={"name": "ours"}))
