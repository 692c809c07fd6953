import math

import pytest

from lepton_fl.data.cells import code, distinct, normal, numbers, times


@pytest.mark.parametrize("spelling", [3, "3", "3.0", " 3 ", "03", "+3", "3."])
def test_spellings_of_one_whole_number_are_one_code(spelling):
    """Two institutions that write 3 and 3.0 mean the same code."""
    assert normal(spelling) == "3"


@pytest.mark.parametrize("spelling", [True, "True", "true", "TRUE"])
def test_spellings_of_true_are_one_code(spelling):
    """A boolean of TOML equals what Python, R and SQL write."""
    assert normal(spelling) == "true"


def test_true_is_not_one():
    """A truth and a count are different codes."""
    assert normal(True) != normal(1)


def test_negative_zero_is_zero():
    """A sign makes no second zero."""
    assert normal("-0.0") == "0"


def test_a_code_with_an_exponent_stays_text():
    """1E30 is a code of ICD-11, not ten to the thirtieth."""
    assert normal("1E30") == "1E30"


def test_long_identifiers_keep_every_digit():
    """Codes never pass through a float."""
    assert normal("12345678901234567891") != normal("12345678901234567892")


def test_composed_and_decomposed_letters_are_one_code():
    """An accent typed on another system is no other code."""
    assert normal("cafe\u0301") == normal("caf\u00e9")


@pytest.mark.parametrize("cell", ["", " ", "NA", "n/a", "NaN", "NAN", "null", "NULL", "none", "?"])
def test_missing_markers(cell):
    """What institutions write for no value is no value."""
    assert code(cell) is None


def test_distinct_texts_keep_their_first_order():
    """Each cell points to its text, and texts stand as they first appeared."""
    texts, index = distinct(["b", "a", "b"])

    assert texts == ["b", "a"]
    assert index.tolist() == [0, 1, 0]


def test_numbers_with_missing_cells():
    """A marker or a blank is missing and never unreadable."""
    read = numbers(["1.5", " ", "NA", " 2 "])

    assert read.unreadable == 0
    assert [math.isnan(v) for v in read.value_B] == [False, True, True, False]


@pytest.mark.parametrize("cell", ["3,5", "1_000", "abc", "0x10"])
def test_text_is_no_number(cell):
    """Decimal commas, Python literals and words are counted, not guessed at."""
    assert numbers(["1", cell]).unreadable == 1


def test_times_without_a_zone_are_utc():
    """The same file gives the same seconds on every machine."""
    assert times(["1970-01-02"]).value_B.tolist() == [86400.0]


def test_times_with_a_zone_are_moved_to_utc():
    """An offset is obeyed."""
    assert times(["1970-01-01T02:00:00+02:00"]).value_B.tolist() == [0.0]


def test_an_infinite_time_is_unreadable():
    """Infinity is no point in time."""
    assert times(["inf"]).unreadable == 1
