import math
import tomllib

import numpy as np
import pytest

from lepton_fl.data import Batch
from lepton_fl.data.columns import place
from lepton_fl.errors import ConfigError

FLOAT = {"type": "float", "range": [0, 100]}
CATEGORY = {"type": "category", "vocabulary": [1, 2]}
MCC = {"type": "category", "vocabulary": "iso18245"}
HASHED = {"type": "category", "hash": 8}


def test_columns_are_sorted_by_name(make_contract):
    """The study's file may list them in any order."""
    assert [n for n, _ in make_contract({"b": FLOAT, "a": FLOAT}).columns] == ["a", "b"]


def test_feature_names(make_contract):
    """Each feature says which column and which code it stands for."""
    contract = make_contract(
        {
            "age": {**FLOAT, "missing": "flag"},
            "cp": {**CATEGORY, "missing": "flag"},
            "shop": {"type": "category", "hash": 2},
        }
    )

    assert contract.feature_names == (
        *("age", "age:missing"),
        *("cp=1", "cp=2", "cp=other", "cp:missing"),
        *("shop#0", "shop#1"),
    )
    assert contract.width == 8


def test_needed_names_each_column_once(make_contract):
    """Features, target, unit and time are read; nothing else is."""
    contract = make_contract(
        {"a": FLOAT},
        privacy={"noise": "none", "unit": "patient"},
        evaluation={"split": "time", "time_column": "seen", "cutoff": 0},
    )

    assert contract.needed == ("a", "ill", "patient", "seen")


def test_unit_record_reads_no_column(make_contract):
    """`record` is a word of the study, not a column."""
    assert make_contract({"a": FLOAT}).needed == ("a", "ill")


def test_the_range_becomes_minus_one_to_one(encode):
    """The public bounds are the ends, their middle is 0."""
    assert encode(FLOAT, "0", "50", "100") == [[-1.0], [0.0], [1.0]]


def test_beyond_the_range_is_the_bound(encode):
    """A value beyond the range influences no more than the bound."""
    assert encode(FLOAT, "-1", "1e9") == [[-1.0], [1.0]]


def test_log1p_bends_the_range(encode):
    """The range is transformed with the value."""
    column = {"type": "float", "range": [0, math.e - 1], "transform": "log1p"}

    assert encode(column, str(math.sqrt(math.e) - 1)) == [[pytest.approx(0.0, abs=1e-6)]]


def test_a_missing_number_is_the_middle_and_flagged(encode):
    """Missing adds no value of its own but says so."""
    assert encode({**FLOAT, "missing": "flag"}, "", "100") == [[0.0, 1.0], [1.0, 0.0]]


def test_a_range_too_narrow_for_float64_is_refused(make_contract):
    """Ends that are one number after the transform cannot be scaled."""
    column = {"type": "float", "range": [1e300, 1.000000000000001e300], "transform": "log1p"}

    with pytest.raises(ConfigError, match="a wider range"):
        make_contract({"c": column})


def test_the_widest_range_is_finite(encode):
    """No overflow at the ends of float64."""
    assert encode({"type": "float", "range": [-1.7e308, 1.7e308]}, "0") == [[0.0]]


def test_codes_are_indicators(encode):
    """One indicator a code, one for what is not listed."""
    assert encode(CATEGORY, "1.0", "2", "9") == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_a_missing_code_is_flagged_only(encode):
    """Missing is not another code."""
    assert encode({**CATEGORY, "missing": "flag"}, "?") == [[0, 0, 0, 1]]


def test_a_listed_other_takes_unlisted_codes(make_contract, encode):
    """A list with its own `other` needs no second one."""
    column = {"type": "category", "vocabulary": ["a", "other"]}

    assert make_contract({"c": column}).feature_names == ("c=a", "c=other")
    assert encode(column, "other", "z") == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("mcc", "group"),
    [
        *(("0001", "agricultural"), ("0742", "agricultural"), ("742", "agricultural")),
        *(("1499", "agricultural"), ("1500", "contracted"), ("2999", "contracted")),
        *(("3000", "airlines"), ("3299", "airlines"), ("3300", "car-rental")),
        *(("3499", "car-rental"), ("3500", "lodging"), ("3999", "lodging")),
        *(("4000", "transport"), ("4799", "transport"), ("4800", "utilities")),
        *(("4999", "utilities"), ("5000", "retail"), ("5599", "retail")),
        *(("5600", "clothing"), ("5699", "clothing"), ("5700", "miscellaneous")),
        *(("7299", "miscellaneous"), ("7300", "business"), ("7999", "business")),
        *(("8000", "professional"), ("8999", "professional"), ("9000", "government")),
        *(("9999", "government"), ("0000", "other"), ("10000", "other"), ("ATM", "other")),
    ],
)
def test_merchant_codes_fall_into_the_standards_ranges(make_contract, encode, mcc, group):
    """ISO 18245's public ranges, first and last code of each."""
    names = make_contract({"c": MCC}).feature_names

    assert names[int(np.argmax(encode(MCC, mcc)[0]))] == f"c={group}"


def test_an_unknown_vocabulary_is_refused_with_those_there_are(make_contract):
    """A misspelt code list is a mistake in the study."""
    with pytest.raises(ConfigError, match=r"c\.vocabulary: found 'iso1'.*iso18245"):
        make_contract({"c": {"type": "category", "vocabulary": "iso1"}})


def test_two_spellings_of_a_code_are_refused(make_contract):
    """3 and "3.0" would be two indicators of one code."""
    with pytest.raises(ConfigError, match="are the same code"):
        make_contract({"c": {"type": "category", "vocabulary": [3, "3.0"]}})


def test_a_code_that_means_missing_is_refused(make_contract):
    """`NA` in a vocabulary could never be seen."""
    with pytest.raises(ConfigError, match="do not mean a missing value"):
        make_contract({"c": {"type": "category", "vocabulary": ["NA", "ZA"]}})


def test_a_label_that_means_missing_is_refused(make_contract):
    """Nobody could be positive."""
    task = {"kind": "binary", "target": "ill", "positive": "?"}

    with pytest.raises(ConfigError, match=r"task\.positive"):
        make_contract({"a": FLOAT}, task=task)


def test_two_features_of_one_name_are_refused(make_contract):
    """A column called like another one's flag cannot be told apart from it."""
    with pytest.raises(ConfigError, match="'a:missing'"):
        make_contract({"a": {**FLOAT, "missing": "flag"}, "a:missing": FLOAT})


def test_hashing_is_pinned():
    """The same bucket and sign in every process, on every platform and in every release."""
    assert place("shop", "a", 1000) == (687, -1)
    assert place("shop", "d", 1000) == (389, 1)


def test_hashing_separates_column_and_code():
    """`ab` + `c` is not `a` + `bc`."""
    assert place("ab", "c", 2**40) != place("a", "bc", 2**40)


def test_a_hashed_code_has_one_signed_feature(encode):
    """One bucket is 1 or -1; the others are 0."""
    assert sorted(abs(v) for v in encode(HASHED, "x")[0]) == [0] * 7 + [1]


def test_a_missing_hashed_code_is_flagged_only(encode):
    """Missing is not hashed."""
    assert encode({**HASHED, "missing": "flag"}, "NA") == [[0] * 8 + [1]]


def test_raw_values_are_not_scaled(contract):
    """Trees get numbers as they came and the index of a code."""
    batch = Batch({"age": ["95"], "chol": [""], "cp": ["2"], "ill": ["1"]})
    columns = contract.encode(batch).columns

    assert columns["age"].raw_B.tolist() == [95.0]
    assert np.isnan(columns["chol"].raw_B).all()
    assert columns["cp"].raw_B.tolist() == [1.0]


def test_many_buckets_are_numbers_to_a_tree(make_contract):
    """A histogram tree holds 255 categories."""
    wide = {"type": "category", "hash": 256}
    contract = make_contract({"a": FLOAT, "b": HASHED, "c": wide})

    assert contract.raw_categorical == (False, True, False)


def test_column_names_are_composed(make_contract):
    """A name typed on another system is the same name."""
    columns = tomllib.loads('"a\u0308" = {type = "float", range = [0, 1]}')

    assert make_contract(columns).feature_names == ("\u00e4",)
