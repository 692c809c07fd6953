"""`lepton-fl client`: the agent of one institution, and what its own people say to it."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fl.cli.options import Json, OfSite, ReceiptsFile, SiteFile
from lepton_fl.cli.terminal import Commands, fail, print_json, print_table, printable, say
from lepton_fl.errors import ConfigError, ConnectionFailed

if TYPE_CHECKING:
    from pathlib import Path

    from lepton_fl.fleet.agent.process import Started

client_app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    suggest_commands=False,
    help="Run this institution's agent, look at it, pause it. It trains on the institution's own table and "
    "refuses whatever policy.toml or the privacy budget forbids.",
)


@client_app.command("start")
def client_start(
    config: SiteFile,
    give_up_after: Annotated[
        float | None,
        typer.Option(
            help="Seconds without a connection after which to end (exit 5). Default: try for ever.",
            metavar="SECONDS",
            min=0.1,
        ),
    ] = None,
) -> None:
    """Run the agent in this terminal, or under systemd, until it is told to stop.

    It connects to the consortium's server and stays connected; a server that is down is tried again for
    ever. Its log goes to standard error, or to the file named by `log` under [runtime] in site.toml.

    Example: lepton-fl client start -c /etc/lepton-fl/site.toml
    """
    from lepton_fl.fleet.agent.process import start

    start(config, give_up_after=give_up_after, show=_banner)


@client_app.command("status")
def client_status(
    config: SiteFile,
    wait: Annotated[
        float,
        typer.Option(help="Seconds to wait until an agent runs and is connected.", min=0, metavar="SECONDS"),
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """What the running agent does. Exit 5 where none runs; with --wait, where it is not connected by then.

    Example: lepton-fl client status --wait 60 -c site.toml
    """
    found = _status(config, wait)
    _show(found, as_json=as_json)
    if wait and not found["connected"]:
        fail(f"the agent is not connected: {found['not_connected_because']}", ConnectionFailed.exit_code)


def _status(config: Path, wait: float) -> dict[str, Any]:
    until = time.monotonic() + wait
    while True:
        try:
            found = _ask(config, "status")
        except ConnectionFailed:
            if time.monotonic() >= until:
                raise
        else:
            if found["connected"] or time.monotonic() >= until:
                return found
        time.sleep(min(0.2, max(0.0, until - time.monotonic())))


@client_app.command("pause")
def client_pause(config: SiteFile, as_json: Json = False) -> None:
    """Take part in nothing new until `client resume`, also after a restart. What was begun is finished.

    Example: lepton-fl client pause -c site.toml
    """
    _show(_ask(config, "pause"), as_json=as_json)


@client_app.command("resume")
def client_resume(config: SiteFile, as_json: Json = False) -> None:
    """Take part again.

    Example: lepton-fl client resume -c site.toml
    """
    _show(_ask(config, "resume"), as_json=as_json)


@client_app.command("stop")
def client_stop(config: SiteFile) -> None:
    """End the agent: it finishes what it works on, says goodbye, and is gone.

    Example: lepton-fl client stop -c site.toml
    """
    from lepton_fl.fleet.agent.local import wait_until_gone
    from lepton_fl.site.config import files_of

    pid = _ask(config, "stop")["pid"]
    say(f"agent {pid} is stopping")
    wait_until_gone(files_of(config).state)
    say("stopped")


@client_app.command("receipts")
def client_receipts(site: OfSite, file: ReceiptsFile, config: SiteFile) -> None:
    """Write down all that this site has seen of another site's ledger: for that one's people, to recover it.

    Also while the agent runs.

    Example: lepton-fl client receipts bank-b bank-b.receipts -c /etc/lepton-fl/site.toml
    """
    from lepton_fl.cli.budgets import write_receipts
    from lepton_fl.fleet.agent.ledger import open_witness
    from lepton_fl.fleet.agent.member import EnrolledSite
    from lepton_fl.site.config import files_of

    files, member = files_of(config), EnrolledSite.load(config)
    write_receipts(files.witness, lambda: open_witness(member, files.witness), site, file)


@client_app.command("doctor")
def client_doctor(config: SiteFile, as_json: Json = False) -> None:
    """Check files, modes, certificate, clock, network, TLS, versions, device, disk and data, one line each.

    Shows no record and changes nothing. Exit 3 where configuration fails, 5 where identity or connection
    does.

    Example: lepton-fl client doctor -c site.toml
    """
    from lepton_fl.fleet.agent.doctor import examine

    found = examine(config)
    if as_json:
        print_json([check.as_json() for check in found])
    else:
        for check in found:
            fix = f" (fix: {check.fix})" if check.fix else ""
            typer.echo(printable(f"{check.verdict:4} {check.about}: {check.found}{fix}"))
    code = max((check.exit_code for check in found), default=0)
    if code:
        failed = [check.about for check in found if check.exit_code]
        fail(f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}", code)


def _ask(config: Path, command: str) -> dict[str, Any]:
    from lepton_fl.fleet.agent.local import ask
    from lepton_fl.site.config import files_of

    if not config.exists():
        raise ConfigError(f"{config}: no such file", fix="lepton-fl init DIR --template site")
    return ask(files_of(config).state, command)


def _show(status: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(status)
        return
    studies = status.pop("studies", [])
    for name, value in status.items():
        if value != "":
            typer.echo(printable(f"{name.replace('_', ' ')}: {value}"))
    if studies:
        rows = [(s["name"], s["study"][:12], s["state"], s["reason"]) for s in studies]
        print_table("Studies offered by the server", ("study", "id", "here", "why"), rows)


def _banner(started: Started) -> None:
    """Who this is, where it goes, and what binds it; on standard error."""
    from lepton_fl import __version__
    from lepton_fl.secure_rounds import what_hides

    site, member, policy = started.site, started.member, started.site.policy
    require, budget = policy.require, policy.budget
    spent = site.ledger.spent(policy.data.id, budget.delta_total)
    until = member.identity.certificate.not_after
    days = (until - datetime.now(UTC)).days
    units = ", ".join(require.privacy_units)
    say(f"lepton_fl {__version__}: agent of {site.name}")
    consortium = member.identity.consortium
    say(f"consortium: {consortium.name}, fingerprint {consortium.fingerprint.hex()}")
    say(f"server: {member.address}; this site's certificate is good until {until:%Y-%m-%d} ({days} days)")
    say(f"device: {started.device.said}")
    say(
        f"policy: {site.policy_file}: at least {require.min_sites} sites, approval {require.approval}, "
        f"metrics {policy.release.metrics}, models {', '.join(policy.release.allow_models)}"
    )
    say(
        f"budget of {policy.data.id}: epsilon {spent:.3f} of {budget.epsilon_total:g} spent at delta "
        f"{budget.delta_total:g}, per unit ({units}) of this site, over all studies; "
        f"at most {budget.epsilon_per_study:g} a study"
    )
    if not require.differential_privacy:
        say(
            "policy.toml allows studies without noise, whose updates can show records "
            "(require.differential_privacy = false)"
        )
    if policy.release.metrics == "exact":
        say("policy.toml lets evaluation figures leave without noise (release.metrics = 'exact')")
    if require.secure_aggregation:
        say(
            f"updates leave in sums over at least {require.min_sites} sites, or not at all "
            "(require.secure_aggregation = true)"
        )
    else:
        say(
            "policy.toml allows studies without secure aggregation, in which the server sees each update of "
            "this site (require.secure_aggregation = false)"
        )
    for offered in started.offered:
        if offered.state != "refused":
            say(printable(f"study {offered.study.study.name}: {what_hides(offered.study)}"))
