"""The consortium's authority: who may be a member (offline, under a passphrase), who may talk (online).

`root.sealed` holds the root's TLS key and the Ed25519 key that signs identities and rosters; it can lie
elsewhere than on the server. The issuing key beside the server renews TLS certificates without a person,
and can sign neither identities nor rosters: who steals the server gains no participant.

A private key and its certificates are one PEM file, so that no crash leaves two that do not match::

    root.sealed    both root keys, sealed
    consortium.bin the document that invitations fingerprint and agents pin
    issuing.pem    key and certificate of the issuing authority
    server.pem     key and certificate of the server, and the issuing certificate
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from lepton_fl.errors import ConfigError, IdentityRefused, VerificationFailed
from lepton_fl.files import write_atomic
from lepton_fl.fleet.pki import certificates
from lepton_fl.fleet.pki.certificates import Certificate, Key, SiteCertificate
from lepton_fl.fleet.pki.sealed import seal, unseal
from lepton_fl.secagg.encoding import decode, digest, encode
from lepton_fl.secagg.identity import IdentityCertificate, IdentityKey, Member, Roster, key_digest

SECRET = 0o600
IDENTITY_LIFE = timedelta(days=731)
"""Of identity certificates. Membership itself ends with the roster."""
MIN_PASSPHRASE = 12

_CONSORTIUM = "lepton-fl/consortium/1"
_SITE_KEYS = "lepton-fl/site-keys/1"
_MAX_DOCUMENT = 16 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Consortium:
    """Who may say who is a member: the root's certificate and the public key that signs rosters."""

    root: Certificate
    roster_key: bytes

    @classmethod
    def read(cls, document: bytes) -> Consortium:
        """The consortium that `encode` described. Whose it is only its fingerprint can tell.

        Raises:
            VerificationFailed: malformed.
        """
        if len(document) > _MAX_DOCUMENT:
            raise VerificationFailed("consortium's document: too long")
        tag, der, roster_key = decode(document, str, bytes, bytes)
        try:
            root = x509.load_der_x509_certificate(der)
        except ValueError:
            raise VerificationFailed("consortium's document: holds no certificate") from None
        if tag != _CONSORTIUM or len(roster_key) != 32:
            raise VerificationFailed("consortium's document: malformed")
        return cls(root=root, roster_key=roster_key)

    def encode(self) -> bytes:
        return encode(_CONSORTIUM, self.root.public_bytes(Encoding.DER), self.roster_key)

    @property
    def name(self) -> str:
        found = self.root.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        return str(found[0].value) if found else ""

    @property
    def fingerprint(self) -> bytes:
        return digest(_CONSORTIUM, self.root.public_bytes(Encoding.DER), self.roster_key)

    @property
    def root_pem(self) -> bytes:
        return certificates.certificate_pem(self.root)


def spoken(fingerprint: bytes) -> str:
    """The first 80 bits, to be compared by voice: nobody finds another key with the same."""
    text = fingerprint[:10].hex()
    return " ".join(text[at : at + 4] for at in range(0, len(text), 4))


def site_keys(tls_key: ec.EllipticCurvePublicKey, identity_key: bytes) -> str:
    """Both public keys of a site, as its people and the operator compare them by voice."""
    return spoken(digest(_SITE_KEYS, certificates.public_der(tls_key), identity_key))


class Authority:
    """Both root keys, in memory: for one command of the operator's."""

    def __init__(self, folder: Path, consortium: Consortium, root_key: Key, roster_key: IdentityKey) -> None:
        self._folder = folder
        self.consortium = consortium
        self._root_key = root_key
        self._roster_key = roster_key

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        name: str,
        hosts: Sequence[str],
        passphrase: str,
        now: datetime,
        root: Path | None = None,
    ) -> Authority:
        """A new consortium: its sealed root, its issuing authority and its server's certificate.

        `root` is where the sealed keys go; in `folder` if not said.

        Raises:
            ConfigError: there is one already, the passphrase is short, or a host is malformed.
        """
        if len(passphrase) < MIN_PASSPHRASE:
            raise ConfigError(
                f"passphrase: found {len(passphrase)} characters, allowed: at least {MIN_PASSPHRASE}"
            )
        sealed = root or _sealed(folder)
        if root is not None and not root.parent.is_dir():
            raise ConfigError(f"{root.parent}: no such folder", fix="make it, or name another with --root")
        for path in (sealed, _document(folder)):
            if path.exists():
                raise ConfigError(f"{path}: there is a consortium already, and it is not overwritten")
        root_key, roster_key, issuing_key = (
            certificates.new_key(),
            IdentityKey.generate(),
            certificates.new_key(),
        )
        consortium = Consortium(
            root=certificates.make_root(root_key, name, now), roster_key=roster_key.public
        )
        issuing = Issuing(
            folder,
            issuing_key,
            certificates.make_issuing(consortium.root, root_key, issuing_key.public_key(), now),
        )
        # Before anything is written: a host may be refused.
        server = issuing.server_pem(hosts, now)
        secrets = {"root": certificates.key_pem(root_key), "roster": roster_key.to_bytes()}
        make_private(folder)
        write_atomic(sealed, seal(secrets, passphrase), mode=SECRET)
        issuing.store()
        write_atomic(_server(folder), server, mode=SECRET)
        # Last: with it there is a consortium.
        write_atomic(_document(folder), consortium.encode())
        return cls(folder, consortium, root_key, roster_key)

    @classmethod
    def open(cls, folder: Path, passphrase: str, *, root: Path | None = None) -> Authority:
        """The consortium of `folder`, its keys unsealed; `root` names the sealed file if it is elsewhere.

        Raises:
            ConfigError: a file is missing.
            IdentityRefused: the passphrase is wrong, or the keys are another consortium's.
            VerificationFailed: a file is malformed.
        """
        consortium, sealed = read_consortium(folder), root or _sealed(folder)
        data = _read(sealed, fix="name the file of sealed keys with --root FILE")
        secrets = unseal(data, passphrase, file=str(sealed))
        root_key = certificates.read_key(secrets.get("root", b""), file=str(sealed))
        roster_key = IdentityKey.read(secrets.get("roster", b""))
        if (
            roster_key.public != consortium.roster_key
            or root_key.public_key() != consortium.root.public_key()
        ):
            raise IdentityRefused(f"{sealed}: holds the keys of another consortium than {folder}")
        return cls(folder, consortium, root_key, roster_key)

    def certify(self, *, party: int, site: str, key: bytes, now: datetime) -> IdentityCertificate:
        """The consortium's word that the Ed25519 `key` is this party's."""
        return IdentityCertificate.issue(
            self._roster_key,
            party=party,
            name=site,
            key=key,
            not_before=now - certificates.BACKDATED,
            not_after=now + IDENTITY_LIFE,
            # Positive in the encoding's 16 bytes.
            serial=int.from_bytes(os.urandom(15)),
        )

    def next_roster(
        self,
        last: Roster | None,
        *,
        joined: Sequence[IdentityCertificate] = (),
        left: Sequence[IdentityCertificate] = (),
    ) -> Roster:
        """`last` with these members more and those fewer, one version on.

        Built on the last *signed* roster: whoever may write the server's database cannot slip in a
        member for us to sign.
        """
        gone = {certificate.party for certificate in left}
        members = [member for member in (last.members if last else ()) if member.party not in gone]
        members += [Member(c.party, c.name, key_digest(c.key)) for c in joined]
        return Roster.issue(
            self._roster_key,
            consortium=self.consortium.fingerprint,
            version=(last.version if last else 0) + 1,
            members=members,
            revoked={*(last.revoked if last else ()), *(c.serial for c in left)},
        )

    def renew_issuing(self, now: datetime) -> Issuing:
        """The issuing authority's certificate for another two years, over its present key, stored.

        Certificates that it has issued stay good.
        """
        held = Issuing.open(self._folder)
        renewed = Issuing(
            self._folder,
            held.key,
            certificates.make_issuing(self.consortium.root, self._root_key, held.key.public_key(), now),
        )
        renewed.store()
        return renewed


class Issuing:
    """The key beside the server, which signs TLS certificates only."""

    def __init__(self, folder: Path, key: Key, certificate: Certificate) -> None:
        self._folder = folder
        self.key = key
        self.certificate = certificate

    @classmethod
    def open(cls, folder: Path) -> Issuing:
        """The issuing authority of `folder`.

        Raises:
            ConfigError: the file is missing, or others may read it.
            IdentityRefused: it is not under the consortium's root.
            VerificationFailed: the file is malformed.
        """
        path = _issuing(folder)
        pem = read_secret(path)
        key = certificates.read_key(pem, file=str(path))
        (certificate,) = certificates.read_chain(pem, file=str(path), length=1)
        certificates.check_authority(certificate, read_consortium(folder).root)
        check_pair(key, certificate, path)
        return cls(folder, key, certificate)

    @property
    def pem(self) -> bytes:
        """Its certificate."""
        return certificates.certificate_pem(self.certificate)

    def store(self) -> None:
        write_atomic(_issuing(self._folder), certificates.key_pem(self.key) + self.pem, mode=SECRET)

    def issue_site(
        self, key: ec.EllipticCurvePublicKey, site: str, now: datetime
    ) -> tuple[bytes, SiteCertificate]:
        """A certificate for `site`, in PEM and in words."""
        certificate = certificates.make_site(self.certificate, self.key, key, site, now)
        return certificates.certificate_pem(certificate), certificates.site_of(
            certificate, issuer=self.certificate
        )

    def server_pem(self, hosts: Sequence[str], now: datetime) -> bytes:
        """A new key, its certificate for `hosts`, and the issuing certificate."""
        key = certificates.new_key()
        certificate = certificates.make_server(self.certificate, self.key, key.public_key(), hosts, now)
        return certificates.key_pem(key) + certificates.certificate_pem(certificate, self.certificate)

    def issue_server(self, hosts: Sequence[str], now: datetime) -> None:
        """Replace the server's key and certificate; a running server picks them up."""
        write_atomic(_server(self._folder), self.server_pem(hosts, now), mode=SECRET)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerIdentity:
    """What the server shows and whom it trusts, as its files were when they were read."""

    folder: Path
    consortium: Consortium
    certificate: Certificate
    issuing: Certificate
    """For `certificates.read_site` of a caller's; as good after `ca renew`, which keeps the key."""
    key_pem: bytes = field(repr=False)
    chain_pem: bytes
    """The server's certificate and the issuing one."""
    stamp: tuple[int, ...]
    """Of the files."""

    @classmethod
    def load(cls, folder: Path) -> ServerIdentity:
        """Read the files of `folder`.

        Raises:
            ConfigError: a file is missing, or others may read a key.
            IdentityRefused: they are not of one consortium.
            VerificationFailed: a file is malformed.
        """
        # Before they are read: what changes meanwhile is read again next time.
        stamp = _stamp(folder)
        consortium, issuing = read_consortium(folder), Issuing.open(folder)
        path = _server(folder)
        pem = read_secret(path)
        key = certificates.read_key(pem, file=str(path))
        leaf, _ = certificates.read_chain(pem, file=str(path), length=2)
        certificates.check_issued(leaf, issuing.certificate, whose=str(path))
        check_pair(key, leaf, path)
        return cls(
            folder=folder,
            consortium=consortium,
            certificate=leaf,
            issuing=issuing.certificate,
            key_pem=certificates.key_pem(key),
            # The issuing certificate as it is now: `ca renew` may have replaced the one beside the leaf.
            chain_pem=certificates.certificate_pem(leaf, issuing.certificate),
            stamp=stamp,
        )

    @property
    def client_trust_pem(self) -> bytes:
        """Whom gRPC lets in: the issuing authority alone, since the root itself certifies no site."""
        return certificates.certificate_pem(self.issuing)

    @property
    def hosts(self) -> list[str]:
        return certificates.hosts_of(self.certificate)

    @property
    def not_after(self) -> datetime:
        return self.certificate.not_valid_after_utc

    def refreshed(self) -> ServerIdentity:
        """This, or what the files say where they have changed."""
        return self if _stamp(self.folder) == self.stamp else ServerIdentity.load(self.folder)

    def renewed(self, now: datetime) -> ServerIdentity:
        """This, or where two thirds of its certificate's life are over another, which is stored."""
        leaf = self.certificate
        if not certificates.renewal_due(leaf.not_valid_before_utc, leaf.not_valid_after_utc, now):
            return self
        Issuing.open(self.folder).issue_server(self.hosts, now)
        return ServerIdentity.load(self.folder)


def _stamp(folder: Path) -> tuple[int, ...]:
    found = [path.stat() for path in (_server(folder), _issuing(folder)) if path.exists()]
    return tuple(number for file in found for number in (file.st_mtime_ns, file.st_ino))


def read_consortium(folder: Path) -> Consortium:
    """The consortium whose server has its keys in `folder`.

    Raises:
        ConfigError: there is none.
        VerificationFailed: its document is malformed.
    """
    return Consortium.read(_read(_document(folder), fix="lepton-fl ca init -c server.toml"))


def read_secret(path: Path) -> bytes:
    """A file that nobody else may read.

    Raises:
        ConfigError: it is missing, cannot be read, or others may.
    """
    data = _read(path)
    if mode := stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigError(
            f"{path}: others may read or write it (mode has {mode:03o} for them)", fix=f"chmod 600 {path}"
        )
    return data


def make_private(folder: Path) -> None:
    """A folder of mode 0700, made where absent.

    Raises:
        ConfigError: it cannot be made or written in, or is open to others.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(folder.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror}") from None
    if mode & 0o077:
        raise ConfigError(
            f"{folder}: a folder of keys, and others may enter it (mode {mode:03o})",
            fix=f"chmod 700 {folder}",
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: cannot write here", fix="make it belong to the user of this command")


def check_pair(key: Key, certificate: Certificate, path: Path) -> None:
    """That they belong together.

    Raises:
        VerificationFailed: not so.
    """
    if key.public_key() != certificate.public_key():
        raise VerificationFailed(f"{path}: key and certificate do not match")


def _read(path: Path, *, fix: str = "") -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", fix=fix) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _sealed(folder: Path) -> Path:
    return folder / "root.sealed"


def _document(folder: Path) -> Path:
    return folder / "consortium.bin"


def _issuing(folder: Path) -> Path:
    return folder / "issuing.pem"


def _server(folder: Path) -> Path:
    return folder / "server.pem"
