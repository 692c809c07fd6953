"""The runs that are wanted, each in a process of its own: begun, stopped, and begun again where one dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from lepton_fl.files import write_atomic
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.server.config import ServerFiles
from lepton_fl.fleet.server.hub import Hub
from lepton_fl.fleet.server.ledgers import EVERY
from lepton_fl.fleet.server.link import DIED, RunnerLink, RunSpec
from lepton_fl.fleet.server.studies import Journal, RoundRow, Run, State, Studies, Submitted, ready
from lepton_fl.fleet.server.telemetry import Telemetry

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Deaths of a run's process in a row, without a round between, after which the run has failed."""
FIRST_WAIT = 1.0
"""Seconds before a run's process is started again; doubled with each death."""
_FIRST_MODEL = "first.safetensors"


class Runs:
    """All runs that have a process."""

    def __init__(
        self,
        hub: Hub,
        files: ServerFiles,
        studies: Studies,
        journal: Journal,
        telemetry: Telemetry,
        members: Callable[[], Mapping[int, str]],
        *,
        relay: Callable[[Collection[int]], None],
        roster_key: bytes,
    ) -> None:
        """`members` are the parties that are enrolled now, with their names.

        `relay` has the ledgers of a run's parties countersigned by one another. `roster_key` verifies the
        rosters in the file of the newest one.
        """
        self._relay = relay
        self._hub = hub
        self._files = files
        self._studies = studies
        self._journal = journal
        self._telemetry = telemetry
        self._members = members
        self._roster_key = roster_key
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._links: dict[str, RunnerLink] = {}
        self._stopping: set[str] = set()
        self._leaving = False

    def look(self) -> None:
        """Begin what is wanted and can be begun; stop what is to stop."""
        if self._leaving:
            return
        for run in self._studies.wanted():
            if run.id not in self._tasks:
                self._begin_if_ready(run)
        for run in self._studies.stopping():
            if run.id in self._tasks:
                self._stop(run.id)
            else:
                self._studies.ended(run.id, "stopped")
        for run in self._studies.running():
            if run.id not in self._tasks:
                self._studies.ended(run.id, "interrupted", reason="its end could not be written down")
        self._telemetry.states(self._studies.counts())

    def _begin_if_ready(self, run: Run) -> None:
        study = self._studies.study(run.study)
        answers = self._studies.answers(study.id)
        if len(ready(answers, self._hub.sessions, sites=run.sites)) < study.min_sites:
            return
        if self._studies.begin(run.id):
            members = self._members()
            sites = ready(answers, members, sites=run.sites)
            self._tasks[run.id] = asyncio.create_task(self._serve(run, study, sites))

    def _stop(self, run: str) -> None:
        if run not in self._stopping:
            self._stopping.add(run)
            log.info("run is asked to stop", extra={"run": run})
            if run in self._links:
                self._links[run].stop()

    async def leave(self, patience: float) -> None:
        """End all of them: after their round, or where that lasts longer than `patience` seconds, at once."""
        self._leaving = True
        tasks = list(self._tasks.values())
        for link in self._links.values():
            link.stop()
        if tasks:
            await asyncio.wait(tasks, timeout=patience)
            for link in self._links.values():
                link.kill()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, run: Run, study: Submitted, sites: dict[int, str]) -> None:
        try:
            await self._process(run, study, sites)
        except sqlite3.Error:
            # `look` finds it again, once the database can be written.
            log.exception("the end of a run could not be written down", extra={"run": run.id})
        except Exception as error:
            # One run's trouble, as a full disk, is not the server's.
            log.exception("run could not be served", extra={"run": run.id})
            with contextlib.suppress(sqlite3.Error):
                self._end(run, "failed", reason=f"the server could not serve it: {error}", exit_code=1)
        finally:
            del self._tasks[run.id]
            self._links.pop(run.id, None)
            self._stopping.discard(run.id)

    async def _process(self, run: Run, study: Submitted, sites: dict[int, str]) -> None:
        self._prepare(run, study, sites)
        finished, deaths = pb.Finished(exit_code=DIED), 0
        while deaths < ATTEMPTS and not self._ending(run.id):
            link = RunnerLink(
                self._hub, self._files.run(run.id), run.id, study.id, set(sites), partial(self._hear, sites)
            )
            self._links[run.id] = link
            log.info("run begins", extra={"run": run.id, "study": study.id, "sites": sorted(sites.values())})
            finished = await link.run()
            self._relay(sites)
            if finished.exit_code != DIED:
                break
            deaths = 1 if link.rounds else deaths + 1
            log.warning("run's process died", extra={"run": run.id, "reason": finished.message})
            if deaths < ATTEMPTS:
                await asyncio.sleep(FIRST_WAIT * 2 ** (deaths - 1))
        outcome: dict[str, Any] = json.loads(finished.json or "{}")
        cut_off = finished.exit_code == DIED and self._ending(run.id)
        if (outcome.get("stopped") or cut_off) and run.id not in self._stopping:
            self._end(run, "interrupted", reason="the server was asked to leave", outcome=outcome)
        elif outcome.get("stopped") or cut_off:
            self._end(run, "stopped", outcome=outcome)
        elif finished.exit_code:
            exit_code = 1 if finished.exit_code == DIED else finished.exit_code
            self._end(run, "failed", reason=finished.message, exit_code=exit_code, outcome=outcome)
        else:
            self._end(run, "finished", exit_code=0, outcome=outcome)

    def _ending(self, run: str) -> bool:
        return self._leaving or run in self._stopping

    def _prepare(self, run: Run, study: Submitted, sites: dict[int, str]) -> None:
        """The run's folder; where it is there, the run is gone on with from its checkpoint."""
        folder, patience = self._files.run(run.id), self._files.config.runs
        (folder / "spool").mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(folder / "study.canonical", study.canonical, mode=0o600)
        if study.first_model is not None:
            shutil.copyfile(self._files.first_model(study.first_model), folder / _FIRST_MODEL)
        RunSpec(
            run=run.id,
            study_id=study.id,
            sites=sites,
            join_deadline=patience.join_deadline_s,
            evaluate_deadline=patience.evaluate_deadline_s,
            settle=patience.settle_s,
            first_model=None if study.first_model is None else _FIRST_MODEL,
            first_model_sha256=study.first_model,
            roster_key=self._roster_key.hex(),
            roster=str(self._files.roster.resolve()),
        ).write(folder / "run.json")

    def _hear(self, sites: Collection[int], run: str, event: dict[str, Any]) -> None:
        """An event of a run's process."""
        if event["event"] == "joined":
            about = {"sites": event["cohort"], "refused": event["refused"], "hiding": event["hiding"]}
            log.info("cohort", extra={"run": run, **about})
            return
        row = RoundRow(
            number=event["round"],
            sites=tuple(event["sites"]),
            dropped=event["dropped"],
            seconds=event["seconds"],
            at=time.time(),
        )
        self._journal.round(run, row)
        if row.number % EVERY == 0:
            self._relay(sites)
        self._telemetry.rounds.labels("aggregated" if row.sites else "lost").inc()
        self._telemetry.round_seconds.observe(row.seconds)
        log.info(
            "round",
            extra={
                "run": run,
                "round": row.number,
                "sites": len(row.sites),
                "dropped": dict(row.dropped),
                "seconds": round(row.seconds, 4),
            },
        )

    def _end(
        self,
        run: Run,
        state: State,
        *,
        reason: str = "",
        exit_code: int | None = None,
        outcome: Mapping[str, Any] | None = None,
    ) -> None:
        self._journal.flush()
        self._studies.ended(run.id, state, reason=reason, exit_code=exit_code, outcome=outcome)
        model = (outcome or {}).get("model", "")
        log.info("run ended", extra={"run": run.id, "state": state, "reason": reason, "model": model})
        self._telemetry.states(self._studies.counts())
        for left in (self._files.run(run.id) / "spool").glob("*"):
            # It has ended, as was written down: what cannot be removed is no reason for another end.
            with contextlib.suppress(OSError):
                left.unlink()
