"""An agent opens with its policy, its ledger and its table, or not at all."""

from dataclasses import replace

import pytest

from lepton_fl.errors import ConfigError, VerificationFailed
from lepton_fl.messages import SECAGG, SecureRequest
from lepton_fl.simulation.functional import Functional
from lepton_fl.simulation.members import memberships
from lepton_fl.site import Deployed, open_site
from lepton_fl.site.history import DiskHistory

POLICY = """\
[data]
id = "clinic-records"
[budget]
epsilon_total = 5.0
epsilon_per_study = 5.0
delta_total = 1e-2
[require]
secure_aggregation = false
approval = "auto"
"""


@pytest.fixture
def home(tmp_path):
    """A clinic's folder, whole."""
    (tmp_path / "site.toml").write_text('[site]\nid = "clinic"\n[data]\nsource = "records.csv"\n')
    (tmp_path / "policy.toml").write_text(POLICY)
    rows = "".join(f"{i / 100 - 0.5},{i % 2}\n" for i in range(100))
    (tmp_path / "records.csv").write_text("x,ill\n" + rows)
    return tmp_path


@pytest.fixture
def opened(home):
    """The clinic, open."""
    site = open_site(home / "site.toml")
    yield site
    site.ledger.close()


def test_a_site_opens_as_deployed(opened):
    """Not as part of a simulation, and with its ledger on disk."""
    assert isinstance(opened.surroundings, Deployed)
    assert opened.ledger.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("missing", ["site.toml", "policy.toml"])
def test_a_site_without_a_file_does_not_open(home, missing):
    """Without a policy there is no site, so there is no app."""
    (home / missing).unlink()

    with pytest.raises(ConfigError, match=missing):
        open_site(home / "site.toml")


def test_a_site_without_a_ledger_does_not_open(home):
    """What is in its place is no database."""
    (home / "state").mkdir()
    (home / "state" / "ledger.db").write_bytes(b"not a ledger" * 100)

    with pytest.raises(VerificationFailed, match="cannot be used as a ledger"):
        open_site(home / "site.toml")


def test_no_noise_is_drawn_twice(home, opened, study):
    """A seed known to anyone is no privacy."""
    again = open_site(home / "site.toml")
    again.ledger.close()

    drawn = {s.noise.key("noise", 1) for s in (again, opened, opened)}
    assert len(drawn) == 3


def test_a_record_held_out_once_is_held_out_in_every_run(home, opened, study):
    """It would otherwise judge what it has taught."""
    again = open_site(home / "site.toml")
    again.ledger.close()

    assert again.load(study).test.fingerprint == opened.load(study).test.fingerprint


def test_a_deployed_site_trains_on_its_own_table(opened, ask, charged):
    """From the CSV file to a charge and an update."""
    reply = ask(opened)

    assert not reply.has_error()
    assert charged(opened) == [1]


def test_a_deployed_site_that_is_a_member_enters_a_secure_round(home, make_study, ask, charged):
    """What leaves it first is an advert, and no update."""
    history = DiskHistory(home / "rounds.db")
    _, members = memberships({101: "bank", 102: "clinic", 103: "ward"})
    site = open_site(home / "site.toml", replace(members["clinic"], history=history))
    study = make_study(secure_aggregation={"enabled": True})

    reply = ask(site, study=study, secure=SecureRequest(kind="train", attempt=1, roster=1))
    left, spent = set(reply.content), charged(site)
    site.ledger.close()
    history.close()

    assert left == {SECAGG}
    assert spent == [1]


def test_a_deployed_site_has_the_protocol_or_nothing(opened):
    """For callers that no type checker has read: what is for rehearsals sends the update in clear."""
    _, members = memberships({102: "clinic"})

    with pytest.raises(TypeError, match="has the protocol, or no secure aggregation"):
        replace(opened, aggregation=Functional(members["clinic"]))
