"""`lepton-fl audit`: what can be verified offline, by files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lepton_fl.cli.options import Json
from lepton_fl.cli.privacy_audit import audit_privacy
from lepton_fl.cli.terminal import Commands, print_json, print_table
from lepton_fl.errors import ConfigError

audit_app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    suggest_commands=False,
    help="Verify, offline, what a site has recorded, and what this installation does.",
)


audit_app.command("privacy")(audit_privacy)


@audit_app.command("verify")
def audit_verify(
    places: Annotated[
        list[Path],
        typer.Argument(
            help="A ledger.db, or a site: its policy.toml, site.toml or a folder that holds them.",
            metavar="LEDGER_OR_SITE...",
        ),
    ],
    receipts: Annotated[
        list[Path] | None,
        typer.Option("--receipts", help="Receipts that the server or a peer gave; repeated.", metavar="FILE"),
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Public key, in hex, that must have signed the ledger.", metavar="HEX")
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify a ledger: each entry and signature, the sums by the site's policy, who let its studies in.

    Exit 7 with the first that is wrong. Reads only, and needs no private key: a copy of the file will do.
    """
    from lepton_fl.cli.auditing import verify

    found = [one for place in places for one in verify(place, receipts or [], _key(key))]
    if as_json:
        print_json([one.as_json() for one in found])
        return
    print_table(
        "Ledgers verified: every entry, signature and digest",
        ("ledger", "entries", "head", "key", "charged", "released", "compared with", "policy"),
        [one.as_row() for one in found],
        right=(1, 4, 5),
    )


def _key(text: str | None) -> bytes | None:
    if text is None:
        return None
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError.at("command line", "--key", found=text, allowed="64 hexadecimal digits")
    return key
