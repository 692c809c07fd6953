"""Parties, their certificates and the roster: signed, and never taken back."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from lepton_fl.errors import IdentityRefused, VerificationFailed
from lepton_fl.secagg import (
    IdentityCertificate,
    IdentityKey,
    Member,
    Roster,
    decode,
    encode,
    key_digest,
    verify,
)

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
ROOT, OTHER = IdentityKey.generate(), IdentityKey.generate()
KEYS = {name: IdentityKey.generate() for name in ("bank-1", "bank-2", "bank-3")}


def certificate(name="bank-1", root=ROOT, **changed):
    given = {
        "party": 100 + int(name[-1]),
        "name": name,
        "key": KEYS[name].public,
        "not_before": NOW,
        "not_after": NOW + timedelta(days=1),
        "serial": int(name[-1]),
    }
    return IdentityCertificate.issue(root, **{**given, **changed})


def roster(version=1, names=("bank-1", "bank-2"), root=ROOT, revoked=(), members=None):
    listed = [Member(100 + int(n[-1]), n, key_digest(KEYS[n].public)) for n in names]
    return Roster.issue(
        root,
        consortium=b"c" * 32,
        version=version,
        members=listed if members is None else members,
        revoked=revoked,
    )


def test_a_signature_is_its_keys_and_its_purposes():
    """And over exactly these values."""
    signature = ROOT.sign("lepton-fl/test/1", 1, "a")

    verify(ROOT.public, signature, "lepton-fl/test/1", 1, "a")
    for key, tag, values in [
        (OTHER.public, "lepton-fl/test/1", (1, "a")),
        (ROOT.public, "lepton-fl/test/2", (1, "a")),
        (ROOT.public, "lepton-fl/test/1", (1, "b")),
        (b"short", "lepton-fl/test/1", (1, "a")),
    ]:
        with pytest.raises(VerificationFailed, match="signature"):
            verify(key, signature, tag, *values)


def test_a_key_is_read_as_it_was_written():
    """And signs the same."""
    read = IdentityKey.read(ROOT.to_bytes())

    assert read.public == ROOT.public
    assert read.sign("t", 1) == ROOT.sign("t", 1)


@pytest.mark.parametrize(
    "data", [b"", b"x", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_what_is_no_key_is_refused(data):
    """In our own words."""
    with pytest.raises(VerificationFailed, match="Ed25519"):
        IdentityKey.read(data)


def test_a_key_does_not_show_itself():
    """Neither in a traceback's locals nor in a log."""
    assert "PRIVATE" not in repr(ROOT)


@pytest.mark.parametrize(
    ("issue", "read"),
    [(certificate, IdentityCertificate.read), (roster, Roster.read)],
    ids=["cert", "roster"],
)
def test_only_the_consortiums_signature_counts(issue, read):
    """Not another's, and on no other bytes."""
    signed = issue().signed

    assert read(signed, ROOT.public) == issue()
    with pytest.raises(VerificationFailed):
        read(issue(root=OTHER).signed, ROOT.public)
    for at in range(len(signed)):
        changed = bytearray(signed)
        changed[at] ^= 1
        with pytest.raises(VerificationFailed):
            read(bytes(changed), ROOT.public)


def test_a_certificate_is_no_roster():
    """The signature says what for."""
    body, signature = decode(certificate().signed, tuple, bytes)

    with pytest.raises(VerificationFailed, match="signature"):
        Roster.read(encode(body, signature), ROOT.public)


@pytest.mark.parametrize("changed", [{"party": 100}, {"party": 1 << 63}, {"key": b"short"}])
def test_a_malformed_certificate_is_refused_even_if_signed(changed):
    """A party id below the first, above Flower's node ids, or another key."""
    with pytest.raises(VerificationFailed, match="malformed"):
        certificate(**changed)


def test_a_member_of_the_roster_is_let_in():
    """Name, key and time agree."""
    certificate().check(roster(), NOW)


@pytest.mark.parametrize(
    ("found", "listed", "now", "said"),
    [
        (certificate(), roster(), NOW - timedelta(seconds=1), "not in force"),
        (certificate(), roster(), NOW + timedelta(days=1), "not in force"),
        (certificate("bank-3"), roster(), NOW, "not a member"),
        (certificate(), roster(revoked=[1]), NOW, "not a member"),
        (certificate(key=KEYS["bank-2"].public), roster(), NOW, "another name or key"),
        (certificate(name="bank-2", party=101), roster(), NOW, "another name or key"),
    ],
    ids=["early", "late", "no member", "revoked", "key", "name"],
)
def test_who_is_no_member_is_refused(found, listed, now, said):
    """One thing wrong each."""
    with pytest.raises(IdentityRefused, match=said):
        found.check(listed, now)


@pytest.mark.parametrize(
    "members",
    [
        [Member(101, "a", b"1" * 32), Member(101, "b", b"2" * 32)],
        [Member(101, "a", b"1" * 32), Member(102, "a", b"2" * 32)],
        [Member(101, "a", b"1" * 32), Member(102, "b", b"1" * 32)],
    ],
    ids=["party", "name", "key"],
)
def test_no_two_members_share_anything(members):
    """One institution with two seats would count twice in a quorum."""
    with pytest.raises(VerificationFailed, match="malformed"):
        roster(members=members)


def test_a_newer_roster_supersedes():
    """With a member more, one fewer, or none at all before."""
    held = roster(3, revoked=[7])

    assert roster(4, ("bank-1", "bank-2", "bank-3"), revoked=[7]).supersedes(held)
    assert roster(9, ("bank-1",), revoked=[7, 2]).supersedes(held)
    assert held.supersedes(None)
    assert not roster(3, revoked=[7]).supersedes(held)


REPLACED = [Member(101, "bank-1", key_digest(KEYS["bank-3"].public))]
RENAMED = [Member(101, "bank-9", key_digest(KEYS["bank-1"].public))]


@pytest.mark.parametrize(
    ("offered", "said"),
    [
        (roster(2, revoked=[7]), "version 2 was offered, version 3 is held"),
        (roster(3, ("bank-1",), revoked=[7]), "version 3 was offered, version 3 is held"),
        (roster(4), "restores what was revoked"),
        (roster(4, members=REPLACED, revoked=[7]), "about bank-1"),
        (roster(4, members=RENAMED, revoked=[7]), "about bank-1"),
    ],
    ids=["rolled back", "two of a version", "revocation undone", "key replaced", "renamed"],
)
def test_a_roster_never_goes_back(offered, said):
    """Even where the consortium's signature is on it."""
    with pytest.raises(VerificationFailed, match=said):
        offered.supersedes(roster(3, revoked=[7]))


def test_another_consortiums_roster_supersedes_nothing():
    """Should one key ever serve two."""
    with pytest.raises(VerificationFailed, match="another consortium"):
        replace(roster(4), consortium=b"d" * 32).supersedes(roster(3))
