"""What people read of secure aggregation is computed from the study, and true of the smallest cohort."""

import pytest

from lepton_fl.errors import ConfigError
from lepton_fl.secure_rounds import check_protectable, noise_factor, sum_of, what_hides, what_leaves


@pytest.fixture
def made(make_study):
    """A study with shared noise under secure aggregation with these keys."""

    def make(noise="shared", **keys):
        return make_study(
            privacy={"noise": noise},
            train={"strategy": "lockstep"},
            secure_aggregation={"enabled": True, **keys},
        )

    return make


@pytest.mark.parametrize(
    ("keys", "sites", "quorum"),
    [
        ({"min_sites": 4}, None, 4),
        ({"min_sites": 4}, 9, 9),
        ({"min_sites": 4, "min_survivors": 4}, 9, 7),
        ({"min_sites": 4, "min_survivors": 8}, 9, 8),
        ({"min_sites": 4, "min_survivors": 6}, None, 6),
        ({"min_sites": 4}, 2, 4),
    ],
)
def test_what_leaves_is_in_a_sum_over_the_quorum(made, keys, sites, quorum):
    """Of these sites, or of the smallest cohort: more than two thirds, and the study's survivors."""
    study = made(**keys)

    assert sum_of(study, sites).quorum == quorum
    assert what_leaves(study, 481, sites) == (
        f"Each round releases 481 numbers, only as a sum over at least {quorum} sites."
    )


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        ({"release": "exact"}, "4096 bins of the score, WITHOUT noise and covered by no epsilon"),
        (
            {"release": "dp", "share": 0.25},
            "16 bins of the score, with noise, only as such a sum: epsilon 0.5 of",
        ),
    ],
)
def test_what_leaves_names_figures_from_held_out_records(make_study, evaluation, said):
    """Who approves a study is told of them, and whether an epsilon covers them."""
    study = make_study(privacy={"epsilon": 2.0}, secure_aggregation={"enabled": True}, evaluation=evaluation)

    assert said in what_leaves(study, 481)


def test_without_secure_aggregation_the_server_sees_all(make_study):
    """And both sentences say so."""
    study = make_study(secure_aggregation={"enabled": False})

    assert what_leaves(study, 5, 9) == ("Each round releases 5 numbers, which the server sees for each site.")
    assert what_hides(study, 9) == "Secure aggregation is off: the server sees each site's update."
    assert noise_factor(study, 9) is None


def test_what_hides_a_site_names_numbers(made):
    """The honest sites around it, and the noise over a trusted curator's and over local noise's."""
    said = what_hides(made(min_sites=4))

    assert said == (
        "In a cohort of 4: against the server together with up to 1 of 4 sites, hidden among at least "
        "min_sites - n_C = 3 honest sites; no site may drop out. The noise on the sum is 1.15 times what a "
        "trusted curator would add; if each site added all of it, it would be 2.00 times."
    )


def test_local_noise_is_not_compared(made):
    """Each site adds all of it, which the promise says."""
    assert "noise" not in what_hides(made(noise="local", min_sites=4))


def test_a_sum_of_two_hides_nothing_from_the_other(made):
    """A policy may allow it; what is said must say so."""
    assert what_hides(made(min_sites=2, colluders=0)).startswith("In a cohort of 2: against the server alone")
    assert "each site can work out the other's part" in what_hides(made(min_sites=2, colluders=0))


@pytest.mark.parametrize(
    ("keys", "sites"),
    [
        ({"min_sites": 2}, 2),
        ({"min_sites": 3, "colluders": 2}, 3),
        # Five hold out against two, four do not: a cohort that lost one would not be protected.
        ({"min_sites": 4, "colluders": 2}, 4),
        # 6 hold out against 3, 7 against 2 only.
        ({"min_sites": 6, "colluders": 3}, 7),
    ],
)
def test_too_many_colluders_for_some_cohort_are_refused(made, keys, sites):
    """Naming the smallest that cannot be protected, and what to change."""
    with pytest.raises(
        ConfigError, match=f"colluders: found .* allowed: what {sites} sites can be"
    ) as refused:
        check_protectable(made(**keys))

    assert refused.value.exit_code == 3
    assert refused.value.fix == "raise secure_aggregation.min_sites, or lower colluders"


@pytest.mark.parametrize(
    "keys",
    [
        {"min_sites": 3},
        {"min_sites": 5, "colluders": 1},
        {"min_sites": 8, "colluders": 3},
        {"min_sites": 3, "min_survivors": 5},
    ],
)
def test_what_can_be_protected_is_not_refused(made, keys):
    """Cohorts that a round never has, below its survivors, are not asked after."""
    check_protectable(made(**keys))
