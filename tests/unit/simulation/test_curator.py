"""The simulator in the place of secure aggregation: one mean, and exactly the noise of the sites' shares."""

import math

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from lepton_fl.errors import ConfigError, PolicyRefused
from lepton_fl.messages import (
    CONFIG,
    EVALUATE,
    MEMBERS,
    TRAIN,
    Assignment,
    assignment_config,
    error_reply,
    from_record,
    update_reply,
)
from lepton_fl.privacy import Guarantee
from lepton_fl.simulation import InProcessGrid
from lepton_fl.simulation.curator import CuratorGrid, share_multiplier
from lepton_fl.training import SimulationNoise

COORDINATES = 40_000
TEMPLATE = {"w": np.zeros(COORDINATES, np.float32)}


def zeros(message):
    return update_reply(message, TEMPLATE)


def ones(message):
    return update_reply(message, {"w": np.ones(COORDINATES, np.float32)})


def app_of(answer):
    app = ClientApp()
    app.train()(lambda m, _: answer(m))
    app.evaluate()(lambda m, _: answer(m))
    return app


@pytest.fixture
def curate(study):
    """The curator's replies to one round's messages."""

    def run(answers, *, study=study, number=1, kind=TRAIN, seed=0):
        names = tuple(sorted("abcdefgh"[: len(answers)]))
        config = assignment_config(Assignment(study=study, run="0" * 32, round=number, cohort=names))
        nodes = range(101, 101 + len(answers))
        inner = InProcessGrid({n: app_of(answer) for n, answer in zip(nodes, answers, strict=True)})
        grid = CuratorGrid(
            inner,
            study=study,
            guarantee=Guarantee.of(study),
            template=TEMPLATE,
            noise=SimulationNoise(seed, "curator"),
        )
        content = RecordDict({CONFIG: config})
        asked = [Message(content, dst_node_id=node, message_type=kind) for node in nodes]
        return list(grid.send_and_receive(asked))

    return run


def mean_of(reply):
    return from_record(reply.content.array_records["arrays"])["w"]


def members_of(reply):
    return reply.content.config_records[CONFIG][MEMBERS]


def is_normal(values, std):
    """Whether mean, variance and tails of 40,000 values are those of N(0, std^2), at five sigma each."""
    z, n = values.astype(np.float64) / std, len(values)
    beyond = 2 * (1 - 0.5 * (1 + math.erf(2 / math.sqrt(2))))
    return (
        abs(z.mean()) < 5 / math.sqrt(n)
        and abs((z**2).mean() - 1) < 5 * math.sqrt(2 / n)
        and abs((np.abs(z) > 2).mean() - beyond) < 5 * math.sqrt(beyond / n)
    )


def test_the_sum_has_the_noise_of_all_shares(curate, study):
    """sigma_share * sqrt(n) on the sum of four sites: neither two thirds of it nor half as much again."""
    sigma = Guarantee.of(study).event.noise_multiplier
    share = share_multiplier(study, Guarantee.of(study), 4)

    (reply,) = curate([zeros] * 4)
    on_the_sum = mean_of(reply) * 4 * study.train.expected_batch / study.privacy.clip

    expected = share * math.sqrt(4)
    assert expected == pytest.approx(1.1547 * sigma, rel=1e-4)
    assert is_normal(on_the_sum, expected)
    assert not is_normal(on_the_sum, expected * 2 / 3)
    assert not is_normal(on_the_sum, expected * 1.5)


def test_the_noise_is_in_units_of_the_clip(curate, make_study):
    """A unit may move the sum three times as far, so three times the noise hides it."""
    study = make_study(privacy={"clip": 3.0})
    share = share_multiplier(study, Guarantee.of(study), 4)

    (reply,) = curate([zeros] * 4, study=study)

    assert is_normal(mean_of(reply) * 4 * 10.0, 3.0 * share * 2)


def test_a_round_that_lost_a_site_keeps_sigma(curate, make_study):
    """Three of four shares, one of them a colluder's: two honest ones still add up to sigma."""
    study = make_study(secure_aggregation={"min_survivors": 3})
    share = share_multiplier(study, Guarantee.of(study), 4)

    reply, _ = curate([zeros, zeros, zeros, lambda m: error_reply(m, None)], study=study)
    on_the_sum = mean_of(reply) * 3 * study.train.expected_batch

    assert share * math.sqrt(2) == pytest.approx(Guarantee.of(study).event.noise_multiplier)
    assert is_normal(on_the_sum, share * math.sqrt(3))


@pytest.mark.parametrize(("colluders", "factor"), [(0, 1.0), (1, 4 / 3), (2, 2.0), (3, 4.0)])
def test_a_share_leaves_the_colluders_out(make_study, colluders, factor):
    """n shares have the variance n / (n - colluders) of a trusted curator's noise."""
    study = make_study(secure_aggregation={"min_sites": 4, "colluders": colluders})
    guarantee = Guarantee.of(study)

    share = share_multiplier(study, guarantee, 4)

    assert 4 * share**2 == pytest.approx(factor * guarantee.event.noise_multiplier**2)


def test_as_many_colluders_as_sites_are_refused(make_study):
    """No honest share would be left, whatever the cohort."""
    with pytest.raises(ConfigError, match="leaves no honest part"):
        make_study(secure_aggregation={"colluders": 4})


@pytest.mark.parametrize("noise", ["local", "none"])
def test_without_shared_noise_the_mean_is_exact(curate, make_study, noise):
    """Local noise is in the updates already."""
    promise = {"epsilon": None, "delta": None} if noise == "none" else {}
    study = make_study(privacy={"noise": noise, **promise})

    (reply,) = curate([zeros, ones, ones, ones], study=study)

    assert set(mean_of(reply).tolist()) == {0.75}


def test_the_mean_names_its_members(curate):
    """All sites whose updates are in it."""
    (reply,) = curate([zeros] * 3)

    assert members_of(reply) == [101, 102, 103]


def test_no_two_rounds_have_the_same_noise(curate):
    """Their difference would be free of it."""
    (first,), (second,) = curate([zeros] * 3, number=1), curate([zeros] * 3, number=2)

    difference = mean_of(first) - mean_of(second)

    assert is_normal(difference / mean_of(first).std(), math.sqrt(2))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda m: update_reply(m, {"w": np.full(COORDINATES, np.nan, np.float32)}), "not finite"),
        (lambda m: update_reply(m, TEMPLATE, members=[101, 102]), "carries no config record"),
        (lambda m: error_reply(m, PolicyRefused("x", public="not today")), "not today"),
    ],
    ids=["NaN", "members claimed", "a refusal"],
)
def test_a_bad_reply_is_left_out_and_named(curate, answer, reason):
    """The others' mean goes on without it."""
    mean, refused = curate([zeros, answer, zeros])

    assert members_of(mean) == [101, 103]
    assert refused.metadata.src_node_id == 102
    assert reason in refused.error.reason


def test_nothing_is_summed_of_nothing(curate):
    """Refusals alone are passed on."""
    replies = curate([lambda m: error_reply(m, None)] * 3)

    assert all(reply.has_error() for reply in replies)


def test_other_messages_pass_as_they_are(curate):
    """Nothing is summed but updates."""
    replies = curate([zeros, ones, zeros], kind=EVALUATE)

    assert [reply.metadata.src_node_id for reply in replies] == [101, 102, 103]
