"""The passphrase of a consortium's root: from a file, from the environment, or typed unseen."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from lepton_fl.errors import ConfigError

VARIABLE = "LEPTON_FL_CA_PASSPHRASE"


def passphrase(file: Path | None, *, twice: bool = False) -> str:
    """The passphrase; `twice` where a slip of the finger would lock the operator out.

    Raises:
        ConfigError: the file cannot be read, others may read it, or there is nobody to ask.
    """
    if file is not None:
        from lepton_fl.fleet.pki.authority import read_secret

        try:
            return read_secret(file).decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise ConfigError(f"{file}: not UTF-8 text") from None
    if given := os.environ.get(VARIABLE):
        return given
    if not sys.stdin.isatty():
        raise ConfigError(
            "no terminal to ask for the passphrase on", fix=f"--passphrase-file FILE, or {VARIABLE}"
        )
    asked: str = typer.prompt(
        "Passphrase of the consortium's root", hide_input=True, confirmation_prompt=twice, err=True
    )
    return asked
