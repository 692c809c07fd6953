"""`lepton-fl enroll`: sites come in, and go out."""

from __future__ import annotations

import re
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from lepton_fl.cli.desk import open_desk
from lepton_fl.cli.options import SERVER_TOML, Json, PassphraseFile, RootFile, ServerFile, SiteFile
from lepton_fl.cli.passphrase import passphrase
from lepton_fl.cli.terminal import Commands, fail, print_json, print_table, say
from lepton_fl.errors import ConfigError, ConnectionFailed, IdentityRefused

POLL_S = 2.0
"""Between two questions of a site that waits for approval."""
_STDIN = "-"
_MAX_LIFE = timedelta(days=30)

enroll_app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    suggest_commands=False,
    help="Invite sites, approve and revoke them (on the server's machine); join (at a site).",
)
SiteName = Annotated[str, typer.Argument(metavar="SITE")]


@enroll_app.command("invite")
def enroll_invite(
    site: SiteName,
    config: ServerFile = SERVER_TOML,
    ttl: Annotated[str, typer.Option(help="How long the token is good for: 30m, 72h, 7d.")] = "72h",
) -> None:
    """Print a token by which SITE may ask, once, to join.

    Example: lepton-fl enroll invite bank-1 --ttl 24h -c server.toml
    """
    from lepton_fl.fleet.pki.authority import read_consortium
    from lepton_fl.fleet.server.config import OFF
    from lepton_fl.study import NAME_PATTERN

    if not re.fullmatch(NAME_PATTERN, site):
        raise ConfigError.at(
            "command line",
            "SITE",
            found=site,
            allowed="1 to 64 letters, digits, dots, dashes and underscores",
        )
    life = _duration(ttl)
    with open_desk(config) as desk:
        consortium = read_consortium(desk.files.pki)
        token = desk.register.invite(site, consortium=consortium, life=life, now=datetime.now(UTC))
    typer.echo(str(token))
    listen = desk.files.config.listen.enrolment
    port = "" if listen == OFF else listen.rpartition(":")[2]
    say(f"for {site}, once, within {ttl}; who has it can ask in its place: send it where others cannot read")
    say(f"there: lepton-fl enroll join TOKEN --server HOST:{port or 'PORT'} -c site.toml")
    if not port:
        say(f"{config}: listen.enrolment is off, so no site can join")


@enroll_app.command("list")
def enroll_list(config: ServerFile = SERVER_TOML, as_json: Json = False) -> None:
    """Sites that are invited, asking, enrolled or revoked.

    Example: lepton-fl enroll list -c server.toml
    """
    with open_desk(config) as desk:
        found = desk.sites()
    if as_json:
        print_json([row.as_json() for row in found])
        return
    rows = [
        (
            row.site,
            row.state,
            "" if row.party is None else str(row.party),
            f"{row.since:%Y-%m-%d %H:%M}",
            "" if row.until is None else f"{row.until:%Y-%m-%d %H:%M}",
            row.keys,
        )
        for row in found
    ]
    print_table("Sites", ("site", "state", "party", "since (UTC)", "until (UTC)", "keys"), rows)


@enroll_app.command("join")
def enroll_join(
    token: Annotated[str, typer.Argument(help="The token, or - to read it from standard input.")],
    config: SiteFile,
    server: Annotated[str, typer.Option(help="The server's enrolment port.", metavar="HOST:PORT")],
    wait: Annotated[bool, typer.Option(help="Wait until the operator has decided.")] = True,
) -> None:
    """Make this site's keys, here, and ask to join; go on with the same command if interrupted.

    Example: lepton-fl enroll join - --server fl.example.org:9701 -c site.toml
    """
    # Before the site's part, which imports gRPC: it reads its environment once.
    from lepton_fl.fleet.agent.enrol import Joining
    from lepton_fl.fleet.pki.tokens import Token
    from lepton_fl.site.config import load_site_config

    invited = Token.read(sys.stdin.readline() if token == _STDIN else token)
    if not config.exists():
        raise ConfigError(f"{config}: no such file", fix="lepton-fl init DIR --template site")
    site = load_site_config(config)
    if invited.site != site.site.id:
        raise IdentityRefused(
            f"invitation: is for {invited.site}, and {config} says site.id = {site.site.id!r}",
            fix=f"set site.id in {config}, or ask for another invitation",
        )
    joining = Joining(invited, server, config.parent / site.server.pki)
    member = joining.ask(datetime.now(UTC))
    if member is None:
        say(f"{invited.site} has asked {server} to join; keys {joining.keys}")
        say(
            "compare these with the operator by voice, who then types: "
            f"lepton-fl enroll approve {invited.site}"
        )
        if not wait:
            say("later, the same command again fetches the certificates")
            return
        say("waiting; Ctrl-C and the same command later do no harm")
    while member is None:
        time.sleep(POLL_S)
        try:
            member = joining.ask(datetime.now(UTC))
        except IdentityRefused:
            raise
        except ConnectionFailed:
            # It answered before; a restart of the server is no reason to begin again.
            continue
    typer.echo(f"{member.site} is enrolled in {member.consortium.name} as party {member.party}")
    say(f"certificate good until {member.certificate.not_after:%Y-%m-%d %H:%M} UTC; the agent renews it")
    say(f"agents' port of the server: {member.fleet_address}")


@enroll_app.command("approve")
def enroll_approve(
    site: SiteName,
    config: ServerFile = SERVER_TOML,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    passphrase_file: PassphraseFile = None,
    root: RootFile = None,
) -> None:
    """Make SITE a member, with the keys that its people read out.

    Example: lepton-fl enroll approve bank-1 -c server.toml
    """
    from lepton_fl.fleet.pki.authority import Authority

    with open_desk(config) as desk:
        keys = desk.register.requested(site)
        typer.echo(f"{site} asks to join with keys {keys}")
        if not yes and not typer.confirm("Has the site read out the same?", default=False):
            fail(f"{site}: not approved", 5)
        authority = Authority.open(desk.files.pki, passphrase(passphrase_file), root=root)
        roster = desk.register.approve(site, keys=keys, authority=authority, now=datetime.now(UTC))
    members = ", ".join(member.name for member in roster.members)
    typer.echo(f"approved {site}; roster {roster.version}: {members}")


@enroll_app.command("reject")
def enroll_reject(site: SiteName, config: ServerFile = SERVER_TOML) -> None:
    """Refuse the request of SITE, for good.

    Example: lepton-fl enroll reject bank-1 -c server.toml
    """
    with open_desk(config) as desk:
        desk.register.reject(site)
    typer.echo(f"rejected {site}")


@enroll_app.command("revoke")
def enroll_revoke(
    site: SiteName,
    config: ServerFile = SERVER_TOML,
    now: Annotated[
        bool, typer.Option("--now", help="Leave the roster, and its passphrase, for later.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    root: RootFile = None,
) -> None:
    """Put SITE out: the server refuses it at once, and a new roster tells the other sites.

    Example: lepton-fl enroll revoke bank-1 -c server.toml
    """
    from lepton_fl.fleet.pki.authority import Authority

    with open_desk(config) as desk:
        # First what needs no passphrase: a site that must go is out before anybody has found it.
        fresh = desk.register.revoke(site, datetime.now(UTC))
        typer.echo(f"{site}: {'refused from now on' if fresh else 'was revoked before'}")
        if now:
            say(f"the roster that the other sites hold still names it, until: lepton-fl enroll revoke {site}")
            return
        authority = Authority.open(desk.files.pki, passphrase(passphrase_file), root=root)
        roster = desk.register.sign_roster(authority)
    if roster is not None:
        typer.echo(f"roster {roster.version}: {', '.join(m.name for m in roster.members) or 'no member'}")


def _duration(text: str) -> timedelta:
    found = re.fullmatch(r"([1-9]\d{0,5})([mhd])", text)
    life = None
    if found:
        life = (
            int(found[1])
            * {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}[found[2]]
        )
    if life is None or life > _MAX_LIFE:
        raise ConfigError.at("command line", "--ttl", found=text, allowed="as 30m, 72h or 7d, at most 30d")
    return life
