"""The ledger itself: entries in SQLite, and what they come to, in memory. disk.py keeps one on disk."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lepton_fl.errors import AlreadyCharged, BudgetExhausted, ConfigError, PolicyRefused, VerificationFailed
from lepton_fl.files import write_ahead
from lepton_fl.privacy.accounting import Event, epsilon
from lepton_fl.privacy.ledger import events
from lepton_fl.privacy.ledger.book import Book, Budget, DataSet, Spent
from lepton_fl.privacy.ledger.chain import (
    FORMAT,
    SCHEMA,
    SQLITE_ERRORS,
    check_format,
    check_seen,
    follow,
    is_settled,
    unusable,
)
from lepton_fl.privacy.ledger.entries import (
    Charge,
    Commit,
    Content,
    Entry,
    Opening,
    RecoveredCharge,
    Release,
    Renewal,
)
from lepton_fl.privacy.ledger.receipts import NO_ENTRY, Head, Receipt, Statement
from lepton_fl.secagg.identity import IdentityKey


class AnyLedger:
    """What a ledger on disk and one that forgets have in common: everything but where it is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._book = Book()
        self._ahead = False
        """The book may be ahead of the file, until the transaction has ended."""
        self._one_at_a_time = threading.Lock()
        """Threads share a connection, and so a transaction."""
        self._verified = NO_ENTRY
        """The last head that was in the file for sure."""
        # Reservations of this process: what is checked once is not composed anew at every round.
        self._reserved: dict[tuple[str, str], _Reservation] = {}
        try:
            self._make()
            self._db = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None
        try:
            self._open()
        except OSError as error:
            self._db.close()
            raise self._unusable(error) from None
        except BaseException:
            self._db.close()
            raise

    def _open(self) -> None:
        with self._io():
            write_ahead(self._db)
        with self._locked("IMMEDIATE"):
            schema = self._rows("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid")
            written = self._rows("PRAGMA user_version")[0][0]
            if not schema and written == 0:
                self._key = self._new_key()
                self._begin()
            else:
                check_format(self.path, written, [sql for (sql,) in schema])
                self._sync()
                self._key = self._own_key()

    def _begin(self) -> None:
        for statement in SCHEMA:
            self._db.execute(statement)
        self._db.execute(f"PRAGMA user_version = {FORMAT}")
        self._append("", Opening(self._key.public))

    # Where it is kept

    def _make(self) -> None:
        """Make the file where there is none."""

    def _new_key(self) -> IdentityKey:
        """The key of a ledger that begins."""
        return IdentityKey.generate()

    def _own_key(self) -> IdentityKey:
        """The key of a ledger that was begun before."""
        return self._key

    def _appended(self, head: Head) -> None:
        """Entries up to this head are in the file."""

    def close(self) -> None:
        """Close the file; a closed ledger charges nothing."""
        self._db.close()

    # Spending

    def reserve(self, planned: Charge, *, rounds: int, budget: Budget, beside: Charge | None = None) -> None:
        """Check that a run of `rounds` rounds like `planned`, and one `beside`, fits; nothing is spent yet.

        What this run has charged before, as when it is resumed, is not counted twice.

        Raises:
            BudgetExhausted: together with all that was charged before they would not fit.
        """
        with self._transaction():
            found = self._book.of(budget.data_set)
            mine = set(found.rounds.get(planned.run, {}))
            others = [] if beside is None or beside.round in mine else [beside.event]
            if beside is not None:
                mine.discard(beside.round)
            self._reserve(planned, max(rounds - len(mine), 0), budget, others)

    def charge(self, charge: Charge, *, rounds: int, budget: Budget) -> None:
        """Spend one round, durably, before this returns; the first row is read for it afterwards.

        `rounds` is how many the run may take in all, by its study.

        Guarantee: after any sequence of calls, crashes and restarts, by any number of processes, the
        composition of all charges on the data-set id since its last renewal stays within `budget`; and
        every round for which this returned is in the file. It is never refunded.

        Raises:
            BudgetExhausted: it would not fit; nothing was spent.
            AlreadyCharged: this (run, round) was charged before: a round is released once.
            PolicyRefused: the study's delta is above the site's, or its unit is another than the ledger's.
            ConfigError: the file cannot be written; nothing was spent, or at most this round.
            VerificationFailed: the file is not what this process knows of it.
        """
        with self._appending():
            found = self._book.of(budget.data_set)
            mine = found.rounds.get(charge.run, {})
            if charge.round in mine:
                raise AlreadyCharged(
                    f"{charge.study_name}: round {charge.round} of this run was charged before, and a "
                    "round is released once",
                    public="round already charged",
                )
            held = self._reserved.get((budget.data_set, charge.run))
            if held is None or not held.covers(charge, budget, others=_others(found, charge), mine=len(mine)):
                self._reserve(charge, max(rounds - len(mine), 1), budget)
            self._append(budget.data_set, charge)

    def commit(self, data_set: str, *, run: str, round: int, sha256: bytes) -> None:
        """Record, durably, that a charged round is about to leave: what leaves has this SHA-256.

        Guarantee: for one charge, one content. The same content may leave again at no cost.

        Raises:
            PolicyRefused: the round was not charged, or something else has left for it.
            ConfigError: the file cannot be written; then nothing may leave.
        """
        with self._appending():
            found = self._book.of(data_set).round(run, round)
            if found is None:
                raise PolicyRefused(
                    f"round {round} of run {run} was not charged, so nothing leaves for it",
                    public="round not charged",
                )
            if found.outcome == "charged":
                self._append(data_set, Commit(run, round, sha256))
            elif found.sha256 != sha256:
                raise PolicyRefused(
                    f"round {round} of run {run}: something else has left for its charge",
                    public="round already released",
                )

    def release(self, data_set: str, *, study: str, run: str, what: str, charged: bool) -> None:
        """Record, durably, that something leaves without noise: once for each run.

        `charged`: only a run that was charged for training may have it, so that it cannot be had for
        nothing and without end.

        Raises:
            PolicyRefused: the run had it before, or has trained nothing here.
        """
        with self._appending():
            found = self._book.of(data_set)
            # The run as this study's: under another study's rules it would ask a second time for one charge.
            if charged and not found.events(study=study, run=run):
                raise PolicyRefused(f"{what}: this run has trained nothing here", public="nothing to judge")
            if what in found.released.get(run, ()):
                raise PolicyRefused(
                    f"{what}: released to this run before, and is released once", public="released before"
                )
            self._append(data_set, Release(study, run, what))

    def renew(self, renewal: Renewal, *, officer: bytes) -> None:
        """Begin the budget of a data-set id anew, by the word of the policy's `officer`, a public key.

        Raises:
            PolicyRefused: the officer's key is another.
            VerificationFailed: not signed by it, of another ledger or data set, or used before.
        """
        if renewal.officer != officer:
            raise PolicyRefused(
                f"renewal signed by key {renewal.officer.hex()}, the policy's officer has {officer.hex()}",
                fix="sign with the key that policy.toml names in budget.officer_key",
            )
        with self._appending():
            self._append(renewal.data_set, renewal)

    # What it says

    @property
    def key(self) -> bytes:
        """The public key that signs it."""
        return self._key.public

    def head(self) -> Head:
        """Where it ends."""
        return self._read().head

    def lost(self) -> int:
        """Entries that recoveries could not explain, at most."""
        return self._read().lost

    def data_set(self, data_set: str) -> DataSet:
        """All that was charged to a data-set id; not to be changed."""
        return self._read().of(data_set)

    def released(self, data_set: str, *, run: str) -> tuple[str, ...]:
        """What left without noise in a run."""
        return tuple(self._read().of(data_set).released.get(run, ()))

    def events(self, data_set: str, *, study: str | None = None, run: str | None = None) -> list[Event]:
        """The events charged to a data-set id since its last renewal, of one study or run or of all."""
        return self._read().of(data_set).events(study=study, run=run)

    def spent(self, data_set: str, delta: float) -> float:
        """Epsilon at `delta` of everything charged to a data-set id since its last renewal."""
        return epsilon(self.events(data_set), delta)

    def studies(self, data_set: str) -> list[Spent]:
        """What each study spent since the last renewal, in order of first charge, each at its own delta."""
        found = self._read().of(data_set)
        return [
            Spent(
                study=of_id,
                study_name=study.name,
                delta=study.delta,
                epsilon=epsilon(found.events(study=of_id), study.delta),
                runs=len(study.runs),
                rounds=study.rounds,
                last=study.last,
            )
            for of_id, study in found.studies.items()
        ]

    def history(self, data_set: str) -> list[dict[str, object]]:
        """Every charge since ever, oldest first, with what became of it; events by their parameters."""
        found, listed = self._read().of(data_set), []
        for entry in self._entries():
            content = entry.content
            charge = content.charge if isinstance(content, RecoveredCharge) else content
            if entry.data_set == data_set and isinstance(charge, Charge):
                round = found.round(charge.run, charge.round)
                listed.append(
                    {
                        "seq": entry.seq,
                        "at": entry.at,
                        "data_set": data_set,
                        "study": charge.study,
                        "study_name": charge.study_name,
                        "run": charge.run,
                        "round": charge.round,
                        "mechanism": events.mechanism(charge.event),
                        **events.parameters(charge.event),
                        "clip": charge.clip,
                        "unit": charge.unit,
                        "delta": charge.delta,
                        "fingerprint": charge.fingerprint,
                        "outcome": "recovered" if round is None or charge is not content else round.outcome,
                    }
                )
        return listed

    def would_spend(
        self, planned: Charge, *, rounds: int, data_set: str, delta: float, beside: Charge | None = None
    ) -> float:
        """Epsilon at `delta` of what was charged, `rounds` rounds like `planned`, and one `beside`."""
        others = [] if beside is None else [beside.event]
        return epsilon([*self.events(data_set), planned.event.times(rounds), *others], delta)

    def state(
        self,
        *,
        site: str,
        data_set: str,
        run: str = "",
        round: int = 0,
        identity: IdentityKey | None = None,
    ) -> Statement:
        """What the site says of this ledger to the server and the peers, signed by its key.

        `round` is the one that leaves with it; 0 where none does. `identity` is the site's among the sites.

        Raises:
            PolicyRefused: the round was not charged.
        """
        with self._transaction("DEFERRED"):
            charge, entry = None, NO_ENTRY
            if round:
                found = self._book.of(data_set).round(run, round)
                if found is None:
                    raise PolicyRefused(f"round {round} of run {run} was not charged, so it is not stated")
                charging = self._entry(found.seq)
                content, entry = charging.content, Head(found.seq, charging.digest)
                charge = content.charge if isinstance(content, RecoveredCharge) else content
            return Statement.issue(
                self._key,
                site=site,
                data_set=data_set,
                head=self._book.head,
                run=run,
                charge=charge if isinstance(charge, Charge) else None,
                entry=entry,
                settled=tuple(self._book.lost_ends.items()),
                identity=identity,
            )

    def restate(self, told: Statement, identity: IdentityKey | None = None) -> Statement:
        """The same as `told`, of the head that the ledger has by now. Waits for nobody who charges.

        So that statements which leave late, as over a connection that was cut, still leave in order.
        """
        head = self._verified
        if head == told.head:
            return told
        return Statement.issue(
            self._key,
            site=told.site,
            data_set=told.data_set,
            head=head,
            run=told.run,
            charge=told.charge,
            entry=told.entry,
            settled=told.settled,
            identity=identity,
        )

    def check(self, seen: Iterable[Receipt]) -> None:
        """That this ledger has all that the receipts show, whoever holds them.

        Raises:
            VerificationFailed: it is behind, replaced or one of two; the agent must not go on.
        """
        with self._transaction("DEFERRED"):
            for receipt in seen:
                told = receipt.statement
                if not is_settled(self._book, self._entry, told):
                    self._check(told.ledger, told.head, receipt.witness)

    def _check(self, key: bytes, seen: Head, witness: str) -> None:
        check_seen(self.path, self._book, self._entry, key=key, seen=seen, witness=witness)

    # Within a transaction

    def _reserve(self, planned: Charge, rounds: int, budget: Budget, beside: Sequence[Event] = ()) -> None:
        found = self._book.of(budget.data_set)
        if planned.delta > budget.delta_total:
            raise PolicyRefused(
                f"study asks delta {planned.delta:g}, this site allows {budget.delta_total:g} "
                f"({budget.file}, budget.delta_total)",
                public="delta above the site's limit",
            )
        if found.unit not in ("", planned.unit):
            # A step that protects customers bounds a record's part by twice its clip, and one that
            # protects records says nothing of customers: the two do not compose.
            raise PolicyRefused(
                f"study protects unit {planned.unit!r}, and data set {budget.data_set} was charged per "
                f"{found.unit!r}: budgets of different units do not add up",
                fix="keep one privacy unit for a data set",
                public="the site's budget is kept for another privacy unit",
            )
        run = [planned.event.times(rounds), *beside]
        total = epsilon([*found.events(), *run], budget.delta_total)
        # Not `>`, which lets what is no number pass.
        if not total <= budget.epsilon_total:
            before = epsilon(found.events(), budget.delta_total)
            raise BudgetExhausted(
                f"privacy budget of data set {budget.data_set} does not cover this run: spent epsilon "
                f"{before:.3g}, with it {total:.3g}, allowed {budget.epsilon_total:g} at delta "
                f"{budget.delta_total:g} per {planned.unit} ({budget.file}, budget.epsilon_total)",
                fix=f"lepton-fl budget show {budget.file}",
                public="the site's privacy budget does not cover the run",
            )
        of_study = found.events(study=planned.study)
        study_epsilon = epsilon([*of_study, *run], planned.delta)
        if not study_epsilon <= budget.epsilon_per_study:
            before = epsilon(of_study, planned.delta)
            raise BudgetExhausted(
                f"study {planned.study_name} would reach epsilon {study_epsilon:.3g} (spent "
                f"{before:.3g}) at delta {planned.delta:g} per {planned.unit} of data set "
                f"{budget.data_set}, this site allows {budget.epsilon_per_study:g} a study "
                f"({budget.file}, budget.epsilon_per_study)",
                fix=f"lepton-fl budget show {budget.file}",
                public="the study's privacy budget at this site does not cover the run",
            )
        self._reserved[budget.data_set, planned.run] = _Reservation(
            event=planned.event,
            study=planned.study,
            delta=planned.delta,
            budget=budget,
            rounds=len(found.rounds.get(planned.run, {})) + rounds,
            others=_others(found, planned),
        )

    def _append(self, data_set: str, content: Content) -> None:
        head = self._book.head
        entry = Entry.write(self._key, content, seq=head.counter + 1, previous=head.digest, data_set=data_set)
        # Refused before it is written, if it contradicts what is there.
        self._ahead = True
        self._book.apply(entry)
        self._db.execute(
            "INSERT INTO entries (seq, body, signature) VALUES (?, ?, ?)",
            (entry.seq, entry.body, entry.signature),
        )

    def _sync(self) -> None:
        """Take in what was appended since, by this process or another, verified."""
        rows = self._rows(
            "SELECT seq, body, signature FROM entries WHERE seq >= ? ORDER BY seq", (self._book.head.counter,)
        )
        self._ahead = True
        follow(self.path, self._book, rows)
        if self._verified.counter:
            # For a book that was derived anew: what this process has seen once is there for good.
            self._check(self.key, self._verified, "this process")
        self._ahead = False

    def _entry(self, seq: int) -> Entry:
        rows = self._rows("SELECT body, signature FROM entries WHERE seq = ?", (seq,))
        return Entry.read(*rows[0])

    def _entries(self) -> Iterator[Entry]:
        for body, signature in self._rows("SELECT body, signature FROM entries ORDER BY seq"):
            yield Entry.read(body, signature)

    def _read(self) -> Book:
        with self._transaction("DEFERRED"):
            return self._book

    def _rows(self, sql: str, parameters: tuple[object, ...] = ()) -> list[Any]:
        with self._io():
            return self._db.execute(sql, parameters).fetchall()

    def _unusable(self, error: Exception) -> ConfigError | VerificationFailed:
        return unusable(self.path, error)

    @contextmanager
    def _io(self) -> Iterator[None]:
        try:
            yield
        except SQLITE_ERRORS as error:
            raise self._unusable(error) from None

    @contextmanager
    def _appending(self) -> Iterator[None]:
        """A transaction that may append; when it has ended, what was appended is on disk."""
        with self._transaction():
            before = self._book.head
            yield
        if self._book.head != before:
            try:
                self._appended(self._book.head)
            except OSError as error:
                raise self._unusable(error) from None

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        """A transaction in which the book is up to date."""
        # IMMEDIATE: the write lock is taken before the sums are read, so two processes cannot both
        # see room for the last round.
        with self._locked(kind):
            self._sync()
            yield

    @contextmanager
    def _locked(self, kind: str) -> Iterator[None]:
        with self._one_at_a_time, self._io():
            self._db.execute(f"BEGIN {kind}")
            try:
                yield
                self._db.execute("COMMIT")
                self._verified = self._book.head
            except BaseException:
                if self._ahead:
                    # The book holds what may not be on disk: it is derived from the file anew.
                    self._book = Book()
                # SQLite has rolled back by itself after some errors, a full disk among them.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            finally:
                self._ahead = False


class RehearsalLedger(AnyLedger):
    """A ledger in memory, for a simulated run whose model nobody keeps. It forgets, and so permits.

    Not a `Ledger`: whatever must not forget asks for one by type.
    """

    def __init__(self) -> None:
        super().__init__(Path(":memory:"))

    def _sync(self) -> None:
        # Nobody else can write to it: the book is behind only where it is derived anew.
        if not self._book.head.counter:
            super()._sync()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reservation:
    """A composition that was checked: valid while nothing else was charged to the data set."""

    event: Event
    study: str
    delta: float
    budget: Budget
    rounds: int
    others: int

    def covers(self, charge: Charge, budget: Budget, *, others: int, mine: int) -> bool:
        return (
            self.event == charge.event
            and self.study == charge.study
            and self.delta == charge.delta
            and self.budget == budget
            and self.others == others
            and mine < self.rounds
        )


def _others(found: DataSet, like: Charge) -> int:
    """Charges on the data set that are no round of the same run, study and event as `like`."""
    return found.charged - found.charges[like.run, like.study, like.event]
