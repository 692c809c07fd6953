"""Who is invited, asking and enrolled: the server's register of sites, shared with the operator's commands.

An invitation goes open -> requested -> approved or rejected; a newer one for the same site makes it void.
A member stays in the register for good, so that no party id is used twice; `revoked_at` ends it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import sqlite3
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

from cryptography.hazmat.primitives.asymmetric import ec

from lepton_fl.errors import IdentityRefused
from lepton_fl.fleet.pki.authority import Authority, Consortium, Issuing, site_keys
from lepton_fl.fleet.pki.certificates import SiteCertificate, check_site, read_csr
from lepton_fl.fleet.pki.tokens import ID_BYTES, SECRET_BYTES, Token
from lepton_fl.fleet.server.database import Database
from lepton_fl.secagg.identity import FIRST_PARTY, IdentityCertificate, Roster, key_digest

SCHEMA = """
CREATE TABLE IF NOT EXISTS members (
    party INTEGER PRIMARY KEY,
    site TEXT NOT NULL,
    key_digest BLOB NOT NULL UNIQUE,
    certificate BLOB NOT NULL,
    enrolled_at INTEGER NOT NULL,
    revoked_at INTEGER
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS one_member_of_a_name ON members (site) WHERE revoked_at IS NULL;
CREATE TABLE IF NOT EXISTS tls_certificates (
    serial TEXT PRIMARY KEY,
    party INTEGER NOT NULL REFERENCES members,
    not_after INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS invitations (
    id BLOB PRIMARY KEY,
    secret_digest BLOB NOT NULL,
    site TEXT NOT NULL,
    made_at INTEGER NOT NULL,
    expires INTEGER NOT NULL,
    failures INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL DEFAULT 'open',
    csr BLOB,
    identity_key BLOB,
    requested_at INTEGER,
    party INTEGER REFERENCES members,
    tls_certificate BLOB
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS one_invitation_of_a_name ON invitations (site)
    WHERE state IN ('open', 'requested');
CREATE TABLE IF NOT EXISTS rosters (
    version INTEGER PRIMARY KEY,
    signed BLOB NOT NULL
) STRICT
"""

KEPT_CERTIFICATES = 8
"""TLS certificates of one site that are in force at one time, beside the one that it renews."""
MAX_FAILURES = 10
"""Wrong secrets for one invitation, after which it is void."""

_UNKNOWN = "invitation: the server does not know this token"
_ASK = "ask the operator for a new one: lepton-fl enroll invite {site}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a site sends to join; the proof that it holds the identity key has been verified."""

    token_id: bytes
    secret: bytes = field(repr=False)
    site: str
    csr: bytes
    identity_key: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What became of a request. The certificates are there once it is approved."""

    state: Literal["pending", "approved", "rejected"]
    tls_certificate: bytes = b""
    identity_certificate: bytes = b""
    roster: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRow:
    """One site as the operator sees it."""

    site: str
    state: Literal["invited", "invitation expired", "requested", "rejected", "enrolled", "revoked"]
    party: int | None
    keys: str
    """Fingerprint of its two public keys, to be compared by voice; empty before it has asked."""
    since: datetime
    until: datetime | None
    """End of the invitation, or of the latest TLS certificate."""

    def as_json(self) -> dict[str, object]:
        return {
            "site": self.site,
            "state": self.state,
            "party": self.party,
            "keys": self.keys,
            "since": self.since.isoformat(),
            "until": None if self.until is None else self.until.isoformat(),
        }


class Register:
    """The register in `database`. Every method is one transaction; the server and the commands take turns."""

    def __init__(self, database: Database) -> None:
        self._db = database
        database.declare(SCHEMA)

    # Every call of an agent

    def admit(self, certificate: SiteCertificate, now: datetime) -> int:
        """The party whose certificate this is: in force, issued by us, and its site not revoked.

        Raises:
            IdentityRefused: not so.
        """
        certificate.check_time(now)
        rows = self._db.rows(
            "SELECT m.party, m.site, m.revoked_at FROM tls_certificates c JOIN members m USING (party)"
            " WHERE c.serial = ?",
            (certificate.serial,),
        )
        if not rows or rows[0]["site"] != certificate.site:
            raise IdentityRefused(f"{certificate.site}: this server has issued no such certificate")
        if rows[0]["revoked_at"] is not None:
            raise IdentityRefused(
                f"{certificate.site}: was revoked at {_time(rows[0]['revoked_at']):%Y-%m-%d %H:%M} UTC",
                fix="ask the operator to invite this site anew",
            )
        return int(rows[0]["party"])

    def renew(self, certificate: SiteCertificate, csr: bytes, issuing: Issuing, now: datetime) -> bytes:
        """A new TLS certificate, PEM, for the site that `certificate` has just been admitted for.

        The one before stays good until it expires.

        Raises:
            IdentityRefused: the request is malformed, or the site is no longer admitted.
        """
        key = read_csr(csr)
        with self._db.transaction():
            party = self.admit(certificate, now)
            return self._issue(party, certificate.site, key, issuing, now, held=certificate.serial)

    # An invited site

    def request(self, request: Request, issuing: Issuing, now: datetime) -> Decision:
        """Take down that a site asks, or tell it what was decided.

        The same request again is the same question again, so a site may ask as often as it likes. An
        approved one may fetch its certificates also after its invitation's time.

        Raises:
            IdentityRefused: the token is unknown, void, expired, another site's or was used with other
                keys; or the request is malformed.
        """
        read_csr(request.csr)
        with self._db.transaction():
            row = self._invitation(request.token_id)
            known = hmac.compare_digest(
                row["secret_digest"] if row else bytes(32), hashlib.sha256(request.secret).digest()
            )
            if row is not None and not known:
                self._db.execute(
                    "UPDATE invitations SET failures = failures + 1, state ="
                    " CASE WHEN failures + 1 >= ? AND state = 'open' THEN 'void' ELSE state END WHERE id = ?",
                    (MAX_FAILURES, request.token_id),
                )
            refused = self._refusal(row if known else None, request, now)
            if row is not None and refused is None:
                return self._decide(row, request, issuing, now)
        # After the commit: the failure has been counted.
        raise refused or IdentityRefused(_UNKNOWN)

    def _refusal(self, row: sqlite3.Row | None, request: Request, now: datetime) -> IdentityRefused | None:
        fix = _ASK.format(site=request.site)
        if row is None:
            return IdentityRefused(_UNKNOWN, fix=fix)
        if row["site"] != request.site:
            return IdentityRefused(f"invitation: is for {row['site']}, not for {request.site}")
        if row["state"] == "void":
            return IdentityRefused("invitation: this token is void; a newer one may have been made", fix=fix)
        if row["state"] == "open" and now >= _time(row["expires"]):
            return IdentityRefused(
                f"invitation: this token expired at {_time(row['expires']):%Y-%m-%d %H:%M} UTC", fix=fix
            )
        if row["state"] != "open" and (row["csr"], row["identity_key"]) != (
            request.csr,
            request.identity_key,
        ):
            return IdentityRefused(
                f"invitation: this token has been used with other keys ({_keys(row)}); if that was not this "
                "institution, tell the operator to reject them",
                fix=fix,
            )
        return None

    def _decide(self, row: sqlite3.Row, request: Request, issuing: Issuing, now: datetime) -> Decision:
        if row["state"] == "rejected":
            return Decision(state="rejected")
        if row["state"] == "open":
            self._db.execute(
                "UPDATE invitations SET state = 'requested', csr = ?, identity_key = ?, requested_at = ?"
                " WHERE id = ?",
                (request.csr, request.identity_key, _seconds(now), request.token_id),
            )
        if row["state"] != "approved":
            return Decision(state="pending")
        (member,) = self._db.rows("SELECT * FROM members WHERE party = ?", (row["party"],))
        if member["revoked_at"] is not None:
            raise IdentityRefused(f"{row['site']}: was revoked")
        return Decision(
            state="approved",
            tls_certificate=self._first_certificate(row, issuing, now),
            identity_certificate=member["certificate"],
            roster=self.signed_roster() or b"",
        )

    def _first_certificate(self, row: sqlite3.Row, issuing: Issuing, now: datetime) -> bytes:
        """Issued when it is fetched, and once: the same bytes while they are in force."""
        held = row["tls_certificate"]
        if held is not None:
            try:
                check_site(held, issuer=issuing.certificate, now=now)
            except IdentityRefused:
                held = None
        if held is None:
            held = self._issue(row["party"], row["site"], read_csr(row["csr"]), issuing, now)
            self._db.execute("UPDATE invitations SET tls_certificate = ? WHERE id = ?", (held, row["id"]))
        return bytes(held)

    def _issue(
        self,
        party: int,
        site: str,
        key: ec.EllipticCurvePublicKey,
        issuing: Issuing,
        now: datetime,
        *,
        held: str = "",
    ) -> bytes:
        pem, certificate = issuing.issue_site(key, site, now)
        # An expired one is refused for its time, whether we remember it or not. And of a site that renews
        # without end the last are remembered, with the one that it is `held` to have: answers may be lost.
        self._db.execute(
            "DELETE FROM tls_certificates WHERE party = ? AND (not_after <= ? OR serial != ? AND serial"
            " NOT IN (SELECT serial FROM tls_certificates WHERE party = ? ORDER BY rowid DESC LIMIT ?))",
            (party, _seconds(now), held, party, KEPT_CERTIFICATES - 1),
        )
        self._db.execute(
            "INSERT INTO tls_certificates (serial, party, not_after) VALUES (?, ?, ?)",
            (certificate.serial, party, _seconds(certificate.not_after)),
        )
        return pem

    def _invitation(self, token_id: bytes) -> sqlite3.Row | None:
        return next(iter(self._db.rows("SELECT * FROM invitations WHERE id = ?", (token_id,))), None)

    # The operator

    def invite(self, site: str, *, consortium: Consortium, life: timedelta, now: datetime) -> Token:
        """A token by which `site` may ask once. An earlier one, asked with or not, is void from now on.

        Raises:
            IdentityRefused: a site of this name is enrolled.
        """
        token = Token(
            site=site,
            id=os.urandom(ID_BYTES),
            secret=os.urandom(SECRET_BYTES),
            fingerprint=consortium.fingerprint,
        )
        with self._db.transaction():
            if self._member(site) is not None:
                raise IdentityRefused(
                    f"{site}: a site of this name is enrolled",
                    fix=f"invite under another name, or first: lepton-fl enroll revoke {site}",
                )
            self._db.execute(
                "UPDATE invitations SET state = 'void' WHERE site = ? AND state IN ('open', 'requested')",
                (site,),
            )
            self._db.execute(
                "INSERT INTO invitations (id, secret_digest, site, made_at, expires) VALUES (?, ?, ?, ?, ?)",
                (
                    token.id,
                    # 128 random bits: a slow hash would protect nothing more.
                    hashlib.sha256(token.secret).digest(),
                    site,
                    _seconds(now),
                    _seconds(now + life),
                ),
            )
        return token

    def requested(self, site: str) -> str:
        """The fingerprint of the keys with which `site` asks.

        Raises:
            IdentityRefused: it does not.
        """
        return _keys(self._requested(site))

    def approve(self, site: str, *, keys: str, authority: Authority, now: datetime) -> Roster:
        """Make `site` a member, with the keys whose fingerprint the operator has seen.

        Raises:
            IdentityRefused: it does not ask, or with other keys than those.
            VerificationFailed: the last roster is not the consortium's.
        """
        with self._db.transaction():
            row = self._requested(site)
            if _keys(row) != keys:
                raise IdentityRefused(f"{site}: asks with other keys than were shown", fix="look again")
            if self._db.rows(
                "SELECT 1 FROM members WHERE key_digest = ?", (key_digest(row["identity_key"]),)
            ):
                raise IdentityRefused(
                    f"{site}: its identity key is, or was, a member's already",
                    fix=f"lepton-fl enroll reject {site}; the site makes new keys in an empty folder",
                )
            (last,) = self._db.rows("SELECT MAX(party) AS party FROM members")
            party = max(FIRST_PARTY, (last["party"] or 0) + 1)
            certificate = authority.certify(party=party, site=site, key=row["identity_key"], now=now)
            self._db.execute(
                "INSERT INTO members (party, site, key_digest, certificate, enrolled_at)"
                " VALUES (?, ?, ?, ?, ?)",
                (party, site, key_digest(certificate.key), certificate.signed, _seconds(now)),
            )
            self._db.execute(
                "UPDATE invitations SET state = 'approved', party = ? WHERE id = ?", (party, row["id"])
            )
            return self._sign(authority, joined=certificate)

    def reject(self, site: str) -> None:
        """Refuse a request, for good.

        Raises:
            IdentityRefused: there is none.
        """
        with self._db.transaction():
            row = self._requested(site)
            self._db.execute("UPDATE invitations SET state = 'rejected' WHERE id = ?", (row["id"],))

    def revoke(self, site: str, now: datetime) -> bool:
        """No certificate of `site` is admitted from now on; whether it was until now.

        The other sites hear of it with the next roster: `sign_roster`.

        Raises:
            IdentityRefused: there is no such site, nor was there.
        """
        with self._db.transaction():
            if self._member(site) is None:
                if not self._db.rows("SELECT 1 FROM members WHERE site = ?", (site,)):
                    raise IdentityRefused(
                        f"{site}: no site of this name is enrolled", fix="lepton-fl enroll list"
                    )
                return False
            self._db.execute(
                "UPDATE members SET revoked_at = ? WHERE site = ? AND revoked_at IS NULL",
                (_seconds(now), site),
            )
            return True

    def sign_roster(self, authority: Authority) -> Roster | None:
        """A new roster without the sites that were revoked since the last; none where there are none.

        Raises:
            VerificationFailed: the last roster is not the consortium's.
        """
        with self._db.transaction():
            return self._sign(authority) if self._left(authority.consortium) else None

    def signed_roster(self) -> bytes | None:
        """The last one, as agents read it."""
        rows = self._db.rows("SELECT signed FROM rosters ORDER BY version DESC LIMIT 1")
        return bytes(rows[0]["signed"]) if rows else None

    def roster(self, consortium: Consortium) -> Roster | None:
        """The last one, verified.

        Raises:
            VerificationFailed: it is not the consortium's.
        """
        signed = self.signed_roster()
        return None if signed is None else Roster.read(signed, consortium.roster_key)

    def identity(self, site: str) -> bytes | None:
        """The digest of the identity key of the member of this name, as rosters have it."""
        rows = self._db.rows("SELECT key_digest FROM members WHERE site = ? AND revoked_at IS NULL", (site,))
        return bytes(rows[0]["key_digest"]) if rows else None

    def sites(self, now: datetime) -> list[SiteRow]:
        """Every site that is or was invited or enrolled, by name."""
        members = self._db.rows(
            "SELECT m.*, MAX(c.not_after) AS until, i.csr, i.identity_key FROM members m"
            " LEFT JOIN tls_certificates c USING (party) JOIN invitations i USING (party) GROUP BY m.party"
        )
        asking = self._db.rows("SELECT * FROM invitations WHERE state IN ('open', 'requested', 'rejected')")
        found = [
            SiteRow(
                site=row["site"],
                state="enrolled" if row["revoked_at"] is None else "revoked",
                party=row["party"],
                keys=_keys(row),
                since=_time(row["enrolled_at"] if row["revoked_at"] is None else row["revoked_at"]),
                until=None if row["until"] is None else _time(row["until"]),
            )
            for row in members
        ] + [self._asking(row, now) for row in asking]
        return sorted(found, key=lambda row: (row.site, row.since))

    def _asking(self, row: sqlite3.Row, now: datetime) -> SiteRow:
        expires = _time(row["expires"])
        opened = row["state"] == "open"
        return SiteRow(
            site=row["site"],
            state=row["state"] if not opened else "invited" if now < expires else "invitation expired",
            party=None,
            keys="" if opened else _keys(row),
            since=_time(row["made_at"] if opened else row["requested_at"]),
            until=expires if opened else None,
        )

    def _requested(self, site: str) -> sqlite3.Row:
        rows = self._db.rows("SELECT * FROM invitations WHERE site = ? AND state = 'requested'", (site,))
        if not rows:
            raise IdentityRefused(
                f"{site}: no site of this name is asking to join", fix="lepton-fl enroll list"
            )
        return rows[0]

    def _member(self, site: str) -> sqlite3.Row | None:
        rows = self._db.rows("SELECT * FROM members WHERE site = ? AND revoked_at IS NULL", (site,))
        return rows[0] if rows else None

    def _left(self, consortium: Consortium) -> list[IdentityCertificate]:
        """Who is revoked here and not yet in the last roster."""
        last = self.roster(consortium)
        rows = self._db.rows("SELECT certificate FROM members WHERE revoked_at IS NOT NULL")
        gone = [IdentityCertificate.read(row["certificate"], consortium.roster_key) for row in rows]
        return [c for c in gone if last is None or c.serial not in last.revoked]

    def _sign(self, authority: Authority, joined: IdentityCertificate | None = None) -> Roster:
        roster = authority.next_roster(
            self.roster(authority.consortium),
            joined=[joined] if joined else [],
            left=self._left(authority.consortium),
        )
        self._db.execute(
            "INSERT INTO rosters (version, signed) VALUES (?, ?)", (roster.version, roster.signed)
        )
        return roster


def _keys(row: sqlite3.Row) -> str:
    return site_keys(read_csr(row["csr"]), row["identity_key"])


def _seconds(at: datetime) -> int:
    return int(at.timestamp())


def _time(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
