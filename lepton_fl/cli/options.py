"""Options that several groups of commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
SiteFile = Annotated[Path, typer.Option("-c", "--config", help="site.toml of this institution.")]
ServerFile = Annotated[Path, typer.Option("-c", "--config", help="server.toml of the consortium.")]
SERVER_TOML = Path("server.toml")
OfSite = Annotated[str, typer.Argument(metavar="SITE", help="Whose ledger.")]
ReceiptsFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="For `lepton-fl budget recover --receipts` at that site.")
]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        help="File, mode 0600, with the passphrase of the consortium's root "
        "(or in LEPTON_FL_CA_PASSPHRASE; asked for otherwise).",
        metavar="FILE",
    ),
]
RootFile = Annotated[
    Path | None, typer.Option("--root", help="The sealed root, where it is not in pki/.", metavar="FILE")
]
