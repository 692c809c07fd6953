import time
import tracemalloc
from itertools import islice

import numpy as np
import pytest

from lepton_fl.data import Batch, check_table, load_table, pool, read_csv
from lepton_fl.data.growing import Growing
from lepton_fl.errors import DataError

FLOAT = {"type": "float", "range": [0, 100]}
CATEGORY = {"type": "category", "vocabulary": ["a", "b"]}


def batch(labels=None, **cells):
    rows = len(next(iter(cells.values())))
    return Batch({**cells, "ill": labels or ["0"] * rows})


@pytest.fixture
def refusal(make_contract):
    """What is said when a table of one column `c` is refused, by loading and by checking alike."""

    def run(column, cells, labels=None, **tables):
        contract = make_contract({"c": column}, **tables)
        batches = [batch(labels, c=cells)]
        with pytest.raises(DataError) as caught:
            load_table(contract, batches, source="t")
        report = check_table(contract, batches, source="t")
        assert report.problems[0] == str(caught.value)
        assert not report.ok
        return str(caught.value)

    return run


def test_positive_labels_are_compared_as_codes(make_contract):
    """1, 1.0 and 01 are the study's positive; all else is negative."""
    table = load_table(
        make_contract({"c": FLOAT}),
        [batch(["1", "1.0", "01", "0", "2"], c=["1.5"] * 5)],
        source="t",
    )

    assert table.y_N.tolist() == [1, 1, 1, 0, 0]
    assert table.positives == 3


def test_units_are_numbered_as_they_appear_over_all_batches(make_contract, by_patient):
    """A person met again in a later batch is the same unit."""
    contract = make_contract({"c": FLOAT}, privacy=by_patient)
    parts = [batch(c=["1.5"] * 2, patient=["p9", "p1"]), batch(c=["1.5"] * 2, patient=["p1", "x"])]

    table = load_table(contract, parts, source="t")

    assert table.unit_N.tolist() == [0, 1, 1, 2]
    assert table.units == 3


def test_two_spellings_of_a_person_are_one_unit(make_contract, by_patient):
    """Merging never weakens the promise; splitting would."""
    contract = make_contract({"c": FLOAT}, privacy=by_patient)

    table = load_table(contract, [batch(c=["1.5"] * 2, patient=["7", "7.0"])], source="t")

    assert table.units == 1


def test_each_record_is_a_unit_where_the_study_says_record(make_table):
    """The default unit needs no column."""
    assert make_table([0, 1, 0]).unit_N.tolist() == [0, 1, 2]


def test_iso_times_become_seconds(make_table):
    """So that they can be ordered."""
    table = make_table([0, 1], times=["1970-01-01", "1970-01-01T00:01:00Z"])

    assert table.time_N.tolist() == [0.0, 60.0]


def test_a_table_of_one_class_is_accepted(make_table):
    """A hospital without a case still contributes."""
    assert make_table([0, 0, 0]).positives == 0


def test_text_in_a_float_column_is_refused(refusal):
    """Column and counts are said."""
    said = refusal(FLOAT, ["1", "x", "y"])

    assert "t: column 'c': 2 of 3 cells are not numbers" in said


def test_infinite_values_are_refused(refusal):
    """They have no place in any range."""
    assert "1 of 2 cells are infinite" in refusal(FLOAT, ["1", "-inf"])


def test_missing_values_are_refused_unless_flagged(refusal):
    """The fix is a line of the study."""
    said = refusal(FLOAT, ["1", ""])

    assert "1 of 2 cells are missing" in said
    assert 'missing = "flag"' in said


def test_a_missing_label_is_refused(refusal):
    """It is neither positive nor negative."""
    said = refusal(FLOAT, ["1", "2"], labels=["1", ""])

    assert "column 'ill': 1 of 2 cells of the target column are missing" in said


def test_a_missing_unit_is_refused(make_contract, by_patient):
    """A record of nobody cannot be protected."""
    contract = make_contract({"c": FLOAT}, privacy=by_patient)

    with pytest.raises(DataError, match="column 'patient': 1 of 2 cells of the unit column"):
        load_table(contract, [batch(c=["1", "2"], patient=["p", "NA"])], source="t")


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (["1", "soon"], "1 of 2 cells are neither numbers nor ISO 8601"),
        (["1", ""], "1 of 2 cells of the time column are missing"),
        (["1", "2026-01-01"], "1 of 2 cells are numbers and 1 are dates"),
    ],
)
def test_times_that_cannot_be_ordered_are_refused(make_table, cells, said):
    """One way of writing times, in every record."""
    with pytest.raises(DataError, match=said):
        make_table([0, 1], times=cells)


def test_a_fifth_out_of_range_is_accepted(make_contract):
    """Outliers are moved to the bound and counted."""
    contract = make_contract({"c": FLOAT})
    cells = ["200", "1", "2", "3", "4"]

    report = check_table(contract, [batch(c=cells)], source="t")

    assert report.ok
    assert report.columns[0].out_of_range == 1


def test_more_than_a_fifth_out_of_range_is_refused(refusal):
    """Grams instead of kilograms."""
    said = refusal(FLOAT, ["200", "1", "2", "3"])

    assert "1 of 4 cells lie outside the public range" in said


def test_more_than_a_fifth_out_of_vocabulary_is_refused(refusal):
    """Another coding of the same fact."""
    said = refusal(CATEGORY, ["z", "a", "a", "b"])

    assert "1 of 4 cells are out of the vocabulary" in said


def test_a_flood_is_measured_against_cells_that_hold_something(refusal):
    """Missing cells do not dilute it."""
    column = {**CATEGORY, "missing": "flag"}

    assert "out of the vocabulary" in refusal(column, ["z", "a", *[""] * 98])


def test_a_hashed_identifier_is_refused(refusal):
    """A different value in nearly every record names the record."""
    column = {"type": "category", "hash": 8}

    said = refusal(column, [f"p{i}" for i in range(50)])

    assert "50 of 50 cells are different, as in an identifier" in said
    assert 'identifier = "allow"' in said


def test_whole_numbers_all_different_are_an_identifier(refusal):
    """Account numbers, declared as a float."""
    column = {"type": "float", "range": [0, 1000]}

    assert "as in an identifier" in refusal(column, [str(i) for i in range(50)])


def accepted(make_contract, column, cells):
    return len(load_table(make_contract({"c": column}), [batch(c=cells)], source="t"))


def test_measurements_all_different_are_no_identifier(make_contract):
    """Amounts to the cent differ too."""
    column = {"type": "float", "range": [0, 1000]}

    assert accepted(make_contract, column, [f"{i}.25" for i in range(50)]) == 50


def test_an_identifier_may_be_allowed(make_contract):
    """The study's owner decides."""
    column = {"type": "category", "hash": 8, "identifier": "allow"}

    assert accepted(make_contract, column, [f"p{i}" for i in range(50)]) == 50


def test_few_cells_make_no_identifier(make_contract):
    """49 different values may be chance."""
    assert accepted(make_contract, {"type": "category", "hash": 8}, [f"p{i}" for i in range(49)])


def test_repeated_values_make_no_identifier(make_contract):
    """At 95 % different values a column still describes."""
    cells = [f"p{min(i, 94)}" for i in range(100)]

    assert accepted(make_contract, {"type": "category", "hash": 8}, cells)


def test_an_identifier_is_seen_across_batches(make_contract):
    """Small batches hide nothing."""
    contract = make_contract({"c": {"type": "category", "hash": 8}})
    parts = [batch(c=[f"p{i}"]) for i in range(60)]

    with pytest.raises(DataError, match="60 of 60 cells are different"):
        load_table(contract, parts, source="t")


def test_no_rows_are_refused(contract):
    """A header alone is no table."""
    with pytest.raises(DataError, match="t: no rows"):
        load_table(contract, [], source="t")


def test_further_problems_are_counted(make_contract):
    """One line names the first by column name and says how many others there are."""
    contract = make_contract({"b": FLOAT, "a": CATEGORY})

    with pytest.raises(DataError, match=r"column 'a': .* \(and 2 more\)"):
        load_table(contract, [batch(a=["z"], b=[""], labels=[""])], source="t")


def test_check_lists_all_problems_and_counts(make_contract, by_patient):
    """Counts by column, features first; every problem as a run would say it."""
    contract = make_contract({"b": FLOAT, "a": CATEGORY}, privacy=by_patient)
    part = batch(["1", "0"], b=["", "x"], a=["z", "z"], patient=["p", "p"])

    report = check_table(contract, [part], source="t")

    assert (report.rows, report.units, report.positives) == (2, 1, 1)
    assert [c.role for c in report.columns] == ["feature", "feature", "target", "unit"]
    assert (report.columns[1].missing, report.columns[1].unreadable) == (1, 1)
    assert len(report.problems) == 3


def test_check_of_a_sound_table_finds_nothing(contract):
    """And says so."""
    part = batch(age=["50"], cp=["1"], chol=[""])

    assert check_table(contract, [part], source="t").ok


def test_check_lists_what_cannot_be_read(contract, write):
    """A missing column is a finding, not a crash."""
    report = check_table(contract, read_csv(write("age,cp,ill\n"), contract), source="t")

    assert len(report.problems) == 1
    assert "no column 'chol'" in report.problems[0]


def test_check_keeps_what_it_found_before_a_ragged_line(contract, write):
    """Both are told."""
    path = write("age,cp,chol,ill\n50,1,x,0\n60\n")

    report = check_table(contract, read_csv(path, contract, batch_rows=1), source="t")

    assert report.rows == 1
    assert ["not numbers" in report.problems[0], "line 3" in report.problems[1]] == [True, True]


def test_a_subset_numbers_its_units_anew(make_table):
    """Units stay dense, in order of first appearance."""
    table = make_table([0, 1, 0, 1], units=["a", "b", "c", "b"])

    part = table.subset(np.array([3, 2, 1]))

    assert part.unit_N.tolist() == [0, 1, 0]
    assert part.units == 2
    assert part.key_U.tolist() == table.key_U[[1, 2]].tolist()
    assert part.y_N.tolist() == [1, 0, 1]


def test_a_subset_by_mask_keeps_times(make_table):
    """Every array follows."""
    table = make_table([0, 1, 0], times=[5, 6, 7])

    assert table.subset(np.array([True, False, True])).time_N.tolist() == [5, 7]


def test_the_fingerprint_names_the_data(make_table):
    """Equal tables, equal digest; one label changed, another."""
    assert make_table([0, 1]).fingerprint == make_table([0, 1]).fingerprint
    assert make_table([0, 1]).fingerprint != make_table([1, 1]).fingerprint


def test_the_fingerprint_is_of_features_labels_and_units(make_table):
    """Evidence from before units had keys stays good."""
    digest = "08640341a0a8f16559a82f14e2c4fea90583591f5ba71200a0ee8feefedb9774"

    assert make_table([0, 1], units=["a", "b"]).fingerprint == digest


def test_pooled_tables_keep_their_units_apart(make_table):
    """A unit is one person at one site."""
    table = make_table([0, 1, 1], units=["a", "b", "b"])

    pooled = pool([table, table])

    assert pooled.unit_N.tolist() == [0, 1, 1, 2, 3, 3]
    assert (len(pooled), pooled.units, pooled.positives) == (6, 4, 4)
    assert pooled.key_U.tolist() == 2 * table.key_U.tolist()


def test_tables_of_different_contracts_are_not_pooled(make_contract, make_table):
    """Their features mean different things."""
    other = load_table(make_contract({"c": FLOAT}), [batch(c=["1.5"])], source="t")

    with pytest.raises(ValueError, match="different contracts"):
        pool([make_table([0]), other])


def test_memory_is_bounded_by_the_table(make_contract, write):
    """200,000 rows of 10 columns never stand in memory as text."""
    rows = 200_000
    names = [f"f{i}" for i in range(9)]
    contract = make_contract({**dict.fromkeys(names, FLOAT), "g": CATEGORY})
    lines = [f"{','.join([f'{i % 97}.5'] * 9)},{'ab'[i % 2]},{i % 2}\n" for i in range(1000)]
    path = write(",".join([*names, "g", "ill"]) + "\n" + "".join(lines) * (rows // 1000))
    start = time.perf_counter()
    for part in islice(read_csv(path, contract, batch_rows=4096), 5):
        contract.encode(part)
    if time.perf_counter() - start > 1:
        pytest.skip("this machine is too slow to trace every allocation")

    tracemalloc.start()
    try:
        table = load_table(contract, read_csv(path, contract, batch_rows=4096), source="t")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    held = sum(a.nbytes for a in (table.x_NF, table.y_N, table.unit_N, table.raw_NC, table.key_U))
    # Twice, while the batches are joined; and a batch of 4,096 rows as text.
    assert peak < 2.1 * held + 8e6


def test_raw_numbers_that_are_not_kept_take_no_memory(make_contract, monkeypatch):
    """Not even while the table is read: a view without columns would hold the whole batch."""
    blocks, add = [], Growing.add
    monkeypatch.setattr(Growing, "add", lambda self, **new: (blocks.append(new["raw_NC"]), add(self, **new)))
    load_table(make_contract({"c": FLOAT}), [batch(c=["1", "2"])], source="t", raw=False)

    assert [(block.shape, block.base) for block in blocks] == [((2, 0), None)]
