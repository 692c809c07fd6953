"""Laws of holding out: a unit's side depends on the secret key and on the unit, and on nobody else."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lepton_fl.config import parse
from lepton_fl.data import Batch, Contract, load_table, split
from lepton_fl.errors import DataError
from lepton_fl.study import Evaluation, Study

NUMBER = {"type": "float", "range": [0, 100], "identifier": "allow"}


def contract_of(unit, evaluation):
    raw = {
        "study": {"name": "test"},
        "task": {"kind": "binary", "target": "label"},
        "privacy": {"noise": "none", "unit": unit},
        "train": {"rounds": 10, "sample_rate": 0.1, "lr": 0.1},
        "features": {"columns": {"number": NUMBER}},
        "evaluation": evaluation,
    }
    return Contract.of(parse(Study, raw, file="study.toml"))


KEY = st.binary(min_size=16, max_size=64)
FRACTION = st.floats(0, 0.5, exclude_min=True)
ROW = st.fixed_dictionaries(
    {
        "number": st.integers(0, 100).map(str),
        "label": st.sampled_from(["0", "1"]),
        "person": st.integers(0, 12).map(str),
        "seen": st.integers(0, 20).map(str),
    }
)
ROWS = st.lists(ROW, min_size=1, max_size=30)
UNIT = st.sampled_from(["record", "person"])


def sides(rows, unit, evaluation, key, cuts=()):
    """By row, in the order given: whether it is held out; None where the table is refused."""
    contract = contract_of(unit, evaluation.model_dump())
    bounds = [0, *sorted(cuts), len(rows)]
    parts = [rows[a:b] for a, b in pairwise(bounds)]
    batches = [Batch({name: [row[name] for row in part] for name in contract.needed}) for part in parts]
    table = load_table(contract, batches, source="t")
    try:
        train, test = split(table, evaluation, key)
    except DataError:
        return None
    held = {bytes(k) for k in test.key_U}
    assert not held & {bytes(k) for k in train.key_U}
    assert len(train) + len(test) == len(rows)
    return [bytes(table.key_U[u]) in held for u in table.unit_N]


def anchored(rows):
    """The rows and a hundred of other people, so that no side is empty but for a very small fraction."""
    others = [{"number": str(i), "label": "0", "person": f"other{i}", "seen": "0"} for i in range(100)]
    return [*rows, *others]


@given(ROWS, UNIT, FRACTION, KEY, st.data())
def test_adding_or_removing_a_unit_moves_no_other(rows, unit, fraction, key, data):
    """The train tables of neighbours differ by at most the unit in which they differ."""
    evaluation = Evaluation(test_fraction=fraction)
    rows = anchored(rows)
    gone = data.draw(st.integers(0, len(rows) - 1))
    owner = [i if unit == "record" else row["person"] for i, row in enumerate(rows)]
    stays = [i for i in range(len(rows)) if owner[i] != owner[gone]]

    whole = sides(rows, unit, evaluation, key)
    less = sides([rows[i] for i in stays], unit, evaluation, key)

    if whole is not None and less is not None:
        assert less == [whole[i] for i in stays]


@given(ROWS, UNIT, KEY, st.data())
def test_order_and_batches_do_not_matter(rows, unit, key, data):
    """The same rows read in another order, cut anywhere, have the same sides."""
    rows = anchored(rows)
    order = data.draw(st.permutations(range(len(rows))))
    cuts = data.draw(st.lists(st.integers(0, len(rows)), max_size=5))

    straight = sides(rows, unit, Evaluation(), key)
    shuffled = sides([rows[i] for i in order], unit, Evaluation(), key, cuts)

    assert shuffled == [straight[i] for i in order]


@given(ROWS, UNIT, FRACTION, FRACTION, KEY)
def test_fractions_are_nested(rows, unit, one, other, key):
    """Whoever is held out is so at every larger fraction."""
    small, large = sorted([one, other])

    fewer = sides(anchored(rows), unit, Evaluation(test_fraction=small), key)
    more = sides(anchored(rows), unit, Evaluation(test_fraction=large), key)

    if fewer is not None and more is not None:
        assert all(more[i] for i, held in enumerate(fewer) if held)


@given(ROWS, st.integers(-1, 21), KEY)
def test_by_time_each_record_stands_for_itself(rows, cutoff, key):
    """Held out from the cutoff on, whatever the others' times are."""
    evaluation = Evaluation(split="time", time_column="seen", cutoff=cutoff)
    contract = contract_of("person", evaluation.model_dump())
    cells = {name: [row[name] for row in rows] for name in contract.needed}
    table = load_table(contract, [Batch(cells)], source="t")
    expected = [float(row["seen"]) >= cutoff for row in rows]

    try:
        train, test = split(table, evaluation, key)
    except DataError:
        assert len(set(expected)) == 1
    else:
        times = [float(row["seen"]) for row in rows]
        assert train.time_N.tolist() == [t for t, held in zip(times, expected, strict=True) if not held]
        assert test.time_N.tolist() == [t for t, held in zip(times, expected, strict=True) if held]
