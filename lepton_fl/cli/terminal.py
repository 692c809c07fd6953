"""What every command shares: errors as one line with an exit code, tables, and JSON."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import typer
from typer.core import TyperGroup

from lepton_fl.errors import ConfigError, LeptonError

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
"""The shell's code for a program that was interrupted: 128 + SIGINT."""
_DEBUG = "LEPTON_FL_DEBUG"


class Commands(TyperGroup):
    """A command group whose errors are one line each: never a traceback, always their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LeptonError as error:
            fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)
        except BrokenPipeError:
            # The reader of our output went away; keep Python from saying so at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except click.Abort:
            fail("interrupted", INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except Exception as error:  # noqa: BLE001 - the last resort: one line, and where to look
            if os.environ.get(_DEBUG):
                traceback.print_exc()
            fail(
                f"internal error: {type(error).__name__} (set {_DEBUG}=1 to see where; please report it)",
                1,
            )


def fail(message: str, code: int) -> NoReturn:
    """One plain line on standard error, and the exit code."""
    say(f"lepton-fl: {' '.join(message.split())}")
    raise typer.Exit(code)


def say(line: str) -> None:
    """A plain line on standard error: progress and remarks, apart from a command's own output."""
    sys.stderr.write(printable(line) + "\n")


def printable(text: str) -> str:
    """`text` without what moves a cursor, ends a line or turns the reading direction.

    Studies, files and servers are written by others: their words must not pass for ours.
    """
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def console(*, stderr: bool = False) -> Console:
    """A rich console that honours NO_COLOR and prints plain lines where there is no terminal."""
    from rich.console import Console

    plain = Console(stderr=stderr, highlight=False)
    # Without a terminal there is no width to fit: a table is not cut at 80 columns.
    return plain if plain.is_terminal else Console(stderr=stderr, highlight=False, width=160)


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()
) -> None:
    """A table on standard output; `right` are the columns to align right."""
    from rich.table import Table
    from rich.text import Text

    out = console()
    # Plain aligned lines where there is no terminal: frames are for eyes, not for grep.
    table = Table() if out.is_terminal else Table(box=None, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    out.print(Text(title, style="bold"), soft_wrap=True)
    out.print(table)


def print_json(value: object) -> None:
    """`value` as JSON on standard output, with what `printable` takes out in JSON's own escapes."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    shown = (c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
    sys.stdout.write("".join(shown) + "\n")


def make_writable(folder: Path) -> Path:
    """`folder`, made where absent.

    Raises:
        ConfigError: it cannot be made, or nothing can be written in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot write here: {error.strerror}",
            fix="name another folder, or make this one writable",
        ) from None
    return folder


def numbers(text: str, *, option: str) -> tuple[float, ...]:
    """`1,3,8` as numbers above zero; empty text is none.

    Raises:
        ConfigError: a part is no such number.
    """
    try:
        found = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = (0.0,)
    if any(not 0 < number < float("inf") for number in found):
        raise ConfigError.at(
            "command line", option, found=text, allowed="numbers above 0, separated by commas"
        )
    return found


def whole_numbers(text: str, *, option: str) -> tuple[int, ...]:
    """`5000,800` as whole numbers of at least 1; empty text is none.

    Raises:
        ConfigError: a part is no such number.
    """
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() and int(part) >= 1 for part in found):
        raise ConfigError.at(
            "command line", option, found=text, allowed="whole numbers of at least 1, separated by commas"
        )
    return tuple(int(part) for part in found)


def write_new(folder: Path, texts: dict[str, str]) -> None:
    """Write files into a folder that has none of them yet; made where absent."""
    from lepton_fl.files import write_atomic

    make_writable(folder)
    if there := [name for name in texts if (folder / name).exists()]:
        raise ConfigError(f"{folder / there[0]}: exists, and is not overwritten", fix="name another folder")
    for name, text in texts.items():
        make_writable((folder / name).parent)
        write_atomic(folder / name, text.encode())
        say(f"wrote {folder / name}")
