"""The consortium as a run's process sees it: the newest roster in the server's file, verified once more."""

import pytest

from lepton_fl.errors import ConfigError, VerificationFailed
from lepton_fl.fleet.server.link import RunSpec
from lepton_fl.fleet.server.runner import _Members
from lepton_fl.secagg.identity import IdentityKey, Member, Roster, key_digest

ROOT = IdentityKey.generate()
MEMBERS = [Member(101, "bank", key_digest(b"k" * 32)), Member(102, "clinic", key_digest(b"l" * 32))]


def roster(version, members=MEMBERS, root=ROOT):
    return Roster.issue(root, consortium=b"c" * 32, version=version, members=members, revoked=())


@pytest.fixture
def file(tmp_path):
    (tmp_path / "roster.bin").write_bytes(roster(2).signed)
    return tmp_path / "roster.bin"


@pytest.fixture
def members(file):
    spec = RunSpec(
        run="0" * 32,
        study_id="0" * 64,
        sites={},
        join_deadline=1.0,
        evaluate_deadline=1.0,
        roster_key=ROOT.public.hex(),
        roster=str(file),
    )
    return _Members(spec)


def test_the_newest_roster_is_read_anew(members, file):
    """And what was verified of its members stays known while it is the newest."""
    first, again = members(), members()
    file.write_bytes(roster(3, MEMBERS[:1]).signed)

    assert first is again
    assert (first.roster.version, members().roster.version) == (2, 3)


def test_an_older_roster_is_refused(members, file):
    """It could restore who was revoked."""
    members()
    file.write_bytes(roster(1).signed)

    with pytest.raises(VerificationFailed, match="version 1 was offered, version 2 is held"):
        members()


def test_a_roster_that_the_root_did_not_sign_is_refused(members, file):
    """Whoever can write the file can still not make a member."""
    file.write_bytes(roster(3, root=IdentityKey.generate()).signed)

    with pytest.raises(VerificationFailed, match="not its signer's"):
        members()


def test_a_roster_that_is_not_there_is_said_so(members, file):
    """With its name."""
    file.unlink()

    with pytest.raises(ConfigError, match=r"roster\.bin: the roster cannot be read"):
        members()
