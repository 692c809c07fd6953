"""The consortium of a simulation: as one that was founded by people, for as long as the simulation lasts."""

from datetime import UTC, datetime, timedelta

import pytest

from lepton_fl.secagg.context import Attempt
from lepton_fl.secagg.errors import BadCertificate, Phase
from lepton_fl.simulation.members import memberships

SITES = {101: "north", 102: "south", 103: "west"}


@pytest.fixture
def now():
    return datetime.now(UTC)


def test_each_site_is_who_the_roster_says(now):
    """By a certificate of its own key, which the root has signed."""
    consortium, members = memberships(SITES)

    for party, name in SITES.items():
        member = members[name]
        certificate = consortium.certificate(member.certificate, phase=Phase.ADVERTISE, now=now)

        assert (member.name, member.party) == (name, party)
        assert (certificate.name, certificate.party) == (name, party)
        assert certificate.key == member.identity.public


def test_another_simulations_certificates_are_refused(now):
    """Each has a root of its own."""
    (consortium, _), (_, others) = memberships(SITES), memberships(SITES)

    with pytest.raises(BadCertificate):
        consortium.certificate(others["north"].certificate, phase=Phase.ADVERTISE, now=now)


def test_certificates_outlast_a_long_simulation(now):
    """A run of weeks does not end because of them."""
    consortium, members = memberships(SITES)

    consortium.certificate(members["west"].certificate, phase=Phase.ADVERTISE, now=now + timedelta(days=300))


def test_sites_share_no_memory():
    """What one has released, or verified, is not another's knowledge."""
    _, members = memberships(SITES)
    attempt = Attempt(run=b"r" * 16, kind="train", round=1, cohort=b"c" * 32, number=1, released=True)

    members["north"].history.write(attempt)

    assert members["north"].history.read(attempt.run, "train", 1) == attempt
    assert members["south"].history.read(attempt.run, "train", 1) is None
    assert len({id(member.consortium()) for member in members.values()}) == 3
