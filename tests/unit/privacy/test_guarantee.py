"""The promise in words, and the noise that keeps it."""

import math
from dataclasses import replace

import pytest

from lepton_fl.errors import ConfigError
from lepton_fl.privacy import Guarantee, epsilon
from lepton_fl.secagg.context import Cohort


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


FOUR = {"privacy": {"noise": "shared"}}


def test_three_of_four_shares_are_sigma(make_study):
    """The colluder's may be known; 1.15 times a curator's noise where all four are there."""
    guarantee = Guarantee.of(make_study(**FOUR))

    assert guarantee.shares(4) == 3
    assert guarantee.noise_factor(4) == pytest.approx(math.sqrt(4 / 3))


def test_dropouts_that_are_allowed_are_made_up_for(make_study):
    """Six of ten must survive, two of them may collude: four shares."""
    secure = {"min_survivors": 6, "colluders": 2}
    guarantee = Guarantee.of(make_study(**FOUR, secure_aggregation=secure))

    assert guarantee.shares(10) == 4
    assert guarantee.noise_factor(10) == pytest.approx(math.sqrt(10 / 4))


@pytest.mark.parametrize("wanted", ["all", 100])
def test_of_a_drawn_graph_the_smallest_part_has_all_of_the_noise(make_study, wanted):
    """Above 128 sites a server may open a sum in parts: fewer shares are counted than survivors."""
    guarantee = Guarantee.of(make_study(**FOUR, secure_aggregation={"min_survivors": wanted, "colluders": 1}))
    survivors = 129 if wanted == "all" else wanted
    cohort = Cohort(parties=tuple(range(101, 230)), colluders=1, min_sites=survivors)

    assert not cohort.graph.complete
    assert guarantee.shares(129) == cohort.hidden_among < survivors - 1
    assert guarantee.shares(128) == (128 if wanted == "all" else wanted) - 1
    lattice = guarantee.lattice(coordinates=500, cohort=129)
    event = guarantee.discrete(lattice, sampler_distance=2.0**-110)
    assert event.shares == lattice.shares == cohort.hidden_among
    alone, together, *_ = guarantee.exposures(event, 129)
    assert alone.epsilon == together.epsilon <= 3


def test_few_survivors_are_few_shares_in_a_drawn_graph_too(make_study):
    """The protocol may hide a site among more than the study counts on."""
    guarantee = Guarantee.of(make_study(**FOUR, secure_aggregation={"min_survivors": 6, "colluders": 2}))

    assert guarantee.shares(200) == 4


def test_local_noise_is_one_share_whatever_the_cohort(make_study):
    """The guarantee depends on nobody, and costs the root of the sites."""
    guarantee = Guarantee.of(make_study())

    assert guarantee.shares(9) == 1
    assert guarantee.noise_factor(9) == 3.0


@pytest.mark.parametrize("noise", ["shared", "local"])
@pytest.mark.parametrize("cohort", [4, 9])
def test_all_rounds_on_the_lattice_are_within_the_promise(make_study, noise, cohort):
    """As the ledger charges them, gap included; and 3 % more steps would not be."""
    guarantee = Guarantee.of(make_study(privacy={"noise": noise}, train={"rounds": 100}))
    lattice = guarantee.lattice(coordinates=500, cohort=cohort)

    charge = guarantee.discrete(lattice, sampler_distance=2.0**-110)

    assert charge.shares == (cohort - 1 if noise == "shared" else 1)
    assert charge.noise_multiplier == guarantee.event.noise_multiplier
    assert charge.gap > 0
    assert epsilon([charge] * 105, 1e-5) <= 3.0
    assert epsilon([charge] * 108, 1e-5) > 3.0


def test_rounds_of_other_cohorts_compose_as_one_kind(make_study):
    """A site that drops out for a while costs no finer accounting."""
    guarantee = Guarantee.of(make_study(**FOUR))
    charges = [
        guarantee.discrete(guarantee.lattice(coordinates=500, cohort=n), sampler_distance=2.0**-110)
        for n in (4, 5, 6)
    ]

    assert len({(charge.noise_multiplier, charge.sampling_rate) for charge in charges}) == 1
    assert len({charge.share for charge in charges}) == 3
    assert epsilon(charges * 7, 1e-5) <= 3.0


def test_a_sampler_too_coarse_for_the_promise_is_refused(make_study):
    """Rather than charged as what it is not."""
    guarantee = Guarantee.of(make_study(**FOUR))
    lattice = guarantee.lattice(coordinates=500, cohort=4)

    with pytest.raises(ConfigError, match=r"500 parameters x 21 steps of 3 shares are .* from the noise"):
        guarantee.discrete(lattice, sampler_distance=1e-12)


def test_a_lattice_of_another_noise_is_refused(make_study):
    """A share that does not add up to the calibrated noise cannot be charged as if it did."""
    guarantee = Guarantee.of(make_study(**FOUR))
    lattice = guarantee.lattice(coordinates=500, cohort=4)

    with pytest.raises(ConfigError, match="from the noise that is accounted"):
        guarantee.discrete(replace(lattice, share=lattice.share * 0.99), sampler_distance=2.0**-110)


def test_without_an_expected_batch_there_is_no_lattice(make_study):
    """Its range would be a guess."""
    guarantee = Guarantee.of(make_study(train={"expected_batch": None}))

    with pytest.raises(ConfigError, match=r"train\.expected_batch"):
        guarantee.lattice(coordinates=10, cohort=4)


def test_who_sees_what_at_which_epsilon(make_study):
    """Readers see four shares' noise, server and insiders three, all others together one."""
    guarantee = Guarantee.of(make_study(**FOUR))
    charge = guarantee.discrete(guarantee.lattice(coordinates=500, cohort=4), sampler_distance=2.0**-110)

    readers, server, insider, all_others = guarantee.exposures(charge, 4)

    assert readers.against == "the server alone, and every reader of the model"
    assert server.against == "the server and 1 member together"
    assert insider.against == "1 member, by what it knows"
    assert all_others.against == "the server and all other members together"
    assert readers.epsilon < server.epsilon == insider.epsilon <= 3.0 < all_others.epsilon
    sigma = guarantee.event.noise_multiplier
    for found, hidden in ((readers, 4), (server, 3), (all_others, 1)):
        event = replace(guarantee.event, noise_multiplier=sigma * math.sqrt(hidden / 3))
        assert found.epsilon == pytest.approx(epsilon([event], 1e-5), rel=1e-4)


def test_local_noise_holds_alike_against_everyone(make_study):
    """One row: the promise."""
    guarantee = Guarantee.of(make_study())
    charge = guarantee.discrete(guarantee.lattice(coordinates=500, cohort=4), sampler_distance=2.0**-110)

    (everyone,) = guarantee.exposures(charge, 4)

    assert everyone.against == guarantee.holds_against
    assert 2.99 < everyone.epsilon <= 3.0


@pytest.mark.parametrize("noise", ["local", "shared"])
def test_metrics_are_within_the_studys_epsilon(make_study, noise):
    """Their own share by themselves; with training, the whole and no more than it needs."""
    study = make_study(privacy={"noise": noise}, evaluation={"release": "dp", "share": 0.2})

    guarantee = Guarantee.of(study)

    assert epsilon([guarantee.metrics], 1e-5) <= 0.6
    assert epsilon([guarantee.event, guarantee.metrics], 1e-5) <= 3.0
    # What is left below it is room for the gap of discrete noise.
    less = replace(guarantee.event, noise_multiplier=guarantee.event.noise_multiplier * 0.999)
    assert epsilon([less, guarantee.metrics], 1e-5) > 3.0


def test_exact_metrics_are_no_event(make_study):
    """Nothing bounds what they tell: they are named, and not counted."""
    study = make_study(evaluation={"release": "exact"})

    assert Guarantee.of(study).metrics is None
    assert Guarantee.of(study).event == Guarantee.of(make_study()).event
