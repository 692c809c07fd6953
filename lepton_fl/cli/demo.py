"""`lepton-fl demo`: a deployment to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lepton_fl.cli.options import Json
from lepton_fl.cli.terminal import Commands

demo_app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    suggest_commands=False,
    help="A whole federation on this machine, to look at.",
)


@demo_app.callback()
def _demo() -> None:
    # With one command alone typer would leave its name out.
    pass


@demo_app.command("network")
def demo_network(
    sites: Annotated[
        int | None,
        typer.Option(
            help="Deal the patients to so many artificial hospitals.",
            min=4,
            max=16,
            show_default="4, the real ones",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of the study.", min=20, max=10_000)] = 400,
    insecure_seed: Annotated[
        int | None,
        typer.Option(
            metavar="SEED",
            help="Draw the sites' noise from a seed, and hold the model against `simulate`. No privacy: the "
            "model is marked, and is never promoted.",
            min=0,
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where all files go, kept; new or empty (default: a temporary folder, removed)."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the temporary folder.")] = False,
    as_json: Json = False,
) -> None:
    """Server and agents as processes on loopback, with real certificates; one agent is killed in mid-run.

    Every step is a command that you could type, and is shown. Four hospitals are invited, join and are
    approved; each approves a study; while it runs, one of the agents is killed with -9 and started again;
    the run completes. Then: what each of them saw.

    Example: lepton-fl demo network --insecure-seed 7
    """
    from lepton_fl.cli.network import Demo, run_demo

    run_demo(Demo(sites=sites, rounds=rounds, seed=insecure_seed), folder, keep=keep, as_json=as_json)
