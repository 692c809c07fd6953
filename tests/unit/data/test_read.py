import pytest

from lepton_fl.data import read_csv
from lepton_fl.errors import ConfigError, DataError

HEADER = "age,cp,chol,ill\n"


def cells(contract, path, **options):
    """By column, all cells of the file, batch after batch."""
    found = {name: [] for name in contract.needed}
    for batch in read_csv(path, contract, **options):
        for name, texts in batch.cells.items():
            found[name] += texts
    return found


def test_only_needed_columns_are_kept(contract, write):
    """What the study does not need is never held."""
    path = write("name,age,cp,chol,ill\nx,50,1,200,0\n")

    assert cells(contract, path) == {"age": ["50"], "chol": ["200"], "cp": ["1"], "ill": ["0"]}


def test_batches_are_bounded(contract, write):
    """No batch holds more rows than asked for, and none is lost."""
    path = write(HEADER + "50,1,200,0\n" * 5)

    assert [len(batch) for batch in read_csv(path, contract, batch_rows=2)] == [2, 2, 1]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lines_may_end_either_way(contract, write, newline):
    """A file from Windows is read like any other."""
    path = write((HEADER + "50,1,200,0\n").replace("\n", newline))

    assert cells(contract, path)["ill"] == ["0"]


def test_a_byte_order_mark_is_no_part_of_the_first_header(contract, write):
    """Spreadsheets write one."""
    path = write(b"\xef\xbb\xbf" + (HEADER + "50,1,200,0\n").encode())

    assert cells(contract, path)["age"] == ["50"]


def test_blank_lines_are_skipped(contract, write):
    """A line with nothing on it is no record."""
    path = write(HEADER + "50,1,200,0\n\n60,1,200,1\n\n")

    assert cells(contract, path)["ill"] == ["0", "1"]


def test_quoted_cells_may_hold_the_delimiter(contract, write):
    """CSV's own quoting is obeyed."""
    path = write(HEADER + '50,"1,5",200,0\n')

    assert cells(contract, path)["cp"] == ["1,5"]


def test_another_delimiter(contract, write):
    """Semicolons, where commas are decimal."""
    path = write((HEADER + "50,1,200,0\n").replace(",", ";"))

    assert cells(contract, path, delimiter=";")["age"] == ["50"]


def test_columns_are_mapped_to_the_institutions_headers(contract, write):
    """The study's name need not be the institution's."""
    path = write("ALTER,cp,chol,ill\n50,1,200,0\n")

    assert cells(contract, path, columns={"age": "ALTER"})["age"] == ["50"]


def test_a_mapping_for_another_study_is_ignored(contract, write):
    """One site.toml serves several studies."""
    path = write(HEADER + "50,1,200,0\n")

    assert cells(contract, path, columns={"weight": "KG"})["age"] == ["50"]


def refusal(contract, path, **options):
    with pytest.raises((ConfigError, DataError)) as caught:
        list(read_csv(path, contract, **options))
    return str(caught.value)


def test_a_missing_file_is_refused(contract, tmp_path):
    """The path is a matter of configuration."""
    with pytest.raises(ConfigError, match=r"none\.csv: cannot be read: No such file"):
        list(read_csv(tmp_path / "none.csv", contract))


def test_a_folder_is_refused(contract, tmp_path):
    """A folder is no table."""
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_csv(tmp_path, contract))


def test_an_empty_file_is_refused(contract, write):
    """Nothing in it, not even a header."""
    assert "the file is empty" in refusal(contract, write(""))


def test_text_that_is_not_utf8_is_refused(contract, write):
    """Latin-1 is refused rather than guessed."""
    assert "not UTF-8" in refusal(contract, write(HEADER.encode() + b"50,\xe4,200,0\n"))


def test_a_nul_byte_is_refused(contract, write):
    """A spreadsheet's own format is no text."""
    assert "line 2: a NUL byte" in refusal(contract, write(HEADER + "50,\0,200,0\n"))


@pytest.mark.parametrize("row", ["50,1,200", "50,1,200,0,9"])
def test_a_ragged_line_is_refused_by_its_number(contract, write, row):
    """A cell too few or too many shifts every cell after it."""
    assert "line 3:" in refusal(contract, write(f"{HEADER}50,1,200,0\n{row}\n"))


def test_an_open_quote_is_refused(contract, write):
    """It would swallow every record after it."""
    assert "bad quoting" in refusal(contract, write(HEADER + '50,"1,200,0\n50,1,200,0\n'))


def test_a_header_twice_is_refused(contract, write):
    """Nobody knows which of the two is meant."""
    assert "'age' stands there 2 times" in refusal(contract, write("age,age,cp,chol,ill\n"))


def test_a_file_without_header_is_refused_without_showing_it(contract, write):
    """The first line is then somebody's record."""
    said = refusal(contract, write("agee,1,200,0\n60,1,200,1\n"))

    assert "holds data" in said
    assert "agee" not in said


def test_a_missing_column_is_refused_with_near_headers(contract, write):
    """The person who maps the columns sees what there is."""
    said = refusal(contract, write("AGE_Y,cp,chol,ill\n50,1,200,0\n"), columns={})

    assert "no column 'age'; near it: 'AGE_Y'" in said
    assert 'fix: map it in site.toml: [data.columns] age = "..."' in said


def test_where_nobody_maps_columns_the_file_and_the_study_are_named(contract, write):
    """A simulation's tables have no site.toml to mend."""
    path = write("AGE_Y,cp,chol,ill\n50,1,200,0\n")
    said = refusal(contract, path)

    assert f"fix: call it 'age' in {path}, or as it is called there in study {contract.study}" in said
    assert "site.toml" not in said


def test_a_mapped_header_that_is_missing_is_named_with_its_column(contract, write):
    """Both names are needed to mend the map."""
    said = refusal(contract, write(HEADER), columns={"age": "ALTER"})

    assert "no column 'ALTER' (for 'age')" in said


def test_further_missing_columns_are_counted(contract, write):
    """One line, but it says how much else is wrong."""
    assert "(and 1 more)" in refusal(contract, write("age,cp,x\n"))


def test_a_missing_unit_is_said_first(make_contract, by_patient, write):
    """Without it the study's promise cannot be kept."""
    contract = make_contract(privacy=by_patient)

    said = refusal(contract, write("cp,chol,ill\n"))

    assert "the study's privacy unit cannot be protected here: no column 'patient'" in said


def test_the_wrong_delimiter_is_recognised(contract, write):
    """A header that is one cell was most likely cut at the wrong character."""
    said = refusal(contract, write(HEADER.replace(",", ";")))

    assert "the header is one cell" in said
    assert "fix: delimiter ';'" in said


def test_a_delimiter_of_two_characters_is_refused(contract, write):
    """The csv format knows one character only."""
    assert "allowed: one character" in refusal(contract, write(HEADER), delimiter="||")


def test_one_header_for_two_columns_is_refused(contract, write):
    """The label read as a feature would be learnt at once."""
    said = refusal(contract, write(HEADER), columns={"age": "ill"})

    assert "'age' and 'ill' are both read from the header 'ill'" in said
