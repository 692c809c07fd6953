"""`lepton-fl audit privacy`: the installed implementation against its own promise."""

from __future__ import annotations

from typing import Annotated

import typer

from lepton_fl.cli.options import Json
from lepton_fl.cli.terminal import fail, print_json, say
from lepton_fl.errors import ConfigError, VerificationFailed


def audit_privacy(
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            help="noise, sensitivity, sampling, ledger, one-run or many-run; repeated. Default: all.",
            metavar="CHECK",
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="The long form: minutes, and finds smaller faults.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of every draw: the same seed finds the same.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Audit the privacy of this installation: its noise, clipping, sampling and books; exit 7 if it fails.

    Touches no site's data: the records are the audit's own. A line for each property, with what was measured
    and what is allowed. What each check would find is in docs/audit.md, and in --json.
    """
    from dataclasses import asdict

    from lepton_fl.audit import CHECKS, audit

    for name in only or []:
        if name not in CHECKS:
            raise ConfigError.at("command line", "--only", found=name, allowed=", ".join(CHECKS))
    findings = []
    for finding in audit(only or (), seed=seed, full=full):
        findings.append(finding)
        if not as_json:
            typer.echo(f"{finding.verdict:<12}  {finding.check}: {finding.what}: {finding.statistic}")
    if as_json:
        print_json([asdict(finding) for finding in findings])
    wrong = [finding for finding in findings if finding.verdict != "pass"]
    if wrong:
        first = wrong[0]
        fail(
            f"{len(wrong)} of {len(findings)} properties do not hold or could not be seen, the first: "
            f"{first.check}: {first.what}",
            VerificationFailed.exit_code,
        )
    say(f"lepton-fl: {len(findings)} properties of this installation's privacy hold")
