"""`lepton-fl ca`: the consortium's root, its issuing authority and the server's certificate."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from lepton_fl.cli.desk import open_desk, server_files
from lepton_fl.cli.enroll import enroll_revoke
from lepton_fl.cli.options import SERVER_TOML, Json, PassphraseFile, RootFile, ServerFile
from lepton_fl.cli.passphrase import passphrase
from lepton_fl.cli.terminal import Commands, print_json, print_table, printable, say
from lepton_fl.errors import ConfigError

ca_app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    suggest_commands=False,
    help="A consortium's certificates, on the server's machine.",
)

Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", help="Name or address by which sites reach the server; may be repeated."),
]


@ca_app.command("init")
def ca_init(
    config: ServerFile = SERVER_TOML,
    host: Hosts = None,
    passphrase_file: PassphraseFile = None,
    root: RootFile = None,
) -> None:
    """Make a consortium: its root under a passphrase, and the server's certificate.

    Example: lepton-fl ca init --host fl.example.org -c server.toml
    """
    from lepton_fl.fleet.pki.authority import Authority, spoken

    with open_desk(config) as desk:
        files = desk.files
        if desk.register.signed_roster() is not None:
            raise ConfigError(
                f"{files.database}: has the members of an earlier consortium",
                fix=f"move {files.state} away, or bring back the {files.pki} that goes with it",
            )
    if not host:
        host = ["localhost", "127.0.0.1"]
        say("no --host: the server's certificate is good on this machine only")
    authority = Authority.create(
        files.pki,
        name=files.config.server.name,
        hosts=host,
        passphrase=passphrase(passphrase_file, twice=True),
        now=datetime.now(UTC),
        root=root,
    )
    sealed = root or files.pki / "root.sealed"
    typer.echo(f"consortium {authority.consortium.name}: {authority.consortium.fingerprint.hex()}")
    typer.echo(f"short: {spoken(authority.consortium.fingerprint)}")
    say(f"wrote {files.pki}; {sealed} may be moved to a safe place, and is then named with --root FILE")
    say("without that file and its passphrase no site can be approved: keep a copy of both, apart")
    say(f"next: lepton-fl enroll invite SITE -c {config}")


@ca_app.command("show")
def ca_show(config: ServerFile = SERVER_TOML, as_json: Json = False) -> None:
    """The consortium: its fingerprint, its server's hosts, its members.

    Example: lepton-fl ca show -c server.toml
    """
    from lepton_fl.fleet.pki.authority import ServerIdentity, spoken

    with open_desk(config) as desk:
        identity = ServerIdentity.load(desk.files.pki)
        roster = desk.register.roster(identity.consortium)
    found: dict[str, object] = {
        "consortium": identity.consortium.name,
        "fingerprint": identity.consortium.fingerprint.hex(),
        "short": spoken(identity.consortium.fingerprint),
        "hosts": identity.hosts,
        "roster": roster.version if roster else 0,
        "members": [member.name for member in roster.members] if roster else [],
    }
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        typer.echo(printable(f"{name}: {', '.join(value) if isinstance(value, list) else value}"))


@ca_app.command("list")
def ca_list(config: ServerFile = SERVER_TOML, as_json: Json = False) -> None:
    """The certificates in use and when they end.

    Example: lepton-fl ca list -c server.toml
    """
    from lepton_fl.fleet.pki.authority import ServerIdentity

    with open_desk(config) as desk:
        identity = ServerIdentity.load(desk.files.pki)
        sites = [row for row in desk.sites() if row.state == "enrolled"]
    ends = [
        ("root", identity.consortium.name, identity.consortium.root.not_valid_after_utc),
        ("issuing", identity.consortium.name, identity.issuing.not_valid_after_utc),
        ("server", ", ".join(identity.hosts), identity.not_after),
        *(("site", row.site, row.until) for row in sites),
    ]
    if as_json:
        print_json(
            [
                {"kind": kind, "of": of, "not_after": None if until is None else until.isoformat()}
                for kind, of, until in ends
            ]
        )
        return
    rows = [
        (kind, of, "not fetched yet" if end is None else f"{end:%Y-%m-%d %H:%M}") for kind, of, end in ends
    ]
    print_table("Certificates", ("kind", "of", "until (UTC)"), rows)


@ca_app.command("issue")
def ca_issue(config: ServerFile = SERVER_TOML, host: Hosts = None) -> None:
    """A new key and certificate for the server, for the same hosts or others; it need not stop.

    Example: lepton-fl ca issue --host fl.example.org --host 192.0.2.7 -c server.toml
    """
    from lepton_fl.fleet.pki.authority import Issuing, ServerIdentity

    files = server_files(config)
    Issuing.open(files.pki).issue_server(host or ServerIdentity.load(files.pki).hosts, datetime.now(UTC))
    typer.echo(f"server's certificate for {', '.join(ServerIdentity.load(files.pki).hosts)}")


@ca_app.command("renew")
def ca_renew(
    config: ServerFile = SERVER_TOML, passphrase_file: PassphraseFile = None, root: RootFile = None
) -> None:
    """The issuing authority's certificate for two more years; what it has issued stays good.

    Example: lepton-fl ca renew --root /media/safe/root.sealed -c server.toml
    """
    from lepton_fl.fleet.pki.authority import Authority

    files = server_files(config)
    authority = Authority.open(files.pki, passphrase(passphrase_file), root=root)
    issuing = authority.renew_issuing(datetime.now(UTC))
    typer.echo(f"issuing certificate good until {issuing.certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")


# Where it is looked for: the same command.
ca_app.command("revoke")(enroll_revoke)
