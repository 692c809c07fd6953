"""What a server says of itself to an agent, and why it cannot be reached, in words for the site's people."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import NoReturn

import grpc.aio

from lepton_fl import __version__
from lepton_fl.errors import ConnectionFailed, IdentityRefused, ProtocolError, VerificationFailed
from lepton_fl.fleet.pki.certificates import BACKDATED
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.limits import printable

_MAX_WORDS = 300
"""Characters of a server's own words."""


def obey(said: pb.Goodbye) -> NoReturn:
    """Raise what a server's goodbye means.

    Raises:
        IdentityRefused: this agent is not to come back.
        VerificationFailed: its ledger has gone back.
        ConnectionFailed: it may, later.
    """
    reason = printable(said.reason, _MAX_WORDS)
    if said.code == pb.Goodbye.REFUSED:
        raise IdentityRefused(
            f"the server refuses this site: {reason}",
            fix="" if "(fix:" in reason else "ask the consortium's operator",
        )
    if said.code == pb.Goodbye.REPLACED:
        raise IdentityRefused(
            f"the server has ended this connection: {reason}",
            fix="stop the other agent, or have this site's certificate revoked if it is not yours",
        )
    if said.code == pb.Goodbye.LEDGER:
        raise VerificationFailed(
            f"the server does not take this site's ledger: {reason}",
            fix="stop any other agent of this site, get the operator's and the peers' receipts, then "
            "lepton-fl budget recover -c site.toml --receipts FILE",
        )
    raise ConnectionFailed(f"the server says goodbye: {reason}")


def check_release(theirs: str) -> None:
    """That the server's release speaks with this one: the same major number; of 0.y, the same y.

    Raises:
        ProtocolError: it does not; says which release to install.
    """
    if _series(theirs) is None or _series(theirs) != _series(__version__):
        shown = printable(theirs, 40)
        series = _series(theirs)
        raise ProtocolError(
            f"the server runs lepton_fl {shown or 'of no release'}, this agent {__version__}: they do not "
            "understand one another",
            fix=f"pip install 'lepton-fl=={series}.*'" if series else "ask the consortium's operator",
        )


def _series(release: str) -> str | None:
    found = re.match(r"(\d{1,6})\.(\d{1,6})(?!\d)", release)
    if found is None:
        return None
    return f"{found[1]}.{found[2]}" if found[1] == "0" else found[1]


def check_clock(seconds: float, now: float | None = None) -> float:
    """How far the server's clock, as its welcome told it, is ahead of this machine's. 0: it told none.

    Raises:
        IdentityRefused: so far that certificates, and the times in the ledger, would mean nothing.
    """
    ours = time.time() if now is None else now
    if not seconds:
        return 0.0
    if not abs(seconds - ours) <= BACKDATED.total_seconds():
        raise IdentityRefused(
            f"this machine's clock says {_minute(ours)}, the server's says {_minute(seconds)}: one of the "
            "two is off",
            fix="set the clock of both machines",
        )
    return seconds - ours


def _minute(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return "no time at all"


_CAUSES = (
    ("Connection refused", "nothing listens there: is the server running?"),
    ("CERTIFICATE_VERIFY_FAILED", "what listens there is not under this consortium's root"),
    ("not match expected", "its certificate is for another host"),
    ("Hostname Verification", "its certificate is for another host"),
    ("DNS resolution failed", "its name cannot be resolved"),
    ("Ssl handshake failed", "no TLS connection: what listens there is no fleet port, or refuses us"),
    ("timed out", "no answer"),
    ("Timeout", "no answer"),
    ("unreachable", "no way to it in this network"),
)


def explain(error: grpc.aio.AioRpcError) -> str:
    """What gRPC says, in our words, where the cause is a usual one."""
    details = printable(str(error.details() or ""), 10_000)
    for sign, cause in _CAUSES:
        if sign.lower() in details.lower():
            return f"the server cannot be reached: {cause}"
    return f"{error.code().name.lower().replace('_', ' ')}: {details[:_MAX_WORDS]}"
