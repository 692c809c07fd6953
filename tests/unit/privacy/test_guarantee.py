"""The promise in words, and the noise that keeps it."""

from dataclasses import replace

import pytest

from lepton_fl.privacy import Guarantee, epsilon


def test_noise_covers_the_spare_rounds(make_study):
    """20 rounds and one spare, 3 steps each: all 63 steps are within epsilon."""
    study = make_study(train={"strategy": "fedavg", "local_steps": 3})

    event = Guarantee.of(study).event

    assert event.steps == 63
    assert event.sampling_rate == 0.1
    assert epsilon([event], 1e-5) <= 3.0
    assert epsilon([replace(event, steps=64)], 1e-5) > 3.0


def test_all_rounds_cost_what_the_whole_costs(make_study):
    """Charged one by one, the rounds compose to the promise and to no more."""
    study = make_study(train={"strategy": "fedavg", "local_steps": 3})
    guarantee = Guarantee.of(study)

    assert guarantee.round_event.steps == 3
    assert epsilon([guarantee.round_event] * 21, 1e-5) == epsilon([guarantee.event], 1e-5)
    assert guarantee.epsilon_after(21) == epsilon([guarantee.event], 1e-5)
    assert guarantee.epsilon_after(0) == 0.0


def test_shared_noise_is_calibrated_like_local_noise(make_study):
    """The sum carries as much as a site of its own would add."""
    shared = make_study(privacy={"noise": "shared"})

    assert Guarantee.of(shared).event == Guarantee.of(make_study()).event


@pytest.mark.parametrize(
    ("privacy", "sentence"),
    [
        (
            {},
            (
                "Epsilon 3, delta 1e-05 per record of this site, against the server, the other sites and "
                "every reader of the model."
            ),
        ),
        (
            {"unit": "patient"},
            (
                "Epsilon 3, delta 1e-05 per patient (all records of one, at one site) of this site, against "
                "the server, the other sites and every reader of the model."
            ),
        ),
        (
            {"noise": "shared"},
            (
                "Epsilon 3, delta 1e-05 per record of this site, against the server and every reader of the "
                "model, provided at most 1 member colludes with the server."
            ),
        ),
    ],
    ids=["record", "patient", "shared"],
)
def test_the_sentence_says_unit_delta_and_against_whom(make_study, privacy, sentence):
    """An epsilon is never told without the three."""
    assert Guarantee.of(make_study(privacy=privacy)).sentence() == sentence


def test_several_colluders_collude(make_study):
    """The condition names how many."""
    study = make_study(privacy={"noise": "shared"}, secure_aggregation={"colluders": 2})

    assert "provided at most 2 members collude with the server" in Guarantee.of(study).holds_against


def test_without_noise_there_is_no_promise(make_study):
    """And the sentence says so, with no epsilon in it."""
    guarantee = Guarantee.of(make_study(privacy={"noise": "none", "epsilon": None, "delta": None}))

    assert guarantee.event is guarantee.round_event is guarantee.epsilon_after(5) is None
    assert guarantee.sentence().startswith("No differential privacy")
    assert guarantee.holds_against == "nobody: no noise is added"
