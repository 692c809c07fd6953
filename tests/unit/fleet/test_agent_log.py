"""What an agent writes into its log."""

import json
import logging
import sys

from lepton_fl.fleet.logs import JsonLines


def test_an_unforeseen_error_is_logged_without_its_words():
    """They may quote a record."""
    try:
        int("patient 4711")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f.py", 1, "internal error", (), sys.exc_info())

    line = JsonLines().format(record)

    assert "4711" not in line
    assert json.loads(line)["error"] == "ValueError"
    assert json.loads(line)["at"][0].startswith("test_agent_log.py:")


def test_no_word_of_others_fills_the_log():
    """A server's study may be a megabyte, and what is wrong with it is told in its own words."""
    record = logging.LogRecord("x", logging.WARNING, "f.py", 1, "offer refused", (), None)
    record.reason = "x" * 1_000_000

    assert len(JsonLines().format(record)) < 5_000
