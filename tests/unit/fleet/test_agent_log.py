"""What an agent writes into its log."""

import json
import logging
import sys

import pytest

from lepton_fl.errors import ConfigError
from lepton_fl.fleet.logs import JsonLines
from lepton_fl.training.device import choose_device


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


@pytest.mark.parametrize("asked", ["cuda", "mps"])
def test_a_device_that_is_not_used_is_not_claimed(asked):
    """Training of this release runs on the CPU."""
    with pytest.raises(ConfigError, match=r"runtime\.device"):
        choose_device(asked, file="site.toml")


def test_an_accelerator_that_lies_idle_is_told(monkeypatch):
    """auto is honest."""
    monkeypatch.setattr("lepton_fl.training.device.accelerator", lambda: "cuda")

    device = choose_device("auto", file="site.toml")

    assert device.name == "cpu"
    assert "cuda is there" in device.said
