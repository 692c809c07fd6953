"""What both ends of a secure round work out for themselves: groups above all."""

import hashlib
import math
import struct

import pytest

from lepton_fl.errors import ConfigError
from lepton_fl.privacy.guarantee import Guarantee
from lepton_fl.secure_rounds import (
    EVALUATE_SUM,
    TRAIN_SUM,
    check_protectable,
    group_sizes,
    group_with,
    groups_of,
    shared_lattice,
)


@pytest.fixture
def grouped(make_study):
    """The study with groups of five or more, and other keys of secure aggregation."""
    return lambda **more: make_study(secure_aggregation={"min_sites": 15, "group_size": 5, **more})


def names(count):
    return [f"site-{number:03d}" for number in range(count)]


@pytest.mark.parametrize("count", [15, 16, 19, 20, 24, 25, 137])
def test_every_site_is_in_one_group_of_the_agreed_size(grouped, count):
    """As even as can be: fewer than ten sites, and at most one more than in another group."""
    groups = groups_of(grouped(), TRAIN_SUM, names(count), 1)
    sizes = [len(group) for group in groups]

    assert sorted(site for group in groups for site in group) == names(count)
    assert len(groups) == count // 5
    assert min(sizes) >= 5
    assert max(sizes) <= min(9, min(sizes) + 1)
    assert set(sizes) == group_sizes(grouped(), count)


def test_histograms_are_summed_over_the_whole_cohort(grouped):
    """However updates are grouped."""
    assert group_with("site-003", grouped(), EVALUATE_SUM, names(30), 21) == tuple(names(30))
    assert len(group_with("site-003", grouped(), TRAIN_SUM, names(30), 1)) == 5


def test_without_a_size_there_is_one_group(make_study):
    """Of all, in the order given."""
    assert groups_of(make_study(), TRAIN_SUM, names(40), 3) == [tuple(names(40))]


def test_all_parties_find_the_same_groups(grouped):
    """In whatever order they list the cohort; each site its own one of them."""
    study = grouped()
    groups = groups_of(study, TRAIN_SUM, names(23), 4)

    assert groups_of(study, TRAIN_SUM, names(23)[::-1], 4) == groups
    assert {group_with(site, study, TRAIN_SUM, names(23), 4) for site in names(23)} == set(groups)


def test_the_groups_of_a_round_are_as_written_down(grouped):
    """In docs/robustness.md, from which sites of another release find the same."""
    study, cohort = grouped(), names(17)

    def element(kind, body):
        return struct.pack("<Q", len(body)) + kind + body

    def drawn(name):
        texts = [element(b"s", text.encode()) for text in ("lepton-fl/secagg/groups/1", study.id)]
        number = element(b"i", (7).to_bytes(16, "little"))
        return hashlib.sha256(b"".join(texts) + number + element(b"s", name.encode())).digest()

    order = sorted(cohort, key=drawn)

    assert groups_of(study, TRAIN_SUM, cohort, 7) == [
        tuple(order[0::3]),
        tuple(order[1::3]),
        tuple(order[2::3]),
    ]


def test_groups_are_drawn_anew_every_round(grouped):
    """Two sites of thirty meet in one round of six or so, by chance, and not always or never."""
    study, rounds = grouped(), 400
    met = sum(
        "site-007" in group_with("site-021", study, TRAIN_SUM, names(30), number)
        for number in range(1, rounds + 1)
    )

    share = 4 / 29
    assert abs(met / rounds - share) < 5 * math.sqrt(share * (1 - share) / rounds)


def test_another_study_has_other_groups(grouped, make_study):
    """Nobody who is in several is always with the same."""
    other = grouped(colluders=2)

    assert groups_of(grouped(), TRAIN_SUM, names(30), 1) != groups_of(other, TRAIN_SUM, names(30), 1)


def test_each_group_must_bear_all_colluders(grouped):
    """Two of five can be borne, three cannot; in one sum of fifteen they could."""
    check_protectable(grouped(colluders=2))

    with pytest.raises(ConfigError, match="a group of 5 sites can be protected") as refused:
        check_protectable(grouped(colluders=3))
    assert "raise secure_aggregation.group_size, or lower colluders" in str(refused.value.fix)


def test_one_sum_of_as_many_bears_more(make_study):
    """What groups cost in protection."""
    check_protectable(make_study(secure_aggregation={"min_sites": 15, "colluders": 4}), 15)


@pytest.mark.parametrize("size", range(5, 12))
@pytest.mark.parametrize("least", [1, 2, 3])
@pytest.mark.parametrize("colluders", range(6))
def test_a_study_that_is_admitted_is_protectable_at_every_size(make_study, size, least, colluders):
    """No cohort has a group that the check at the study's gate did not look at."""
    study = make_study(
        secure_aggregation={"min_sites": size * least, "group_size": size, "colluders": colluders}
    )
    cohorts = range(size * least, size * (least + 9))

    assert admitted(study) == all(admitted(study, cohort) for cohort in cohorts)


def admitted(study, sites=None):
    try:
        check_protectable(study, sites)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(("survivors", "honest"), [("all", 4), (4, 3)])
def test_each_sum_has_all_of_the_noise_by_itself(grouped, make_study, survivors, honest):
    """sigma * clip from the fewest honest shares of one group, whatever the other groups add."""
    raw = make_study(privacy={"noise": "shared"}, train={"expected_batch": 20.0})
    study = grouped(min_survivors=survivors).model_copy(update={"privacy": raw.privacy})
    event = Guarantee.of(study).event
    assert event is not None
    share = shared_lattice(study, 5, 100)

    assert share.shares == honest
    assert share.event(sampling_rate=1.0, steps=1, sampler_distance=0.0).noise_multiplier == pytest.approx(
        event.noise_multiplier, abs=1e-6
    )
