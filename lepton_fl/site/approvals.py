"""Whose word lets a study in: that of this site's people, or of the key that signs studies.

A person's approval is signed with the key of the site's ledger: to write the file is not enough to approve.
A study's signature is made elsewhere (`lepton-fl study sign`), and the policy says by whose key. Both are
verified each time that they are relied on.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lepton_fl.errors import ConfigError, VerificationFailed
from lepton_fl.files import write_atomic
from lepton_fl.secagg.identity import IdentityKey, verify
from lepton_fl.study import Study

_APPROVAL = "lepton-fl/approval/1"
_STUDY = "lepton-fl/study-signature/1"
_KEY, _SIGNATURE = 32, 64


@dataclass(frozen=True, slots=True)
class StudySignature:
    """The owner of an Ed25519 key says: sites that trust me may run this study, whose id this is."""

    key: bytes
    """Public, 32 bytes. Whether it is to be trusted is for each site's policy to say."""
    signature: bytes

    @classmethod
    def sign(cls, key: IdentityKey, study_id: str) -> StudySignature:
        return cls(key.public, key.sign(_STUDY, study_id))

    @classmethod
    def read(cls, data: bytes, study_id: str) -> StudySignature:
        """The signature in `data`, once it has been verified.

        Raises:
            VerificationFailed: it is no signature of this study by the key that it names.
        """
        found = cls(data[:_KEY], data[_KEY:])
        if len(data) != _KEY + _SIGNATURE:
            raise VerificationFailed(f"{len(data)} bytes, a study's signature has {_KEY + _SIGNATURE}")
        verify(found.key, found.signature, _STUDY, study_id)
        return found

    @classmethod
    def load(cls, path: Path, study_id: str) -> StudySignature:
        """The signature in a file that `save` wrote, verified.

        Raises:
            ConfigError: the file cannot be read.
            VerificationFailed: it holds no signature of this study.
        """
        try:
            data = bytes.fromhex(path.read_text(encoding="ascii"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except ValueError:
            data = b""
        try:
            return cls.read(data, study_id)
        except VerificationFailed as error:
            raise VerificationFailed(
                f"{path}: is no signature of study {study_id[:16]}: {error.message}",
                fix="lepton-fl study sign STUDY.toml --key FILE",
            ) from None

    def save(self, path: Path) -> None:
        """Write it as one line of text."""
        write_atomic(path, self.to_bytes().hex().encode() + b"\n")

    def to_bytes(self) -> bytes:
        """As it travels: key and signature."""
        return self.key + self.signature


def signature_file(study_file: Path) -> Path:
    """Where the signature of a study.toml lies: beside it."""
    return study_file.with_suffix(".sig")


class Approvals:
    """What people at this site said to studies: one JSON line each, append-only.

    The last that is a refusal or a signed approval counts.

    Guarantee: what counts as an approval was signed with the site's own key, for this very study. A refusal
    needs no signature: nothing can be had by one. Who can write the file can still take its last lines out,
    a refusal among them, and so bring back an approval that was signed before it.
    """

    def __init__(self, path: Path, *, key: bytes | None) -> None:
        """`key`: the public key of the site's ledger; None where it has none yet, and nothing is approved."""
        self.path = path
        self._key = key

    def has(self, study_id: str) -> bool:
        """Whether this very study is approved; an unreadable file approves nothing."""
        entry = self._last(study_id)
        return entry is not None and "refused" not in entry and not self._flaw(entry)

    def flaw(self, study_id: str) -> str:
        """Why what looks like an approval of this study is none; empty where it is one, or there is none."""
        entry = self._last(study_id)
        return "" if entry is None or "refused" in entry else self._flaw(entry)

    def refusal(self, study_id: str) -> str | None:
        """Why people here refuse this study, as they told its operator; None where they do not."""
        entry = self._last(study_id)
        return None if entry is None or "refused" not in entry else str(entry["refused"])

    def add(self, study: Study, key: IdentityKey) -> None:
        """Record the approval of a study, signed with the key of the site's ledger."""
        at = _now()
        signature = key.sign(_APPROVAL, study.id, at)
        self._append(study, at, {"key": key.public.hex(), "signature": signature.hex()})

    def refuse(self, study: Study, reason: str) -> None:
        """Record a refusal, which holds whatever the policy says. The reason is told to the operator."""
        self._append(study, _now(), {"refused": reason})

    def signature(self, study_id: str) -> StudySignature | None:
        """The signature that came with a study, verified anew; None where none came.

        Raises:
            ConfigError, VerificationFailed: what is kept is none.
        """
        path = self.signature_path(study_id)
        return StudySignature.load(path, study_id) if path.exists() else None

    def signature_path(self, study_id: str) -> Path:
        """Where the signature of a study is kept: with the studies that were offered."""
        return self.path.parent / "studies" / f"{study_id}.sig"

    def _flaw(self, entry: dict[str, object]) -> str:
        key, signature, at = (entry.get(name) for name in ("key", "signature", "at"))
        if not (isinstance(key, str) and isinstance(signature, str) and isinstance(at, str)):
            return "is not signed, as in releases before this one"
        if self._key is None or key != self._key.hex():
            return f"is signed by key {key[:64]!r}, which is not this site's ledger's"
        try:
            verify(self._key, bytes.fromhex(signature), _APPROVAL, str(entry["study"]), at)
        except (ValueError, VerificationFailed):
            return "was changed after it was signed"
        return ""

    def _last(self, study_id: str) -> dict[str, object] | None:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.path}: approvals cannot be read: {error}") from None
        found = [entry for line in lines if (entry := _entry(line)).get("study") == study_id]
        refused = [at for at, entry in enumerate(found) if "refused" in entry]
        if refused:
            # What takes a refusal back is an approval, and not whatever somebody has written after it.
            found = [found[refused[-1]], *(one for one in found[refused[-1] + 1 :] if not self._flaw(one))]
        return found[-1] if found else None

    def _append(self, study: Study, at: str, said: dict[str, object]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"study": study.id, "name": study.study.name, "at": at, **said}
        self.path.touch(mode=0o600)
        with self.path.open("ab+") as file:
            # A line that was cut off, as by a full disk, must not swallow this one.
            file.seek(-1 if file.seek(0, os.SEEK_END) else 0, os.SEEK_END)
            begin = b"" if file.read() in (b"", b"\n") else b"\n"
            file.write(begin + json.dumps(entry, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _entry(line: str) -> dict[str, object]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}
