"""What a wrong file is told: one line with file, key, found and allowed."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from lepton_fl.config import Array, Strict, load, parse
from lepton_fl.errors import ConfigError
from lepton_fl.study import Study


class Inner(Strict):
    depth: Annotated[int, Field(ge=1)] = 1
    survivors: Literal["all"] | Annotated[int, Field(ge=1)] = "all"


class Outer(Strict):
    kind: Literal["red", "green"]
    size: float = 1.0
    widths: Array[int] = (1,)
    inner: Inner = Inner()


def refusal(raw, model=Outer):
    with pytest.raises(ConfigError) as caught:
        parse(model, raw, file="f.toml")
    return caught.value.message


def test_a_misspelt_key_names_the_nearest():
    """The likeliest mistake is answered with what was meant."""
    assert refusal({"kind": "red", "sise": 2.0}).startswith("f.toml: sise: unknown key; did you mean 'size'?")


def test_a_misspelt_required_key_is_told_as_misspelt_and_not_as_missing():
    """`kimd` makes `kind` missing as well; the spelling is the mistake to mend."""
    assert "kimd: unknown key; did you mean 'kind'?" in refusal({"kimd": "red"})


def test_an_unknown_key_lists_those_allowed_in_its_table():
    """Of the table it stands in, and not of another."""
    said = refusal({"kind": "red", "inner": {"xyz": 1}})

    assert said == "f.toml: inner.xyz: unknown key; allowed here: depth, survivors"


def test_an_unknown_key_of_a_column_lists_that_columns_keys(raw):
    """Behind a mapping and a union the way to the allowed keys is found too."""
    raw["features"]["columns"]["age"]["rang"] = [0, 1]

    assert "features.columns.age.rang: unknown key; did you mean 'range'?" in refusal(raw, Study)


def test_a_missing_key_says_that_it_has_no_default():
    """Nothing is guessed."""
    assert refusal({}) == "f.toml: kind: missing, and it has no default"


def test_a_wrong_type_names_found_and_allowed():
    """Text is not turned into a number."""
    assert refusal({"kind": "red", "size": "2"}) == "f.toml: size: found '2', allowed: a valid number"


def test_an_array_keeps_its_items_strict():
    """The array may be a list; what is in it is not converted."""
    assert "widths.1: found '2'" in refusal({"kind": "red", "widths": [1, "2"]})


def test_a_boolean_is_no_number():
    """`size = true` is a slip, although Python would take it for 1."""
    assert "size: found True" in refusal({"kind": "red", "size": True})


def test_a_word_outside_the_list_shows_the_list():
    """One reads what to write instead."""
    said = refusal({"kind": "blue"})

    assert said == "f.toml: kind: found 'blue', allowed: 'red' or 'green'"


def test_a_number_out_of_range_shows_the_bound():
    """The bound, not only that there is one."""
    said = refusal({"kind": "red", "inner": {"depth": 0}})

    assert said == "f.toml: inner.depth: found 0, allowed: greater than or equal to 1"


def test_a_union_is_one_mistake_with_all_alternatives():
    """`survivors` fails as a word and as a number; the user made one mistake."""
    said = refusal({"kind": "red", "inner": {"survivors": "none"}})

    assert said == "f.toml: inner.survivors: found 'none', allowed: 'all' or a valid integer"


def test_several_mistakes_are_counted():
    """One line for the first, and how many wait behind it."""
    assert refusal({"kind": "blue", "size": "2", "inner": {"depth": 0}}).endswith("(and 2 more)")


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_a_number_that_is_not_finite_is_refused(number):
    """TOML can write them, and every comparison with NaN would let them pass."""
    assert f"size: found {number}" in refusal({"kind": "red", "size": float(number)})


def test_a_long_value_is_cut():
    """An error is one line."""
    assert len(refusal({"kind": "x" * 10_000})) < 200


def test_a_configuration_cannot_be_changed():
    """What was checked is what is used."""
    outer = parse(Outer, {"kind": "red"}, file="f.toml")

    with pytest.raises(ValueError, match="frozen"):
        outer.size = 2.0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"kind = ", "not valid TOML"),
        (b"kind = 'red'\nkind = 'red'", "not valid TOML"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, content, said):
    """The reader's own exceptions do not get out."""
    path = tmp_path / "f.toml"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=f"f.toml: {said}"):
        load(Outer, path)


def test_a_missing_file_names_the_command_that_makes_one(tmp_path):
    """Every refusal names what mends it."""
    with pytest.raises(ConfigError, match="no such file") as caught:
        load(Outer, tmp_path / "f.toml")

    assert caught.value.fix.startswith("lepton-fl init")


def test_a_folder_is_no_file(tmp_path):
    """An operating-system error is told like any other."""
    with pytest.raises(ConfigError, match="cannot be read"):
        load(Outer, tmp_path)
