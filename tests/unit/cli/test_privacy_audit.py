"""`audit privacy`: a line for each property, exit 7 where one does not hold, and never a traceback."""

import json

import pytest
from typer.testing import CliRunner

from lepton_fl.audit import CHECKS, Finding
from lepton_fl.cli.commands import app
from lepton_fl.errors import ProtocolError

HELD = Finding.of("many-run", "epsilon", passed=True, statistic="1 of 2", power="more")
BROKEN = Finding.of("many-run", "epsilon", passed=False, statistic="3 of 2", power="more")
UNSEEN = Finding(check="many-run", what="epsilon", verdict="inconclusive", statistic="none", power="none")


@pytest.fixture
def run(monkeypatch):
    """The command, with checks that find what is given."""

    def run(*findings, options=("--only", "many-run")):
        monkeypatch.setitem(CHECKS, "many-run", lambda seed, *, full: iter(findings))
        return CliRunner().invoke(app, ["audit", "privacy", *options])

    return run


def test_what_holds_is_said_and_exits_with_0(run):
    result = run(HELD)

    assert result.exit_code == 0
    assert result.stdout == "pass          many-run: epsilon: 1 of 2\n"


@pytest.mark.parametrize("found", [BROKEN, UNSEEN], ids=["broken", "not seen"])
def test_what_does_not_hold_or_was_not_seen_exits_with_7(run, found):
    result = run(HELD, found)

    assert result.exit_code == 7
    assert found.verdict in result.stdout
    assert result.stderr.count("\n") == 1


def test_an_implementation_that_raises_is_one_line(monkeypatch):
    """No traceback, and not its text, which may be anything."""

    def raises(seed, *, full):
        yield HELD
        raise ProtocolError("secret")

    monkeypatch.setitem(CHECKS, "many-run", raises)
    result = CliRunner().invoke(app, ["audit", "privacy", "--only", "many-run"])

    assert result.exit_code == 7
    assert "inconclusive  many-run: the check runs to its end: stopped by ProtocolError" in result.stdout
    assert "secret" not in result.output
    assert "Traceback" not in result.output


def test_json_has_each_finding_whole(run):
    result = run(HELD, options=("--only", "many-run", "--json"))

    (found,) = json.loads(result.stdout)
    assert found == {
        "check": "many-run",
        "what": "epsilon",
        "verdict": "pass",
        "statistic": "1 of 2",
        "power": "more",
    }


def test_a_check_that_is_none_is_refused(run):
    result = run(HELD, options=("--only", "honesty"))

    assert result.exit_code == 3
    assert "honesty" in result.stderr


def test_options_reach_the_checks(monkeypatch):
    asked = []

    def spy(seed, *, full):
        asked.append((seed, full))
        yield HELD

    monkeypatch.setitem(CHECKS, "one-run", spy)
    CliRunner().invoke(app, ["audit", "privacy", "--only", "one-run", "--seed", "7", "--full"])

    assert asked == [(7, True)]
