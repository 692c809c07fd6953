import datetime as dt
import hashlib

import numpy as np
import pytest
from pydantic import ValidationError

from lepton_fl.data import Batch, load_table, partition, split
from lepton_fl.data.split import _skewed
from lepton_fl.errors import ConfigError, DataError
from lepton_fl.study import Evaluation

KEY = bytes(range(32))


def rng():
    return np.random.default_rng(7)


def rows(table):
    """Which rows of the whole table these are: its only feature."""
    return set(table.raw_NC[:, 0].astype(int).tolist())


def test_train_and_test_are_all_records_once(make_table):
    """Nothing is lost and nothing is on both sides."""
    train, test = split(make_table([0, 1] * 20), Evaluation(), KEY)

    assert rows(train) | rows(test) == set(range(40))
    assert not rows(train) & rows(test)


def test_a_unit_is_on_one_side(make_table):
    """The test shows people whom the model has not seen."""
    units = [i // 3 for i in range(90)]
    table = make_table([0, 0, 1] * 30, units=units)

    train, test = split(table, Evaluation(), KEY)

    assert not {units[r] for r in rows(train)} & {units[r] for r in rows(test)}
    assert train.units + test.units == 30


def test_a_unit_is_held_out_by_its_keyed_hash_alone(make_table):
    """The first 8 bytes of BLAKE2b, as a share of 2^64, against the fraction."""
    table = make_table([0, 1] * 20)
    shares = [
        int.from_bytes(hashlib.blake2b(b"lepton-fl/split/1\n" + unit.tobytes(), key=KEY).digest()[:8], "big")
        / 2**64
        for unit in table.key_U
    ]

    _, test = split(table, Evaluation(test_fraction=0.3), KEY)

    assert rows(test) == {i for i, share in enumerate(shares) if share < 0.3}


@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.5])
def test_about_the_fraction_is_held_out(make_table, fraction):
    """As many as of a coin thrown for each unit: within 5 standard deviations."""
    units = 20_000

    _, test = split(make_table([0] * units), Evaluation(test_fraction=fraction), KEY)

    assert abs(test.units - fraction * units) < 5 * np.sqrt(fraction * (1 - fraction) * units)


def test_another_key_draws_other_sides(make_table):
    """Independently: of two quarters a sixteenth is in both."""
    table = make_table([0] * 20_000)

    here, there = (rows(split(table, Evaluation(), key)[1]) for key in (KEY, KEY[::-1]))

    assert abs(len(here & there) - 20_000 / 16) < 5 * np.sqrt(20_000 / 16 * 15 / 16)


def test_records_that_read_the_same_are_on_one_side(make_contract):
    """Different units with one key: a copy of a training record would judge nothing."""
    contract = make_contract({"c": {"type": "float", "range": [0, 1000]}})
    cells = [str(i // 2) for i in range(200)]
    table = load_table(contract, [Batch({"c": cells, "ill": ["0"] * 200})], source="t")

    train, test = split(table, Evaluation(), KEY)

    assert table.units == 200
    assert not set(train.raw_NC[:, 0]) & set(test.raw_NC[:, 0])


@pytest.mark.parametrize(("key", "held"), [(b"0" * 16, "none"), (b"2" * 16, "all")])
def test_no_side_is_empty(make_table, key, held):
    """A table of one unit has nobody to judge by, or nobody to learn from."""
    table = make_table([0, 1], units=["a", "a"])

    with pytest.raises(DataError, match=f"of 1 units {held} would be held out at test_fraction 0.5"):
        split(table, Evaluation(test_fraction=0.5), key)


@pytest.mark.parametrize("length", [0, 15, 65])
def test_a_key_that_is_no_secret_is_refused(make_table, length):
    """Short enough to be searched, or longer than BLAKE2b takes."""
    with pytest.raises(ValueError, match=f"a key of {length} bytes"):
        split(make_table([0, 1]), Evaluation(), bytes(length))


def by_time(cutoff):
    return Evaluation(split="time", time_column="seen", cutoff=cutoff)


def test_records_from_the_cutoff_on_are_the_test(make_table):
    """As the model will be used: on what comes after. The cutoff itself is held out."""
    table = make_table([0] * 8, times=[8, 1, 7, 2, 6, 3, 5, 4])

    _, test = split(table, by_time(7), KEY)

    assert rows(test) == {0, 2}


def test_a_cutoff_is_exact(make_table):
    """The last number before it trains."""
    times = [repr(t) for t in (np.nextafter(0.1, 0).item(), 0.1, np.nextafter(0.1, 1).item())]

    _, test = split(make_table([0] * 3, times=times), by_time(0.1), KEY)

    assert rows(test) == {1, 2}


@pytest.mark.parametrize("cutoff", ["2026-01-31", "2026-01-31T00:00:00Z", "2026-01-31T02:00+02:00"])
def test_a_cutoff_by_the_calendar(make_table, cutoff):
    """Read as the cells are: UTC where no zone is named."""
    times = [
        "2026-01-30T23:59:59.999999",
        "2026-01-31",
        "2026-01-31T00:30:00+01:00",
        "2026-01-30T23:30:00-01:00",
    ]

    _, test = split(make_table([0] * 4, times=times), by_time(cutoff), KEY)

    assert rows(test) == {1, 3}


@pytest.mark.parametrize(("cutoff", "side"), [(4, "before"), (1, "at or after")])
def test_a_cutoff_beyond_all_records_is_refused(make_table, cutoff, side):
    """Nothing would be judged, or nothing learnt."""
    table = make_table([0] * 3, times=[1, 2, 3])

    with pytest.raises(DataError, match=f"'seen': all 3 records are {side} the cutoff {cutoff}"):
        split(table, by_time(cutoff), KEY)


def test_a_table_without_times_cannot_be_split_by_time(make_table):
    """It was loaded for another study."""
    with pytest.raises(DataError, match="without its time column 'seen'"):
        split(make_table([0, 1]), by_time(1), KEY)


@pytest.mark.parametrize(
    ("spelling", "form"),
    [
        (3, 3.0),
        (" 3.0 ", 3.0),
        ("20260131", 20260131.0),  # as a cell is read
        ("2026-01-31", "2026-01-31T00:00:00+00:00"),
        ("2026-01-31T02:00+02:00", "2026-01-31T00:00:00+00:00"),
        (dt.date(2026, 1, 31), "2026-01-31T00:00:00+00:00"),  # as TOML reads it without quotes
        (dt.datetime(2026, 1, 31, 12, tzinfo=dt.UTC), "2026-01-31T12:00:00+00:00"),
    ],
)
def test_a_cutoff_has_one_form(spelling, form):
    """So that studies that mean one instant have one id."""
    evaluation = by_time(spelling)

    assert evaluation.cutoff == form
    assert by_time(evaluation.cutoff) == evaluation


@pytest.mark.parametrize(
    "cutoff", ["soon", "", "nan", "inf", "1_000", "2026-13-01", "0001-01-01T00:00+05:00", float("inf"), True]
)
def test_a_cutoff_that_is_no_time_is_refused(cutoff):
    """Refused with the study, not at the sites."""
    with pytest.raises(ValidationError, match="cutoff"):
        by_time(cutoff)


@pytest.mark.parametrize(
    "given",
    [
        {"split": "time"},
        {"split": "time", "time_column": "seen"},
        {"split": "time", "cutoff": 3},
        {"time_column": "seen"},
        {"cutoff": 3},
        {"time_column": "seen", "cutoff": 3},
    ],
)
def test_split_by_time_has_a_column_and_a_cutoff(given):
    """A part of the three is a mistake."""
    with pytest.raises(ValidationError, match="split = 'time', time_column and cutoff go together"):
        Evaluation(**given)


@pytest.mark.parametrize("fraction", [0.0, 0.5000001])
def test_most_units_train(fraction):
    """Half of them at least, and some are held out."""
    with pytest.raises(ValidationError, match="test_fraction"):
        Evaluation(test_fraction=fraction)


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
    "how",
    [
        "natural",
        "dirichlet",
        "dirichlet:0",
        "dirichlet:-1",
        "dirichlet:nan",
        "dirichlet:x",
        "label-skew:0.5",
        "label-skew:inf",
        "quantity-skew:0",
        "quantity-skew",
    ],
)
def test_an_unknown_partition_is_refused_with_those_there_are(make_table, how):
    """A misspelt flag is one clear line."""
    forms = "split: found .*, allowed: iid, dirichlet:ALPHA, label-skew:RATIO, quantity-skew:ALPHA"
    with pytest.raises(ConfigError, match=forms):
        partition(make_table([0, 1] * 4), how, 2, rng())


def test_no_sites_are_refused(make_table):
    """Somebody must hold the records."""
    with pytest.raises(ConfigError, match="at least 1"):
        partition(make_table([0, 1]), "iid", 0, rng())


def test_the_richest_site_has_ratio_times_the_rate_of_the_poorest(make_table):
    """4 sites of 100, 150 positive, ratio 8: 10, 20, 40 and 80 of each 100."""
    parts = partition(make_table([1] * 150 + [0] * 250), "label-skew:8", 4, rng())

    assert [(part.positives, part.units) for part in parts] == [(10, 100), (20, 100), (40, 100), (80, 100)]


@pytest.mark.parametrize(
    ("positive", "ratio", "sites", "why"),
    [
        (300, 8, 4, "the richest would need more positives than it has units"),
        (3, 8, 4, "the poorest would have none"),
        (0, 1, 4, "there are none"),
        (200, 8, 1, "one site has one rate"),
    ],
)
def test_a_ratio_that_cannot_be_met_is_refused(make_table, positive, ratio, sites, why):
    """With what the sites would have to hold."""
    table = make_table([1] * positive + [0] * (400 - positive))

    with pytest.raises(
        DataError, match=f"{positive} positive of 400 units cannot make {sites} sites in ratio"
    ):
        partition(table, f"label-skew:{ratio}", sites, rng())


def test_a_small_alpha_makes_large_and_small_sites(make_table):
    """Sizes differ more the smaller alpha is; the share of positives does not."""
    table = make_table([0, 1] * 1000)

    apart = [part.units for part in partition(table, "quantity-skew:0.1", 5, rng())]
    alike = [part.units for part in partition(table, "quantity-skew:1000", 5, rng())]

    assert np.std(apart) > 300
    assert np.std(alike) < 50


def test_dirichlet_shares_have_the_spread_of_the_beta_distribution():
    """Two-sided: alpha = 20 about a share of 0.2, and neither 10 nor 40; 400 draws of two sites of 1,000."""
    rng = np.random.default_rng(0)
    positive_U = np.arange(2000) < 400

    share_D = [positive_U[_skewed(positive_U, [1000, 1000], 20.0, rng)[0]].mean() for _ in range(400)]

    assert np.mean(share_D) == pytest.approx(0.2, abs=0.02)
    assert np.std(share_D) == pytest.approx(np.sqrt(0.2 * 0.8 / 21 + 0.16 / 1000), rel=0.15)
