"""Laws of the schema contract: what a row's encoding may depend on, and what errors may show."""

import traceback

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_fl.config import parse
from lepton_fl.data import Batch, Contract, check_table, load_table, read_csv
from lepton_fl.errors import LeptonError
from lepton_fl.study import Study

COLUMNS = {
    "amount": {"type": "float", "range": [0, 5e4], "transform": "log1p", "missing": "flag"},
    "delta": {"type": "float", "range": [-2.5, 7], "missing": "flag"},
    "code": {"type": "category", "vocabulary": [1, "b", True], "missing": "flag"},
    "mcc": {"type": "category", "vocabulary": "iso18245", "missing": "flag"},
    "shop": {"type": "category", "hash": 5, "missing": "flag"},
}


def contract_of(columns):
    raw = {
        "study": {"name": "test"},
        "task": {"kind": "binary", "target": "label"},
        "privacy": {"noise": "none", "unit": "person"},
        "train": {"rounds": 10, "sample_rate": 0.1, "lr": 0.1},
        "features": {"columns": columns},
    }
    return Contract.of(parse(Study, raw, file="study.toml"))


CONTRACT = contract_of(COLUMNS)

NUMBER = st.one_of(
    st.floats().map(repr),
    st.integers(-(10**6), 10**6).map(str),
    st.sampled_from(["", "NA", " 3 ", "x", "inf", "-nan", "1_0", "1e999"]),
)
CODE = st.one_of(
    st.sampled_from(["1", "1.0", "b", "True", "true", "", "?", "5411", "0742", "9999"]),
    st.text(max_size=6),
)
CELLS = {"amount": NUMBER, "delta": NUMBER, "code": CODE, "mcc": CODE, "shop": CODE}
ROW = st.fixed_dictionaries({**CELLS, "label": CODE, "person": CODE})
ROWS = st.lists(ROW, min_size=1, max_size=12)


def encoded(rows, contract=CONTRACT):
    batch = Batch({name: [row[name] for row in rows] for name in contract.needed})
    return contract.encode(batch).x_BF


@given(ROWS)
def test_encoded_values_are_bounded(rows):
    """Whatever a cell says, its features are finite and in [-1, 1]."""
    x = encoded(rows)

    assert x.dtype == np.float32
    assert np.isfinite(x).all()
    assert (np.abs(x) <= 1).all()


@given(ROWS, st.data())
def test_batches_do_not_matter(rows, data):
    """The encoding of a row is that of the row alone: cut anywhere, the table is the same."""
    cut = data.draw(st.integers(0, len(rows)))

    parts = [encoded(part) for part in (rows[:cut], rows[cut:])]

    assert np.array_equal(np.concatenate(parts), encoded(rows))


@given(ROWS, st.data())
def test_permuted_rows_give_permuted_features(rows, data):
    """The order of the records changes their order and nothing else."""
    order = data.draw(st.permutations(range(len(rows))))

    assert np.array_equal(encoded([rows[i] for i in order]), encoded(rows)[order])


@given(ROWS, st.permutations(sorted(COLUMNS)))
def test_the_order_of_the_studys_columns_does_not_matter(rows, order):
    """Two files that say the same encode the same."""
    contract = contract_of({name: COLUMNS[name] for name in order})

    assert contract.feature_names == CONTRACT.feature_names
    assert np.array_equal(encoded(rows, contract), encoded(rows))


@given(ROWS)
def test_loading_and_checking_agree(rows):
    """What a check lists is what a run refuses; what it passes, a run loads."""
    batch = Batch({name: [row[name] for row in rows] for name in CONTRACT.needed})

    report = check_table(CONTRACT, [batch], source="t")

    if report.ok:
        table = load_table(CONTRACT, [batch], source="t")
        assert (len(table), table.units) == (report.rows, report.units)
        assert table.positives == report.positives
    else:
        with pytest.raises(LeptonError) as caught:
            load_table(CONTRACT, [batch], source="t")
        assert caught.value.message.startswith(report.problems[0].split(" (fix:")[0])


SENTINEL = "zq7731xv"


def refusal(path):
    """All that a refused table says of itself, the traceback with its causes included."""
    try:
        load_table(CONTRACT, read_csv(path, CONTRACT), source="t")
    except LeptonError as error:
        return f"{''.join(traceback.format_exception(error))} {error.fix} {error.public}"
    return ""


HEADER = ["amount", "delta", "code", "mcc", "shop", "label", "person"]
SOUND = ["10.5", "1.5", "1", "5411", "s", "1", "p"]


@given(
    st.lists(st.sampled_from([SENTINEL, *SOUND, "", "-1", '"', "\0", ","]), min_size=1, max_size=60),
    st.sampled_from([7, 7, 7, 6, 8]),
    st.booleans(),
)
def test_no_error_shows_a_value(tmp_path_factory, cells, width, header):
    """Errors go to logs and screens: they name columns, lines and counts, never a cell's text."""
    cells = [*cells, SENTINEL]
    lines = [SOUND, *(cells[i : i + width] for i in range(0, len(cells), width))]
    lines = [HEADER, *lines] if header else lines
    path = tmp_path_factory.mktemp("t") / "table.csv"
    path.write_text("\n".join(",".join(line) for line in lines), encoding="utf-8")

    report = check_table(CONTRACT, read_csv(path, CONTRACT), source="t")

    assert SENTINEL not in refusal(path)
    assert SENTINEL not in repr(report)
