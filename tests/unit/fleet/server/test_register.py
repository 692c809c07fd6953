"""The register: who is let in, who no more, and what an invitation is good for."""

import hashlib
import sqlite3
import threading
from dataclasses import replace
from datetime import timedelta

import pytest

from lepton_fl.errors import IdentityRefused, VerificationFailed
from lepton_fl.fleet.pki.authority import Issuing
from lepton_fl.fleet.pki.certificates import make_csr, new_key, read_site
from lepton_fl.fleet.server.database import Database
from lepton_fl.fleet.server.register import KEPT_CERTIFICATES, MAX_FAILURES, Register, Request
from lepton_fl.secagg import IdentityCertificate, IdentityKey, Roster

HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@pytest.fixture
def database(tmp_path):
    opened = Database(tmp_path / "state" / "server.db")
    yield opened
    opened.close()


@pytest.fixture
def register(database):
    return Register(database)


@pytest.fixture
def issuing(authority, tmp_path):
    return Issuing.open(tmp_path / "pki")


@pytest.fixture
def invited(register, authority, now):
    """Invite a site; gives the request it would send."""

    def make(site="bank-1", life=3 * DAY):
        token = register.invite(site, consortium=authority.consortium, life=life, now=now)
        return Request(
            token_id=token.id,
            secret=token.secret,
            site=site,
            csr=make_csr(new_key()),
            identity_key=IdentityKey.generate().public,
        )

    return make


@pytest.fixture
def enrol(register, authority, issuing, invited, now):
    """Take a site all the way in; gives its request, certificates and roster."""

    def make(site="bank-1"):
        request = invited(site)
        register.request(request, issuing, now)
        register.approve(site, keys=register.requested(site), authority=authority, now=now)
        return request, register.request(request, issuing, now)

    return make


@pytest.fixture
def read(issuing):
    return lambda decision: read_site(decision.tls_certificate, issuer=issuing.certificate)


def test_a_site_is_pending_until_it_is_approved(register, authority, issuing, invited, read, now):
    """And asking is the same question however often it is asked."""
    request = invited()
    first, again = (register.request(request, issuing, now) for _ in range(2))
    roster = register.approve("bank-1", keys=register.requested("bank-1"), authority=authority, now=now)
    after, repeated = (register.request(request, issuing, now + HOUR) for _ in range(2))

    assert (first.state, first.tls_certificate, again) == ("pending", b"", first)
    assert (after.state, repeated) == ("approved", after)
    assert read(after).site == "bank-1"
    assert Roster.read(after.roster, authority.consortium.roster_key) == roster
    certified = IdentityCertificate.read(after.identity_certificate, authority.consortium.roster_key)
    certified.check(roster, now)
    assert (certified.party, certified.key) == (101, request.identity_key)


def test_an_enrolled_site_is_admitted(register, enrol, read, now):
    """As its party, which nobody else ever is."""
    assert [register.admit(read(enrol(f"bank-{n}")[1]), now) for n in (1, 2, 3)] == [101, 102, 103]


def test_a_certificate_is_judged_by_its_time_each_time(register, enrol, read, now):
    """Admitted a moment ago is no reason."""
    certificate = read(enrol()[1])
    register.admit(certificate, now)

    with pytest.raises(IdentityRefused, match="expired"):
        register.admit(certificate, now + 30 * DAY)
    with pytest.raises(IdentityRefused, match="not valid before"):
        register.admit(certificate, now - 2 * DAY)


def test_a_certificate_that_the_register_does_not_know_is_refused(register, enrol, issuing, read, now):
    """Though the issuing key has signed it; and so is a known one under another name."""
    certificate = read(enrol()[1])
    _, unknown = issuing.issue_site(new_key().public_key(), "bank-1", now)

    for wrong in (unknown, replace(certificate, site="bank-2")):
        with pytest.raises(IdentityRefused, match="issued no such certificate"):
            register.admit(wrong, now)


def test_a_revoked_site_is_refused_at_once(register, enrol, issuing, read, now):
    """Every certificate of it, renewal and its old invitation; the others stay."""
    (request, decision), (_, other) = enrol("bank-1"), enrol("bank-2")
    certificate = read(decision)
    renewed = register.renew(certificate, make_csr(new_key()), issuing, now)

    assert register.revoke("bank-1", now)
    for pem in (decision.tls_certificate, renewed):
        with pytest.raises(IdentityRefused, match="was revoked at 2026-11-22 12:00 UTC"):
            register.admit(read_site(pem, issuer=issuing.certificate), now)
    with pytest.raises(IdentityRefused, match="was revoked"):
        register.renew(certificate, make_csr(new_key()), issuing, now)
    with pytest.raises(IdentityRefused, match="was revoked"):
        register.request(request, issuing, now)
    assert register.admit(read(other), now) == 102
    assert not register.revoke("bank-1", now)


def test_revocation_is_seen_by_an_open_server(register, enrol, read, tmp_path, now):
    """The operator's command is another process."""
    certificate = read(enrol()[1])
    operator = Database(tmp_path / "state" / "server.db")
    Register(operator).revoke("bank-1", now)
    operator.close()

    with pytest.raises(IdentityRefused, match="was revoked"):
        register.admit(certificate, now)


def test_a_renewed_certificate_is_admitted_beside_the_old(register, enrol, issuing, read, now):
    """An open stream is not cut for it."""
    old = read(enrol()[1])
    new = read_site(
        register.renew(old, make_csr(new_key()), issuing, now + 20 * DAY), issuer=issuing.certificate
    )

    assert register.admit(old, now + 20 * DAY) == register.admit(new, now + 20 * DAY) == 101
    assert register.admit(new, now + 49 * DAY) == 101
    assert new.serial != old.serial


def test_renewals_do_not_pile_up(register, enrol, issuing, read, database, now):
    """What has expired is forgotten."""
    certificate, at = read(enrol()[1]), now
    for _ in range(20):
        at += 20 * DAY
        pem = register.renew(certificate, make_csr(new_key()), issuing, at)
        certificate = read_site(pem, issuer=issuing.certificate)

    assert len(database.rows("SELECT serial FROM tls_certificates")) == 2


def test_a_site_that_renews_without_end_fills_nothing(register, enrol, issuing, read, database, now):
    """Nor is it kept out where no answer reached it: the certificate that it calls with stays good."""
    held = read(enrol()[1])
    for _ in range(3 * KEPT_CERTIFICATES):
        last = read_site(register.renew(held, make_csr(new_key()), issuing, now), issuer=issuing.certificate)

    assert register.admit(held, now) == register.admit(last, now) == 101
    assert len(database.rows("SELECT serial FROM tls_certificates")) == KEPT_CERTIFICATES + 1


def test_an_expired_certificate_is_not_renewed(register, enrol, issuing, read, now):
    """Too late is a new invitation."""
    with pytest.raises(IdentityRefused, match="expired"):
        register.renew(read(enrol()[1]), make_csr(new_key()), issuing, now + 30 * DAY)


def test_the_secret_is_not_kept(register, invited, database):
    """Its digest is."""
    request = invited()
    kept = [value for row in database.rows("SELECT * FROM invitations") for value in tuple(row)]

    assert request.secret not in kept
    assert hashlib.sha256(request.secret).digest() in kept


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"token_id": b"x" * 8}, "does not know this token"),
        ({"token_id": b""}, "does not know this token"),
        ({"secret": b"x" * 16}, "does not know this token"),
        ({"secret": b""}, "does not know this token"),
        ({"site": "bank-2"}, "is for bank-1, not for bank-2"),
        ({"csr": b"x"}, "certificate request"),
    ],
)
def test_another_token_is_refused(register, invited, issuing, now, wrong, said):
    """And leaves the right one good."""
    request = invited()
    with pytest.raises(IdentityRefused, match=said):
        register.request(replace(request, **wrong), issuing, now)

    assert register.request(request, issuing, now).state == "pending"


def test_a_wrong_secret_says_no_more_than_an_unknown_token(register, invited, issuing, now):
    """Nothing is learnt about which tokens there are."""
    request, said = invited(), set()
    for wrong in ({"token_id": b"x" * 8}, {"secret": b"x" * 16}, {"secret": b"x" * 16, "site": "bank-2"}):
        with pytest.raises(IdentityRefused) as refused:
            register.request(replace(request, **wrong), issuing, now)
        said.add(refused.value.message)

    assert len(said) == 1


def test_a_bounded_number_of_failures(register, invited, issuing, now):
    """Then the invitation is void, for its owner too."""
    request = invited()
    for _ in range(MAX_FAILURES):
        with pytest.raises(IdentityRefused):
            register.request(replace(request, secret=b"x" * 16), issuing, now)

    with pytest.raises(IdentityRefused, match="void"):
        register.request(request, issuing, now)


def test_failures_do_not_undo_a_request(register, invited, issuing, now):
    """A stranger cannot throw out who has come in."""
    request = invited()
    register.request(request, issuing, now)
    for _ in range(2 * MAX_FAILURES):
        with pytest.raises(IdentityRefused):
            register.request(replace(request, secret=b"x" * 16), issuing, now)

    assert register.request(request, issuing, now).state == "pending"


def test_an_expired_token_is_refused(register, invited, issuing, now):
    """One that was used in time still fetches."""
    late, in_time = invited("bank-1", life=HOUR), invited("bank-2", life=HOUR)
    register.request(in_time, issuing, now + HOUR - timedelta(seconds=1))

    with pytest.raises(IdentityRefused, match="expired at 2026-11-22 13:00 UTC"):
        register.request(late, issuing, now + HOUR)
    assert register.request(in_time, issuing, now + DAY).state == "pending"


@pytest.mark.parametrize("field", ["csr", "identity_key"])
@pytest.mark.parametrize("approved", [False, True])
def test_a_token_serves_one_pair_of_keys(register, enrol, invited, issuing, now, field, approved):
    """Replayed with another, before or after approval, it is refused."""
    if approved:
        request, _ = enrol()
    else:
        request = invited()
        register.request(request, issuing, now)
    other = {"csr": make_csr(new_key()), "identity_key": IdentityKey.generate().public}

    with pytest.raises(IdentityRefused, match="has been used with other keys"):
        register.request(replace(request, **{field: other[field]}), issuing, now)


def test_a_newer_invitation_voids_the_one_before(register, invited, issuing, now):
    """Asked with or not."""
    first = invited()
    register.request(first, issuing, now)
    second = invited()

    with pytest.raises(IdentityRefused, match="void"):
        register.request(first, issuing, now)
    with pytest.raises(IdentityRefused, match="no site of this name is asking"):
        register.requested("bank-1")
    assert register.request(second, issuing, now).state == "pending"


def test_a_rejected_site_hears_it(register, invited, issuing, authority, now):
    """And cannot be approved after all."""
    request = invited()
    register.request(request, issuing, now)
    keys = register.requested("bank-1")
    register.reject("bank-1")

    assert register.request(request, issuing, now).state == "rejected"
    with pytest.raises(IdentityRefused, match="no site of this name is asking"):
        register.approve("bank-1", keys=keys, authority=authority, now=now)


def test_the_name_of_an_enrolled_site_is_taken(enrol, invited):
    """With the two ways out."""
    enrol()
    with pytest.raises(IdentityRefused, match="bank-1: a site of this name is enrolled") as refused:
        invited("bank-1")

    assert "enroll revoke bank-1" in refused.value.fix


def test_a_name_comes_back_as_another_party(register, enrol, read, now):
    """Its old keys do not, and its old certificate is not let in under the name."""
    old = read(enrol()[1])
    register.revoke("bank-1", now)
    new = read(enrol()[1])

    assert register.admit(new, now) == 102
    with pytest.raises(IdentityRefused, match="was revoked"):
        register.admit(old, now)


def test_a_key_is_a_members_once(register, enrol, authority, issuing, invited, now):
    """Not for a second name, nor after it was revoked."""
    first, _ = enrol("bank-1")
    register.revoke("bank-1", now)
    for site in ("bank-1", "bank-2"):
        register.request(replace(invited(site), identity_key=first.identity_key), issuing, now)
        with pytest.raises(IdentityRefused, match="is, or was, a member's already"):
            register.approve(site, keys=register.requested(site), authority=authority, now=now)


def test_what_was_shown_is_what_is_approved(register, authority, issuing, invited, now):
    """Another request, between the operator's look and the yes, is not."""
    register.request(invited(), issuing, now)
    shown = register.requested("bank-1")
    register.request(invited(), issuing, now)

    with pytest.raises(IdentityRefused, match="other keys than were shown"):
        register.approve("bank-1", keys=shown, authority=authority, now=now)
    assert register.roster(authority.consortium) is None


def test_the_next_roster_leaves_out_the_revoked(register, enrol, authority, now):
    """Once; signed with the passphrase, whenever that is at hand, or with the next approval."""
    for n in (1, 2, 3):
        enrol(f"bank-{n}")
    register.revoke("bank-1", now)
    assert [m.name for m in register.roster(authority.consortium).members] == ["bank-1", "bank-2", "bank-3"]

    signed = register.sign_roster(authority)
    assert ([m.name for m in signed.members], signed.version) == (["bank-2", "bank-3"], 4)
    assert register.sign_roster(authority) is None
    register.revoke("bank-2", now)
    enrol("bank-4")
    assert [m.name for m in register.roster(authority.consortium).members] == ["bank-3", "bank-4"]
    assert register.sign_roster(authority) is None


def test_a_member_written_into_the_database_is_signed_by_nobody(register, enrol, authority, database, now):
    """Who has the server has its database, and not its members."""
    enrol("bank-1")
    key = IdentityKey.generate()
    forged = IdentityCertificate.issue(
        key, party=999, name="evil", key=key.public, not_before=now, not_after=now + DAY, serial=1
    )
    database.execute(
        "INSERT INTO members (party, site, key_digest, certificate, enrolled_at) VALUES (?, ?, ?, ?, 0)",
        (999, "evil", b"x" * 32, forged.signed),
    )
    enrol("bank-2")

    assert [m.name for m in register.roster(authority.consortium).members] == ["bank-1", "bank-2"]


def test_a_roster_that_the_consortium_did_not_sign_is_not_built_upon(
    register, enrol, authority, database, now
):
    """A forged one is no ground for the next."""
    enrol("bank-1")
    forged = Roster.issue(
        IdentityKey.generate(),
        consortium=authority.consortium.fingerprint,
        version=9,
        members=[],
        revoked=[],
    )
    database.execute("INSERT INTO rosters (version, signed) VALUES (9, ?)", (forged.signed,))
    register.revoke("bank-1", now)

    with pytest.raises(VerificationFailed, match="signature"):
        register.sign_roster(authority)


def test_a_first_certificate_that_was_never_fetched_in_time_is_issued_anew(
    register, enrol, read, issuing, now
):
    """It is made when it is fetched."""
    request, first = enrol()
    late = register.request(request, issuing, now + 31 * DAY)

    assert late.tls_certificate != first.tls_certificate
    assert register.admit(read(late), now + 31 * DAY) == 101


def test_unknown_names_are_refused(register):
    """By every command of the operator's."""
    for command in (register.requested, register.reject, lambda s: register.revoke(s, None)):
        with pytest.raises(IdentityRefused, match="nobody: no site of this name") as refused:
            command("nobody")
        assert "enroll list" in refused.value.fix


def test_the_operator_sees_every_site(register, enrol, invited, issuing, now):
    """In each of its states."""
    enrol("enrolled")
    enrol("revoked")
    register.revoke("revoked", now)
    invited("late", life=HOUR)
    invited("invited")
    for site in ("asking", "rejected"):
        register.request(invited(site), issuing, now)
    register.reject("rejected")
    found = {row.site: row for row in register.sites(now + HOUR)}

    assert {site: row.state for site, row in found.items()} == {
        "asking": "requested",
        "enrolled": "enrolled",
        "invited": "invited",
        "late": "invitation expired",
        "rejected": "rejected",
        "revoked": "revoked",
    }
    assert found["enrolled"].until == now + 30 * DAY
    assert found["enrolled"].as_json()["party"] == 101
    assert (found["invited"].keys, len(found["asking"].keys)) == ("", 24)


def test_a_refused_approval_leaves_nothing(register, authority, issuing, invited, monkeypatch, now):
    """All of it or none: a crash leaves no member without a roster."""
    register.request(invited(), issuing, now)
    keys = register.requested("bank-1")
    monkeypatch.setattr(authority, "next_roster", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        register.approve("bank-1", keys=keys, authority=authority, now=now)
    monkeypatch.undo()

    assert [row.state for row in register.sites(now)] == ["requested"]
    register.approve("bank-1", keys=keys, authority=authority, now=now)


def test_server_and_commands_write_at_once(register, authority, issuing, invited, tmp_path, now):
    """Twenty sites ask while twenty others are invited, from two connections: none is lost."""
    requests = [invited(f"bank-{n}") for n in range(20)]
    failed: list[BaseException] = []

    def operator():
        database = Database(tmp_path / "state" / "server.db")
        try:
            for n in range(20, 40):
                Register(database).invite(f"bank-{n}", consortium=authority.consortium, life=HOUR, now=now)
        except (sqlite3.Error, IdentityRefused) as error:
            failed.append(error)
        finally:
            database.close()

    thread = threading.Thread(target=operator)
    thread.start()
    for request in requests:
        register.request(request, issuing, now)
    thread.join(60)

    assert not thread.is_alive()
    assert failed == []
    states = [row.state for row in register.sites(now)]
    assert (states.count("requested"), states.count("invited")) == (20, 20)
