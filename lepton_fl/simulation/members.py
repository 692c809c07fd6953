"""The sites of a simulation as members of a consortium that lasts as long as the simulation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from lepton_fl.secagg.context import Consortium, Forgetful
from lepton_fl.secagg.identity import IdentityCertificate, IdentityKey, Member, Roster, key_digest
from lepton_fl.site.secure import Membership

_VALID = timedelta(days=365)


def memberships(parties: Mapping[int, str]) -> tuple[Consortium, dict[str, Membership]]:
    """A consortium of these sites, by party, and who each of them is in it, by name."""
    root, now = IdentityKey.generate(), datetime.now(UTC)
    keys = {party: IdentityKey.generate() for party in parties}
    roster = Roster.issue(
        root,
        consortium=os.urandom(32),
        version=1,
        members=[Member(party, parties[party], key_digest(key.public)) for party, key in keys.items()],
        revoked=(),
    )
    certificates = {
        party: IdentityCertificate.issue(
            root,
            party=party,
            name=parties[party],
            key=key.public,
            not_before=now - _VALID,
            not_after=now + _VALID,
            serial=party,
        )
        for party, key in keys.items()
    }

    def member(party: int) -> Membership:
        # Each its own: what it has verified counts for itself alone.
        consortium = Consortium(root.public, roster)
        return Membership(
            name=parties[party],
            party=party,
            identity=keys[party],
            certificate=certificates[party].signed,
            consortium=lambda: consortium,
            history=Forgetful(),
        )

    return Consortium(root.public, roster), {name: member(party) for party, name in parties.items()}
