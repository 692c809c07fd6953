"""The ledger: nothing leaves that was not charged, and nothing is charged that the budget does not cover."""

import sqlite3
import stat
from contextlib import closing
from dataclasses import replace

import pytest

from lepton_fl.errors import (
    AlreadyCharged,
    BudgetExhausted,
    ConfigError,
    PolicyRefused,
    Unwritable,
    VerificationFailed,
)
from lepton_fl.privacy import Gaussian, Ledger, RehearsalLedger, epsilon

DELTA = 1e-5
STEP = Gaussian(noise_multiplier=2.0, sampling_rate=0.2, steps=1)
LOUD = replace(STEP, steps=3)


def cost(rounds):
    return epsilon([replace(STEP, steps=rounds)], DELTA)


def rows(path, sql="SELECT COUNT(*) - 1 FROM entries"):
    """Entries behind the first, which is the ledger's own."""
    with closing(sqlite3.connect(path)) as db:
        return db.execute(sql).fetchone()[0]


# --- on disk ---


def test_a_charge_is_committed_when_charge_returns(path, spend):
    """Anybody who opens the file now sees it."""
    spend(1)

    assert rows(path) == 1


def test_commits_wait_for_the_disk(ledger):
    """Write-ahead log with synchronous FULL: a power cut after `charge` returned loses nothing."""
    assert ledger._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert ledger._db.execute("PRAGMA synchronous").fetchone()[0] == 2


def test_only_the_owner_may_read_the_file(path, spend):
    """The file and what SQLite puts beside it."""
    spend(1)

    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == [
        "ledger.db",
        "ledger.db-shm",
        "ledger.db-wal",
        "ledger.head",
        "ledger.key",
    ]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


@pytest.mark.parametrize(
    "sql",
    ["UPDATE entries SET body = x''", "DELETE FROM entries", "DELETE FROM entries WHERE seq = 2"],
)
def test_entries_are_never_changed_or_removed(path, spend, sql):
    """By no statement, whoever has the file open."""
    spend(1, 2)

    with closing(sqlite3.connect(path)) as db, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        db.execute(sql)
    assert rows(path) == 2


def test_the_event_is_stored_as_data(ledger, spend):
    """Mechanism and parameters, so that another accountant can compose them."""
    spend(3, clip=0.5, unit="patient", fingerprint="abc")

    (row,) = ledger.history("cards-2026")
    at = row.pop("at")
    assert at.endswith("+00:00")
    assert row == {
        "seq": 2,
        "data_set": "cards-2026",
        "study": "s",
        "study_name": "study-s",
        "run": "r",
        "round": 3,
        "mechanism": "poisson-gaussian",
        "noise_multiplier": 2.0,
        "sampling_rate": 0.2,
        "steps": 1,
        "sites_per_unit": 1,
        "clip": 0.5,
        "unit": "patient",
        "delta": DELTA,
        "fingerprint": "abc",
        "outcome": "charged",
    }


# --- the budget ---


def test_ten_rounds_fit_and_the_eleventh_does_not(ledger, budget, spend, make_charge):
    """The budget is met exactly, and refused with both figures and whose limit it is."""
    spend(*range(1, 11))

    with pytest.raises(BudgetExhausted, match=r"cards-2026.*allowed.*policy.toml, budget.epsilon_") as caught:
        ledger.charge(make_charge(11), rounds=1, budget=budget)
    assert f"{cost(10):.3g}" in str(caught.value)
    assert ledger.spent("cards-2026", DELTA) == cost(10)


def test_a_refusal_tells_the_other_side_no_figure(ledger, budget, make_charge):
    """How much was spent before is the institution's own matter."""
    with pytest.raises(BudgetExhausted) as caught:
        ledger.reserve(make_charge(), rounds=11, budget=budget)

    assert not any(character.isdigit() for character in caught.value.public)
    assert "policy" not in caught.value.public


def test_runs_studies_and_reopened_files_add_up(open_ledger, budget, make_charge):
    """The budget belongs to the data-set id and to nothing that can be renewed."""
    budget = replace(budget, epsilon_per_study=1e9)
    for number, (study, run) in enumerate([("s", "r"), ("s", "q"), ("t", "p"), ("t", "o"), ("u", "n")]):
        ledger = open_ledger()
        for round in (1, 2):
            charge = make_charge(round, study=study, run=run, fingerprint=str(number))
            ledger.charge(charge, rounds=2, budget=budget)
        ledger.close()

    ledger = open_ledger()
    assert ledger.spent("cards-2026", DELTA) == cost(10)
    with pytest.raises(BudgetExhausted, match="epsilon_total"):
        ledger.charge(make_charge(1, study="v", run="m"), rounds=1, budget=budget)


def test_a_study_has_a_budget_of_its_own(ledger, budget, spend, make_charge):
    """Over all its runs; another study is not concerned."""
    budget = replace(budget, epsilon_per_study=cost(3))
    for round, run in ((1, "r"), (2, "r"), (1, "q")):
        ledger.charge(make_charge(round, run=run), rounds=1, budget=budget)

    with pytest.raises(BudgetExhausted, match="epsilon_per_study"):
        ledger.charge(make_charge(2, run="q"), rounds=1, budget=budget)
    ledger.charge(make_charge(1, study="t", run="p"), rounds=1, budget=budget)
    assert [(s.study, s.runs, s.rounds, s.epsilon) for s in ledger.studies("cards-2026")] == [
        ("s", 2, 3, cost(3)),
        ("t", 1, 1, cost(1)),
    ]


def test_a_delta_above_the_sites_is_refused(ledger, budget, make_charge):
    """A generous delta would make any epsilon small."""
    with pytest.raises(PolicyRefused, match=r"asks delta 2e-05, this site allows 1e-05 .*delta_total"):
        ledger.charge(make_charge(delta=2e-5), rounds=1, budget=budget)

    assert ledger.history("cards-2026") == []


def test_a_delta_above_the_sites_is_refused_under_a_reservation(ledger, budget, make_charge):
    """What was reserved at one delta does not cover another."""
    ledger.reserve(make_charge(), rounds=5, budget=budget)

    with pytest.raises(PolicyRefused, match="asks delta"):
        ledger.charge(make_charge(delta=2e-5), rounds=5, budget=budget)


def test_the_total_is_judged_at_the_sites_delta(ledger, budget, make_charge):
    """Studies of different deltas compose at one, the policy's."""
    budget = replace(budget, epsilon_per_study=1e9)

    with pytest.raises(BudgetExhausted, match="epsilon_total"):
        ledger.charge(make_charge(), rounds=1, budget=replace(budget, delta_total=1e-5, epsilon_total=0.01))
    ledger.charge(make_charge(delta=1e-7), rounds=10, budget=budget)


def test_other_data_sets_do_not_count(ledger, budget, spend, make_charge):
    """Each id has its own budget, even of the same run and round."""
    spend(*range(1, 11))

    other = replace(budget, data_set="cards-2027")
    ledger.charge(make_charge(1), rounds=1, budget=other)
    assert ledger.spent("cards-2027", DELTA) == cost(1)
    assert ledger.spent("cards-2026", DELTA) == cost(10)


def test_a_refused_charge_leaves_no_trace(path, ledger, budget, make_charge):
    """Nothing was spent, and the ledger goes on."""
    with pytest.raises(BudgetExhausted):
        ledger.charge(make_charge(1, event=replace(STEP, steps=100)), rounds=1, budget=budget)

    assert rows(path) == 0
    ledger.charge(make_charge(1), rounds=1, budget=budget)


# --- once only ---


def test_a_round_is_charged_once(ledger, budget, spend, make_charge):
    """A round that is asked for twice is refused, not charged twice and not given for free."""
    spend(1)

    with pytest.raises(AlreadyCharged, match="round 1 of this run was charged before"):
        ledger.charge(make_charge(1), rounds=1, budget=budget)
    assert ledger.spent("cards-2026", DELTA) == cost(1)


def test_a_round_is_charged_once_after_reopening(open_ledger, budget, make_charge):
    """It is the file that remembers."""
    first = open_ledger()
    first.charge(make_charge(1), rounds=1, budget=budget)
    first.close()

    with pytest.raises(AlreadyCharged, match="charged before"):
        open_ledger().charge(make_charge(1), rounds=1, budget=budget)


def test_a_hundred_replays_are_charged_once(open_ledger, budget, make_charge):
    """By any process that has the file open."""
    ledgers = [open_ledger(), open_ledger()]
    ledgers[0].charge(make_charge(1), rounds=10, budget=budget)

    for replay in range(100):
        with pytest.raises(AlreadyCharged):
            ledgers[replay % 2].charge(make_charge(1), rounds=10, budget=budget)
    assert ledgers[0].spent("cards-2026", DELTA) == cost(1)


# --- commits ---


def commit(ledger, round=1, sha256=bytes(32)):
    ledger.commit("cards-2026", run="r", round=round, sha256=sha256)


def outcomes(ledger):
    return [row["outcome"] for row in ledger.history("cards-2026")]


def test_a_commit_says_what_leaves(path, ledger, spend):
    """On disk when `commit` returns; a charge without one is of a round that never left."""
    spend(1, 2)
    commit(ledger)

    assert rows(path) == 3
    assert outcomes(ledger) == ["released", "charged"]
    assert ledger.spent("cards-2026", DELTA) == cost(2)


def test_nothing_is_committed_that_was_not_charged(ledger, spend):
    """Neither another round nor another run's."""
    spend(1)

    with pytest.raises(PolicyRefused, match="round 2 of run r was not charged"):
        commit(ledger, 2)
    with pytest.raises(PolicyRefused, match="was not charged"):
        ledger.commit("cards-2027", run="r", round=1, sha256=bytes(32))


def test_one_charge_is_for_one_content(path, ledger, spend):
    """The same bytes may leave again; others may not."""
    spend(1)
    commit(ledger)
    commit(ledger)

    with pytest.raises(PolicyRefused, match="something else has left"):
        commit(ledger, sha256=b"x" * 32)
    assert rows(path) == 2


# --- numbers that are none ---


@pytest.mark.parametrize(
    "changes",
    [
        {"round": -1},
        {"round": 1 << 31},
        {"delta": float("nan")},
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": -1e-5},
        {"clip": float("inf")},
        {"clip": -1.0},
        {"event": replace(STEP, steps=0)},
    ],
    ids=str,
)
def test_a_charge_of_no_meaning_cannot_be_made(make_charge, changes):
    """Negative, infinite, or no number."""
    with pytest.raises(ValueError, match=next(iter(changes)).replace("event", "steps")):
        make_charge(**changes)


@pytest.mark.parametrize("rate", [float("nan"), -0.1, 0.0, 1.1])
def test_an_event_of_no_meaning_cannot_be_made(rate):
    """Nor its noise, which is refused alike."""
    with pytest.raises(ValueError, match="sampling_rate"):
        replace(STEP, sampling_rate=rate)
    with pytest.raises(ValueError, match="noise_multiplier"):
        replace(STEP, noise_multiplier=float("nan"))


def test_a_number_beyond_64_bits_spends_nothing(path, ledger, budget, make_charge, monkeypatch):
    """What cannot be stored as it is, is not stored as something else."""
    monkeypatch.setattr("lepton_fl.privacy.ledger.ledger.epsilon", lambda events, delta: 0.0)

    with pytest.raises(ValueError, match="steps 9223372036854775808 is beyond 64 bits"):
        ledger.charge(make_charge(event=replace(STEP, steps=1 << 63)), rounds=1, budget=budget)
    assert rows(path) == 0


@pytest.mark.parametrize("epsilon", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_budget_of_no_meaning_cannot_be_made(budget, epsilon):
    """It would allow everything, or compare as nothing does."""
    with pytest.raises(ValueError, match="epsilon_total"):
        replace(budget, epsilon_total=epsilon)
    with pytest.raises(ValueError, match="epsilon_per_study"):
        replace(budget, epsilon_per_study=epsilon)
    with pytest.raises(ValueError, match="delta_total"):
        replace(budget, delta_total=float("nan"))


@pytest.mark.parametrize("found", [float("nan"), float("inf")])
def test_a_sum_that_is_no_number_is_over_any_budget(path, ledger, budget, make_charge, monkeypatch, found):
    """Whatever the accountant answers, only a number within the budget lets a round run."""
    monkeypatch.setattr("lepton_fl.privacy.ledger.ledger.epsilon", lambda events, delta: found)

    with pytest.raises(BudgetExhausted):
        ledger.charge(make_charge(), rounds=1, budget=budget)
    assert rows(path) == 0


# --- reservations ---


def test_a_run_that_does_not_fit_is_refused_before_its_first_round(ledger, budget, make_charge):
    """Half a run would be spent for nothing."""
    with pytest.raises(BudgetExhausted):
        ledger.reserve(make_charge(), rounds=11, budget=budget)

    with pytest.raises(BudgetExhausted):
        ledger.charge(make_charge(1), rounds=11, budget=budget)
    assert ledger.spent("cards-2026", DELTA) == 0


def test_reserving_spends_nothing(ledger, budget, make_charge):
    """A run that never starts costs nothing."""
    ledger.reserve(make_charge(), rounds=10, budget=budget)

    assert ledger.spent("cards-2026", DELTA) == 0


def test_a_resumed_run_reserves_only_what_is_left(open_ledger, budget, make_charge):
    """After a crash at round 6 the ten rounds still fit: six of them are charged."""
    first = open_ledger()
    for round in range(1, 7):
        first.charge(make_charge(round), rounds=10, budget=budget)
    first.close()

    resumed = open_ledger()
    resumed.reserve(make_charge(), rounds=10, budget=budget)
    for round in range(7, 11):
        resumed.charge(make_charge(round), rounds=10, budget=budget)
    assert resumed.spent("cards-2026", DELTA) == cost(10)


def test_what_comes_beside_is_reserved_with_the_rounds(ledger, budget, make_charge):
    """Nine rounds and one like them fit; ten and one do not."""
    beside = make_charge(99)

    ledger.reserve(make_charge(), rounds=9, budget=budget, beside=beside)

    with pytest.raises(BudgetExhausted):
        ledger.reserve(make_charge(), rounds=10, budget=budget, beside=beside)


def test_what_came_beside_is_not_reserved_twice(ledger, budget, make_charge):
    """A run that is resumed after its last charge has spent all ten, and may still be joined."""
    for round in (*range(1, 10), 99):
        ledger.charge(make_charge(round), rounds=1, budget=budget)

    ledger.reserve(make_charge(), rounds=9, budget=budget, beside=make_charge(99))

    with pytest.raises(BudgetExhausted):
        ledger.reserve(make_charge(), rounds=9, budget=budget, beside=make_charge(100))


def test_a_reservation_covers_no_more_rounds_than_reserved(ledger, budget, make_charge):
    """Round 11 of a run reserved for ten is checked like any other."""
    for round in range(1, 11):
        ledger.charge(make_charge(round), rounds=10, budget=budget)

    with pytest.raises(BudgetExhausted):
        ledger.charge(make_charge(11), rounds=10, budget=budget)


@pytest.mark.parametrize(
    "other",
    [{"run": "q"}, {"run": "q", "study": "t"}, {"event": LOUD}, {"study": "t"}],
    ids=["run", "study", "louder-event-same-run", "study-same-run"],
)
def test_a_reservation_ends_with_anothers_charge(open_ledger, budget, make_charge, other):
    """Room that was there when it was checked is not room that is still there."""
    ours, theirs = open_ledger(), open_ledger()
    ours.reserve(make_charge(), rounds=10, budget=budget)
    taken = 3 if "event" in other else 9
    for round in range(1, taken + 1):
        theirs.charge(make_charge(100 + round, **other), rounds=1, budget=budget)

    ours.charge(make_charge(1), rounds=1, budget=budget)
    with pytest.raises(BudgetExhausted):
        ours.charge(make_charge(2), rounds=1, budget=budget)
    assert ours.spent("cards-2026", DELTA) == cost(10)


def test_a_louder_event_needs_its_own_check(ledger, budget, make_charge):
    """A reservation for one sigma covers no charge of a smaller one."""
    ledger.reserve(make_charge(), rounds=10, budget=budget)

    with pytest.raises(BudgetExhausted):
        ledger.charge(make_charge(1, event=replace(STEP, steps=11)), rounds=10, budget=budget)


def test_another_study_needs_its_own_check(ledger, budget, make_charge):
    """A study that has spent its part cannot go on in a run that was reserved for another."""
    budget = replace(budget, epsilon_per_study=cost(3))
    for round in (1, 2, 3):
        ledger.charge(make_charge(round, study="t", run="q"), rounds=3, budget=budget)
    ledger.reserve(make_charge(), rounds=3, budget=budget)

    with pytest.raises(BudgetExhausted, match="epsilon_per_study"):
        ledger.charge(make_charge(1, study="t"), rounds=3, budget=budget)


def test_a_tighter_policy_holds_at_once(ledger, budget, make_charge):
    """The officer lowers the budget in mid-run: the next round is judged by the new one."""
    ledger.charge(make_charge(1), rounds=10, budget=budget)

    with pytest.raises(BudgetExhausted):
        ledger.charge(make_charge(2), rounds=10, budget=replace(budget, epsilon_total=cost(1)))


def test_what_would_be_spent(ledger, spend, make_charge):
    """A plan's figure is that of the charges it would make."""
    spend(1, 2)

    assert ledger.would_spend(make_charge(), rounds=3, data_set="cards-2026", delta=DELTA) == cost(5)


def test_a_rehearsal_touches_no_disk_and_keeps_the_rules(tmp_path, monkeypatch, budget, make_charge):
    """The same checks, in memory."""
    monkeypatch.chdir(tmp_path)
    with closing(RehearsalLedger()) as ledger:
        for round in range(1, 11):
            ledger.charge(make_charge(round), rounds=1, budget=budget)

        with pytest.raises(BudgetExhausted):
            ledger.charge(make_charge(11), rounds=1, budget=budget)
    assert list(tmp_path.iterdir()) == []


# --- one unit, and what leaves without noise ---


def test_a_data_set_keeps_one_privacy_unit(ledger, budget, spend, make_charge):
    """Epsilon per patient and epsilon per record do not add up to anything."""
    spend(1)

    with pytest.raises(PolicyRefused, match=r"'patient'.*charged per 'record'"):
        ledger.charge(make_charge(1, run="q", unit="patient"), rounds=1, budget=budget)


def release(ledger, **changes):
    usual = {"study": "s", "run": "r", "what": "test metrics", "charged": True}
    ledger.release("cards-2026", **{**usual, **changes})


def test_what_leaves_without_noise_is_recorded_first(path, ledger, spend):
    """On disk when `release` returns, like a charge."""
    spend(1)
    release(ledger)

    assert rows(path) == 2
    assert ledger.released("cards-2026", run="r") == ("test metrics",)
    assert ledger.released("cards-2026", run="q") == ()


def test_an_exact_figure_is_released_once_a_run(ledger, spend):
    """Asked for again and again, on models of the asker's choice, it would tell the records."""
    spend(1)
    release(ledger)

    with pytest.raises(PolicyRefused, match="released once"):
        release(ledger)


def test_a_run_that_trained_nothing_is_told_nothing(ledger, spend):
    """Else a new run would be a free way to ask."""
    spend(1, run="q")

    with pytest.raises(PolicyRefused, match="has trained nothing here"):
        release(ledger)
    release(ledger, charged=False)


def test_a_study_that_trained_nothing_is_told_nothing(ledger, spend):
    """Not under the run of another study either."""
    spend(1)

    with pytest.raises(PolicyRefused, match="has trained nothing here"):
        release(ledger, study="another", what="another metric")


# --- files that are no ledger ---


def test_a_ledger_of_a_newer_format_is_refused(path, ledger):
    """Its charges may not mean what this release takes them for."""
    ledger.close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 3")

    with pytest.raises(ConfigError, match="ledger format 3, this release reads 2"):
        Ledger(path)


@pytest.mark.parametrize("content", [b"no database" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_file_that_is_no_ledger_is_refused(tmp_path, content):
    """And left as it is."""
    path = tmp_path / "ledger.db"
    path.write_bytes(content)

    with pytest.raises(VerificationFailed, match="cannot be used as a ledger"):
        Ledger(path)
    assert path.read_bytes() == content


def test_a_damaged_ledger_is_told_in_one_line(path, ledger, spend):
    """Pages overwritten behind its header: refused as a file, not as SQLite's own exception."""
    spend(*range(1, 9))
    ledger.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * len(data[4096:])
    path.write_bytes(data)

    with pytest.raises(VerificationFailed, match="cannot be used as a ledger"):
        Ledger(path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    """Here the path goes through a file."""
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(ConfigError, match="cannot be used as a ledger"):
        Ledger(tmp_path / "file" / "ledger.db")


def test_a_folder_is_no_ledger(tmp_path):
    """The path exists and cannot be opened."""
    with pytest.raises(ConfigError, match="cannot be used as a ledger"):
        Ledger(tmp_path)


def test_a_full_disk_spends_nothing_and_is_told_in_one_line(path, ledger, spend, budget, make_charge):
    """Without a charge on disk nothing may leave; with room again, the ledger goes on."""
    spend(1)
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    long = "x" * 100_000

    # What the machine refuses for now: the site sits the round out, and not the run.
    with pytest.raises(Unwritable, match="cannot be used as a ledger"):
        ledger.charge(make_charge(2, fingerprint=long), rounds=1, budget=budget)
    assert rows(path) == 1
    ledger._db.execute("PRAGMA max_page_count = 1000000")
    ledger.charge(make_charge(2, fingerprint=long), rounds=1, budget=budget)
    assert rows(path) == 2


def test_an_error_that_ends_the_transaction_is_told_by_its_own_name(path, ledger, budget, make_charge):
    """SQLite rolls back by itself after some; the reason must not drown in a second rollback's."""
    ledger._db.execute(
        "CREATE TEMP TRIGGER fault BEFORE INSERT ON entries BEGIN SELECT RAISE(ROLLBACK, 'input/output'); END"
    )

    with pytest.raises(VerificationFailed, match="cannot be used as a ledger: input/output"):
        ledger.charge(make_charge(1), rounds=1, budget=budget)
    assert rows(path) == 0
