"""The one error tree of lepton_fl.

::

    LeptonError                    exit
    ├── ConfigError                 3    a file the user wrote: file, key, found, allowed
    ├── DataError                   3    a site's table: column and count, never a value
    ├── PolicyRefused               4    the site's policy forbids it
    │   ├── BudgetExhausted         4    the site's privacy budget does not cover it
    │   └── AlreadyCharged          4    the site took part in this round before, and does so once
    ├── ConnectionFailed            5    a server cannot be reached, or does not let us in
    │   └── IdentityRefused         5    a certificate, token or fingerprint does not prove what it should
    ├── ProtocolError               5    a peer is at fault, and is named
    │   ├── BadReply                5    a site's reply cannot enter the aggregate
    │   └── BadRequest              5    a server's message cannot be obeyed
    ├── TooFewSites                 6    a round cannot reach its quorum
    └── VerificationFailed          7    bytes that should agree do not

Every error is one line that a person can act on: what was found, what is allowed, whose limit it is,
and in `fix` the one command or edit that mends it. `public` is what may be told to another party: it
never carries a count, a value or a path of the institution.
"""

from __future__ import annotations


class LeptonError(Exception):
    """Root of the tree. `exit_code` is the shell's, see docs/cli.md."""

    exit_code = 1

    def __init__(self, message: str, *, fix: str = "", public: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix
        self.public = public or type(self).__name__

    def __str__(self) -> str:
        return f"{self.message} (fix: {self.fix})" if self.fix else self.message


class ConfigError(LeptonError):
    """A file or flag that the user wrote is not acceptable."""

    exit_code = 3

    @classmethod
    def at(cls, file: str, key: str, *, found: object, allowed: str, fix: str = "") -> ConfigError:
        """The usual form: file, key, what was found and what is allowed."""
        return cls(f"{file}: {key}: found {found!r}, allowed: {allowed}", fix=fix)


class Unwritable(ConfigError):
    """The machine refuses a file for now: its disk is full or read-only, or another process holds it."""


class DataError(LeptonError):
    """A site's table breaks the schema contract. Names columns and counts, never a value."""

    exit_code = 3


class PolicyRefused(LeptonError):
    """The site's own policy forbids what the study asks."""

    exit_code = 4


class BudgetExhausted(PolicyRefused):
    """The site's privacy budget does not cover what the study asks."""


class AlreadyCharged(PolicyRefused):
    """The site's ledger has charged this round of this run. The site sits the round out, not the run."""


class ConnectionFailed(LeptonError):
    """A server cannot be reached, or does not let us in. Safe to try again."""

    exit_code = 5


class IdentityRefused(ConnectionFailed):
    """A certificate, token or fingerprint does not prove who somebody is. Trying again does not help."""


class ProtocolError(LeptonError):
    """A peer broke the protocol."""

    exit_code = 5


class BadReply(ProtocolError):
    """A site's reply is malformed: wrong sender, names, shapes, type or non-finite values."""


class BadRequest(ProtocolError):
    """A server's message is malformed, out of order or names another study."""


class TooFewSites(LeptonError):
    """Fewer sites answered than the study's quorum. No model was made; what was charged stays charged."""

    exit_code = 6


class VerificationFailed(LeptonError):
    """Bytes that should agree with a digest or a record do not."""

    exit_code = 7
