"""The command line. Heavy libraries are imported by the command that needs them: `--help` is instant."""

from lepton_fl.cli.commands import app, main

__all__ = ["app", "main"]
