"""The replies that a site has given, on its own disk: who asks again is sent the same bytes.

A reply holds what was released with noise and charged for, so it may leave again at no cost, where a second
training would be a second release.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import shutil
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.app import Message

from lepton_fl.fleet.protocol.payload import SMALL, Payload
from lepton_fl.messages import refusal_reason
from lepton_fl.privacy.ledger import Statement

KEPT = 5
"""Replies of one run that are kept: those of a secure round, of which the last may be asked for again."""
RUNS = 8
"""Runs whose replies are kept, beside those that are going on."""
_NAME = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{64}\.reply")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What goes back: a payload, or an error with its public reason."""

    payload: Payload | None = None
    error_code: int = 0
    error_reason: str = ""
    stated: Statement | None = None
    """The ledger, when the payload was made; it leaves with it, of the head of then."""

    @classmethod
    def refusing(cls, message: Message) -> Reply:
        """The refusal that `message` is, without what else Flower would carry."""
        return cls(error_code=message.error.code, error_reason=refusal_reason(message))


class ReplyCache:
    """Replies by run and request, in a folder of mode 0700: files whose names say their digest.

    They are not forced to the disk one by one. What a power cut takes fails its digest and counts as none:
    the site then sits the round out, since its ledger, which is forced, says that it has taken part.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: dict[str, deque[Path]] = {}
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for cut in folder.glob("*/*.tmp"):
            cut.unlink()

    def path(self, run: str, key: str) -> Path:
        """Where the payload of a reply is to be written, before `put`."""
        home = self._folder / run
        home.mkdir(mode=0o700, exist_ok=True)
        return home / f"{key}.tmp"

    def put(self, run: str, key: str, payload: Payload) -> Payload:
        """Keep a reply; what is older than the last few of its run goes. Returns it as it is kept."""
        written = self.path(run, key)
        if payload.path is None:
            handle = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(payload.inline)
        kept = self._of(run)
        path = written.with_name(f"{key}.{payload.sha256.hex()}.reply")
        written.replace(path)
        kept.append(path)
        while len(kept) > KEPT:
            kept.popleft().unlink(missing_ok=True)
        return payload if payload.path is None else replace(payload, path=path)

    def get(self, run: str, key: str) -> Payload | None:
        """The reply that was given, if it is whole."""
        # A copy, made at once: another thread may be at `put`.
        path = next((path for path in tuple(self._of(run)) if path.name.startswith(f"{key}.")), None)
        if path is None:
            return None
        sha256 = bytes.fromhex(path.name.split(".")[1])
        try:
            size = path.stat().st_size
            if size <= SMALL:
                found = Payload.of(path.read_bytes())
            else:
                with path.open("rb") as file:
                    found = Payload(size=size, sha256=hashlib.file_digest(file, "sha256").digest(), path=path)
        except OSError:
            return None
        return found if hmac.compare_digest(found.sha256, sha256) else None

    def prune(self, going_on: Collection[str]) -> None:
        """Forget the oldest runs, but none of those that are going on."""
        # Also of runs that were asked about and had no reply; what is on disk is found again.
        for run in set(self._kept) - set(going_on):
            self._kept.pop(run, None)
        for home in _by_age(home for home in self._folder.iterdir() if home.name not in going_on)[:-RUNS]:
            shutil.rmtree(home, ignore_errors=True)

    def _of(self, run: str) -> deque[Path]:
        """The kept replies of a run, oldest first."""
        if run not in self._kept:
            found = (self._folder / run).glob("*.reply")
            self._kept[run] = deque(path for path in _by_age(found) if _NAME.fullmatch(path.name))
        return self._kept[run]


def _by_age(paths: Iterable[Path]) -> list[Path]:
    """Oldest first."""
    return sorted(paths, key=lambda found: found.stat().st_mtime_ns)
