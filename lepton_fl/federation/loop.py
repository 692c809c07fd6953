"""The round loop of a run.

Ours and not Flower's `Strategy.start`, which cannot resume, waits without limit for nodes that are gone,
lets one malformed reply end the run, and begins again at round 1 after a crash.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from lepton_fl.errors import PolicyRefused, ProtocolError, TooFewSites
from lepton_fl.federation.checkpoint import Checkpoint
from lepton_fl.federation.grids import CohortGrid, SummingGrid
from lepton_fl.federation.rounds import Round
from lepton_fl.federation.stopping import PublicTable, stopping_of
from lepton_fl.federation.strategy import expect, strategy_of
from lepton_fl.messages import (
    CONFIG,
    EVALUATE,
    JOIN,
    METRICS,
    WEIGHT,
    Assignment,
    assignment_config,
    from_record,
    identify,
    is_site_name,
    refusal_exit_code,
    refusal_reason,
    to_record,
)
from lepton_fl.study import Study
from lepton_fl.tasks.arrays import Arrays, check_like

log = logging.getLogger(__name__)

SERVER_NODE = 1
"""The id under which the server sends; no site has it."""
_POLL = 0.2
PATIENCE = 2
"""Rounds in a row after which a silent site is put out: each was charged to the sites that did answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """What happened in a round that was aggregated, or could not be."""

    number: int
    sites: tuple[str, ...]
    """Sites whose updates are in the new model; empty where there is none."""
    dropped: Mapping[str, str]
    seconds: float


class Observer(Protocol):
    """Is told of each step of a run; display and measurement hang here."""

    def joined(self, cohort: tuple[str, ...], refused: Mapping[str, str]) -> None:
        """The cohort stands."""

    def round_done(self, report: RoundReport, model: Arrays) -> None:
        """A round was aggregated into `model`, or was lost and `model` is the old one."""


@dataclass(kw_only=True)
class Federation:
    """One run of a study at the server: give it to `server_app`, or `run` it over a Grid."""

    study: Study
    model: Arrays
    """Initial parameters; then the latest."""
    sites: Mapping[int, str] | None = None
    """Node ids that may join, with their names. None: as they name themselves."""
    observer: Observer | None = None
    checkpoint: Path | None = None
    """Written before and after each round, where given."""
    run_id: str = field(default_factory=lambda: os.urandom(16).hex())
    started: int = 0
    done: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    """Sites that are not asked (again) in this run, with the reason they or we gave."""
    released: dict[str, dict[str, float]] = field(default_factory=dict)
    """Evaluation figures that sites released, by site."""
    context: str = ""
    """What else must be the same when a run is resumed; the simulator puts its seed here."""
    public: PublicTable | None = None
    """What early stopping on a public signal looks at; no site's records."""
    stopped_early: str = ""
    """Why the run ended before its last round, by the study's own rule; empty where it did not."""
    _strategy_state: Arrays = field(default_factory=dict)
    _stopping_state: Arrays = field(default_factory=dict)
    _missed: Counter[str] = field(default_factory=Counter)

    @classmethod
    def resume(
        cls,
        path: Path,
        *,
        study: Study,
        sites: Mapping[int, str] | None = None,
        observer: Observer | None = None,
        context: str = "",
        public: PublicTable | None = None,
    ) -> Federation:
        """Go on from a checkpoint, with the round after the last one that was sent out.

        Raises:
            ConfigError: the checkpoint is another study's, or was written under another `context`.
        """
        found = Checkpoint.read(path, study_id=study.id, context=context)
        return cls(
            study=study,
            model=found.model,
            sites=sites,
            observer=observer,
            checkpoint=path,
            context=context,
            public=public,
            stopped_early=found.stopped_early,
            run_id=found.run,
            started=found.started,
            done=found.done,
            _strategy_state=found.strategy,
            _stopping_state=found.stopping,
        )

    def run(self, grid: Grid) -> None:
        """All rounds still to do, unless the study's own rule stops it; afterwards `model` is the result.

        Raises:
            ConfigError: a public table is missing for early stopping, or given for nothing.
            PolicyRefused, BudgetExhausted: too few sites may take part, because they refuse.
            TooFewSites: too few sites are there, or stay.
        """
        # Before anybody is asked: what cannot end as agreed must not begin.
        stopping = stopping_of(self.study, self.public)
        if stopping is not None and self._stopping_state:
            stopping.restore(self._stopping_state)
        identify(self.run_id, SERVER_NODE)
        cohort = self._gather(grid)
        if self.observer is not None:
            self.observer.joined(tuple(sorted(cohort.values())), self.refused)
        strategy = strategy_of(self.study)
        if self._strategy_state:
            strategy.restore(self._strategy_state)
        while self.done < self.study.train.rounds and not self.stopped_early:
            self._check_enough(cohort)
            if self.started >= self.study.train.charged_rounds:
                raise TooFewSites(
                    f"all {self.study.train.charged_rounds} rounds that the noise covers are used, "
                    f"{self.done} of {self.study.train.rounds} could be aggregated"
                )
            number, before = self.started + 1, time.monotonic()
            self.started = number
            # Before anything goes out: a number that a site may have charged is never used again.
            self._save()
            expect(strategy, len(cohort))
            quorum = self.study.survivors(len(cohort))
            current = Round(number, cohort, quorum=quorum, template=self.model)
            config = assignment_config(self._assignment(cohort, number))
            messages = strategy.configure_train(
                number, to_record(self.model), config, CohortGrid(grid, sorted(cohort))
            )
            replies = grid.send_and_receive(messages, timeout=self.study.train.deadline)
            for reply in replies:
                current.take(reply, summed=isinstance(grid, SummingGrid))
            try:
                current.close()
            except TooFewSites as error:
                log.warning("%s", error)
                self._report(current, (), before)
                cohort = self._still_in(cohort, current)
                continue
            # The number of the aggregation: a lost round is no step of the server's optimizer.
            aggregate, _ = strategy.aggregate_train(
                self.done + 1, [self._as_weights(reply, delta) for _, reply, delta in current.accepted]
            )
            if aggregate is None:
                raise TooFewSites(f"round {number}: the strategy gave no model")
            self.model = _as_model(from_record(aggregate), self.model, number)
            self.done += 1
            self._strategy_state = strategy.state()
            if stopping is not None and self.done < self.study.train.rounds:
                updates = [delta for _, _, delta in current.accepted]
                self.stopped_early = stopping.look(self.done, updates, self.model)
                self._stopping_state = stopping.state()
            self._save()
            self._report(current, tuple(sorted(current.included)), before)
            cohort = self._still_in(cohort, current)
        self._evaluate(grid, cohort)

    def stop(self) -> None:
        """End after the current round."""

    def _gather(self, grid: Grid) -> dict[int, str]:
        """Ask every node whether it will take part, and wait for the quorum ourselves."""
        least = self.study.secure_aggregation.min_sites
        deadline = time.monotonic() + self.study.train.deadline
        while len(nodes := sorted(grid.get_node_ids())) < least:
            if time.monotonic() > deadline:
                raise TooFewSites(f"{len(nodes)} sites are connected, the study asks {least}")
            time.sleep(_POLL)
        messages = [
            # No cohort yet: a site learns it, and may refuse it, with each message that asks for more.
            Message(
                RecordDict({CONFIG: assignment_config(self._assignment({}, 0))}),
                dst_node_id=node,
                message_type=JOIN,
            )
            for node in nodes
            if self.sites is None or node in self.sites
        ]
        cohort: dict[int, str] = {}
        codes: list[int] = []
        unheard = {m.metadata.dst_node_id for m in messages}
        for reply in grid.send_and_receive(messages, timeout=self.study.train.deadline):
            node = reply.metadata.src_node_id
            if node not in unheard:
                continue
            unheard.remove(node)
            if reply.has_error():
                self.refused[self._name(node)] = refusal_reason(reply)
                codes.append(refusal_exit_code(reply))
                continue
            name = _declared_name(reply)
            if name is None or name in cohort.values() or name != self._name(node, name):
                self.refused[self._name(node)] = "did not give the name it is known by"
            else:
                cohort[node] = name
        for node in unheard:
            self.refused[self._name(node)] = "no answer before the deadline"
        least = self.study.needed(len(cohort))
        if len(cohort) < least:
            said = (
                f"{len(cohort)} of {len(messages)} sites take part, the study asks {least} "
                f"({self._refusals()})"
            )
            # What the sites refused for is what a person must mend, more than the number that is left.
            if PolicyRefused.exit_code in codes:
                raise PolicyRefused(said)
            raise TooFewSites(said)
        return cohort

    def _name(self, node: int, otherwise: str | None = None) -> str:
        """The name a node is known by: given, or else what it says itself, or else its number."""
        if self.sites is not None:
            return self.sites[node]
        return otherwise if otherwise is not None else f"node {node}"

    def _assignment(self, cohort: Mapping[int, str], number: int) -> Assignment:
        return Assignment(
            study=self.study,
            run=self.run_id,
            round=number,
            cohort=tuple(sorted(cohort.values())),
        )

    def _as_weights(self, reply: Message, delta: Arrays) -> Message:
        """Flower's strategies average weights; sites encode deltas. In float64, so nothing is lost."""
        weights = {n: self.model[n].astype(np.float64) + d for n, d in delta.items()}
        content = RecordDict({"arrays": to_record(weights), METRICS: reply.content.metric_records[METRICS]})
        return Message(content, reply_to=reply)

    def _still_in(self, cohort: dict[int, str], current: Round) -> dict[int, str]:
        """The cohort without the sites that left or were put out, named and not asked again."""
        for name in cohort.values():
            self._missed[name] = self._missed[name] + 1 if name in current.dropped else 0
            if self._missed[name] >= PATIENCE:
                current.left.add(name)
        for name in current.left:
            log.warning("round %d: %s is out: %s", current.number, name, current.dropped[name])
            self.refused[name] = current.dropped[name]
        return {node: name for node, name in cohort.items() if name not in current.left}

    def _check_enough(self, cohort: Mapping[int, str]) -> None:
        """Stop before a round that the sites would have to refuse, and would be charged for."""
        least = self.study.needed(len(cohort))
        if len(cohort) < least:
            raise TooFewSites(f"{len(cohort)} sites are left, the study asks {least} ({self._refusals()})")

    def _refusals(self) -> str:
        return "; ".join(f"{name}: {why}" for name, why in sorted(self.refused.items()))

    def _report(self, current: Round, sites: tuple[str, ...], before: float) -> None:
        if self.observer is not None:
            self.observer.round_done(
                RoundReport(
                    number=current.number,
                    sites=sites,
                    dropped=dict(current.dropped),
                    seconds=time.monotonic() - before,
                ),
                self.model,
            )

    def _save(self) -> None:
        if self.checkpoint is not None:
            Checkpoint(
                study_id=self.study.id,
                context=self.context,
                run=self.run_id,
                started=self.started,
                done=self.done,
                model=self.model,
                strategy=self._strategy_state,
                stopping=self._stopping_state,
                stopped_early=self.stopped_early,
            ).write(self.checkpoint)

    def _evaluate(self, grid: Grid, cohort: Mapping[int, str]) -> None:
        """Ask each site to judge the result; what leaves is for its policy to say."""
        config = assignment_config(self._assignment(cohort, 0))
        content = RecordDict({"arrays": to_record(self.model), CONFIG: config})
        messages = [Message(content, dst_node_id=node, message_type=EVALUATE) for node in sorted(cohort)]
        for reply in grid.send_and_receive(messages, timeout=self.study.train.deadline):
            name = cohort.get(reply.metadata.src_node_id)
            if name is None or reply.has_error() or METRICS not in reply.content.metric_records:
                continue
            figures = reply.content.metric_records[METRICS].items()
            found = {k: float(v) for k, v in figures if k != WEIGHT and isinstance(v, float)}
            if found:
                self.released[name] = found


def _as_model(aggregate: Arrays, before: Arrays, number: int) -> Arrays:
    """The aggregate in the model's float32.

    Raises:
        ProtocolError: it is not a finite model there; the one before stays.
    """
    try:
        check_like(aggregate, before)
    except ProtocolError as error:
        raise ProtocolError(
            f"round {number}: the aggregate is no model: {error.message}",
            fix="train diverges: lower train.lr, or train.server_lr where there is one",
        ) from None
    return {name: array.astype(np.float32) for name, array in aggregate.items()}


def _declared_name(reply: Message) -> str | None:
    found = reply.content.config_records.get(CONFIG, ConfigRecord()).get("site")
    return found if isinstance(found, str) and is_site_name(found) else None
