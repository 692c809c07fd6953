"""X.509 certificates of the fleet: made here, and checked here beyond what gRPC checks.

ECDSA on P-256 throughout. A site is named by one URI, `lepton-fl://site/NAME`; a server by its DNS names
and IP addresses. gRPC keeps serving after a certificate has expired and asks for no extended key usage:
`read_site` and `check_time` are for every call and, again and again, for every open stream.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lepton_fl.errors import ConfigError, IdentityRefused, VerificationFailed
from lepton_fl.study import NAME_PATTERN

ROOT_LIFE = timedelta(days=3653)
ISSUING_LIFE = timedelta(days=731)
SERVER_LIFE = timedelta(days=90)
SITE_LIFE = timedelta(days=30)
BACKDATED = timedelta(hours=1)
"""How far another machine's clock may be behind ours on the day of issue."""
RENEW_AT = 2 / 3
"""Part of its life after which a certificate is renewed."""

_SITE_URI = "lepton-fl://site/"
_MAX_CSR = 4096
_CLOCK = "set the clock of both machines"

Key = ec.EllipticCurvePrivateKey
Certificate = x509.Certificate


# Keys


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key) -> bytes:
    """PKCS#8, in clear: for a file of mode 0600 only."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read_key(pem: bytes, *, file: str) -> Key:
    """The private key in `pem`, where it may stand beside certificates.

    Raises:
        VerificationFailed: there is no key on P-256 in it.
    """
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Key) or not isinstance(key.curve, ec.SECP256R1):
        raise VerificationFailed(f"{file}: holds no ECDSA P-256 private key")
    return key


def public_der(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def certificate_pem(*certificates: Certificate) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def read_chain(pem: bytes, *, file: str, length: int) -> list[Certificate]:
    """The `length` certificates in `pem`, leaf first.

    Raises:
        VerificationFailed: there are more or fewer, or they cannot be read.
    """
    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError:
        found = []
    if len(found) != length:
        raise VerificationFailed(f"{file}: does not hold {length} certificates")
    return found


# Making


def make_root(key: Key, name: str, now: datetime) -> Certificate:
    """The consortium's own certificate, by which every other is judged."""
    return _sign(_subject(name, "root"), key.public_key(), key, None, now, ROOT_LIFE, authority=1)


def make_issuing(
    root: Certificate, root_key: Key, key: ec.EllipticCurvePublicKey, now: datetime
) -> Certificate:
    """A certificate under the root that may sign those of servers and sites, and no other authority."""
    (name,) = root.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    subject = _subject(str(name.value), "issuing")
    return _sign(subject, key, root_key, root, now, ISSUING_LIFE, authority=0)


def make_server(
    issuing: Certificate,
    issuing_key: Key,
    key: ec.EllipticCurvePublicKey,
    hosts: Sequence[str],
    now: datetime,
) -> Certificate:
    """A server's, good for these DNS names and IP addresses.

    Raises:
        ConfigError: there are none, or one of them is neither.
    """
    names = [_general_name(host) for host in hosts]
    if not names:
        raise ConfigError("a server's certificate needs a host", fix="--host NAME_OR_IP")
    return _sign(
        _subject("lepton-fl", "server"),
        key,
        issuing_key,
        issuing,
        now,
        SERVER_LIFE,
        names=names,
        usage=ExtendedKeyUsageOID.SERVER_AUTH,
    )


def make_site(
    issuing: Certificate, issuing_key: Key, key: ec.EllipticCurvePublicKey, site: str, now: datetime
) -> Certificate:
    """A site's, good as a TLS client only."""
    return _sign(
        _subject("lepton-fl", "site"),
        key,
        issuing_key,
        issuing,
        now,
        SITE_LIFE,
        names=[x509.UniformResourceIdentifier(_SITE_URI + site)],
        usage=ExtendedKeyUsageOID.CLIENT_AUTH,
    )


def _subject(organization: str, unit: str) -> x509.Name:
    # No common name: a TLS library might take one, here a site's own, for the name of a host.
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
        ]
    )


def _sign(
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    signer: Key,
    issuer: Certificate | None,
    now: datetime,
    life: timedelta,
    *,
    authority: int | None = None,
    names: Sequence[x509.GeneralName] = (),
    usage: x509.ObjectIdentifier | None = None,
) -> Certificate:
    """A certificate: an authority's, with so many below it, or one with `names` and `usage`.

    It ends with its issuer's at the latest, since it is worth nothing longer.

    Raises:
        IdentityRefused: that is over.
    """
    now = now.replace(microsecond=0)
    until = now + life
    if issuer is not None:
        until = min(until, issuer.not_valid_after_utc)
        check_time("issuing certificate", issuer.not_valid_before_utc, issuer.not_valid_after_utc, now)
    is_ca = authority is not None
    builder = (
        x509.CertificateBuilder(
            subject_name=subject, issuer_name=issuer.subject if issuer else subject, public_key=key
        )
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=authority), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_ca,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=is_ca,
                crl_sign=is_ca,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if usage:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
    return builder.sign(signer, SHA256())


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    if not re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*", host) or len(host) > 253:
        raise ConfigError.at("command line", "--host", found=host, allowed="a DNS name or an IP address")
    return x509.DNSName(host.lower())


# Requests


def make_csr(key: Key) -> bytes:
    """A request, DER. It names nobody: whom a certificate is for is the server's to say."""
    builder = x509.CertificateSigningRequestBuilder(subject_name=x509.Name([]))
    return builder.sign(key, SHA256()).public_bytes(Encoding.DER)


def read_csr(der: bytes) -> ec.EllipticCurvePublicKey:
    """The key for which `der` asks a certificate, once its owner has been seen to hold it.

    Raises:
        IdentityRefused: the request is malformed, or its key is no ECDSA P-256 key or did not sign it.
    """
    refused = IdentityRefused("certificate request: not one for an ECDSA P-256 key, signed by that key")
    if len(der) > _MAX_CSR:
        raise refused
    try:
        request = x509.load_der_x509_csr(der)
        key, signed = request.public_key(), request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise refused from None
    if (
        not signed
        or not isinstance(key, ec.EllipticCurvePublicKey)
        or not isinstance(key.curve, ec.SECP256R1)
    ):
        raise refused
    return key


# Checking


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteCertificate:
    """What a site's certificate says."""

    site: str
    serial: str
    """Hexadecimal."""
    not_before: datetime
    not_after: datetime

    def check_time(self, now: datetime) -> None:
        """That it is in force.

        Raises:
            IdentityRefused: not yet, or no more.
        """
        check_time(f"certificate of {self.site}", self.not_before, self.not_after, now)

    def renewal_due(self, now: datetime) -> bool:
        return renewal_due(self.not_before, self.not_after, now)


def read_site(pem: bytes | str, *, issuer: Certificate) -> SiteCertificate:
    """Whose certificate `pem` is, by everything but the time.

    Raises:
        IdentityRefused: it was not signed by `issuer`, or is not a site's, good for TLS clients only.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode() if isinstance(pem, str) else pem)
    except ValueError:
        raise IdentityRefused("certificate: cannot be read") from None
    return site_of(certificate, issuer=issuer)


def check_site(pem: bytes | str, *, issuer: Certificate, now: datetime) -> SiteCertificate:
    """`read_site`, and that it is in force."""
    found = read_site(pem, issuer=issuer)
    found.check_time(now)
    return found


def site_of(certificate: Certificate, *, issuer: Certificate) -> SiteCertificate:
    """`read_site` of a certificate that has been parsed."""
    check_issued(certificate, issuer, whose="certificate")
    try:
        extensions = certificate.extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        raise IdentityRefused("certificate: not a site's: names no site") from None
    if constraints.ca:
        raise IdentityRefused("certificate: not a site's: it is an authority's")
    uris = [name.value for name in names if isinstance(name, x509.UniformResourceIdentifier)]
    site = uris[0].removeprefix(_SITE_URI) if len(uris) == len(list(names)) == 1 else ""
    if not re.fullmatch(NAME_PATTERN, site) or uris[0] != _SITE_URI + site:
        raise IdentityRefused(f"certificate: not a site's: its one name must be {_SITE_URI}NAME")
    _check_usage(certificate, ExtendedKeyUsageOID.CLIENT_AUTH, f"certificate of {site}", "TLS client")
    return SiteCertificate(
        site=site,
        serial=f"{certificate.serial_number:x}",
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )


def _check_usage(certificate: Certificate, wanted: x509.ObjectIdentifier, whose: str, what: str) -> None:
    try:
        found = list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        raise IdentityRefused(f"{whose}: has no extended key usage, allowed: {what} alone") from None
    if found != [wanted]:
        raise IdentityRefused(f"{whose}: its extended key usage is not {what} alone")


def check_issued(certificate: Certificate, issuer: Certificate, *, whose: str) -> None:
    """That `issuer` signed it.

    Raises:
        IdentityRefused: not so.
    """
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        raise IdentityRefused(f"{whose}: was not issued by this consortium") from None


def check_authority(issuing: Certificate, root: Certificate) -> None:
    """That `issuing` is an authority under `root`.

    Raises:
        IdentityRefused: not so.
    """
    check_issued(issuing, root, whose="issuing certificate")
    try:
        authority = issuing.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        authority = False
    if not authority:
        raise IdentityRefused("issuing certificate: is not an authority's")


def check_host(certificate: Certificate, host: str) -> None:
    """That a server's certificate is for `host`.

    Raises:
        IdentityRefused: it is for others, which are named.
    """
    known = hosts_of(certificate)
    try:
        wanted = str(ipaddress.ip_address(host))
    except ValueError:
        wanted = host.lower().rstrip(".")
    if wanted not in known:
        raise IdentityRefused(
            f"server's certificate: found one for {', '.join(known) or 'no host'}, allowed: one for {host}",
            fix=f"use one of these names, or on the server: lepton-fl ca issue --host {host}",
        )


def hosts_of(certificate: Certificate) -> list[str]:
    """The DNS names and IP addresses that a server's certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return []
    return [str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]


def check_time(whose: str, not_before: datetime, not_after: datetime, now: datetime) -> None:
    """That a certificate is in force at `now`.

    Raises:
        IdentityRefused: not yet, or no more; both times are named, since often it is the clock.
    """
    if now < not_before:
        raise IdentityRefused(
            f"{whose}: not valid before {_minute(not_before)}, and this machine's clock says {_minute(now)}: "
            "one of the two clocks is off",
            fix=_CLOCK,
        )
    if now >= not_after:
        raise IdentityRefused(
            f"{whose}: expired at {_minute(not_after)}, and this machine's clock says {_minute(now)}: it was "
            "not renewed in time, or the clock is off",
            fix=f"{_CLOCK}; if they are right, enrol the site anew; for an issuing one: lepton-fl ca renew",
        )


def renewal_due(not_before: datetime, not_after: datetime, now: datetime) -> bool:
    """Whether two thirds of the life are over."""
    return now >= not_before + RENEW_AT * (not_after - not_before)


def _minute(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"
