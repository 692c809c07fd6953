"""Laws of cutting one table into simulated sites."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_fl.config import parse
from lepton_fl.data import Batch, Contract, load_table, partition
from lepton_fl.data.split import LEAST_UNITS
from lepton_fl.errors import DataError
from lepton_fl.study import Study

CONTRACT = Contract.of(
    parse(
        Study,
        {
            "study": {"name": "test"},
            "task": {"kind": "binary", "target": "label"},
            "privacy": {"noise": "none", "unit": "person"},
            "train": {"rounds": 10, "sample_rate": 0.1, "lr": 0.1},
            "features": {"columns": {"number": {"type": "float", "range": [0, 1e6], "identifier": "allow"}}},
        },
        file="study.toml",
    )
)
FORMS = st.sampled_from(["iid", "dirichlet:0.3", "label-skew:1", "label-skew:4", "quantity-skew:0.2"])
SITES = st.integers(1, 6)
SEED = st.integers(0, 2**32)
# One label a person; some have several records.
PEOPLE = st.lists(st.tuples(st.booleans(), st.integers(1, 3)), min_size=2, max_size=200)


def table_of(people):
    rows = [(person, label) for person, (label, records) in enumerate(people) for _ in range(records)]
    cells = {
        "number": [str(i) for i in range(len(rows))],
        "label": [str(int(label)) for _, label in rows],
        "person": [str(person) for person, _ in rows],
    }
    return load_table(CONTRACT, [Batch(cells)], source="t")


def cut(table, how, sites, seed):
    """The parts; None where the table is refused."""
    try:
        return partition(table, how, sites, np.random.default_rng(seed))
    except DataError:
        return None


def people_at(part):
    return {bytes(key) for key in part.key_U}


def rows_at(part):
    return part.raw_NC[:, 0].astype(int).tolist()


@given(PEOPLE, FORMS, SITES, SEED)
def test_every_unit_is_at_one_site_with_all_its_records(people, how, sites, seed):
    """No record is lost or doubled, and nobody is at two sites."""
    table = table_of(people)
    parts = cut(table, how, sites, seed)

    if parts is not None:
        assert sorted(row for part in parts for row in rows_at(part)) == list(range(len(table)))
        assert len(set().union(*map(people_at, parts))) == sum(part.units for part in parts) == table.units


@given(PEOPLE, FORMS, SITES, SEED)
def test_the_generator_decides(people, how, sites, seed):
    """The same one gives the same sites."""
    table = table_of(people)
    first, second = cut(table, how, sites, seed), cut(table, how, sites, seed)

    assert (first is None) == (second is None)
    if first is not None:
        assert list(map(rows_at, first)) == list(map(rows_at, second))


@given(PEOPLE, st.sampled_from(["iid", "dirichlet:0.3", "label-skew:3"]), SITES, SEED)
def test_sizes_are_equal_where_labels_differ(people, how, sites, seed):
    """To within one unit."""
    parts = cut(table_of(people), how, sites, seed)

    if parts is not None:
        sizes = [part.units for part in parts]
        assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 300), st.integers(1, 300), st.floats(1, 20), st.integers(2, 6), SEED)
def test_label_skew_is_a_geometric_progression(positive, negative, ratio, sites, seed):
    """Each site is within one positive of its share, and no other number of positives adds up."""
    table = table_of([(i < positive, 1) for i in range(positive + negative)])
    parts = cut(table, f"label-skew:{ratio!r}", sites, seed)

    if parts is not None:
        size_S = np.array([part.units for part in parts])
        weight_S = size_S * ratio ** (np.arange(sites) / (sites - 1))
        wanted_S = positive * weight_S / weight_S.sum()
        found_S = np.array([part.positives for part in parts])
        assert (np.abs(found_S - wanted_S) < 1 + 1e-9).all()
        assert found_S.sum() == positive
        assert found_S.min() >= 1


@given(PEOPLE, st.floats(1e-3, 1e6), SITES, SEED)
def test_quantity_skew_leaves_nobody_empty(people, alpha, sites, seed):
    """Each site has the least number of units, or the table is refused as too small."""
    table = table_of(people)

    if table.units < LEAST_UNITS * sites:
        with pytest.raises(DataError, match=f"sites of at least {LEAST_UNITS}"):
            partition(table, f"quantity-skew:{alpha!r}", sites, np.random.default_rng(seed))
    else:
        parts = partition(table, f"quantity-skew:{alpha!r}", sites, np.random.default_rng(seed))
        assert min(part.units for part in parts) >= LEAST_UNITS
