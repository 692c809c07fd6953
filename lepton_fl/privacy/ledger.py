"""The site's own record of privacy spent on its data: append-only, crash-safe, across runs and restarts.

Events are stored as data (mechanism, sigma, sampling rate, steps), never as sums, so that any accountant
can read them and all studies on a data set compose. A charge is on disk before the first row is read for
the round and long before anything leaves: a crash wastes budget, it never leaks any.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lepton_fl.errors import AlreadyCharged, BudgetExhausted, ConfigError, PolicyRefused
from lepton_fl.privacy.accounting import Gaussian, epsilon

_SCHEMA = """
CREATE TABLE IF NOT EXISTS charges (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    at TEXT NOT NULL,
    data_set TEXT NOT NULL,
    study TEXT NOT NULL,
    study_name TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    mechanism TEXT NOT NULL,
    noise_multiplier REAL NOT NULL,
    sampling_rate REAL NOT NULL,
    steps INTEGER NOT NULL,
    clip REAL NOT NULL,
    unit TEXT NOT NULL,
    delta REAL NOT NULL,
    fingerprint TEXT NOT NULL,
    UNIQUE (data_set, run, round)
) STRICT;
CREATE TABLE IF NOT EXISTS releases (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    at TEXT NOT NULL,
    data_set TEXT NOT NULL,
    study TEXT NOT NULL,
    run TEXT NOT NULL,
    what TEXT NOT NULL,
    UNIQUE (data_set, run, what)
) STRICT;
CREATE TRIGGER IF NOT EXISTS releases_are_never_changed BEFORE UPDATE ON releases
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS releases_are_never_removed BEFORE DELETE ON releases
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS charges_are_never_changed BEFORE UPDATE ON charges
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS charges_are_never_removed BEFORE DELETE ON charges
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a policy allows per privacy unit, over all studies on one data-set id."""

    data_set: str
    epsilon_total: float
    epsilon_per_study: float
    delta_total: float
    file: str
    """The policy file, for the error that names whose limit it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """One round of one run, as it is charged: event as data, and to what it belongs."""

    study: str
    study_name: str
    run: str
    round: int
    event: Gaussian
    clip: float
    unit: str
    delta: float
    """The study's delta, at which its own epsilon is stated."""
    fingerprint: str
    """SHA-256 of the data trained on: evidence of the version; the budget does not depend on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """A study's part of what was spent."""

    study: str
    study_name: str
    delta: float
    epsilon: float
    runs: int
    rounds: int
    last: str


class AnyLedger:
    """What a ledger on disk and one that forgets have in common: everything but where it is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._make(path)
            self._db = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise
        # Reservations of this process: what is checked once is not composed anew at every round.
        self._reserved: dict[tuple[str, str], _Reservation] = {}

    def _prepare(self) -> None:
        with self._io():
            self._db.execute("PRAGMA journal_mode = WAL")
            # FULL: a commit returns only when the write-ahead log is on disk.
            self._db.execute("PRAGMA synchronous = FULL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            raise ConfigError(f"{self.path}: ledger format {version}, this release reads {_VERSION}")
        with self._transaction():
            for statement in _statements(_SCHEMA):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {_VERSION}")

    def _make(self, path: Path) -> None:
        """Make the file where there is none."""

    def close(self) -> None:
        """Close the file; a closed ledger charges nothing."""
        self._db.close()

    def reserve(self, planned: Charge, *, rounds: int, budget: Budget) -> None:
        """Check that a run of `rounds` rounds like `planned` fits; nothing is spent yet.

        Rounds that this run has charged before, as when it is resumed, are not counted twice.

        Raises:
            BudgetExhausted: together with all that was charged before they would not fit.
        """
        with self._transaction():
            left = rounds - len(self._rounds_of(budget.data_set, planned.run))
            self._reserve(planned, max(left, 0), budget)

    def charge(self, charge: Charge, *, rounds: int, budget: Budget) -> None:
        """Spend one round, durably, before this returns.

        `rounds` is how many the run may take in all, by its study.

        Guarantee: after any sequence of calls, crashes and restarts, by any number of processes, the
        composition of all charges on the data-set id stays within `budget`; and every round for which
        this returned is in the file.

        Raises:
            BudgetExhausted: it would not fit; nothing was spent.
            AlreadyCharged: this (run, round) was charged before: a round is released once.
            PolicyRefused: the study's delta is above the site's, or its unit is another than the ledger's.
            ConfigError: the file cannot be written; nothing was spent, or at most this round.
        """
        with self._transaction():
            key = budget.data_set, charge.run
            held = self._reserved.get(key)
            others = self._count_others(budget.data_set, charge)
            mine = self._rounds_of(budget.data_set, charge.run)
            if charge.round in mine:
                raise AlreadyCharged(
                    f"{charge.study_name}: round {charge.round} of this run was charged before, and a "
                    "round is released once",
                    public="round already charged",
                )
            if held is None or not held.covers(charge, budget, others=others, mine=len(mine)):
                self._reserve(charge, max(rounds - len(mine), 1), budget)
            self._db.execute(
                "INSERT INTO charges (at, data_set, study, study_name, run, round, mechanism,"
                " noise_multiplier, sampling_rate, steps, clip, unit, delta, fingerprint)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    _now(),
                    budget.data_set,
                    charge.study,
                    charge.study_name,
                    charge.run,
                    charge.round,
                    "poisson-gaussian",
                    charge.event.noise_multiplier,
                    charge.event.sampling_rate,
                    charge.event.steps,
                    charge.clip,
                    charge.unit,
                    charge.delta,
                    charge.fingerprint,
                ),
            )

    def release(self, data_set: str, *, study: str, run: str, what: str, charged: bool) -> None:
        """Record, durably, that something leaves without noise: once for each run.

        `charged`: only a run that was charged for training may have it, so that it cannot be had for
        nothing and without end.

        Raises:
            PolicyRefused: the run had it before, or has trained nothing here.
        """
        with self._transaction():
            # The run as this study's: under another study's rules it would ask a second time for one charge.
            if charged and not self.events(data_set, study=study, run=run):
                raise PolicyRefused(f"{what}: this run has trained nothing here", public="nothing to judge")
            if what in self.released(data_set, run=run):
                raise PolicyRefused(
                    f"{what}: released to this run before, and is released once", public="released before"
                )
            self._db.execute(
                "INSERT INTO releases (at, data_set, study, run, what) VALUES (?, ?, ?, ?, ?)",
                (_now(), data_set, study, run, what),
            )

    def released(self, data_set: str, *, run: str) -> tuple[str, ...]:
        """What left without noise in a run."""
        rows = self._rows(
            "SELECT what FROM releases WHERE data_set = ? AND run = ? ORDER BY seq", (data_set, run)
        )
        return tuple(what for (what,) in rows)

    def events(self, data_set: str, *, study: str | None = None, run: str | None = None) -> list[Gaussian]:
        """All events charged to a data-set id, of one study or run or of all, merged by (sigma, q)."""
        rows = self._rows(
            "SELECT noise_multiplier, sampling_rate, SUM(steps) FROM charges WHERE data_set = ?"
            " AND (? IS NULL OR study = ?) AND (? IS NULL OR run = ?) GROUP BY 1, 2",
            (data_set, study, study, run, run),
        )
        return [Gaussian(noise_multiplier=s, sampling_rate=q, steps=n) for s, q, n in rows]

    def spent(self, data_set: str, delta: float) -> float:
        """Epsilon at `delta` of everything charged to a data-set id."""
        return epsilon(self.events(data_set), delta)

    def studies(self, data_set: str) -> list[Spent]:
        """What each study spent, in order of first charge, each at its own delta."""
        rows = self._rows(
            "SELECT study, study_name, MAX(delta), COUNT(DISTINCT run), COUNT(*), MAX(at)"
            " FROM charges WHERE data_set = ? GROUP BY study ORDER BY MIN(seq)",
            (data_set,),
        )
        return [
            Spent(
                study=study,
                study_name=name,
                delta=delta,
                epsilon=epsilon(self.events(data_set, study=study), delta),
                runs=runs,
                rounds=rounds,
                last=last,
            )
            for study, name, delta, runs, rounds, last in rows
        ]

    def history(self, data_set: str) -> list[dict[str, object]]:
        """Every charge, oldest first, as plain columns."""
        with self._io():
            cursor = self._db.execute("SELECT * FROM charges WHERE data_set = ? ORDER BY seq", (data_set,))
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor]

    def would_spend(self, planned: Charge, *, rounds: int, data_set: str, delta: float) -> float:
        """Epsilon at `delta` of everything charged so far and `rounds` rounds like `planned`."""
        return epsilon([*self.events(data_set), planned.event.times(rounds)], delta)

    def _reserve(self, planned: Charge, rounds: int, budget: Budget) -> None:
        if planned.delta > budget.delta_total:
            raise PolicyRefused(
                f"study asks delta {planned.delta:g}, this site allows {budget.delta_total:g} "
                f"({budget.file}, budget.delta_total)",
                public="delta above the site's limit",
            )
        other = self._rows(
            "SELECT unit FROM charges WHERE data_set = ? AND unit != ? LIMIT 1",
            (budget.data_set, planned.unit),
        )
        if other:
            # A step that protects customers bounds a record's part by twice its clip, and one that
            # protects records says nothing of customers: the two do not compose.
            raise PolicyRefused(
                f"study protects unit {planned.unit!r}, and data set {budget.data_set} was charged per "
                f"{other[0][0]!r}: budgets of different units do not add up",
                fix="keep one privacy unit for a data set",
                public="the site's budget is kept for another privacy unit",
            )
        run = planned.event.times(rounds)
        total = epsilon([*self.events(budget.data_set), run], budget.delta_total)
        if total > budget.epsilon_total:
            before = self.spent(budget.data_set, budget.delta_total)
            raise BudgetExhausted(
                f"privacy budget of data set {budget.data_set} does not cover this run: spent epsilon "
                f"{before:.3g}, with it {total:.3g}, allowed {budget.epsilon_total:g} at delta "
                f"{budget.delta_total:g} per {planned.unit} ({budget.file}, budget.epsilon_total)",
                fix=f"lepton-fl budget show {budget.file}",
                public="the site's privacy budget does not cover the run",
            )
        of_study = self.events(budget.data_set, study=planned.study)
        study_epsilon = epsilon([*of_study, run], planned.delta)
        if study_epsilon > budget.epsilon_per_study:
            before = epsilon(of_study, planned.delta)
            raise BudgetExhausted(
                f"study {planned.study_name} would reach epsilon {study_epsilon:.3g} (spent "
                f"{before:.3g}) at delta {planned.delta:g} per {planned.unit} of data set "
                f"{budget.data_set}, this site allows {budget.epsilon_per_study:g} a study "
                f"({budget.file}, budget.epsilon_per_study)",
                fix=f"lepton-fl budget show {budget.file}",
                public="the study's privacy budget at this site does not cover the run",
            )
        mine = self._rounds_of(budget.data_set, planned.run)
        self._reserved[budget.data_set, planned.run] = _Reservation(
            event=planned.event,
            study=planned.study,
            delta=planned.delta,
            budget=budget,
            rounds=len(mine) + rounds,
            others=self._count_others(budget.data_set, planned),
        )

    def _rounds_of(self, data_set: str, run: str) -> set[int]:
        rows = self._rows("SELECT round FROM charges WHERE data_set = ? AND run = ?", (data_set, run))
        return {row[0] for row in rows}

    def _count_others(self, data_set: str, like: Charge) -> int:
        """Charges on the data set that are no round of the same run, study and event as `like`."""
        event = like.event
        rows = self._rows(
            "SELECT COUNT(*) FROM charges WHERE data_set = ? AND NOT"
            " (run = ? AND study = ? AND noise_multiplier = ? AND sampling_rate = ? AND steps = ?)",
            (data_set, like.run, like.study, event.noise_multiplier, event.sampling_rate, event.steps),
        )
        return int(rows[0][0])

    def _rows(self, sql: str, parameters: tuple[object, ...]) -> list[Any]:
        with self._io():
            return self._db.execute(sql, parameters).fetchall()

    def _unusable(self, error: Exception) -> ConfigError:
        return ConfigError(f"{self.path}: cannot be used as a ledger: {error}")

    @contextmanager
    def _io(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        # IMMEDIATE: the write lock is taken before the sums are read, so two processes cannot both
        # see room for the last round.
        with self._io():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors, a full disk among them.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


class Ledger(AnyLedger):
    """The ledger in one SQLite file (WAL, synchronous FULL, mode 0600)."""

    def __init__(self, path: Path) -> None:
        """Open, or create, the ledger at `path`.

        Raises:
            ConfigError: the file cannot be opened, or is not a ledger of this format.
        """
        # Absolute: SQLite takes a relative `:memory:` for no file at all.
        super().__init__(path.absolute())

    def _make(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)


class RehearsalLedger(AnyLedger):
    """A ledger in memory, for a simulated run whose model nobody keeps. It forgets, and so permits.

    Not a `Ledger`: whatever must not forget asks for one by type.
    """

    def __init__(self) -> None:
        super().__init__(Path(":memory:"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reservation:
    """A composition that was checked: valid while nothing else was charged to the data set."""

    event: Gaussian
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _statements(script: str) -> list[str]:
    """The script's statements, one by one: executescript would commit the transaction."""
    statements, current = [], ""
    for line in script.splitlines():
        current += line + "\n"
        if sqlite3.complete_statement(current):
            statements.append(current)
            current = ""
    return statements
