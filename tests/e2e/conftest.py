"""The command line as a user runs it, in an empty folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from click.testing import CliRunner

from lepton_fl.cli import app

# Made once: typer's own runner makes all commands anew for each.
_COMMAND = typer.main.get_command(app)


@dataclass(frozen=True)
class Ended:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line on standard error: the error, where there is one."""
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


Lepton = Callable[..., Ended]


@pytest.fixture
def lepton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lepton:
    """Run `lepton-fl ARGS` in an empty folder; in this process, so that torch is imported once."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str | Path, typed: str | None = None) -> Ended:
        done = CliRunner().invoke(_COMMAND, [str(arg) for arg in args], input=typed)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Ended(done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture
def short_study(tmp_path: Path, lepton: Lepton) -> Path:
    """The heart study of the diagnosis template, three rounds long."""
    lepton("init", "study", "--template", "diagnosis")
    path = tmp_path / "study" / "study.toml"
    path.write_text(path.read_text().replace("rounds = 50", "rounds = 3"))
    return path
