"""What is written to a terminal says what we say, and nothing that others would have us say."""

import json

from lepton_fl.cli.terminal import print_json


def test_json_moves_no_cursor(capsys):
    """JSON itself lets C1 controls and marks of reading direction through; the value stays the same."""
    value = {"purpose": "a\x1b[2J\x9b2J\u202e\U000e0001 é 患者\nb"}

    print_json(value)

    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert "é 患者" in out
    assert json.loads(out) == value
