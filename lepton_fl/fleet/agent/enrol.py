"""How a site becomes a member, and what it has once it is one.

Its keys are made here and leave in no form. The folder, mode 0700::

    site.pem       the TLS key and, once enrolled, its certificate and the issuing one: one file, so that no
                   crash leaves a key beside another's certificate; mode 0600
    identity.pem   the Ed25519 key that signs for this site among the sites; mode 0600
    identity.cert  the consortium's word for that key
    consortium.bin root certificate and roster key, pinned: what the invitation's fingerprint is of
    roster.bin     the newest roster seen
    fleet.txt      HOST:PORT of the server's other port
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import grpc
from cryptography import x509

from lepton_fl.errors import ConnectionFailed, IdentityRefused, VerificationFailed
from lepton_fl.files import write_atomic
from lepton_fl.fleet.agent.peer import check_clock
from lepton_fl.fleet.pki import certificates
from lepton_fl.fleet.pki.authority import (
    SECRET,
    Consortium,
    check_pair,
    make_private,
    read_secret,
    site_keys,
)
from lepton_fl.fleet.pki.certificates import Key, SiteCertificate
from lepton_fl.fleet.pki.joining import make_joining
from lepton_fl.fleet.pki.tokens import Token
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.methods import consortium_method, join_method
from lepton_fl.secagg.identity import IdentityCertificate, IdentityKey, Roster

CALL_S = 20.0
"""Longest wait for one answer."""
_ADDRESS = re.compile(r"([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):(\d{1,5})")
_JOIN = "lepton-fl enroll join TOKEN --server HOST:PORT -c site.toml"

Asked = TypeVar("Asked")
Told = TypeVar("Told")


# A member


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentIdentity:
    """An enrolled site: its keys, and what the consortium says of it."""

    folder: Path
    consortium: Consortium
    certificate: SiteCertificate
    key_pem: bytes = field(repr=False)
    chain_pem: bytes = field(repr=False)
    identity_key: IdentityKey = field(repr=False)
    identity_certificate: IdentityCertificate
    roster: Roster
    fleet_address: str
    """As the server said when the site joined; site.toml may name another."""

    @classmethod
    def load(cls, folder: Path) -> AgentIdentity:
        """The member whose files are in `folder`; the time is still to be checked.

        Raises:
            IdentityRefused: the site is not enrolled, or a certificate is not this consortium's.
            ConfigError: others may read a key.
            VerificationFailed: the files do not agree.
        """
        path = folder / "site.pem"
        if not _is_enrolled(folder):
            raise IdentityRefused(f"{folder}: this site is not enrolled, or not yet approved", fix=_JOIN)
        try:
            consortium = Consortium.read((folder / "consortium.bin").read_bytes())
            certified = (folder / "identity.cert").read_bytes()
            roster = Roster.read((folder / "roster.bin").read_bytes(), consortium.roster_key)
            address = (folder / "fleet.txt").read_text().strip()
        except OSError as error:
            raise IdentityRefused(f"{error.filename}: cannot be read: {error.strerror}", fix=_JOIN) from None
        pem = read_secret(path)
        key = certificates.read_key(pem, file=str(path))
        chain = certificates.read_chain(pem, file=str(path), length=2)
        certificate = _check_chain(key, chain, consortium, path)
        identity = IdentityKey.read(read_secret(folder / "identity.pem"))
        found = _check_identity(certified, roster, consortium, certificate.site, identity)
        return cls(
            folder=folder,
            consortium=consortium,
            certificate=certificate,
            key_pem=certificates.key_pem(key),
            chain_pem=certificates.certificate_pem(*chain),
            identity_key=identity,
            identity_certificate=found,
            roster=roster,
            fleet_address=address,
        )

    @property
    def site(self) -> str:
        return self.certificate.site

    @property
    def party(self) -> int:
        return self.identity_certificate.party

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel to the fleet port: trusts the consortium's root alone."""
        return grpc.ssl_channel_credentials(self.consortium.root_pem, self.key_pem, self.chain_pem)

    def renewal_request(self) -> tuple[Key, pb.RenewRequest]:
        """A new TLS key, and the request to certify it."""
        key = certificates.new_key()
        return key, pb.RenewRequest(csr=certificates.make_csr(key))

    def store_renewed(self, key: Key, reply: pb.RenewReply, now: datetime) -> AgentIdentity:
        """Take the server's answer for `key`: from now on, on disk too, the site is this.

        Raises:
            IdentityRefused: the certificate is not this consortium's for this site, or not in force, or ends
                no later than the one held; nothing was changed.
            VerificationFailed: it is another key's, or malformed; the same.
        """
        path = self.folder / "site.pem"
        pem = reply.certificate + reply.chain
        chain = certificates.read_chain(pem, file="renewed certificate", length=2)
        certificate = _check_chain(key, chain, self.consortium, path)
        if certificate.site != self.site:
            raise IdentityRefused(f"renewed certificate: is for {certificate.site}, not for {self.site}")
        # What is held is good yet, and in its place this would keep the site out for good.
        certificate.check_time(now)
        if certificate.not_after <= self.certificate.not_after:
            raise IdentityRefused("renewed certificate: ends no later than the one it is to replace")
        key_pem, chain_pem = certificates.key_pem(key), certificates.certificate_pem(*chain)
        write_atomic(path, key_pem + chain_pem, mode=SECRET)
        return replace(self, certificate=certificate, key_pem=key_pem, chain_pem=chain_pem)

    def store_roster(self, signed: bytes) -> AgentIdentity:
        """Take a roster that the server sent, where it is newer than the one held.

        Raises:
            VerificationFailed: it is not the consortium's, older, or contradicts the one held.
        """
        roster = Roster.read(signed, self.consortium.roster_key)
        if not roster.supersedes(self.roster):
            return self
        write_atomic(self.folder / "roster.bin", signed)
        return replace(self, roster=roster)


def _is_enrolled(folder: Path) -> bool:
    try:
        return b"BEGIN CERTIFICATE" in (folder / "site.pem").read_bytes()
    except OSError:
        return False


def _check_identity(
    certified: bytes, roster: Roster, consortium: Consortium, site: str, key: IdentityKey
) -> IdentityCertificate:
    found = IdentityCertificate.read(certified, consortium.roster_key)
    if (found.name, found.key) != (site, key.public):
        raise VerificationFailed(f"identity certificate: is not of {site} and its identity key")
    if roster.consortium != consortium.fingerprint:
        raise VerificationFailed("roster: is another consortium's")
    return found


def _check_chain(
    key: Key, chain: list[certificates.Certificate], consortium: Consortium, path: Path
) -> SiteCertificate:
    leaf, issuing = chain
    certificates.check_authority(issuing, consortium.root)
    certificate = certificates.site_of(leaf, issuer=issuing)
    check_pair(key, leaf, path)
    return certificate


# Becoming one


class Joining:
    """One site on its way in. To go on after a crash, or on another day, is to begin with the same token."""

    def __init__(self, token: Token, server: str, folder: Path) -> None:
        """Make the site's keys in `folder`, unless they are there.

        Raises:
            IdentityRefused: the site is enrolled already.
            ConnectionFailed: `server` is no HOST:PORT.
            ConfigError: the folder cannot be made, or is open to others.
        """
        found = _ADDRESS.fullmatch(server)
        if found is None or not 0 < int(found[2]) < 65536:
            raise ConnectionFailed(
                f"--server: found {server!r}, allowed: HOST:PORT", fix="ask the operator for it"
            )
        if _is_enrolled(folder):
            raise IdentityRefused(
                f"{folder}: this site is enrolled already", fix=f"to enrol anew, move {folder} away first"
            )
        self._token, self._server, self._folder = token, server, folder
        self._host, self._port = found[1].strip("[]"), int(found[2])
        make_private(folder)
        self._key = certificates.read_key(
            _keep(folder / "site.pem", lambda: certificates.key_pem(certificates.new_key())), file="site.pem"
        )
        self._identity = IdentityKey.read(
            _keep(folder / "identity.pem", lambda: IdentityKey.generate().to_bytes())
        )
        # The server knows the request again by its bytes, and an ECDSA signature never comes out the same.
        self._csr = _keep(folder / "site.csr", lambda: certificates.make_csr(self._key))
        self.keys = site_keys(self._key.public_key(), self._identity.public)
        """What this site's people and the operator compare by voice."""

    def ask(self, now: datetime) -> AgentIdentity | None:
        """Ask to be let in, or what became of it: the member, or None while nobody has decided.

        Guarantee: the token's secret is sent to a server only that has proved to hold a certificate under
        the root whose fingerprint is in the token.

        Raises:
            ConnectionFailed: the server cannot be reached. Safe to try again.
            IdentityRefused: the server is another, or its certificate or the token is not good.
            VerificationFailed: the server's documents do not agree.
        """
        consortium = self._pinned(now)
        with self._channel(consortium.root_pem) as channel:
            request = make_joining(self._token, self._identity, self._csr)
            reply = self._call(join_method(channel), request)
        # Certificates from a server two days away would fail on another day, and nobody would know why.
        check_clock(reply.time, now.timestamp())
        if reply.state == pb.JoinReply.PENDING:
            return None
        if reply.state != pb.JoinReply.APPROVED:
            raise IdentityRefused(
                f"{self._server}: the operator has rejected this request",
                fix="ask the operator why, and for a new invitation",
            )
        return self._store(consortium, reply, now)

    def _pinned(self, now: datetime) -> Consortium:
        """The consortium that the token means, as the server says and the fingerprint confirms."""
        leaf = self._leaf(now)
        # This trusts whoever answers, for one question that tells them nothing.
        with self._channel(certificates.certificate_pem(leaf)) as channel:
            reply = self._call(consortium_method(channel), pb.ConsortiumRequest())
        consortium = Consortium.read(reply.document)
        if not hmac.compare_digest(consortium.fingerprint, self._token.fingerprint):
            raise IdentityRefused(
                f"{self._server}: belongs to another consortium than the invitation (fingerprint "
                f"{consortium.fingerprint.hex()[:16]}, invitation {self._token.fingerprint.hex()[:16]}); "
                "nothing was sent to it",
                fix="check the address with the operator: somebody may be in between",
            )
        return consortium

    def _leaf(self, now: datetime) -> certificates.Certificate:
        try:
            pem = ssl.get_server_certificate((self._host, self._port), timeout=CALL_S)
            leaf = x509.load_pem_x509_certificate(pem.encode())
        except ssl.SSLError:
            raise ConnectionFailed(
                f"{self._server}: does not speak TLS as an enrolment port does",
                fix="check the address: it is listen.enrolment of the server, 9701 unless changed",
            ) from None
        except OSError as error:
            raise self._unreachable(error.strerror or str(error)) from None
        except ValueError:
            raise IdentityRefused(f"{self._server}: its certificate cannot be read") from None
        # Before gRPC, which would say the same in words for nobody.
        certificates.check_time(
            f"{self._server}: its certificate", leaf.not_valid_before_utc, leaf.not_valid_after_utc, now
        )
        certificates.check_host(leaf, self._host)
        return leaf

    @contextmanager
    def _channel(self, trust: bytes) -> Iterator[grpc.Channel]:
        options = [("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]
        credentials = grpc.ssl_channel_credentials(trust)
        with grpc.secure_channel(self._server, credentials, options=options) as channel:
            yield channel

    def _call(self, method: grpc.UnaryUnaryMultiCallable[Asked, Told], request: Asked) -> Told:
        try:
            return method(request, timeout=CALL_S)
        except grpc.RpcError as error:
            raise self._explain(error) from None

    def _explain(self, error: Any) -> ConnectionFailed:
        code, details = error.code(), str(error.details() or "")[:1000]
        if code == grpc.StatusCode.PERMISSION_DENIED:
            return IdentityRefused(f"{self._server}: {details}")
        if "CERTIFICATE_VERIFY_FAILED" in details:
            return IdentityRefused(
                f"{self._server}: its certificate is not under the root of the invitation's consortium; "
                "nothing was sent to it",
                fix="check the address with the operator: somebody may be in between",
            )
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED):
            return self._unreachable("it is no enrolment port, or has just gone")
        return ConnectionFailed(f"{self._server}: {code.name.lower().replace('_', ' ')}: {details}")

    def _unreachable(self, why: str) -> ConnectionFailed:
        return ConnectionFailed(
            f"{self._server}: cannot be reached: {why}",
            fix="check the address; on the server: lepton-fl server start -c server.toml",
        )

    def _store(self, consortium: Consortium, reply: pb.JoinReply, now: datetime) -> AgentIdentity:
        folder, site = self._folder, self._token.site
        chain_pem = reply.certificate + reply.chain
        chain = certificates.read_chain(chain_pem, file="issued certificate", length=2)
        certificate = _check_chain(self._key, chain, consortium, folder / "site.pem")
        certificate.check_time(now)
        if certificate.site != site:
            raise IdentityRefused(f"issued certificate: is for {certificate.site}, not for {site}")
        roster = Roster.read(reply.roster, consortium.roster_key)
        _check_identity(reply.identity_certificate, roster, consortium, site, self._identity).check(
            roster, now
        )
        files = {
            "consortium.bin": consortium.encode(),
            "identity.cert": reply.identity_certificate,
            "roster.bin": reply.roster,
            "fleet.txt": self._fleet_address(reply.fleet_address).encode() + b"\n",
        }
        for name, data in files.items():
            write_atomic(folder / name, data)
        # Last: with it the site is enrolled.
        write_atomic(folder / "site.pem", certificates.key_pem(self._key) + chain_pem, mode=SECRET)
        (folder / "site.csr").unlink(missing_ok=True)
        return AgentIdentity.load(folder)

    def _fleet_address(self, told: str) -> str:
        """As the server says, or at the host that we know it by where it listens on every address."""
        found = _ADDRESS.fullmatch(told)
        if found is None:
            raise IdentityRefused(f"{self._server}: told no HOST:PORT for the agents")
        try:
            everywhere = ipaddress.ip_address(found[1].strip("[]")).is_unspecified
        except ValueError:
            everywhere = False
        return f"{self._server.rpartition(':')[0]}:{found[2]}" if everywhere else told


def _keep(path: Path, make: Any) -> bytes:
    """What is in the file, made and written with mode 0600 where there is none."""
    if not path.exists():
        write_atomic(path, make(), mode=SECRET)
    return read_secret(path)
