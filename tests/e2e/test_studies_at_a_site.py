"""`lepton-fl study` with a site's site.toml: studies as the server offered them."""

import json
import threading

import pytest

from lepton_fl.fleet.agent.local import socket_path
from lepton_fl.fleet.agent.offers import offers_of
from lepton_fl.site.config import files_of
from lepton_fl.study import load_study


@pytest.fixture
def short_study(short_study):
    """With secure aggregation, which a new site's policy asks for."""
    short_study.write_text(short_study.read_text().replace("enabled = false", "enabled = true"))
    return short_study


@pytest.fixture
def offered(lepton, short_study, tmp_path):
    """A site to which the heart study was offered; gives its site.toml and the study."""
    lepton("init", "clinic", "--template", "site")
    site = tmp_path / "clinic" / "site.toml"
    study = load_study(short_study)
    offers_of(site).take(study.canonical, study.id, current=[study.id])
    return site, study


def test_what_was_offered_is_listed_and_shown(lepton, offered):
    site, study = offered
    listed = lepton("study", "list", "-c", site, "--json")
    shown = lepton("study", "show", study.study.name, "-c", site)

    assert [(s["id"], s["state"]) for s in json.loads(listed.out)] == [(study.id, "waiting")]
    assert "hidden among at least t - n_C = 2 honest sites" in shown.out
    assert "only as a sum over at least 3 sites" in shown.out
    assert "this site: waiting" in shown.out


def test_a_study_is_approved_by_name_and_refused_by_its_id(lepton, offered):
    site, study = offered
    approved = lepton("study", "approve", study.study.name, "-c", site, "--yes")
    states = [offers_of(site).judge(study).state]
    refused = lepton("study", "refuse", study.id[:8], "-c", site, "--reason", "not yet")
    found = offers_of(site).judge(study)

    assert (approved.code, refused.code) == (0, 0)
    assert [*states, found.state] == ["approved", "refused"]
    assert "not yet" in found.public


def test_what_was_not_offered_is_not_approved(lepton, offered):
    site, _ = offered

    done = lepton("study", "approve", "another", "-c", site, "--yes")

    assert done.code == 3
    assert "not among those offered" in done.last


def test_an_offer_on_its_way_to_the_running_agent_is_waited_for(lepton, short_study, tmp_path):
    """The operator proposes, tells the sites by telephone, and their people are quick."""
    lepton("init", "clinic", "--template", "site")
    site = tmp_path / "clinic" / "site.toml"
    study = load_study(short_study)
    agent = socket_path(files_of(site).state)
    agent.parent.mkdir(mode=0o700, parents=True)
    agent.touch()
    comes = threading.Timer(0.5, lambda: offers_of(site).take(study.canonical, study.id, current=[study.id]))
    comes.start()
    shown = lepton("study", "show", study.study.name, "-c", site)
    comes.join()

    assert shown.code == 0
    assert "this site: waiting" in shown.out


def test_nobody_approves_without_a_yes(lepton, offered):
    site, study = offered

    assert lepton("study", "approve", study.study.name, "-c", site).code in (4, 130)
    assert offers_of(site).judge(study).state == "waiting"


# Studies that a key signs


@pytest.fixture
def signed_only(lepton, short_study, tmp_path):
    """A site that lets in what one key has signed; gives its site.toml, and the key's file."""
    lepton("init", "clinic", "--template", "site")
    made = lepton("study", "key", "board.pem")
    policy = tmp_path / "clinic" / "policy.toml"
    kept = [line for line in policy.read_text().splitlines() if not line.startswith("approval")]
    policy.write_text("\n".join(kept).replace("[release]", f"{made.out}[release]"))
    return tmp_path / "clinic" / "site.toml", tmp_path / "board.pem"


def test_a_signature_beside_a_study_lets_it_in(lepton, signed_only, short_study):
    """As `study key` printed the policy and `study sign` wrote it; without, it is said what is missing."""
    site, key = signed_only
    without = lepton("study", "approve", short_study, "-c", site, "--yes")
    signed = lepton("study", "sign", short_study, "--key", key)
    lepton("study", "approve", short_study, "-c", site, "--yes")

    assert "it does not run yet: study heart-disease asks to run without a signature" in without.err
    assert signed.out.strip() == str(short_study.with_suffix(".sig"))
    assert key.stat().st_mode & 0o777 == 0o600
    assert offers_of(site).judge(load_study(short_study)).state == "approved"


def test_a_signature_of_a_changed_study_is_refused_by_file(lepton, signed_only, short_study):
    """Before the study is submitted or approved, in one line."""
    site, key = signed_only
    lepton("study", "sign", short_study, "--key", key)
    short_study.write_text(short_study.read_text().replace("lr = 0.03", "lr = 0.04"))

    for command in (("approve", short_study, "-c", site, "--yes"), ("submit", short_study)):
        done = lepton("study", *command)
        assert done.code == 7
        assert done.err.count("\n") == 1
        assert "study.sig: is no signature of study" in done.err
        assert "lepton-fl study sign STUDY.toml --key FILE" in done.err


def test_what_is_no_key_signs_nothing(lepton, signed_only, short_study, tmp_path):
    """Nor is one that others may read."""
    _, key = signed_only
    other = tmp_path / "other.pem"
    other.write_text("no key")
    other.chmod(0o600)
    key.chmod(0o644)

    assert "not an Ed25519 private key" in lepton("study", "sign", short_study, "--key", other).last
    assert "chmod 600" in lepton("study", "sign", short_study, "--key", key).last
    assert not short_study.with_suffix(".sig").exists()
