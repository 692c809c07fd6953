"""What the operator proposed, what sites say to it, and its runs: the tables that server and commands share.

A run's state::

    wanted ───────> running ──────> finished      its model is made
      │               │ │ └───────> failed        it says why
      │               │ └─────────> interrupted   the server has ended; goes on at its next start
      v               v
    stopped <───── stopping

The operator's commands write `wanted` (`study start`, and `study resume` of what was stopped or has failed)
and `stopping`; all else the server writes. At its start no run has a process: what was `running`, as after a
crash, is `interrupted`, and goes on when enough of its sites are back; what was `stopping` is `stopped`.

What a run has done is in its checkpoint; `rounds` is what was heard of it, and may lack what a crash cut off.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any, Literal

from lepton_fl.errors import ConfigError, TooFewSites
from lepton_fl.fleet.protocol.limits import MAX_STUDY
from lepton_fl.fleet.server.database import Database
from lepton_fl.fleet.server.register import SCHEMA
from lepton_fl.study import Study, check_deployable, parse_canonical

_SCHEMA = """
CREATE TABLE IF NOT EXISTS studies (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    canonical BLOB NOT NULL,
    min_sites INTEGER NOT NULL,
    rounds INTEGER NOT NULL,
    first_model TEXT,
    submitted_at REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS signatures (
    study TEXT PRIMARY KEY REFERENCES studies,
    signature BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS answers (
    study TEXT NOT NULL REFERENCES studies,
    party INTEGER NOT NULL,
    site TEXT NOT NULL,
    state TEXT NOT NULL,
    reason TEXT NOT NULL,
    at REAL NOT NULL,
    PRIMARY KEY (study, party)
) STRICT;
CREATE TABLE IF NOT EXISTS runs (
    id TEXT PRIMARY KEY,
    study TEXT NOT NULL REFERENCES studies,
    state TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT '',
    exit_code INTEGER,
    sites TEXT NOT NULL,
    done INTEGER NOT NULL DEFAULT 0,
    created_at REAL NOT NULL,
    changed_at REAL NOT NULL,
    outcome TEXT NOT NULL DEFAULT '{}',
    version INTEGER
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS one_run_of_a_study ON runs (study)
    WHERE state IN ('wanted', 'running', 'stopping', 'interrupted');
CREATE TABLE IF NOT EXISTS rounds (
    run TEXT NOT NULL REFERENCES runs,
    number INTEGER NOT NULL,
    sites TEXT NOT NULL,
    dropped TEXT NOT NULL,
    seconds REAL NOT NULL,
    at REAL NOT NULL,
    PRIMARY KEY (run, number)
) STRICT;
CREATE TABLE IF NOT EXISTS sessions (
    party INTEGER PRIMARY KEY,
    site TEXT NOT NULL,
    connected INTEGER NOT NULL,
    since REAL NOT NULL,
    heard REAL NOT NULL,
    release TEXT NOT NULL,
    device TEXT NOT NULL,
    state TEXT NOT NULL,
    bytes_in INTEGER NOT NULL,
    bytes_out INTEGER NOT NULL
) STRICT
"""

State = Literal["wanted", "running", "stopping", "stopped", "interrupted", "finished", "failed"]
ACTIVE: tuple[State, ...] = ("wanted", "running", "stopping", "interrupted")
"""States of a run that has not ended."""
SAYS = Literal["waiting", "approved", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A study that the operator proposed."""

    id: str
    name: str
    canonical: bytes
    min_sites: int
    rounds: int
    first_model: str | None
    """SHA-256 of the model that a run begins with, where the operator gave one."""
    submitted_at: float

    def study(self) -> Study:
        """The study itself, verified against its id."""
        return parse_canonical(self.canonical, self.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What a site says to a study."""

    study: str
    party: int
    site: str
    state: SAYS
    reason: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a study."""

    id: str
    study: str
    state: State
    reason: str
    exit_code: int | None
    sites: tuple[str, ...]
    """Those that the operator named; empty: all that have approved."""
    done: int
    """Rounds that were aggregated."""
    created_at: float
    changed_at: float
    outcome: Mapping[str, Any]
    """What its process said at its end: rounds, digest of the model, labels, figures that sites released."""
    version: int | None
    """Under which its model was promoted."""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow:
    """One round of a run."""

    number: int
    sites: tuple[str, ...]
    """Whose updates are in; none: the round was lost."""
    dropped: Mapping[str, str]
    seconds: float
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRow:
    """A site's connection, or its last one."""

    party: int
    site: str
    connected: bool
    since: float
    heard: float
    release: str
    device: str
    state: str
    bytes_in: int
    """Of payloads, since it connected."""
    bytes_out: int


class Studies:
    """The tables. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database
        database.declare(SCHEMA)  # What a revoked member has said counts no more.
        database.declare(_SCHEMA)

    # The operator

    def submit(self, study: Study, *, first_model: str | None = None, signature: bytes = b"") -> bool:
        """Propose a study to all sites; False if it was proposed before.

        Its `signature` goes with it, in place of the one before; whom to believe is for the sites to say.

        Raises:
            ConfigError: it cannot be trained by sites that do not know one another's sizes, asks for a
                protection that its smallest cohorts cannot have, is too long for an offer, or was proposed
                with another first model.
        """
        # With numpy, which the server's own process never loads: it is the operator's command that submits.
        from lepton_fl.secure_rounds import check_protectable

        check_deployable(study, f"study {study.study.name}")
        check_protectable(study)
        if len(study.canonical) > MAX_STUDY:
            raise ConfigError(
                f"study {study.study.name}: {len(study.canonical)} bytes, at most {MAX_STUDY} are sent",
                fix="name long vocabularies by their standard",
            )
        with self._db.transaction():
            rows = self._db.rows("SELECT first_model FROM studies WHERE id = ?", (study.id,))
            if rows and rows[0]["first_model"] != first_model:
                raise ConfigError(
                    f"study {study.study.name}: was submitted before, with another first model",
                    fix="give the study another name",
                )
            if not rows:
                self._db.execute(
                    "INSERT INTO studies VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        study.id,
                        study.study.name,
                        study.canonical,
                        study.secure_aggregation.min_sites,
                        study.train.rounds,
                        first_model,
                        time.time(),
                    ),
                )
            if signature:
                self._db.execute("INSERT OR REPLACE INTO signatures VALUES (?, ?)", (study.id, signature))
        return not rows

    def want(
        self,
        study: Submitted,
        *,
        sites: Collection[str] = (),
        ready: Collection[str] | None = None,
        again: bool = False,
    ) -> Run:
        """A new run, which the server begins as soon as enough sites that approve it are connected.

        `sites`: only these may take part. `ready`: those that could begin now, where the operator will not
        wait. `again`: also where a run has finished, which the sites are charged for once more.

        Raises:
            ConfigError: a run of it is under way, or has finished.
            TooFewSites: of `sites` or `ready` are fewer than the study asks.
        """
        runs = self.runs(study.id)
        if found := [run for run in runs if run.active]:
            raise ConfigError(
                f"study {study.name}: run {found[0].id[:8]} is {found[0].state}",
                fix=f"lepton-fl study stop {study.name}",
            )
        if not again and (found := [run for run in runs if run.state == "finished"]):
            raise ConfigError(
                f"study {study.name}: run {found[0].id[:8]} has finished; the sites are charged for another",
                fix=f"lepton-fl study promote {study.name}, or study start --again",
            )
        if sites and len(set(sites)) < study.min_sites:
            raise TooFewSites(
                f"study {study.name}: sites that may take part: {len(set(sites))}, it asks {study.min_sites}",
                fix="name more of them, or none for all that approve",
            )
        if ready is not None and len(ready) < study.min_sites:
            raise TooFewSites(
                f"study {study.name}: sites that approve it and are connected: {len(ready)}, it asks "
                f"{study.min_sites} ({self._missing(study, sites, ready)})",
                fix="study start --wait begins by itself when they are",
            )
        run, now = os.urandom(16).hex(), time.time()
        try:
            self._db.execute(
                "INSERT INTO runs (id, study, state, sites, created_at, changed_at)"
                " VALUES (?, ?, 'wanted', ?, ?, ?)",
                (run, study.id, json.dumps(sorted(sites)), now, now),
            )
        except sqlite3.IntegrityError:
            raise ConfigError(f"study {study.name}: another run has just been started") from None
        return self.run(run)

    def _missing(self, study: Submitted, sites: Collection[str], ready: Collection[str]) -> str:
        said = {answer.site: answer for answer in self.answers(study.id)}
        others = sorted((set(sites) or set(said)) - set(ready))
        return "; ".join(f"{site}: {_why_not(said.get(site))}" for site in others) or "no site has answered"

    def stop(self, study: Submitted) -> Run:
        """Ask the run under way to end after its round.

        Raises:
            ConfigError: there is none.
        """
        with self._db.transaction():
            run = self._last(study)
            if not run.active:
                raise ConfigError(f"study {study.name}: no run is under way, the last one is {run.state}")
            self._move(run.id, "stopping" if run.state in ("running", "stopping") else "stopped")
        return self.run(run.id)

    def resume(self, study: Submitted) -> Run:
        """Go on with the run that was stopped or has failed, at the round after the last that was sent out.

        Raises:
            ConfigError: it is neither.
        """
        with self._db.transaction():
            run = self._last(study)
            if run.state not in ("stopped", "failed"):
                raise ConfigError(
                    f"study {study.name}: run {run.id[:8]} is {run.state}, allowed: stopped or failed"
                )
            self._move(run.id, "wanted")
        return self.run(run.id)

    def promoted(self, run: str, version: int) -> None:
        """The run's model is in use under `version`."""
        self._db.execute("UPDATE runs SET version = ? WHERE id = ?", (version, run))

    # The server

    def recover(self) -> list[Run]:
        """At the server's start, when no run has a process. Returns the runs that are to be gone on with."""
        with self._db.transaction():
            self._db.execute("UPDATE sessions SET connected = 0, state = ''")
            for run in self._runs_in("stopping"):
                self._move(run.id, "stopped")
            for run in self._runs_in("running"):
                self._move(run.id, "interrupted", reason="the server has ended while it ran")
        return self._runs_in("interrupted")

    def wanted(self) -> list[Run]:
        """Runs that are to begin, or to go on, once their sites are there."""
        return self._runs_in("wanted", "interrupted")

    def running(self) -> list[Run]:
        return self._runs_in("running")

    def stopping(self) -> list[Run]:
        return self._runs_in("stopping")

    def begin(self, run: str) -> bool:
        """It has a process now. False: the operator was faster, and wants it no more."""
        with self._db.transaction():
            if self.run(run).state not in ("wanted", "interrupted"):
                return False
            self._move(run, "running")
        return True

    def ended(
        self,
        run: str,
        state: State,
        *,
        reason: str = "",
        exit_code: int | None = None,
        outcome: Mapping[str, Any] | None = None,
    ) -> None:
        """Its process is gone. What the operator has asked to stop is not to go on, whoever ended it."""
        with self._db.transaction():
            if state == "interrupted" and self.run(run).state == "stopping":
                state, reason = "stopped", ""
            self._move(run, state, reason=reason, exit_code=exit_code)
            if outcome:
                self._db.execute(
                    "UPDATE runs SET outcome = ?, done = ? WHERE id = ?",
                    (json.dumps(dict(outcome)), int(outcome.get("done", 0)), run),
                )

    def record(
        self,
        *,
        rounds: Iterable[tuple[str, RoundRow]] = (),
        answers: Iterable[Answered] = (),
        sessions: Iterable[SessionRow] = (),
    ) -> None:
        """What has been heard since the last time, all at once: each commit waits for the disk."""
        with self._db.transaction():
            for run, row in rounds:
                inserted = self._db.execute(
                    "INSERT OR IGNORE INTO rounds VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        run,
                        row.number,
                        json.dumps(row.sites),
                        json.dumps(dict(row.dropped)),
                        row.seconds,
                        row.at,
                    ),
                ).rowcount
                self._db.execute(
                    "UPDATE runs SET done = done + ? WHERE id = ?", (int(inserted and bool(row.sites)), run)
                )
            for answer in answers:
                self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)", astuple(answer))
            for session in sessions:
                self._db.execute(
                    "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    astuple(session),
                )

    # Both

    def studies(self) -> list[Submitted]:
        """All, the latest first."""
        rows = self._db.rows("SELECT * FROM studies ORDER BY submitted_at DESC, id")
        return [Submitted(**dict(row)) for row in rows]

    def study(self, study: str) -> Submitted:
        """The one of that id."""
        (row,) = self._db.rows("SELECT * FROM studies WHERE id = ?", (study,))
        return Submitted(**dict(row))

    def signatures(self) -> dict[str, bytes]:
        """Those that came with studies, by the study's id."""
        return {row["study"]: row["signature"] for row in self._db.rows("SELECT * FROM signatures")}

    def open(self) -> list[Submitted]:
        """Those that are offered to sites: all but those whose last run has finished."""
        last: dict[str, Run] = {}
        for run in reversed(self.runs()):
            last[run.study] = run
        return [s for s in self.studies() if s.id not in last or last[s.id].state != "finished"]

    def find(self, text: str) -> Submitted:
        """The study of that name, id or beginning of an id, or of that run.

        Raises:
            ConfigError: there is none, or more than one.
        """
        known = self.studies()
        of_runs = {run.study for run in self.runs() if len(text) >= 4 and run.id.startswith(text)}
        found = [s for s in known if s.name == text or s.id in of_runs]
        if len(text) >= 4:
            found += [s for s in known if s.id.startswith(text) and s not in found]
        if len(found) == 1:
            return found[0]
        if not found:
            raise ConfigError(f"study {text!r}: none of this name, id or run", fix="lepton-fl study list")
        ids = ", ".join(s.id[:12] for s in found)
        raise ConfigError(f"study {text!r}: could be {ids}", fix="name it by its id")

    def answers(self, study: str) -> list[Answered]:
        """What sites said that are not revoked, by name; of one that has enrolled anew only the last."""
        rows = self._db.rows(
            "SELECT * FROM answers WHERE study = ? AND party NOT IN"
            " (SELECT party FROM members WHERE revoked_at IS NOT NULL) ORDER BY site, party",
            (study,),
        )
        return list({row["site"]: Answered(**dict(row)) for row in rows}.values())

    def runs(self, study: str | None = None) -> list[Run]:
        """All, or those of one study; the latest first, whatever the clock said."""
        rows = self._db.rows(
            "SELECT * FROM runs WHERE ? IS NULL OR study = ? ORDER BY rowid DESC", (study, study)
        )
        return [_run(row) for row in rows]

    def counts(self) -> dict[str, int]:
        """Runs in each state."""
        rows = self._db.rows("SELECT state, COUNT(*) AS n FROM runs GROUP BY state")
        return {row["state"]: row["n"] for row in rows}

    def run(self, run: str) -> Run:
        (row,) = self._db.rows("SELECT * FROM runs WHERE id = ?", (run,))
        return _run(row)

    def rounds(self, run: str, *, last: int = 1_000_000) -> list[RoundRow]:
        """In their order."""
        rows = self._db.rows(
            "SELECT number, sites, dropped, seconds, at FROM rounds WHERE run = ?"
            " ORDER BY number DESC LIMIT ?",
            (run, last),
        )
        return [
            RoundRow(
                number=row["number"],
                sites=tuple(json.loads(row["sites"])),
                dropped=json.loads(row["dropped"]),
                seconds=row["seconds"],
                at=row["at"],
            )
            for row in reversed(rows)
        ]

    def sessions(self) -> list[SessionRow]:
        rows = self._db.rows("SELECT * FROM sessions ORDER BY site, since")
        return [SessionRow(**{**dict(row), "connected": bool(row["connected"])}) for row in rows]

    def _last(self, study: Submitted) -> Run:
        runs = self.runs(study.id)
        if not runs:
            raise ConfigError(
                f"study {study.name}: was never started", fix=f"lepton-fl study start {study.name}"
            )
        return runs[0]

    def _runs_in(self, *states: State) -> list[Run]:
        return [run for run in reversed(self.runs()) if run.state in states]

    def _move(self, run: str, state: State, *, reason: str = "", exit_code: int | None = None) -> None:
        self._db.execute(
            "UPDATE runs SET state = ?, reason = ?, exit_code = ?, changed_at = ? WHERE id = ?",
            (state, reason, exit_code, time.time(), run),
        )


def ready(
    answers: Iterable[Answered], connected: Collection[int], *, sites: Collection[str] = ()
) -> dict[int, str]:
    """Parties that approve and are connected, with their names; of `sites` only, where some are named."""
    return {
        a.party: a.site
        for a in answers
        if a.state == "approved" and a.party in connected and (not sites or a.site in sites)
    }


def _why_not(answer: Answered | None) -> str:
    if answer is None:
        return "has not answered"
    if answer.state == "approved":
        return "has approved, and is not connected"
    if answer.state == "waiting":
        return "waits for a person there to approve"
    return f"refuses: {answer.reason}" if answer.reason else "refuses"


def _run(row: sqlite3.Row) -> Run:
    return Run(
        id=row["id"],
        study=row["study"],
        state=row["state"],
        reason=row["reason"],
        exit_code=row["exit_code"],
        sites=tuple(json.loads(row["sites"])),
        done=row["done"],
        created_at=row["created_at"],
        changed_at=row["changed_at"],
        outcome=json.loads(row["outcome"]),
        version=row["version"],
    )


class Journal:
    """What the server has heard since the last commit: each waits for the disk, and rounds may be quick."""

    def __init__(self, studies: Studies) -> None:
        self._studies = studies
        self._rounds: list[tuple[str, RoundRow]] = []
        self._answers: dict[tuple[str, int], Answered] = {}
        self._sessions: dict[int, SessionRow] = {}

    def round(self, run: str, row: RoundRow) -> None:
        self._rounds.append((run, row))

    def answer(self, answer: Answered) -> None:
        self._answers[answer.study, answer.party] = answer

    def session(self, row: SessionRow) -> None:
        self._sessions[row.party] = row

    def flush(self) -> bool:
        """Commit it; whether there was anything.

        Raises:
            sqlite3.Error: nothing is lost, and may be committed later.
        """
        if not (self._rounds or self._answers or self._sessions):
            return False
        self._studies.record(
            rounds=self._rounds, answers=self._answers.values(), sessions=self._sessions.values()
        )
        self._rounds, self._answers, self._sessions = [], {}, {}
        return True
