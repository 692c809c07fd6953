"""Sums without masks are bit by bit those of the protocol; and shared noise is what the study promises."""

import math

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from lepton_fl.errors import PolicyRefused
from lepton_fl.messages import (
    ARRAYS,
    CONFIG,
    MEMBERS,
    TRAIN,
    Assignment,
    assignment_config,
    error_reply,
    from_record,
    read_assignment,
    refusal_reason,
    sits_out,
    to_record,
)
from lepton_fl.privacy import Guarantee
from lepton_fl.secagg.context import Floor
from lepton_fl.secure_rounds import noise_factor
from lepton_fl.simulation import Drop, InProcessGrid
from lepton_fl.simulation.functional import Functional, FunctionalGrid
from lepton_fl.simulation.members import memberships
from lepton_fl.simulation.run import prepare
from lepton_fl.site.secure import encoded
from lepton_fl.tasks import model_hash
from lepton_fl.training import SimulationNoise

# --- as the protocol ---


class Rounds:
    """Who was in each round, and who was not."""

    def __init__(self):
        self.seen = []

    def joined(self, *_):
        pass

    def round_done(self, report, _):
        self.seen.append((report.sites, tuple(sorted(report.dropped))))


@pytest.fixture
def outcome(splits):
    """What is left of a run: its model, its rounds and its charges."""

    def run(study, *, masked, drops):
        rounds = Rounds()
        started = prepare(study, splits, 3, observer=rounds, drops=drops, masked=masked)
        started.start()
        charged = {n: len(s.ledger.history(f"{n}-ill")) for n, s in started.sites.items()}
        started.close()
        return model_hash(started.federation.model), rounds.seen, charged, started.federation.refused

    return run


@pytest.mark.parametrize(
    ("changes", "drops"),
    [
        ({}, []),
        ({"privacy": {"noise": "local"}}, []),
        ({"secure_aggregation": {"suite": "LSA1-PQ"}}, []),
        ({"train": {"strategy": "fedavg", "local_steps": 3}, "privacy": {"noise": "local"}}, []),
        ({"train": {"spare_rounds": 2}}, ["b@2"]),
        ({"secure_aggregation": {"min_survivors": 3}}, ["b@2-2"]),
        ({"secure_aggregation": {"min_survivors": 3}}, ["b@2-2:share"]),
        ({"secure_aggregation": {"min_survivors": 3, "suite": "LSA1-PQ"}}, ["a@2:mask"]),
        ({"secure_aggregation": {"min_survivors": 3}}, ["d@1:confirm"]),
        ({"secure_aggregation": {"min_survivors": 3}}, ["c@1-2:unmask"]),
        # Three masked vectors, and too few left to open their sum.
        ({"secure_aggregation": {"min_survivors": 3}}, ["a@2-2:mask", "b@2-2:unmask"]),
    ],
    ids=str,
)
def test_the_sums_are_those_of_the_protocol(make_study, outcome, changes, drops):
    """The same model to the last bit, the same sites in each round, the same charges."""
    study = make_study(**changes)
    drops = [Drop.parse(drop) for drop in drops]

    masked, functional = (outcome(study, masked=how, drops=drops) for how in (True, False))

    assert masked == functional
    assert any(sites for sites, _ in masked[1])


def test_where_in_a_round_a_site_goes_down_decides_whether_it_is_in(make_study, outcome):
    """With its masked vector it is in the sum, whatever becomes of it; without, it is not, and has paid."""
    study = make_study(secure_aggregation={"min_survivors": 3})
    ways = {phase: f"b@2-2:{phase}" for phase in ("share", "mask", "confirm", "unmask")}

    found = {
        phase: outcome(study, masked=True, drops=[Drop.parse(drop)])[1:3] for phase, drop in ways.items()
    }

    without, whole = (("a", "c", "d"), ("b",)), (("a", "b", "c", "d"), ())
    assert {phase: rounds[1] for phase, (rounds, _) in found.items()} == {
        "share": without,
        "mask": without,
        "confirm": whole,
        "unmask": whole,
    }
    assert all(charged == dict.fromkeys("abcd", 3) for _, charged in found.values())


def test_where_all_must_stay_a_drop_costs_everybody_the_round(make_study, outcome):
    """No sum, and the other sites are charged for it; the site is out after two, and the rest go on."""
    study = make_study(train={"spare_rounds": 2})

    _, rounds, charged, refused = outcome(study, masked=True, drops=[Drop.parse("b@2:mask")])

    assert rounds == [
        (("a", "b", "c", "d"), ()),
        ((), ("a", "b", "c", "d")),
        ((), ("a", "b", "c", "d")),
        (("a", "c", "d"), ()),
        (("a", "c", "d"), ()),
    ]
    assert charged == {"a": 5, "b": 2, "c": 5, "d": 5}
    assert refused == {"b": "no answer before the deadline"}


# --- the noise of the sites' shares ---

COORDINATES = 40_000
MODEL = {"w": np.zeros(COORDINATES, np.float32)}


@pytest.fixture
def add_up(study):
    """The grid's replies to one round's messages, to sites whose updates are these numbers, or refusals."""

    def run(answers, *, study=study, number=1, kind=TRAIN):
        names = "abcdefgh"[: len(answers)]
        nodes = dict(zip(range(101, 101 + len(answers)), names, strict=True))
        consortium, members = memberships(nodes)

        def app_of(node, answer):
            app, side = ClientApp(), Functional(members[nodes[node]])

            @app.train()
            def train(message, _):
                if isinstance(answer, Exception):
                    return error_reply(message, answer)
                assignment = read_assignment(message)
                ticket = side.check(message, assignment, MODEL, Floor(min_sites=1))
                update_L = np.full(COORDINATES, answer, np.float32)
                return side.enter(
                    ticket, encoded(update_L, assignment, ticket.context, SimulationNoise(5, nodes[node]))
                )

            @app.evaluate()
            def evaluate(message, _):
                return Message(RecordDict({}), reply_to=message)

            return app

        apps = {node: app_of(node, answer) for node, answer in zip(nodes, answers, strict=True)}
        grid = FunctionalGrid(InProcessGrid(apps), consortium)
        config = assignment_config(Assignment(study=study, run="0" * 32, round=number, cohort=tuple(names)))
        content = RecordDict({CONFIG: config, ARRAYS: to_record(MODEL)})
        return list(
            grid.send_and_receive(
                [Message(content, dst_node_id=node, message_type=kind) for node in nodes], timeout=60.0
            )
        )

    return run


def mean_of(reply):
    return from_record(reply.content.array_records[ARRAYS])["w"].astype(np.float64)


def members_of(reply):
    return reply.content.config_records[CONFIG][MEMBERS]


def is_normal(values, std):
    """Whether mean, variance and tails of 40,000 values are those of N(0, std^2), at five sigma each."""
    z, n = values / std, len(values)
    beyond = 2 * (1 - 0.5 * (1 + math.erf(2 / math.sqrt(2))))
    return (
        abs(z.mean()) < 5 / math.sqrt(n)
        and abs((z**2).mean() - 1) < 5 * math.sqrt(2 / n)
        and abs((np.abs(z) > 2).mean() - beyond) < 5 * math.sqrt(beyond / n)
    )


def curators(study):
    """Standard deviation of a trusted curator's noise on the sum of the updates."""
    return Guarantee.of(study).event.noise_multiplier * study.privacy.clip / study.train.expected_batch


@pytest.mark.parametrize(
    ("sites", "changes", "factor"),
    [
        (4, {}, math.sqrt(4 / 3)),
        (4, {"secure_aggregation": {"colluders": 0}}, 1.0),
        (4, {"privacy": {"clip": 3.0}}, math.sqrt(4 / 3)),
        (8, {"secure_aggregation": {"colluders": 3, "min_survivors": 7}}, math.sqrt(8 / 4)),
    ],
    ids=str,
)
def test_the_sum_has_the_noise_of_all_shares(add_up, make_study, sites, changes, factor):
    """sqrt(n / (min_survivors - colluders)) of a curator's: neither two thirds of it nor half more."""
    study = make_study(**changes)

    (reply,) = add_up([0.0] * sites, study=study)
    on_the_sum = mean_of(reply) * sites

    expected = curators(study) * factor
    assert noise_factor(study, sites) == pytest.approx(factor)
    assert is_normal(on_the_sum, expected)
    assert not is_normal(on_the_sum, expected * 2 / 3)
    assert not is_normal(on_the_sum, expected * 1.5)


def test_a_round_that_lost_a_site_keeps_sigma(add_up, make_study):
    """Three of four shares, one of them a colluder's: two honest ones still add up to the promised noise."""
    study = make_study(secure_aggregation={"min_survivors": 3})

    reply, refused = add_up([0.0, 0.0, 0.0, PolicyRefused("x", public="not today")], study=study)

    assert refused.metadata.src_node_id == 104
    assert members_of(reply) == [101, 102, 103]
    assert is_normal(mean_of(reply) * 3, curators(study) * math.sqrt(3 / 2))


def test_no_two_rounds_have_the_same_noise(add_up):
    """Their difference would be free of it."""
    (first,), (second,) = add_up([0.0] * 3, number=1), add_up([0.0] * 3, number=2)

    assert is_normal((mean_of(first) - mean_of(second)) / mean_of(first).std(), math.sqrt(2))


@pytest.mark.parametrize("noise", ["local", "none"])
def test_without_shared_noise_the_mean_is_exact(add_up, make_study, noise):
    """To the last step of the fixed point: local noise is in the updates already."""
    promise = {"epsilon": None, "delta": None} if noise == "none" else {}
    study = make_study(privacy={"noise": noise, **promise})

    (reply,) = add_up([0.0, 1.0, 1.0, 1.0], study=study)

    assert np.abs(mean_of(reply) - 0.75).max() < 1e-6


def test_too_few_sites_have_no_sum_and_are_asked_again(add_up, make_study):
    """Each is told why, and none is put out for another's refusal."""
    study = make_study(secure_aggregation={"min_survivors": 3})

    replies = add_up([0.0, 0.0, PolicyRefused("x"), PolicyRefused("x")], study=study)

    assert [sits_out(reply) for reply in replies] == [False, False, True, True]
    assert refusal_reason(replies[-1]) == "no sum: 2 sites, at least 3 are needed"
