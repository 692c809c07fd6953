"""A consortium's keys on disk: who may read them, what each can sign, and what a crash leaves."""

import os
import stat
from datetime import timedelta

import pytest

from lepton_fl.errors import ConfigError, IdentityRefused, LeptonError, VerificationFailed
from lepton_fl.fleet.pki.authority import (
    Authority,
    Consortium,
    Issuing,
    ServerIdentity,
    make_private,
    read_consortium,
    read_secret,
    spoken,
)
from lepton_fl.fleet.pki.certificates import check_authority, new_key, read_site
from lepton_fl.secagg import IdentityKey, decode, encode

PASSPHRASE = "correct horse battery"
SECRETS = ("root.sealed", "issuing.pem", "server.pem")


@pytest.fixture
def pki(authority, tmp_path):
    return tmp_path / "pki"


def test_keys_are_for_their_owner_alone(pki):
    """From the folder down; the document is public."""
    assert stat.S_IMODE(pki.stat().st_mode) == 0o700
    assert [stat.S_IMODE((pki / name).stat().st_mode) for name in SECRETS] == [0o600] * 3
    assert sorted(path.name for path in pki.iterdir()) == ["consortium.bin", *sorted(SECRETS)]


def test_the_roots_keys_lie_nowhere_in_clear(pki):
    """Neither PEM nor the raw bytes."""
    assert b"PRIVATE KEY" not in (pki / "root.sealed").read_bytes()


def test_it_opens_with_its_passphrase(authority, pki):
    """And signs what it signed before."""
    opened = Authority.open(pki, PASSPHRASE)

    assert opened.consortium == authority.consortium
    assert opened.next_roster(None).signed == authority.next_roster(None).signed


def test_the_root_can_lie_elsewhere(authority, pki, tmp_path):
    """On a stick in a safe; everything else works without it."""
    moved = (pki / "root.sealed").rename(tmp_path / "stick")

    Issuing.open(pki)
    ServerIdentity.load(pki)
    assert Authority.open(pki, PASSPHRASE, root=moved).consortium == authority.consortium
    with pytest.raises(ConfigError, match="no such file") as refused:
        Authority.open(pki, PASSPHRASE)
    assert "--root" in refused.value.fix


def test_another_consortiums_root_is_refused(pki, tmp_path, now):
    """Same passphrase, same name, other keys."""
    Authority.create(tmp_path / "other", name="banks", hosts=["a"], passphrase=PASSPHRASE, now=now)

    with pytest.raises(IdentityRefused, match="another consortium"):
        Authority.open(pki, PASSPHRASE, root=tmp_path / "other" / "root.sealed")


def test_a_wrong_passphrase_is_one_line(pki):
    """That does not repeat it."""
    with pytest.raises(IdentityRefused, match="the passphrase is wrong") as refused:
        Authority.open(pki, "Tr0ub4dor and 3")

    assert "Tr0ub4dor" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"passphrase": "elevenchars"}, "at least 12"), ({"hosts": []}, "host"), ({"hosts": ["a b"]}, "host")],
)
def test_nothing_is_written_where_something_is_refused(tmp_path, quick_scrypt, now, given, said):
    """So that the next try does not find half a consortium."""
    right = {"name": "banks", "hosts": ["a"], "passphrase": PASSPHRASE, "now": now}
    with pytest.raises(ConfigError, match=said):
        Authority.create(tmp_path / "pki", **{**right, **given})

    assert not (tmp_path / "pki").exists()


@pytest.mark.parametrize("left", ["root.sealed", "consortium.bin"])
def test_a_consortium_is_not_overwritten(tmp_path, now, left):
    """Nor where only its root or only its document is left."""
    (tmp_path / left).write_bytes(b"precious")

    with pytest.raises(ConfigError, match=f"{left}: there is a consortium already"):
        Authority.create(tmp_path, name="x", hosts=["a"], passphrase=PASSPHRASE, now=now)
    assert (tmp_path / left).read_bytes() == b"precious"


def test_the_document_is_all_of_the_fingerprint(authority):
    """Another root or another roster key is another consortium."""
    one = authority.consortium
    read = Consortium.read(one.encode())

    assert (read, read.name) == (one, "banks")
    other_key = Consortium(root=one.root, roster_key=IdentityKey.generate().public)
    assert len({one.fingerprint, other_key.fingerprint, read.fingerprint}) == 2


def test_a_malformed_document_is_refused(authority):
    """Whatever a server sends."""
    document = authority.consortium.encode()
    tag, der, key = decode(document, str, bytes, bytes)
    wrong = [b"", b"x", document + b"\0", document * 100, b"x" * (1 << 20)]
    wrong += [encode("other", der, key), encode(tag, b"", key), encode(tag, der, b"short"), encode(tag, der)]

    for data in wrong:
        with pytest.raises(VerificationFailed):
            Consortium.read(data)


def test_a_spoken_fingerprint_is_80_bits():
    """In groups that can be read out."""
    assert spoken(bytes(range(32))) == "0001 0203 0405 0607 0809"


def test_a_stolen_server_signs_no_identity(pki, authority):
    """What is beside the server is a key for TLS, and rosters are verified with another."""
    check_authority(Issuing.open(pki).certificate, authority.consortium.root)

    for name in ("issuing.pem", "server.pem"):
        with pytest.raises(VerificationFailed, match="Ed25519"):
            IdentityKey.read((pki / name).read_bytes())


def test_a_roster_grows_from_the_last_signed_one(authority, now):
    """Who may write the server's database cannot slip a member in."""
    certified = [
        authority.certify(party=101 + n, site=f"bank-{n}", key=IdentityKey.generate().public, now=now)
        for n in range(3)
    ]
    one = authority.next_roster(None, joined=certified[:2])
    two = authority.next_roster(one, joined=certified[2:], left=certified[:1])

    assert [m.name for m in one.members] == ["bank-0", "bank-1"]
    assert [m.name for m in two.members] == ["bank-1", "bank-2"]
    assert (one.version, two.version, two.revoked) == (1, 2, {certified[0].serial})
    assert two.supersedes(one)
    certified[1].check(two, now)
    with pytest.raises(IdentityRefused, match="not a member"):
        certified[0].check(two, now)


def test_the_issuing_certificate_is_renewed_over_its_key(authority, pki, now):
    """What it issued before is good after, on both sides."""
    before, key = Issuing.open(pki), new_key().public_key()
    old, _ = before.issue_site(key, "bank-1", now)
    authority.renew_issuing(now + timedelta(days=700))
    after = Issuing.open(pki)
    new, _ = after.issue_site(key, "bank-1", now + timedelta(days=700))

    assert after.certificate.not_valid_after_utc > before.certificate.not_valid_after_utc
    for pem in (old, new):
        for issuing in (before, after):
            assert read_site(pem, issuer=issuing.certificate).site == "bank-1"
    assert ServerIdentity.load(pki).chain_pem.endswith(after.pem)


def test_the_server_renews_itself(pki, now):
    """At two thirds of its ninety days, for the same hosts, with a new key."""
    held = ServerIdentity.load(pki)

    assert held.renewed(now + timedelta(days=59)) is held
    new = held.renewed(now + timedelta(days=60))
    assert new.hosts == held.hosts == ["localhost", "127.0.0.1"]
    assert new.not_after == now + timedelta(days=150)
    assert new.key_pem != held.key_pem


def test_new_files_are_seen(pki, now):
    """And unchanged ones are not read again."""
    held = ServerIdentity.load(pki)

    assert held.refreshed() is held
    Issuing.open(pki).issue_server(["server"], now)
    assert held.refreshed().hosts == ["server"]


@pytest.mark.parametrize("name", ["issuing.pem", "server.pem"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_may_touch_is_not_used(pki, name, mode):
    """With the command that mends it."""
    (pki / name).chmod(mode)

    with pytest.raises(ConfigError, match="others may read or write it") as refused:
        ServerIdentity.load(pki)
    assert refused.value.fix == f"chmod 600 {pki / name}"


def test_a_folder_that_others_may_enter_takes_no_keys(tmp_path):
    """The same."""
    (tmp_path / "open").mkdir(mode=0o755)

    with pytest.raises(ConfigError, match="others may enter it"):
        make_private(tmp_path / "open")


def swap(pki, name, other):
    """Put the certificates of `other` behind the key of `name`."""
    key, _, _ = (pki / name).read_bytes().partition(b"-----BEGIN CERTIFICATE")
    _, mark, chain = other.read_bytes().partition(b"-----BEGIN CERTIFICATE")
    (pki / name).write_bytes(key + mark + chain)


@pytest.mark.parametrize("name", ["issuing.pem", "server.pem"])
def test_files_of_two_consortia_do_not_mix(pki, tmp_path, now, name):
    """Whole, or a key from one and certificates from the other."""
    Authority.create(tmp_path / "other", name="banks", hosts=["a"], passphrase=PASSPHRASE, now=now)
    ours = (pki / name).read_bytes()
    (pki / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(IdentityRefused, match="not issued by this consortium"):
        ServerIdentity.load(pki)

    (pki / name).write_bytes(ours)
    ServerIdentity.load(pki)
    swap(tmp_path / "other", name, pki / name)
    (pki / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(VerificationFailed, match="key and certificate do not match"):
        ServerIdentity.load(pki)


@pytest.mark.parametrize("name", ["consortium.bin", "issuing.pem", "server.pem"])
@pytest.mark.parametrize("data", [None, b"", b"x" * 100])
def test_a_broken_file_is_one_line(pki, name, data):
    """Missing, empty or nonsense: never a traceback of somebody else's."""
    (pki / name).unlink() if data is None else (pki / name).write_bytes(data)

    with pytest.raises(LeptonError):
        ServerIdentity.load(pki)


def test_there_is_no_consortium_yet(tmp_path):
    """And what to type."""
    with pytest.raises(ConfigError) as refused:
        read_consortium(tmp_path)
    assert "ca init" in refused.value.fix


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    """Before any key is made."""
    (tmp_path / "shut").mkdir(mode=0o500)

    with pytest.raises(ConfigError, match="cannot write here"):
        make_private(tmp_path / "shut")


def test_the_place_for_the_root_must_be_there(tmp_path, quick_scrypt, now):
    """A stick that is not plugged in; nothing was written elsewhere instead."""
    with pytest.raises(ConfigError, match="no such folder"):
        Authority.create(
            tmp_path / "pki",
            name="banks",
            hosts=["a"],
            passphrase=PASSPHRASE,
            now=now,
            root=tmp_path / "stick" / "root",
        )

    assert not (tmp_path / "pki").exists()


def test_a_secret_is_read(tmp_path):
    """Where it is its owner's alone."""
    (tmp_path / "s").write_bytes(b"s")
    (tmp_path / "s").chmod(0o600)

    assert read_secret(tmp_path / "s") == b"s"
