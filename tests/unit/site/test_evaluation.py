"""What a server hears of a site's held-out records under secure aggregation: one masked histogram, once."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict

from lepton_fl.errors import BudgetExhausted, PolicyRefused
from lepton_fl.messages import (
    CONFIG,
    EVALUATE,
    JOIN,
    PHASES,
    SECAGG,
    TRAIN,
    Assignment,
    SecureRequest,
    assignment_config,
    to_record,
)
from lepton_fl.privacy import Guarantee, epsilon
from lepton_fl.secagg.errors import Phase
from lepton_fl.simulation.members import memberships
from lepton_fl.site import app as site_app
from lepton_fl.site import client_app
from lepton_fl.site.secure import LSA1
from lepton_fl.tasks import arrays_of, build_model

RUN = "0123456789abcdef" * 2
COHORT = ("bank", "clinic", "hospital", "ward")
EXACT = {"release": "exact"}
NOISY = {"release": "dp", "share": 0.3}
NOTE = "scores of held-out records by label, in a sum over the sites"


@pytest.fixture
def make(make_study):
    """The study, its sums secure, releasing as said."""
    return lambda evaluation, **more: make_study(
        secure_aggregation={"enabled": True, "min_survivors": 3},
        evaluation=evaluation,
        privacy={"epsilon": 1.0},
        **more,
    )


@pytest.fixture
def judged(monkeypatch):
    """How often held-out records were looked at."""
    seen = []

    def look(*args):
        seen.append(args)
        return scores(*args)

    scores = site_app.score
    monkeypatch.setattr(site_app, "score", look)
    return seen


@pytest.fixture
def make_clinic(make_site):
    """The clinic as a member of four; its app, which keeps its rounds between messages."""

    def run(release="none", **policy):
        _, members = memberships(dict(enumerate(COHORT, start=101)))
        site = make_site(release={"metrics": release}, **policy)
        return client_app(replace(site, aggregation=LSA1(members["clinic"])))

    return run


@pytest.fixture
def ask():
    """What the clinic replies to one message."""

    def run(clinic, study, kind=EVALUATE, *, round=None, cohort=COHORT, of=None, model=None, attempt=1):
        round = study.evaluation_round if round is None else round
        if model is None:
            model = arrays_of(build_model(study, 1, torch.Generator()))
        of = kind if of is None else of
        content = RecordDict(
            {
                CONFIG: assignment_config(Assignment(study=study, run=RUN, round=round, cohort=cohort)),
                "arrays": to_record(model),
                SECAGG: SecureRequest(kind=of, attempt=attempt, roster=1).record(),
            }
        )
        context = Context(run_id=0, node_id=7, node_config={}, state=RecordDict(), run_config={})
        return clinic(Message(content, dst_node_id=7, message_type=kind), context)

    return run


def advertised(reply):
    return not reply.has_error() and set(reply.content) == {SECAGG}


def charges(clinic):
    return [entry["round"] for entry in clinic.site.ledger.history("clinic-records")]


def notes(clinic):
    return clinic.site.ledger.released("clinic-records", run=RUN)


def test_nothing_of_one_site_is_in_the_reply(make_clinic, make, ask, judged):
    """An advert, and neither figure nor count: what was counted stays for the masks."""
    study, clinic = make(NOISY), make_clinic("dp")

    reply = ask(clinic, study)

    assert advertised(reply)
    assert len(judged) == 1


def test_a_noisy_histogram_is_charged_once_before_it_leaves(make_clinic, make, ask, judged):
    """One Gaussian event of sensitivity 1, no sampling, at the study's number for it."""
    study, clinic = make(NOISY), make_clinic("dp")
    event = Guarantee.of(study).metrics

    ask(clinic, study)
    second = ask(clinic, study)

    (entry,) = clinic.site.ledger.history("clinic-records")
    assert entry["round"] == study.evaluation_round == 5
    assert (entry["noise_multiplier"], entry["sampling_rate"], entry["steps"]) == (
        event.noise_multiplier,
        1.0,
        1,
    )
    assert epsilon([event], study.privacy.delta) <= 0.3 * study.privacy.epsilon
    assert second.error.reason == "BadPhase in advertise"
    assert len(judged) == 1


def test_another_attempt_is_not_charged_again(make_clinic, make, ask, judged):
    """The same integers under fresh keys: nothing is counted, drawn or charged anew."""
    study, clinic = make(NOISY), make_clinic("dp")
    ask(clinic, study)
    words_L = clinic.site.aggregation._open[RUN, "evaluate"].words.copy()

    again = ask(clinic, study, PHASES[Phase.ADVERTISE], of="evaluate", attempt=2)

    assert advertised(again)
    assert (clinic.site.aggregation._open[RUN, "evaluate"].words == words_L).all()
    assert charges(clinic) == [study.evaluation_round]
    assert len(judged) == 1


def test_an_exact_histogram_is_noted_before_it_leaves(make_clinic, make, ask):
    """The ledger says for good that something without noise may have left."""
    study, clinic = make(EXACT), make_clinic("exact")
    ask(clinic, study, TRAIN, round=1)

    reply = ask(clinic, study)

    assert advertised(reply)
    assert notes(clinic) == (NOTE,)
    assert charges(clinic) == [1]


@pytest.mark.parametrize("policy", ["none", "dp"])
def test_an_exact_histogram_needs_the_policys_word(make_clinic, make, ask, judged, policy):
    """The site does not advertise, so no sum over the whole cohort can be."""
    study, clinic = make(EXACT), make_clinic(policy)
    ask(clinic, study, TRAIN, round=1)

    reply = ask(clinic, study)

    assert reply.error.reason == "the site's policy releases no exact figures"
    assert "release.metrics" in clinic.site.refusals[-1].message
    assert notes(clinic) == ()
    assert judged == []


def test_an_exact_sum_is_of_the_whole_cohort(make_clinic, make, ask):
    """Whatever min_survivors allows a round of training: for fewer than all four the site does not unmask."""
    study, clinic = make(EXACT), make_clinic("exact")
    ask(clinic, study, TRAIN, round=1)
    trained = clinic.site.aggregation._open[RUN, "train"].attempt.context

    ask(clinic, study)

    opened = clinic.site.aggregation._open[RUN, "evaluate"].attempt.context
    assert (trained.cohort.quorum, opened.cohort.quorum) == (3, 4)


def test_a_policy_that_releases_nothing_gives_zeros(make_clinic, make, ask, judged):
    """Under noise it is in the sum, adds its share, and no record is looked at or charged for."""
    study, clinic = make(NOISY), make_clinic("none")

    reply = ask(clinic, study)

    assert advertised(reply)
    assert judged == []
    assert charges(clinic) == []


@pytest.mark.parametrize("evaluation", [EXACT, NOISY])
@pytest.mark.parametrize(
    "second",
    [{}, {"model": {}}, {"cohort": ("bank", "clinic", "ward")}, {"round": 4}, {"round": 6}],
    ids=["the same", "another model", "another cohort", "a round of training", "a later round"],
)
def test_there_is_one_histogram_in_a_run(make_clinic, make, ask, judged, evaluation, second):
    """Two, of other models or cohorts, would be subtracted from each other."""
    study, clinic = make(evaluation), make_clinic("exact")
    ask(clinic, study, TRAIN, round=1)
    assert advertised(ask(clinic, study))
    if "model" in second:
        model = arrays_of(build_model(study, 1, torch.Generator()))
        second = {"model": {name: array + 1 for name, array in model.items()}}

    reply = ask(clinic, study, **second)

    assert reply.has_error()
    assert len(judged) == 1
    assert charges(clinic) == [1, *([5] if evaluation is NOISY else [])]


@pytest.mark.parametrize("evaluation", [EXACT, NOISY])
@pytest.mark.parametrize(("kind", "of"), [(EVALUATE, "train"), (TRAIN, "evaluate"), (EVALUATE, "other")])
def test_a_message_sums_what_it_is_for(make_clinic, make, ask, judged, evaluation, kind, of):
    """A training under the number of the histogram would be added up by the histogram's rules."""
    study, clinic = make(evaluation), make_clinic("exact")

    reply = ask(clinic, study, kind, of=of, round=5 if kind == EVALUATE else 1)

    assert reply.has_error()
    assert judged == []
    assert charges(clinic) == []


def test_a_study_that_releases_nothing_has_no_histogram(make_clinic, make, ask, judged):
    """Whatever a policy would allow."""
    study, clinic = make({}), make_clinic("exact")

    assert ask(clinic, study).has_error()
    assert judged == []
    assert notes(clinic) == ()


def test_no_exact_histogram_leaves_for_a_run_that_trained_nothing(make_clinic, make, ask):
    """A run costs nothing to begin."""
    study, clinic = make(EXACT), make_clinic("exact")

    assert ask(clinic, study).error.reason == "nothing to judge"
    assert notes(clinic) == ()


def test_a_run_fits_with_its_histogram_or_is_not_joined(make_clinic, make, ask):
    """The budget covers the training by itself, and not both."""
    study = make(NOISY)
    guarantee = Guarantee.of(study)
    training, both = (
        epsilon(events, 1e-2) for events in ([guarantee.event], [guarantee.event, guarantee.metrics])
    )
    clinic = make_clinic("dp", budget={"epsilon_total": (training + both) / 2})

    reply = ask(clinic, study, JOIN, round=0, cohort=())

    assert reply.error.reason == "the site's privacy budget does not cover the run"
    assert isinstance(clinic.site.refusals[-1], BudgetExhausted)


def test_a_run_of_a_site_that_releases_nothing_needs_no_room_for_it(make_clinic, make, ask):
    """The same budget, and zeros for the histogram."""
    study = make(NOISY)
    clinic = make_clinic("none", budget={"epsilon_total": epsilon([Guarantee.of(study).event], 1e-2)})

    assert not ask(clinic, study, JOIN, round=0, cohort=()).has_error()


def test_one_record_of_each_unit_is_counted(make_clinic, make, ask, monkeypatch, table):
    """Sixty records of twenty units: what twenty of them are charged for."""
    counted = []
    monkeypatch.setattr(
        site_app, "histogram", lambda y_N, *_: counted.append(len(y_N)) or np.zeros((2, 16), np.int64)
    )
    study, clinic = make(NOISY), make_clinic("dp")
    bench = clinic.site.bench(study)
    test = replace(table, unit_N=np.arange(60) % 20, units=20)
    clinic.site._bench[study.id] = replace(bench, data=replace(bench.data, test=test))

    ask(clinic, study)

    assert counted == [20]


def test_every_record_is_counted_where_nothing_is_charged(make_clinic, make, ask, monkeypatch):
    """An exact figure is of the records."""
    counted = []
    monkeypatch.setattr(
        site_app, "histogram", lambda y_N, *_: counted.append(len(y_N)) or np.zeros((2, 4096), np.int64)
    )
    study, clinic = make(EXACT), make_clinic("exact")
    ask(clinic, study, TRAIN, round=1)

    ask(clinic, study)

    assert counted == [60]


def test_the_refusal_is_the_policys(make_clinic, make, ask):
    """Not a fault: the site's own words, for its own people."""
    study, clinic = make(EXACT), make_clinic("none")
    ask(clinic, study, TRAIN, round=1)
    ask(clinic, study)

    assert isinstance(clinic.site.refusals[-1], PolicyRefused)
