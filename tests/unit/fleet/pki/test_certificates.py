"""Whose certificates are let in, and everything else that is not."""

from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage

from lepton_fl.errors import ConfigError, IdentityRefused, VerificationFailed
from lepton_fl.fleet.pki import certificates
from lepton_fl.fleet.pki.certificates import (
    certificate_pem,
    check_authority,
    check_host,
    check_site,
    hosts_of,
    make_csr,
    make_issuing,
    make_root,
    make_server,
    make_site,
    new_key,
    read_csr,
    read_key,
    read_site,
)

ROOT_KEY, KEY, SITE_KEY = new_key(), new_key(), new_key()
URI = x509.UniformResourceIdentifier
SITE = URI("lepton-fl://site/bank-1")


@pytest.fixture
def root(now):
    return make_root(ROOT_KEY, "banks", now)


@pytest.fixture
def issuing(root, now):
    return make_issuing(root, ROOT_KEY, KEY.public_key(), now)


@pytest.fixture
def forge(issuing, now):
    """A certificate by the issuing authority's own key, with one thing wrong."""

    def make(*, names=(SITE,), usages=(Usage.CLIENT_AUTH,), ca=False, issuer=None, key=KEY):
        builder = (
            x509.CertificateBuilder(
                subject_name=x509.Name([]),
                issuer_name=issuing.subject if issuer is None else issuer,
                public_key=SITE_KEY.public_key(),
            )
            .serial_number(7)
            .not_valid_before(now)
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        return certificate_pem(builder.sign(key, SHA256()))

    return make


def test_a_sites_certificate_says_whose_it_is(issuing, now):
    """Until thirty days from now, and from a little before, for clocks that are behind."""
    made = make_site(issuing, KEY, SITE_KEY.public_key(), "bank-1", now)

    found = check_site(certificate_pem(made), issuer=issuing, now=now)

    assert (found.site, found.serial) == ("bank-1", f"{made.serial_number:x}")
    assert (found.not_before, found.not_after) == (now - timedelta(hours=1), now + timedelta(days=30))


def test_the_forged_ones_differ_in_one_thing(forge, issuing, now):
    """Without anything wrong it is let in: each refusal below is for its own reason."""
    assert check_site(forge(), issuer=issuing, now=now).site == "bank-1"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"usages": ()}, "no extended key usage"),
        ({"usages": (Usage.SERVER_AUTH,)}, "not TLS client alone"),
        ({"usages": (Usage.CLIENT_AUTH, Usage.SERVER_AUTH)}, "not TLS client alone"),
        ({"usages": (Usage.ANY_EXTENDED_KEY_USAGE,)}, "not TLS client alone"),
        ({"ca": True}, "an authority's"),
        ({"names": ()}, "names no site"),
        ({"names": (x509.DNSName("bank-1"),)}, "its one name must be"),
        ({"names": (SITE, URI("lepton-fl://site/bank-2"))}, "its one name must be"),
        ({"names": (SITE, x509.DNSName("server"))}, "its one name must be"),
        ({"names": (URI("lepton-fl://site/"),)}, "its one name must be"),
        ({"names": (URI("lepton-fl://site/a/b"),)}, "its one name must be"),
        ({"names": (URI("lepton-fl://server/bank-1"),)}, "its one name must be"),
        ({"names": (URI("bank-1"),)}, "its one name must be"),
        ({"key": SITE_KEY}, "not issued by this consortium"),
        ({"issuer": x509.Name([])}, "not issued by this consortium"),
        ({"key": SITE_KEY, "issuer": x509.Name([])}, "not issued by this consortium"),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(value),
)
def test_what_is_no_sites_certificate_is_refused(forge, issuing, now, wrong, said):
    """Though gRPC would let most of them in."""
    with pytest.raises(IdentityRefused, match=said):
        check_site(forge(**wrong), issuer=issuing, now=now)


@pytest.mark.parametrize("pem", ["", b"x", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_refused(issuing, now, pem):
    """None, or bytes that cannot be read."""
    with pytest.raises(IdentityRefused, match="cannot be read"):
        check_site(pem, issuer=issuing, now=now)


def test_another_consortiums_site_is_refused(issuing, now):
    """Though its authority has the same name."""
    other_key = new_key()
    other = make_issuing(make_root(other_key, "banks", now), other_key, (key := new_key()).public_key(), now)
    pem = certificate_pem(make_site(other, key, SITE_KEY.public_key(), "bank-1", now))

    with pytest.raises(IdentityRefused, match="not issued"):
        check_site(pem, issuer=issuing, now=now)


def test_the_root_certifies_no_site(root, issuing, now):
    """It signs authorities only; the server trusts the issuing one alone."""
    pem = certificate_pem(make_site(root, ROOT_KEY, SITE_KEY.public_key(), "bank-1", now))

    with pytest.raises(IdentityRefused, match="not issued"):
        check_site(pem, issuer=issuing, now=now)


def test_the_servers_certificate_is_no_sites(issuing, now):
    """Nor are the authorities' own."""
    pem = certificate_pem(make_server(issuing, KEY, SITE_KEY.public_key(), ["server"], now))

    with pytest.raises(IdentityRefused, match="one name must be"):
        check_site(pem, issuer=issuing, now=now)


@pytest.mark.parametrize(
    ("at", "said"),
    [
        (
            timedelta(hours=-1, seconds=-1),
            "not valid before 2026-11-22 11:00 UTC.*clock says 2026-11-22 10:59",
        ),
        (timedelta(days=30), "expired at 2026-12-22 12:00 UTC.*clock says 2026-12-22 12:00 UTC"),
    ],
    ids=["future", "expired"],
)
def test_out_of_its_time_it_is_refused(issuing, now, at, said):
    """With both times, since often it is the clock; and each time anew for a certificate read before."""
    pem = certificate_pem(make_site(issuing, KEY, SITE_KEY.public_key(), "bank-1", now))
    found = read_site(pem, issuer=issuing)
    found.check_time(now)

    with pytest.raises(IdentityRefused, match=said):
        found.check_time(now + at)
    with pytest.raises(IdentityRefused, match=said):
        check_site(pem, issuer=issuing, now=now + at)


def test_it_is_renewed_at_two_thirds_of_its_life(issuing, now):
    """Ten days are left to do so in."""
    pem = certificate_pem(make_site(issuing, KEY, SITE_KEY.public_key(), "bank-1", now))
    found = read_site(pem, issuer=issuing)

    assert not found.renewal_due(now + timedelta(days=19))
    assert found.renewal_due(now + timedelta(days=20))


def test_an_authority_is_one_under_the_root(root, issuing, now):
    """Not under another, and not a server that passes its certificate for one."""
    check_authority(issuing, root)
    server = make_server(root, ROOT_KEY, KEY.public_key(), ["server"], now)

    with pytest.raises(IdentityRefused, match="is not an authority's"):
        check_authority(server, root)
    with pytest.raises(IdentityRefused, match="not issued"):
        check_authority(issuing, make_root(new_key(), "banks", now))


def test_nothing_outlives_its_issuer(issuing, now):
    """It would be refused all the same, and nobody would know why."""
    late = issuing.not_valid_after_utc - timedelta(days=3)
    server = make_server(issuing, KEY, SITE_KEY.public_key(), ["server"], late)
    site = make_site(issuing, KEY, SITE_KEY.public_key(), "bank-1", late)

    assert server.not_valid_after_utc == site.not_valid_after_utc == issuing.not_valid_after_utc
    with pytest.raises(IdentityRefused, match="issuing certificate: expired") as refused:
        make_site(issuing, KEY, SITE_KEY.public_key(), "bank-1", late + timedelta(days=3))
    assert "ca renew" in refused.value.fix


def test_a_request_names_a_key_and_nobody(now):
    """Whom the certificate is for is the server's to say."""
    der = make_csr(SITE_KEY)

    assert read_csr(der) == SITE_KEY.public_key()
    assert list(x509.load_der_x509_csr(der).subject) == []


def _csr(key, algorithm):
    builder = x509.CertificateSigningRequestBuilder(subject_name=x509.Name([]))
    return builder.sign(key, algorithm).public_bytes(Encoding.DER)


@pytest.mark.parametrize(
    "der",
    [
        b"",
        b"x" * 100,
        make_csr(SITE_KEY)[:-1],
        make_csr(SITE_KEY) + b"\0" * 5000,
        # The last bytes are the signature's.
        make_csr(SITE_KEY)[:-4] + b"\1\2\3\4",
        _csr(ec.generate_private_key(ec.SECP384R1()), SHA256()),
        _csr(ed25519.Ed25519PrivateKey.generate(), None),
        _csr(rsa.generate_private_key(65537, 2048), SHA256()),
    ],
    ids=["none", "noise", "cut", "long", "signature", "P-384", "Ed25519", "RSA"],
)
def test_another_request_is_refused(der):
    """Who does not hold the key gets no certificate for it."""
    with pytest.raises(IdentityRefused, match="certificate request"):
        read_csr(der)


def test_a_server_is_good_for_its_hosts(issuing, now):
    """Names in any case, addresses in any form."""
    hosts = ["Server.Bank.example", "10.0.0.7", "::1", "[fe80::1]"]
    made = make_server(issuing, KEY, SITE_KEY.public_key(), hosts, now)

    assert hosts_of(made) == ["server.bank.example", "10.0.0.7", "::1", "fe80::1"]
    for host in ("SERVER.bank.example.", "10.0.0.7", "0:0::1"):
        check_host(made, host)
    with pytest.raises(IdentityRefused, match=r"found one for .*10\.0\.0\.7.*allowed: one for evil\.example"):
        check_host(made, "evil.example")


@pytest.mark.parametrize(
    "hosts", [[], ["a b"], ["-a"], ["*.bank.example"], ["a..b"], ["x" * 64], [""], ["a\n"]]
)
def test_a_malformed_host_is_refused(issuing, now, hosts):
    """No wildcard either."""
    with pytest.raises(ConfigError, match="host"):
        make_server(issuing, KEY, SITE_KEY.public_key(), hosts, now)


def test_no_certificate_has_a_common_name(root, issuing, now):
    """gRPC falls back on it where there is no DNS name: a site named as the server is would pass for it."""
    site = make_site(issuing, KEY, SITE_KEY.public_key(), "server.bank.example", now)

    for made in (root, issuing, site):
        assert made.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME) == []


@pytest.mark.parametrize(
    "key",
    [ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())],
    ids=["Ed25519", "P-384"],
)
def test_a_key_of_another_kind_is_refused(key):
    """In a line that names the file."""
    pem = key.private_bytes(Encoding.PEM, certificates.PrivateFormat.PKCS8, certificates.NoEncryption())

    with pytest.raises(VerificationFailed, match=r"site\.pem: holds no ECDSA P-256"):
        read_key(pem, file="site.pem")
