"""Documents that say which test holds a promise name tests that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTOCOL = ROOT / "tests" / "protocol"
FOLDERS = {"i/": PROTOCOL / "integration", "s/": PROTOCOL / "session"}
"""By the letter before a test's name in docs/threat-model.md."""


def defined(folder):
    """All functions of the tests below a folder, and its files."""
    files = list(folder.rglob("test_*.py"))
    names = {
        name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    return names | {file.name for file in files}


def missing(text):
    """The tests that a document names and that are not where it says."""
    named = re.findall(r"(\b[is]/)?`(test_\w+(?:\.py)?)`", text)
    there = {letter: defined(folder) for letter, folder in {"": ROOT / "tests", **FOLDERS}.items()}
    return sorted(letter + name for letter, name in named if name not in there[letter])


@pytest.mark.parametrize("name", ["threat-model.md", "protocol.md"])
def test_a_named_test_is_there(name):
    text = (ROOT / "docs" / name).read_text()

    assert "`test_" in text
    assert missing(text) == []


def test_a_test_that_is_not_there_is_found():
    """Or is elsewhere."""
    said = "`test_of_nothing`, `test_none.py`, i/`test_two_rolls`, s/`test_two_rolls`, `test_two_rolls`"

    assert missing(said) == ["i/test_two_rolls", "test_none.py", "test_of_nothing"]
