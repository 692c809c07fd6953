"""One consortium and one enrolled site, as the tests of keys and certificates need them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

import lepton_fl.fleet  # noqa: F401 - before anything imports grpc
from lepton_fl.fleet.pki import sealed
from lepton_fl.fleet.pki.authority import Authority

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
PASSPHRASE = "correct horse battery"


@pytest.fixture
def now() -> datetime:
    return NOW


@pytest.fixture
def quick_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 MiB and milliseconds for each passphrase."""
    monkeypatch.setattr(sealed, "_LOG2_N", 14)


@pytest.fixture
def authority(tmp_path, quick_scrypt) -> Authority:
    """A consortium in tmp_path / pki."""
    return Authority.create(
        tmp_path / "pki", name="banks", hosts=["localhost", "127.0.0.1"], passphrase=PASSPHRASE, now=NOW
    )
