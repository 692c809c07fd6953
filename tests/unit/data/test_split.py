import numpy as np
import pytest

from lepton_fl.data import partition, split
from lepton_fl.errors import ConfigError, DataError
from lepton_fl.study import Evaluation


def rng():
    return np.random.default_rng(7)


def rows(table):
    """Which rows of the whole table these are: its only feature."""
    return set(table.raw_NC[:, 0].astype(int).tolist())


def test_train_and_test_are_all_records_once(make_table):
    """Nothing is lost and nothing is on both sides."""
    train, test = split(make_table([0, 1] * 20), Evaluation(), rng())

    assert rows(train) | rows(test) == set(range(40))
    assert not rows(train) & rows(test)
    assert len(test) == 10


def test_a_unit_is_on_one_side(make_table):
    """The test shows people whom the model has not seen."""
    units = [i // 3 for i in range(30)]
    table = make_table([0, 0, 1] * 10, units=units)

    train, test = split(table, Evaluation(), rng())

    assert not {units[r] for r in rows(train)} & {units[r] for r in rows(test)}
    assert train.units + test.units == 10


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.99])
def test_both_sides_hold_both_classes_where_there_are_two_of_each(make_table, fraction):
    """Two ill among a hundred: one on each side."""
    table = make_table([1, 1] + [0] * 98)

    train, test = split(table, Evaluation(test_fraction=fraction), rng())

    assert train.positives == test.positives == 1
    assert min(len(train), len(test)) >= 2


@pytest.mark.parametrize("labels", [[0, 1], [0, 0], [1, 1], [1, 0, 0], [1, 1, 0]])
def test_no_side_is_empty(make_table, labels):
    """However few the units."""
    train, test = split(make_table(labels), Evaluation(test_fraction=0.01), rng())

    assert len(train) > 0
    assert len(test) > 0


def test_a_single_positive_trains(make_table):
    """It teaches more than it tests."""
    train, _ = split(make_table([1, 0, 0, 0]), Evaluation(), rng())

    assert train.positives == 1


def test_the_same_generator_gives_the_same_split(make_table):
    """A run can be repeated."""
    table = make_table([0, 1] * 20)

    assert rows(split(table, Evaluation(), rng())[1]) == rows(split(table, Evaluation(), rng())[1])


def test_one_unit_cannot_be_split(make_table):
    """All its records belong together."""
    with pytest.raises(DataError, match="1 units cannot be split"):
        split(make_table([0, 1], units=["a", "a"]), Evaluation(), rng())


BY_TIME = Evaluation(split="time", time_column="seen")


def test_the_latest_records_are_the_test(make_table):
    """As the model will be used: on what comes after."""
    table = make_table([0] * 8, times=[8, 1, 7, 2, 6, 3, 5, 4])

    _, test = split(table, BY_TIME, rng())

    assert rows(test) == {0, 2}


def test_records_of_one_instant_stay_together(make_table):
    """Their order in the file means nothing."""
    table = make_table([0] * 8, times=[1, 1, 1, 1, 1, 2, 2, 2])

    _, test = split(table, BY_TIME, rng())

    assert rows(test) == {5, 6, 7}


def test_a_crowded_first_instant_trains(make_table):
    """Where the cut falls into the first instant, the test is what comes after it."""
    table = make_table([0] * 8, times=[1] * 7 + [2])

    _, test = split(table, BY_TIME, rng())

    assert rows(test) == {7}


def test_records_of_one_instant_only_cannot_be_split(make_table):
    """None of them is the latest."""
    with pytest.raises(DataError, match="'seen': all 3 records are of one instant"):
        split(make_table([0] * 3, times=[1] * 3), BY_TIME, rng())


def test_a_table_without_times_cannot_be_split_by_time(make_table):
    """It was loaded for another study."""
    with pytest.raises(DataError, match="without its time column 'seen'"):
        split(make_table([0, 1]), BY_TIME, rng())


@pytest.mark.parametrize("how", ["iid", "dirichlet:0.1", "dirichlet:100"])
def test_sites_are_all_records_once(make_table, how):
    """Each record is at one site."""
    parts = partition(make_table([0, 0, 0, 1] * 25), how, 7, rng())

    assert sorted(r for part in parts for r in rows(part)) == list(range(100))
    assert {part.units for part in parts} == {14, 15}


@pytest.mark.parametrize("how", ["iid", "dirichlet:0.1"])
def test_a_unit_is_at_one_site(make_table, how):
    """All records of a person are at one site."""
    units = [i % 20 for i in range(100)]
    parts = partition(make_table([0, 1] * 50, units=units), how, 4, rng())

    at = [{units[r] for r in rows(part)} for part in parts]
    assert sum(len(s) for s in at) == len(set.union(*at))


def spread(parts):
    return float(np.std([part.positives / len(part) for part in parts]))


def test_a_small_alpha_drives_sites_apart(make_table):
    """Shares of positives differ more the smaller alpha is."""
    table = make_table([0, 1] * 500)

    apart = spread(partition(table, "dirichlet:0.1", 10, rng()))
    alike = spread(partition(table, "dirichlet:1000", 10, rng()))

    assert apart > 0.25
    assert alike < 0.12


def test_a_table_of_one_class_can_be_partitioned(make_table):
    """There is no label to skew."""
    assert len(partition(make_table([0] * 8), "dirichlet:0.3", 4, rng())) == 4


def test_fewer_than_two_units_a_site_are_refused(make_table):
    """A site of one unit can hold nothing out."""
    with pytest.raises(DataError, match="7 units cannot make 4 sites of at least 2"):
        partition(make_table([0, 1, 0, 1, 0, 1, 0]), "iid", 4, rng())


@pytest.mark.parametrize(
    "how", ["natural", "dirichlet", "dirichlet:0", "dirichlet:-1", "dirichlet:nan", "dirichlet:x"]
)
def test_an_unknown_partition_is_refused_with_those_there_are(make_table, how):
    """A misspelt flag is one clear line."""
    with pytest.raises(ConfigError, match="allowed: iid, dirichlet:ALPHA"):
        partition(make_table([0, 1] * 4), how, 2, rng())


def test_no_sites_are_refused(make_table):
    """Somebody must hold the records."""
    with pytest.raises(ConfigError, match="at least 1"):
        partition(make_table([0, 1]), "iid", 0, rng())
