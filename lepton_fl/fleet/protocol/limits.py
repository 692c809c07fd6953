"""What both ends of a stream hold each other to."""

from __future__ import annotations

from lepton_fl.fleet.protocol.payload import CHUNK

MESSAGE_LIMIT = CHUNK + (64 << 10)
"""Bytes of one message of the stream; gRPC refuses longer ones before it has read them."""
MAX_STUDY = CHUNK
"""Bytes of a study: an offer is one message of the stream."""
MAX_REASON = 200
"""Characters of a site's own words."""
MISSED = 3
"""Heartbeats after which a silent peer is gone."""
TRANSFERS = 3
"""Transfers of one payload whose digest may be wrong before it is given up."""


def printable(text: str, most: int = MAX_REASON) -> str:
    """At most so many characters of the other side's words, as they may stand in a log or on a terminal."""
    return "".join(c for c in text if c.isprintable())[:most]


OF_A_PROCESS = "query.secagg_"
"""How types of requests begin that only the process can answer that entered the round: it has the keys."""
MOST_STATED = 64
"""Statements, or receipts, in one message."""
SERVER = "the server"
"""The server's name as a witness, which no site can have."""


def is_stated(kind: str) -> bool:
    """Whether the reply to a request of this type carries a statement of the ledger.

    All do but the later exchanges of a secure round, which was charged when it began.
    """
    return not kind.startswith(OF_A_PROCESS)
