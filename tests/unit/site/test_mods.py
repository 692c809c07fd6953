"""The controls round a site's ClientApp: nothing a server sends can go round them."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lepton_fl.errors import BadRequest, BudgetExhausted, ConfigError, DataError, PolicyRefused
from lepton_fl.messages import EVALUATE, JOIN, METRICS, ROUND, TRAIN, WEIGHT, from_record
from lepton_fl.privacy import Ledger
from lepton_fl.site.mods import TABLE_REFUSED
from lepton_fl.tasks import arrays_of, build_model
from lepton_fl.training import train_locally

TRAINING = "lepton_fl.site.site.train_locally"
SECRET = "patient 4711 is ill"


@pytest.fixture
def trained(monkeypatch):
    """The rounds for which training was started."""
    rounds = []

    def spy(*args):
        rounds.append(args[-1])
        return train_locally(*args)

    monkeypatch.setattr(TRAINING, spy)
    return rounds


def released(reply):
    """Whether anything but a refusal left."""
    return not reply.has_error()


def test_an_admitted_round_is_trained_charged_and_released(site, ask, charged, trained):
    """Otherwise the refusals below would show nothing."""
    reply = ask(site)

    assert released(reply)
    assert trained == charged(site) == [1]
    assert dict(reply.content.metric_records[METRICS]) == {WEIGHT: 1.0}
    assert reply.content.config_records == {}


@pytest.mark.parametrize("kind", [JOIN, TRAIN])
def test_without_budget_nothing_is_trained_and_nothing_leaves(make_site, ask, charged, trained, kind):
    """The data set's total is below what the run would cost."""
    site = make_site(budget={"epsilon_total": 2.0})

    reply = ask(site, kind)

    assert not released(reply)
    assert trained == charged(site) == []
    assert isinstance(site.refusals[0], BudgetExhausted)
    assert reply.error.reason == "the site's privacy budget does not cover the run"


def test_a_refused_study_reads_no_row(make_site, ask):
    """The policy is asked before the table is opened."""
    read = []
    site = make_site(read=read, budget={"epsilon_per_study": 1.0})

    reply = ask(site)

    assert not released(reply)
    assert read == []


def test_the_charge_is_on_disk_before_training_starts(site, ask, monkeypatch):
    """Spend before send: seen through another connection to the file."""
    seen = []

    def look(*args):
        with closing(Ledger(site.ledger.path)) as other:
            seen.extend(other.history(site.budget.data_set))
        return train_locally(*args)

    monkeypatch.setattr(TRAINING, look)
    ask(site, round=2)

    (row,) = seen
    assert (row["round"], row["steps"], row["sampling_rate"]) == (2, 1, 0.2)
    assert row["outcome"] == "charged"


def test_what_leaves_is_committed_first(site, ask):
    """In the site's own file, and only then a reply."""
    assert released(ask(site))

    (row,) = site.ledger.history(site.budget.data_set)
    assert row["outcome"] == "released"


def test_nothing_leaves_that_cannot_be_committed(site, ask, charged, monkeypatch):
    """A disk that fails between training and sending costs the round."""

    def fail(*_, **__):
        raise ConfigError("disk full")

    monkeypatch.setattr(Ledger, "commit", fail)

    assert not released(ask(site))
    assert charged(site) == [1]


def test_a_crash_in_training_leaves_the_charge(site, ask, charged, monkeypatch):
    """It wastes budget; the other order would leak it."""
    monkeypatch.setattr(TRAINING, lambda *_: 1 / 0)

    reply = ask(site)

    assert not released(reply)
    assert charged(site) == [1]


def test_an_internal_error_does_not_leave_in_words(site, ask, monkeypatch, caplog):
    """The text of an unforeseen error may quote a record."""

    def fail(*_):
        raise ValueError(SECRET)

    monkeypatch.setattr(TRAINING, fail)

    reply = ask(site)

    assert reply.error.reason == "internal error at the site"
    assert SECRET in caplog.text


def test_a_round_is_released_once(site, ask, charged, trained):
    """The same round of the same run again, with whatever model, would be another release."""
    ask(site)

    reply = ask(site)

    assert reply.error.reason == "round already charged"
    assert trained == charged(site) == [1]


@pytest.mark.parametrize("number", [0, 5, 2**62])
def test_a_round_that_the_noise_does_not_cover_is_refused(site, ask, charged, trained, number):
    """Three rounds and a spare one are calibrated for."""
    reply = ask(site, round=number)

    assert not released(reply)
    assert isinstance(site.refusals[0], BadRequest)
    assert trained == charged(site) == []


def test_the_spare_round_is_charged_like_any_other(site, ask, charged):
    """It is part of what the study promised."""
    ask(site, round=4)

    assert charged(site) == [4]


@pytest.mark.parametrize(
    "kind", ["train.default", "train.exact", "query", "query.rows", "evaluate.raw", "system"]
)
def test_an_unknown_message_type_is_refused(site, ask, charged, trained, kind):
    """Flower's own spelling of `train` included: there is one door."""
    reply = ask(site, kind)

    assert reply.error.reason == "message type not allowed"
    assert isinstance(site.refusals[0], PolicyRefused)
    assert trained == charged(site) == []


def test_a_round_of_other_sites_is_refused(site, ask, charged, trained):
    """The cohort does not name this one."""
    reply = ask(site, cohort=("bank", "practice", "ward"))

    assert isinstance(site.refusals[0], BadRequest)
    assert reply.error.reason == "BadRequest"
    assert trained == charged(site) == []


def test_a_cohort_that_shrinks_below_the_policy_is_refused(site, ask, charged, trained):
    """Each message is judged by itself, whatever was joined."""
    ask(site, JOIN, cohort=())

    reply = ask(site, cohort=("bank", "clinic"))

    assert reply.error.reason == "the site's policy refuses the study (require.min_sites)"
    assert trained == charged(site) == []


def test_a_train_message_cannot_pass_for_a_join(site, ask, trained):
    """An empty cohort is for a `JOIN` alone."""
    reply = ask(site, TRAIN, cohort=())

    assert not released(reply)
    assert trained == []


@pytest.mark.parametrize("kind", [JOIN, TRAIN, EVALUATE])
def test_no_message_type_goes_round_the_policy(make_site, ask, kind):
    """Manual approval, and nobody approved."""
    site = make_site(require={"approval": "manual"}, release={"metrics": "exact"})

    reply = ask(site, kind)

    assert reply.error.reason == "the site's policy refuses the study (require.approval)"


@pytest.mark.parametrize("noise", ["local", "shared"])
@pytest.mark.parametrize("deployed", [True, False])
@pytest.mark.parametrize("asked", [{"kind": JOIN, "round": 0, "cohort": ()}, {}], ids=["join", "train"])
def test_a_site_without_an_identity_is_in_no_secure_round(
    make_site, make_study, ask, charged, noise, deployed, asked
):
    """Its update would be seen by the server; and nothing is spent on what is not to be."""
    study = make_study(privacy={"noise": noise}, secure_aggregation={"enabled": True})
    site = make_site(deployed=deployed)

    reply = ask(site, study=study, **asked)

    assert reply.error.reason == "secure aggregation is not available at the site"
    assert charged(site) == []


@pytest.mark.parametrize(
    "extra",
    [
        {"policy": "none"},
        {"skip_ledger": True},
        {"noise_multiplier": 0.0},
        {"epsilon": 100.0},
        {"clip": 1e9},
        {"sample_rate": 1.0},
        {"seed": 0},
        {"steps": 1000},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_a_server_cannot_switch_a_control_off(make_site, ask, extra):
    """A config that asks for it gets the same update for the same charge."""
    plain, asked = make_site(in_memory=True), make_site(in_memory=True)

    assert _outcome(asked, ask(asked, extra=extra)) == _outcome(plain, ask(plain))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    extra=st.dictionaries(
        st.text(max_size=20).filter(lambda key: key not in ("study", "study-id", "run", "cohort", ROUND)),
        st.one_of(st.booleans(), st.integers(-(2**31), 2**31), st.floats(), st.text(), st.binary()),
        min_size=1,
        max_size=5,
    )
)
def test_no_further_config_changes_anything(make_site, ask, extra):
    """Update, charge and refusals are the same, bit by bit, whatever else a message carries."""
    plain, asked = make_site(in_memory=True), make_site(in_memory=True)

    assert _outcome(asked, ask(asked, extra=extra)) == _outcome(plain, ask(plain))


def _outcome(site, reply):
    arrays = from_record(reply.content.array_records["arrays"])
    history = [{k: v for k, v in row.items() if k != "at"} for row in site.ledger.history("clinic-records")]
    return {name: a.tobytes() for name, a in arrays.items()}, history, list(site.refusals)


@pytest.mark.parametrize(
    "really",
    [{"lattice": None}, {"steps": 2}, {"sampling_rate": 0.21}, {"clip": 1.01}],
    ids=lambda really: next(iter(really)),
)
def test_training_that_spent_more_than_was_charged_does_not_leave(site, ask, monkeypatch, really):
    """What really ran is compared with the charge, not with the plan."""
    monkeypatch.setattr(TRAINING, lambda *args: replace(train_locally(*args), **really))

    reply = ask(site)

    assert not released(reply)
    assert "spent more than was charged" in site.refusals[0].message


@pytest.mark.parametrize("release", ["none", "dp"])
def test_a_figure_does_not_leave_by_default(make_site, ask, released_by, release):
    """Only the public weight does."""
    site = make_site(release={"metrics": release})
    ask(site)

    reply = ask(site, EVALUATE)

    assert dict(reply.content.metric_records[METRICS]) == {WEIGHT: 1.0}
    assert released_by(site) == ()


def test_a_figure_leaves_where_the_policy_says_exact(make_site, ask, released_by):
    """And the site keeps a note of it."""
    site = make_site(release={"metrics": "exact"})
    ask(site)

    reply = ask(site, EVALUATE)

    assert set(reply.content.metric_records[METRICS]) == {WEIGHT, "auc"}
    assert released_by(site) == ("auc on held-out records",)


def test_a_figure_leaves_once_a_run(make_site, ask, released_by):
    """Any number of them, for models of a server's choice, would give the labels away."""
    site = make_site(release={"metrics": "exact"})
    ask(site)
    ask(site, EVALUATE)

    reply = ask(site, EVALUATE)

    assert reply.error.reason == "released before"
    assert released_by(site) == ("auc on held-out records",)


def test_no_figure_leaves_for_a_run_that_trained_nothing(make_site, ask, released_by):
    """A run costs nothing to begin."""
    site = make_site(release={"metrics": "exact"})

    reply = ask(site, EVALUATE)

    assert reply.error.reason == "nothing to judge"
    assert released_by(site) == ()


@pytest.mark.parametrize(
    ("policy", "found"),
    [
        ({"min_rows": 61}, "60 training rows"),
        ({"min_positives": 60}, "positive training rows"),
    ],
)
def test_a_refusal_that_depends_on_records_says_nothing(make_site, ask, policy, found):
    """Which check failed would answer a question that the server chose."""
    site = make_site(require=policy)

    reply = ask(site, JOIN, cohort=())

    assert reply.error.reason == TABLE_REFUSED
    assert found in site.refusals[0].message


def test_a_table_that_breaks_the_contract_says_nothing(site, ask):
    """The server hears the same as of one that is too small."""

    def load(_):
        raise DataError("column 'x': 7 cells out of range")

    site = replace(site, load=load)

    reply = ask(site, JOIN, cohort=())

    assert reply.error.reason == TABLE_REFUSED


@pytest.mark.parametrize("model", [{}, {"w": np.zeros(2)}, {"layers.0.weight": np.zeros((1, 1))}])
def test_parameters_of_another_model_are_refused(site, ask, trained, model):
    """Before any record is touched."""
    reply = ask(site, model=model)

    assert not released(reply)
    assert trained == []


def test_an_enormous_parameter_is_refused(site, ask, trained, study):
    """Arithmetic could be made to overflow for a certain record alone."""
    model = arrays_of(build_model(study, 1, torch.Generator()))
    next(iter(model.values()))[:] = 1e7

    reply = ask(site, model=model)

    assert reply.error.reason == "ProtocolError"
    assert trained == []


def test_a_join_tells_the_name_and_nothing_else(site, ask, charged):
    """No count, no version, no path; and it costs nothing."""
    reply = ask(site, JOIN, cohort=())

    assert reply.content.config_records == {"config": ConfigRecord({"site": "clinic"})}
    assert not reply.content.array_records
    assert not reply.content.metric_records
    assert charged(site) == []
