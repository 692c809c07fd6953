"""The replies that a site has given, on its own disk: who asks again is sent the same bytes.

A reply holds what was released with noise and charged for, so it may leave again at no cost, where a second
training would be a second release.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from lepton_fl.files import write_atomic
from lepton_fl.fleet.protocol.payload import Payload

KEPT = 4
"""Replies of one run that are kept: a round has few phases, and only its last is asked for again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What goes back: a payload, or an error with its public reason."""

    payload: Payload | None = None
    error_code: int = 0
    error_reason: str = ""


class ReplyCache:
    """Replies by run and request, in a folder of mode 0700."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, run: str, key: str) -> Path:
        """Where the payload of a reply is to be written, before `put`."""
        home = self._folder / run
        home.mkdir(mode=0o700, exist_ok=True)
        return home / f"{key}.reply"

    def put(self, run: str, key: str, payload: Payload) -> Payload:
        """Keep a reply; what is older than the last few of its run goes. Returns it as it is kept."""
        path = self.path(run, key)
        if payload.path is None:
            write_atomic(path, payload.inline, mode=0o600)
        # Last: without it the reply does not count as whole.
        about = {"size": payload.size, "sha256": payload.sha256.hex()}
        write_atomic(path.with_suffix(".json"), json.dumps(about).encode(), mode=0o600)
        kept = sorted(path.parent.glob("*.json"), key=lambda found: found.stat().st_mtime_ns)
        for old in kept[:-KEPT]:
            old.unlink()
            old.with_suffix(".reply").unlink(missing_ok=True)
        return payload

    def get(self, run: str, key: str) -> Payload | None:
        """The reply that was given, if it is whole."""
        path = self.path(run, key)
        try:
            about = json.loads(path.with_suffix(".json").read_bytes())
            sha256 = bytes.fromhex(about["sha256"])
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").digest() != sha256:
                    return None
            return Payload(size=path.stat().st_size, sha256=sha256, path=path)
        except (OSError, ValueError, KeyError, TypeError):
            return None
