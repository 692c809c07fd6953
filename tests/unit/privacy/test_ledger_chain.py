"""The chain: whatever is changed in a ledger's files is found, and named."""

import hashlib
import itertools
import pkgutil
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from lepton_fl.errors import ConfigError, VerificationFailed
from lepton_fl.privacy import Gaussian, Ledger, RehearsalLedger
from lepton_fl.privacy.ledger import events
from lepton_fl.privacy.ledger.audit import audit
from lepton_fl.privacy.ledger.chain import SLOT
from lepton_fl.privacy.ledger.entries import TAG, Charge, Commit, Entry, Release
from lepton_fl.privacy.ledger.receipts import Receipt
from lepton_fl.secagg.encoding import decode, encode
from lepton_fl.secagg.identity import IdentityKey, verify

FLIPS = 1000


@pytest.fixture
def filled(path, ledger, spend):
    """Eight rounds charged, every second one released, something un-noised; closed."""
    spend(*range(1, 9))
    for round in range(2, 9, 2):
        ledger.commit("cards-2026", run="r", round=round, sha256=bytes([round]) * 32)
    ledger.release("cards-2026", study="s", run="r", what="auc", charged=True)
    ledger.close()
    return path


def forge(path, seq, change):
    """Rewrite one row as somebody could who has the file and not the key."""
    with closing(sqlite3.connect(path)) as db, db:
        (sql,) = db.execute(
            "SELECT sql FROM sqlite_master WHERE name = 'entries_are_never_changed'"
        ).fetchone()
        db.execute("DROP TRIGGER entries_are_never_changed")
        body, signature = db.execute("SELECT body, signature FROM entries WHERE seq = ?", (seq,)).fetchone()
        db.execute(
            "UPDATE entries SET body = ?, signature = ? WHERE seq = ?", (*change(body, signature), seq)
        )
        db.execute(sql)
        # As the schema was written, triggers in their order.
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET rowid = 9 WHERE name = 'entries_are_never_removed'")


def both_refuse(path, match):
    """The agent and the auditor."""
    for opened in (Ledger, audit):
        with pytest.raises(VerificationFailed, match=match):
            opened(path)


def contents(ledger):
    """All that is read of a ledger."""
    rows = [(entry.body, entry.signature) for entry in ledger._entries()]
    return rows, ledger.history("cards-2026"), ledger.released("cards-2026", run="r")


# --- what an entry is ---


def test_an_entry_is_its_canonical_bytes(path, filled):
    """Read by the encoding and the key alone: number, digest of the one before, a signature over both."""
    key = IdentityKey.read(path.with_suffix(".key").read_bytes()).public
    previous = bytes(32)
    with closing(sqlite3.connect(path)) as db:
        rows = db.execute("SELECT seq, body, signature FROM entries ORDER BY seq").fetchall()
    for seq, body, signature in rows:
        tag, number, before, _, data_set, kind, _ = decode(body, str, int, bytes, str, str, str, tuple)
        verify(key, signature, TAG, body)

        assert (tag, number, before) == ("lepton-fl/ledger-entry/2", seq, previous)
        assert data_set == ("" if kind == "opening" else "cards-2026")
        previous = hashlib.sha256(encode(body, signature)).digest()
    assert len(rows) == 14


@pytest.mark.parametrize("sigma", [2.0, 0.1 + 0.2, 1e-300, 12345.678901234567])
def test_an_event_comes_back_as_it_went(sigma):
    """To the last bit."""
    event = Gaussian(noise_multiplier=sigma, sampling_rate=0.1, steps=3)
    name, stored = events.to_value(event)
    (read,) = decode(encode(stored), tuple)

    assert events.from_value(name, read) == event


def test_a_ledger_with_events_of_a_later_release_is_not_guessed_at(path, filled, monkeypatch):
    """It is no damage either: what is missing is the release that knows them."""
    monkeypatch.setattr(events, "MECHANISMS", {"other": Gaussian})
    monkeypatch.setattr("lepton_fl.privacy.ledger.entries._terms", _uncached())

    with pytest.raises(ConfigError, match=r"entry 2: charged by mechanism 'poisson-gaussian', which this"):
        Ledger(path)


def _uncached():
    from lepton_fl.privacy.ledger import entries

    return entries._terms.__wrapped__


def test_a_mechanism_needs_a_name_and_no_more(tmp_path, budget, make_charge, monkeypatch):
    """The ledger stores, reads and counts events of whose parameters it knows nothing."""
    from dataclasses import dataclass

    @dataclass(frozen=True, order=True)
    class Grid(Gaussian):
        scale: int = 8
        label: str = "shared"

    monkeypatch.setattr(events, "MECHANISMS", {**events.MECHANISMS, "grid": Grid})
    event = Grid(noise_multiplier=4.0, sampling_rate=0.5, steps=2, scale=1 << 40, label="x")
    with closing(Ledger(tmp_path / "ledger.db")) as ledger:
        ledger.charge(make_charge(event=event), rounds=1, budget=budget)
    with closing(Ledger(tmp_path / "ledger.db")) as ledger:
        (row,) = ledger.history("cards-2026")

        assert ledger.events("cards-2026") == [event]
    assert (row["mechanism"], row["scale"], row["label"]) == ("grid", 1 << 40, "x")


# --- what is changed is found ---


def test_a_ledger_as_it_was_written_opens(filled):
    """For the agent and for the auditor; else the tests below would hold nothing."""
    with closing(Ledger(filled)) as ledger:
        assert ledger.head().counter == 14
    assert audit(filled).book.head.counter == 14


@pytest.mark.parametrize("seq", [1, 2, 7, 13, 14])
@pytest.mark.parametrize("part", ["body", "signature"])
def test_a_changed_entry_is_named(filled, seq, part):
    """First, last or in between; its body, or its signature."""

    def flip(body, signature):
        data = {"body": bytearray(body), "signature": bytearray(signature)}
        data[part][-1] ^= 1
        return bytes(data["body"]), bytes(data["signature"])

    forge(filled, seq, flip)

    both_refuse(filled, f"entry {seq} was changed")


def test_an_entry_signed_by_another_key_is_named(filled):
    """Who rewrites the whole end without the site's key is found at its first entry."""
    other = IdentityKey.generate()

    def rewrite(body, _):
        entry = Entry.read(body, b"")
        made = Entry.write(other, Release("s", "r", "nothing"), seq=14, previous=entry.previous)
        return made.body, made.signature

    forge(filled, 14, rewrite)

    both_refuse(filled, "entry 14 was changed: its signature is not the ledger's")


@pytest.mark.parametrize("seq", [1, 5, 14])
def test_a_missing_entry_is_named(filled, seq):
    """The last one too: `ledger.head` says that it was there."""
    with closing(sqlite3.connect(filled)) as db, db:
        (sql,) = db.execute(
            "SELECT sql FROM sqlite_master WHERE name = 'entries_are_never_removed'"
        ).fetchone()
        db.execute("DROP TRIGGER entries_are_never_removed")
        db.execute("DELETE FROM entries WHERE seq = ?", (seq,))
        db.execute(sql)

    both_refuse(
        filled, "entry 13, and ledger.head has seen entry 14" if seq == 14 else f"entry {seq} is missing"
    )


def test_a_trigger_that_is_gone_is_found(filled):
    """Nothing was changed yet, and it could be."""
    with closing(sqlite3.connect(filled)) as db, db:
        db.execute("DROP TRIGGER entries_are_never_changed")

    both_refuse(filled, "tables or triggers")


def test_a_lost_write_ahead_log_is_found(path, ledger, spend):
    """A crash leaves the last entries in the log alone; who deletes it refunds nothing."""
    ledger._db.execute("PRAGMA wal_autocheckpoint = 0")
    spend(1, 2)
    copy = path.parent.parent / "copy"
    shutil.copytree(path.parent, copy)
    with closing(Ledger(copy / path.name)) as whole:
        assert whole.head().counter == 3
    shutil.rmtree(copy)
    ledger._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    spend(3, 4)
    shutil.copytree(path.parent, copy)
    (copy / "ledger.db-wal").unlink()

    both_refuse(copy / path.name, "ends at entry 3, and ledger.head has seen entry 5")


@pytest.mark.parametrize("name", ["ledger.key", "ledger.head"])
def test_a_lost_companion_is_named(filled, name):
    """Without its key nothing can be appended; without its end nobody knows that nothing is missing."""
    filled.with_name(name).unlink()

    with pytest.raises(VerificationFailed, match=f"{name}: is gone"):
        Ledger(filled)


def test_a_key_that_others_may_read_is_refused(filled):
    """They could sign what never was."""
    filled.with_suffix(".key").chmod(0o640)

    with pytest.raises(ConfigError, match=r"others may read.*chmod 600"):
        Ledger(filled)


def test_another_ledgers_key_is_refused(filled, tmp_path):
    """Two halves that do not belong together."""
    Ledger(tmp_path / "other.db").close()
    (tmp_path / "other.key").replace(filled.with_suffix(".key"))

    with pytest.raises(VerificationFailed, match="not the key that signs"):
        Ledger(filled)


@pytest.mark.parametrize("left", [("ledger.key",), ("ledger.head",), ("ledger.key", "ledger.head")])
def test_a_lost_ledger_is_not_begun_anew(filled, left):
    """Whatever it has left behind says that it was there."""
    for file in filled.parent.iterdir():
        if file.name not in left:
            file.unlink()

    with pytest.raises(VerificationFailed, match=r"ledger\.db: is gone") as caught:
        Ledger(filled)
    assert "lepton-fl budget recover" in caught.value.fix
    assert not filled.exists()


def test_an_older_copy_of_the_database_is_found(path, ledger, spend):
    """The file alone, put back under what lies beside it."""
    spend(1, 2)
    ledger.close()
    old = path.read_bytes()
    with closing(Ledger(path)) as again:
        again.commit("cards-2026", run="r", round=1, sha256=bytes(32))
    path.write_bytes(old)

    both_refuse(path, "ends at entry 3, and ledger.head has seen entry 4")


def test_a_file_put_in_the_place_of_an_open_ledger_is_found(path, open_ledger, budget, make_charge):
    """At the next charge, by the process that knows more than the file."""
    first = open_ledger()
    first.charge(make_charge(1), rounds=9, budget=budget)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DROP TRIGGER entries_are_never_removed")
        db.execute("DELETE FROM entries WHERE seq = 2")

    with pytest.raises(VerificationFailed, match="entry 2 is gone"):
        first.charge(make_charge(2), rounds=9, budget=budget)
    # It does not come to terms with it either.
    for round in (2, 3):
        with pytest.raises(VerificationFailed, match="this process has seen entry 2"):
            first.charge(make_charge(round), rounds=9, budget=budget)


@pytest.mark.parametrize("where", ["closed", "killed"])
def test_a_thousand_flipped_bits(path, ledger, spend, tmp_path, where):
    """Each is found, or nothing that is read has changed. `killed`: the last entries are in the log only."""
    spend(*range(1, 6))
    ledger.commit("cards-2026", run="r", round=1, sha256=bytes(32))
    if where == "closed":
        ledger.close()
        files = ["ledger.db", "ledger.head"]
    else:
        files = ["ledger.db", "ledger.db-wal", "ledger.head"]
    whole = {name: (path.parent / name).read_bytes() for name in [*files, "ledger.key"]}
    copy = tmp_path / "copy"
    copy.mkdir()
    truth = _contents_of(copy, whole)
    # The log is mostly the older versions of a page: let each file have its share.
    rng = np.random.default_rng(7)
    found = harmless = 0
    for _ in range(FLIPS // 2):
        name = files[rng.integers(len(files))]
        bit = int(rng.integers(8 * len(whole[name])))
        flipped = bytearray(whole[name])
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            seen = _contents_of(copy, {**whole, name: bytes(flipped)})
        except (VerificationFailed, ConfigError):
            found += 1
            continue

        harmless += 1
        assert seen == truth, f"{name}, bit {bit}"
    assert found > FLIPS / 20
    assert harmless > 0


def _contents_of(folder: Path, files):
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).touch(mode=0o600)
        (folder / name).write_bytes(data)
    with closing(Ledger(folder / "ledger.db")) as ledger:
        return contents(ledger)


def test_every_bit_of_an_entry_is_found(path, filled, tmp_path):
    """Of all entries, wherever their bytes lie in the file: 1,000 of them, each named rightly."""
    data = path.read_bytes()
    with closing(sqlite3.connect(path)) as db:
        rows = db.execute("SELECT seq, body, signature FROM entries").fetchall()
    places = [(seq, data.index(part), len(part)) for seq, *parts in rows for part in parts]
    rng = np.random.default_rng(8)
    copy = tmp_path / "copy.db"
    for _ in range(FLIPS):
        seq, start, length = places[rng.integers(len(places))]
        bit = int(rng.integers(8 * length))
        flipped = bytearray(data)
        flipped[start + bit // 8] ^= 1 << bit % 8
        copy.write_bytes(flipped)

        with pytest.raises(VerificationFailed, match=rf"entry {seq} was changed"):
            audit(copy)


def test_a_note_that_was_cut_short_leaves_the_one_before(filled):
    """As a power cut in the middle of the write would leave it: the ledger is whole, and opens."""
    head = filled.with_suffix(".head")
    data = bytearray(head.read_bytes())
    data[14 % 2 * SLOT + 20 :][:10] = bytes(10)
    data[14 % 2 * SLOT + 20 : 14 % 2 * SLOT + 60] = bytes(40)
    head.write_bytes(data)

    with closing(Ledger(filled)) as ledger:
        assert ledger.head().counter == 14


# --- begun, by whom and when ---


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["disk.write_atomic:1", "disk.write_atomic:2", "disk.Path.replace:2"])
def test_a_crash_while_it_begins_leaves_nothing_that_is_lost(path, monkeypatch, step, when):
    """Killed at any of its writes when it is first opened, a ledger opens the next time."""
    name, _, call = step.partition(":")
    left = int(call)

    def mined(function):
        def run(*args, **more):
            nonlocal left
            left -= 1
            if left == 0 and when == "before":
                raise KeyboardInterrupt
            done = function(*args, **more)
            if left == 0:
                raise KeyboardInterrupt
            return done

        return run

    target = f"lepton_fl.privacy.ledger.{name}"
    with monkeypatch.context() as patched:
        patched.setattr(target, mined(pkgutil.resolve_name(target)))
        with pytest.raises(KeyboardInterrupt):
            Ledger(path)
    with closing(Ledger(path)) as ledger:
        assert ledger.head().counter == 1
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".db", ".head", ".key"]


def test_the_sites_key_is_made_once(filled):
    """And signs all that follows."""
    key = filled.with_suffix(".key").read_bytes()
    with closing(Ledger(filled)) as ledger:
        assert IdentityKey.read(key).public == ledger.key
    assert filled.with_suffix(".key").read_bytes() == key


def test_rehearsals_are_signed_by_keys_of_their_own(tmp_path, monkeypatch):
    """Made for each, and kept nowhere."""
    monkeypatch.chdir(tmp_path)
    with closing(RehearsalLedger()) as one, closing(RehearsalLedger()) as other:
        assert one.key != other.key
    assert list(tmp_path.iterdir()) == []


def test_a_commit_without_a_charge_is_no_ledgers(tmp_path, path, filled):
    """Entries are judged as well as their signatures: one that contradicts those before is refused."""
    key = IdentityKey.read(path.with_suffix(".key").read_bytes())
    with closing(Ledger(filled)) as ledger:
        head = ledger.head()
    entry = Entry.write(key, Commit("r", 99, bytes(32)), seq=15, previous=head.digest, data_set="cards-2026")
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("INSERT INTO entries VALUES (?, ?, ?)", (15, entry.body, entry.signature))

    both_refuse(path, "entry 15 commits round 99 of a run that was not charged")


def test_a_round_charged_twice_is_no_ledgers(path, filled, make_charge):
    """Whoever wrote it."""
    key = IdentityKey.read(path.with_suffix(".key").read_bytes())
    with closing(Ledger(filled)) as ledger:
        head = ledger.head()
    entry = Entry.write(key, make_charge(1), seq=15, previous=head.digest, data_set="cards-2026")
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("INSERT INTO entries VALUES (?, ?, ?)", (15, entry.body, entry.signature))

    both_refuse(path, "entry 15 charges round 1 of a run a second time")


def test_the_auditor_writes_nothing(filled):
    """Not even beside the file; a folder that cannot be written will do."""
    before = sorted(file.name for file in filled.parent.iterdir())
    filled.parent.chmod(0o500)
    try:
        audit(filled)
    finally:
        filled.parent.chmod(0o700)

    assert sorted(file.name for file in filled.parent.iterdir()) == before


def test_the_auditor_is_not_alarmed_by_charges_meanwhile(path, ledger, spend, monkeypatch):
    """What it reads of an agent's files is of one moment each, and a charge comes between any two of them."""
    witness, rounds, real = IdentityKey.generate(), itertools.count(1), Path.read_bytes

    def charge():
        spend(next(rounds))
        told = ledger.state(site="bank", data_set="cards-2026")
        ledger.keep(Receipt.issue(witness, witness="server", statement=told))

    charge()

    def read(file):
        if file.suffix in (".head", ".receipts"):
            charge()
        return real(file)

    monkeypatch.setattr(Path, "read_bytes", read)
    found = audit(path)

    assert found.compared == ("key", "ledger.head", "server")
    assert next(rounds) == 4
    assert found.book.head.counter == 4


def test_the_auditor_needs_no_companion(filled, tmp_path):
    """A copy of the database alone, and the key that must have signed it."""
    copy = tmp_path / "copy.db"
    copy.write_bytes(filled.read_bytes())
    key = IdentityKey.read(filled.with_suffix(".key").read_bytes()).public

    assert audit(copy, key=key).compared == ("key",)
    with pytest.raises(VerificationFailed, match="signed by key"):
        audit(copy, key=bytes(32))


def test_a_charge_survives_its_encoding(make_charge):
    """All of it."""
    charge = make_charge(7, clip=0.1, unit="patient", fingerprint="abc", delta=1e-7)

    assert Charge.of(decode(encode(*charge.fields()))) == charge
