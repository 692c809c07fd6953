"""A privacy officer and an auditor at the command line: renew, recover, verify."""

import json
import shutil
from contextlib import closing

import pytest

from lepton_fl.fleet.server.config import load_server
from lepton_fl.fleet.server.ledgers import open_witness
from lepton_fl.privacy import Charge, Gaussian, Ledger, epsilon
from lepton_fl.privacy.ledger import Budget, Receipt
from lepton_fl.privacy.ledger.receipts import to_bytes
from lepton_fl.secagg.identity import IdentityKey
from lepton_fl.site.approvals import StudySignature

STEP = Gaussian(noise_multiplier=2.0, sampling_rate=0.2, steps=1)
DATA = "clinic-records"
LOOSE = Budget(data_set=DATA, epsilon_total=1e3, epsilon_per_study=1e3, delta_total=1e-5, file="policy.toml")


@pytest.fixture
def home(tmp_path, lepton):
    """A site's folder, as `init` makes it; its budget has room for ten rounds of STEP."""
    lepton("init", "clinic", "--template", "site")
    policy = tmp_path / "clinic" / "policy.toml"
    room = epsilon([STEP.times(10)], 1e-5) + 1e-6
    policy.write_text(
        f'[data]\nid = "{DATA}"\n[budget]\nepsilon_total = {room}\nepsilon_per_study = {room}\n'
        'delta_total = 1e-5\n[require]\nprivacy_units = ["record"]\n'
    )
    return tmp_path / "clinic"


@pytest.fixture
def spend(home):
    """Rounds of a run charged and released, with the server's receipts for them."""
    server = IdentityKey.generate()

    def run(*rounds, budget=LOOSE):
        given = []
        with closing(Ledger(home / "state" / "ledger.db")) as ledger:
            for round in rounds:
                charge = Charge(
                    study="5" * 64,
                    study_name="scores",
                    run="r",
                    round=round,
                    event=STEP,
                    clip=1.0,
                    unit="record",
                    delta=1e-5,
                    fingerprint="f",
                )
                ledger.charge(charge, rounds=len(rounds), budget=budget)
                ledger.commit(DATA, run="r", round=round, sha256=bytes(32))
                statement = ledger.state(site="clinic", data_set=DATA, run="r", round=round)
                given.append(Receipt.issue(server, witness="server", statement=statement))
        return given

    return run


def refused(ended, code, *words):
    assert ended.code == code, ended.err
    assert ended.err.count("\n") == 1
    for word in words:
        assert word in ended.err


def show(lepton, home):
    return json.loads(lepton("budget", "show", home, "--json").out)[0]


# --- looking ---


def test_what_was_spent_is_shown_with_the_chain(lepton, home, spend):
    """Epsilon, and the state of the ledger that says so."""
    spend(1, 2)
    shown = show(lepton, home)

    assert shown["epsilon_spent"] == pytest.approx(epsilon([STEP.times(2)], 1e-5))
    assert shown["ledger"]["entries"] == 5
    assert "verified, 5 entries" in lepton("budget", "show", home).out


def test_the_history_has_events_as_data(lepton, home, spend):
    """Each with its parameters and what became of it."""
    spend(1)
    (site,) = json.loads(lepton("budget", "history", home, "--json").out)

    (charge,) = site["charges"]
    assert (charge["mechanism"], charge["noise_multiplier"], charge["steps"]) == ("poisson-gaussian", 2.0, 1)
    assert charge["outcome"] == "released"
    assert "noise_multiplier 2.0, sampling_rate 0.2, steps 1" in lepton("budget", "history", home).out


@pytest.mark.parametrize("command", ["show", "history"])
def test_a_ledger_that_is_gone_is_no_empty_one(lepton, home, spend, command):
    """Its key is there: it spent something."""
    spend(1)
    (home / "state" / "ledger.db").unlink()

    refused(lepton("budget", command, home), 7, "ledger.db: is gone", "lepton-fl budget recover")


@pytest.mark.parametrize(
    ("command", "right"),
    [
        (("budget", "show"), "lepton-fl budget show -c site.toml"),
        (("budget", "history"), "lepton-fl budget history -c site.toml"),
        (("audit", "verify"), "lepton-fl audit verify LEDGER.db, or the folder of a site"),
    ],
)
def test_a_wrong_path_is_named_with_what_was_looked_for(lepton, home, tmp_path, command, right):
    """And with the command that would find it; not with the one that makes a new site."""
    (tmp_path / "empty").mkdir()
    (home / "policy.toml").unlink()

    refused(lepton(*command, tmp_path / "elsewhere"), 3, "elsewhere: no such file", "site.toml", right)
    refused(lepton(*command, tmp_path / "empty"), 3, "empty: holds no site.toml", "SITE/policy.toml", right)
    refused(
        lepton(*command, home / "site.toml"), 3, "policy.toml: no such file", "site.toml was looked", right
    )


# --- verifying ---


def test_an_auditor_verifies_a_site(lepton, home, spend):
    """The chain, and the sums against the site's own policy."""
    spend(1, 2, 3)
    (found,) = json.loads(lepton("audit", "verify", home, "--json").out)

    assert (found["entries"], found["rounds_charged"], found["rounds_released"]) == (7, 3, 3)
    assert found["compared_with"] == ["key", "ledger.head"]
    assert found["policy"].endswith("policy.toml")
    assert lepton("audit", "verify", home).code == 0


def test_an_auditor_verifies_a_copy(lepton, home, spend, tmp_path):
    """The file alone; whose it is, its key says."""
    spend(1)
    copy = tmp_path / "copy.db"
    shutil.copy(home / "state" / "ledger.db", copy)
    (found,) = json.loads(lepton("audit", "verify", copy, "--json").out)

    assert lepton("audit", "verify", copy, "--key", found["key"]).code == 0
    refused(lepton("audit", "verify", copy, "--key", "00" * 32), 7, "signed by key")
    refused(lepton("audit", "verify", copy, "--key", "zz"), 3, "--key")


def test_a_changed_entry_is_named_with_exit_7(lepton, home, spend):
    """And what to do."""
    spend(1, 2)
    ledger = home / "state" / "ledger.db"
    data = bytearray(ledger.read_bytes())
    data[data.index(b"poisson-gaussian") + 3] ^= 1
    ledger.write_bytes(data)

    for command in (("audit", "verify"), ("budget", "show")):
        refused(lepton(*command, home), 7, "was changed", "bring the ledger's files back from the backup")


def test_an_approval_that_was_written_by_hand_is_found(lepton, home, spend):
    """Of a study that was charged: nobody with the site's key has approved it."""
    spend(1)
    line = {"study": "5" * 64, "name": "scores", "at": "2026-01-01T00:00:00+00:00"}
    (home / "state" / "approvals.jsonl").write_text(json.dumps(line) + "\n")

    refused(
        lepton("audit", "verify", home), 7, "the approval of study scores", "is not signed, as in releases"
    )


@pytest.fixture
def sign(home):
    """Keep a signature of the study that `spend` charges, as the agent does, and name `study_key`."""

    def run(signature, study_key):
        kept = home / "state" / "studies" / f"{'5' * 64}.sig"
        kept.parent.mkdir()
        signature.save(kept)
        with (home / "policy.toml").open("a") as policy:
            policy.write(f'approval = "signed-study"\nstudy_key = "{study_key.hex()}"\n')

    return run


@pytest.mark.parametrize(
    ("known", "counts", "said"),
    [(True, (1, 0), ", 1 signature"), (False, (0, 1), ", 1 other signature")],
)
def test_the_signature_of_a_study_is_verified(lepton, home, spend, sign, known, counts, said):
    """And whose it is; another key may have been the policy's when the study was charged."""
    spend(1)
    board = IdentityKey.generate()
    sign(StudySignature.sign(board, "5" * 64), board.public if known else bytes(32))
    (found,) = json.loads(lepton("audit", "verify", home, "--json").out)

    assert (found["studies_signed"], found["studies_signed_by_others"]) == counts
    assert said in lepton("audit", "verify", home.name).out


def test_a_forged_signature_of_a_study_is_named_with_exit_7(lepton, home, spend, sign):
    """It names the policy's key, which signed another study."""
    spend(1)
    board = IdentityKey.generate()
    sign(StudySignature.sign(board, "6" * 64), board.public)

    refused(
        lepton("audit", "verify", home),
        7,
        f"{'5' * 64}.sig: the signature of study scores, 555555555555, does not verify",
        "lepton-fl study sign",
    )


def test_sums_beyond_the_policy_are_named_with_exit_7(lepton, home, spend):
    """Room is for ten rounds; whoever charged twelve did not ask this policy."""
    spend(*range(1, 13))

    # The opening, then a charge and a commit for each round.
    refused(lepton("audit", "verify", home), 7, "entry 22 takes data set", "epsilon_total")


def test_an_auditor_compares_receipts(lepton, home, spend, tmp_path):
    """Of a peer that has seen more than the site shows."""
    spend(1)
    shutil.copytree(home, tmp_path / "earlier")
    receipts = tmp_path / "receipts"
    receipts.write_bytes(to_bytes(spend(2)))

    assert lepton("audit", "verify", home, "--receipts", receipts).code == 0
    refused(
        lepton("audit", "verify", tmp_path / "earlier", "--receipts", receipts),
        *(7, "ends at entry 3", "server has seen entry 5"),
    )


# --- renewing ---


def officer(lepton, home, name="officer.pem", declared=True):
    """A key, declared in policy.toml."""
    line = lepton("budget", "officer-key", name).out
    policy = home / "policy.toml"
    if declared:
        policy.write_text(policy.read_text().replace("delta_total", f"{line}delta_total"))
    return name


def renew(lepton, home, key):
    return lepton(
        "budget", "renew", "-c", home / "site.toml", "--officer-key", key, "--reason", "patients of 2027"
    )


def test_an_officer_renews_a_budget(lepton, home, spend, tmp_path):
    """By signature, in the chain; what was charged stays in the history."""
    key = officer(lepton, home)
    spend(*range(1, 11))
    assert renew(lepton, home, key).code == 0

    shown = show(lepton, home)
    assert (shown["epsilon_spent"], shown["renewals"]) == (0, 1)
    assert len(json.loads(lepton("budget", "history", home, "--json").out)[0]["charges"]) == 10
    spend(*range(11, 21))
    assert lepton("audit", "verify", home).code == 0
    assert (tmp_path / key).stat().st_mode & 0o777 == 0o600


def test_nobody_else_renews_a_budget(lepton, home, spend):
    """Neither without a declared key, nor with another one."""
    spend(1)
    other = officer(lepton, home, "other.pem", declared=False)
    refused(renew(lepton, home, other), 3, "budget.officer_key", "lepton-fl budget officer-key")

    officer(lepton, home)
    refused(renew(lepton, home, other), 4, "renewal signed by key")
    assert show(lepton, home)["renewals"] == 0


def test_a_renewal_by_another_than_the_policys_officer_is_found(lepton, home, spend):
    """Where the policy was changed for the moment."""
    key = officer(lepton, home)
    spend(1)
    renew(lepton, home, key)
    policy = home / "policy.toml"
    policy.write_text("\n".join(line for line in policy.read_text().splitlines() if "officer" not in line))

    refused(lepton("audit", "verify", home), 7, "renewal 1 of data set", "budget.officer_key")


def test_an_officers_key_is_not_overwritten(lepton, home):
    """Nobody could renew any more."""
    officer(lepton, home)

    refused(lepton("budget", "officer-key", "officer.pem"), 3, "exists")


# --- recovering ---


def test_a_site_recovers_from_an_older_copy(lepton, home, spend, tmp_path):
    """Refused, told how, charged by what the server saw, and then as if nothing had been."""
    spend(1)
    shutil.copytree(home / "state", tmp_path / "backup")
    receipts = tmp_path / "receipts"
    lepton("init", "consortium", "--template", "server")
    server = tmp_path / "consortium" / "server.toml"
    give = ("server", "receipts", "clinic", receipts, "-c", server)
    refused(lepton(*give), 3, "nothing was seen of a ledger of 'clinic'")
    files = load_server(server)
    files.state.mkdir(mode=0o700)
    with closing(open_witness(files)) as witness:
        for given in spend(2, 3):
            witness.see(given.statement)
    assert "wrote 3 receipts" in lepton(*give).err
    refused(lepton(*give), 3, "is not overwritten")
    whole = show(lepton, home)["epsilon_spent"]
    (home / "state" / "ledger.db").write_bytes((tmp_path / "backup" / "ledger.db").read_bytes())
    refused(lepton("budget", "show", home), 7, "ends at entry 3", "lepton-fl budget recover")
    site = home / "site.toml"
    refused(lepton("budget", "recover", "-c", site), 4, "no receipt", "--accept-loss")

    done = lepton("budget", "recover", "-c", site, "--receipts", receipts)

    assert done.code == 0
    assert "2 rounds charged" in done.err
    assert show(lepton, home)["epsilon_spent"] == whole
    assert lepton("audit", "verify", home, "--receipts", receipts).code == 0
