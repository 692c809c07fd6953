"""Keys of people: the privacy officer's, and whoever signs studies. The agent never holds one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lepton_fl.cli.terminal import make_writable
from lepton_fl.errors import ConfigError, VerificationFailed

if TYPE_CHECKING:
    from lepton_fl.secagg.identity import IdentityKey


def new_key(file: Path) -> str:
    """Make a key in a file of mode 0600; its public half, in hex.

    Raises:
        ConfigError: the file is there already, or cannot be written.
    """
    from lepton_fl.files import write_atomic
    from lepton_fl.secagg.identity import IdentityKey

    if file.exists():
        raise ConfigError(f"{file}: exists, and is not overwritten", fix="name another file")
    key = IdentityKey.generate()
    make_writable(file.absolute().parent)
    write_atomic(file, key.to_bytes(), mode=0o600)
    return key.public.hex()


def read_key(file: Path) -> IdentityKey:
    """The key that `new_key` made.

    Raises:
        ConfigError: there is none in the file, or others may read it.
    """
    from lepton_fl.fleet.pki.authority import read_secret
    from lepton_fl.secagg.identity import IdentityKey

    try:
        return IdentityKey.read(read_secret(file))
    except VerificationFailed as error:
        raise ConfigError(f"{file}: {error.message}", fix="name the file of the private key") from None
