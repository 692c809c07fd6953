"""The round loop of a run.

Ours and not Flower's `Strategy.start`, which cannot resume, waits without limit for nodes that are gone,
lets one malformed reply end the run, and begins again at round 1 after a crash.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from lepton_fl.errors import LeptonError, PolicyRefused, ProtocolError, TooFewSites
from lepton_fl.federation.checkpoint import Checkpoint
from lepton_fl.federation.combine import combine
from lepton_fl.federation.grids import CohortGrid, SummingGrid, replies_of
from lepton_fl.federation.rounds import NO_ANSWER, Round, is_passing, members_of
from lepton_fl.federation.stopping import PublicTable, Stopping, stopping_of
from lepton_fl.federation.strategy import Strategy, expect, strategy_of
from lepton_fl.messages import (
    ARRAYS,
    CONFIG,
    COUNTS,
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
from lepton_fl.results import Pooled
from lepton_fl.secure_rounds import group_sizes, noise_on_counts, quorum_of
from lepton_fl.study import Study
from lepton_fl.tasks.arrays import MAX_MAGNITUDE, Arrays, check_like
from lepton_fl.tasks.histogram import pooled

log = logging.getLogger(__name__)

SERVER_NODE = 1
"""The id under which the server sends; no site has it."""
_POLL = 0.2
PATIENCE = 2
"""Rounds in a row after which a silent site is put out: each was charged to the sites that did answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Seconds that sites have for an answer; who has not answered by then is left out of that step."""

    join: float
    """To be connected in sufficient number; and then to say whether they take part."""
    train: float
    evaluate: float

    @classmethod
    def of(cls, study: Study) -> Deadlines:
        """The study's deadline of a round, for every phase."""
        return cls(join=study.train.deadline, train=study.train.deadline, evaluate=study.train.deadline)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """What happened in a round that was aggregated, or could not be."""

    number: int
    sites: tuple[str, ...]
    """Sites whose updates are in the new model; empty where there is none."""
    dropped: Mapping[str, str]
    seconds: float
    returned: tuple[str, ...] = ()
    """Sites that were not in the round before, and were asked in this one: late comers, or silent before."""


class Observer(Protocol):
    """Is told of each step of a run; display and measurement hang here."""

    def joined(self, cohort: tuple[str, ...], refused: Mapping[str, str]) -> None:
        """The first cohort stands; who joins it later is in that round's report."""

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
    """Sites that are out, with the reason they or we gave. One that was silent may come back."""
    released: dict[str, dict[str, float]] = field(default_factory=dict)
    """Evaluation figures that sites released, by site: only without secure aggregation."""
    pooled: Pooled | None = None
    """What the sum of the sites' histograms told, where the study releases one and it came about."""
    context: str = ""
    """What else must be the same when a run is resumed; the simulator puts its seed here."""
    public: PublicTable | None = None
    """What early stopping on a public signal looks at; no site's records."""
    stopped_early: str = ""
    """Why the run ended before its last round, by the study's own rule; empty where it did not."""
    deadlines: Deadlines | None = None
    """None: the study's, for every phase."""
    settle: float = 0.0
    """Seconds that sites have to connect once the quorum is there, where not all of `sites` are."""
    reconnect: float = 0.0
    """Seconds that a round waits, before it takes its number, until enough sites are connected again."""
    stopped: bool = False
    """The run was told to stop, and has rounds left."""
    _strategy_state: Arrays = field(default_factory=dict)
    _stopping_state: Arrays = field(default_factory=dict)
    _missed: Counter[str] = field(default_factory=Counter)
    """Rounds, and invitations, in a row without an answer; an answer to one in mid-run ends no row."""
    _names: dict[int, str] = field(default_factory=dict)
    """Names by which nodes are known: given, or as they joined."""
    _ask_again: dict[str, int] = field(default_factory=dict)
    """Those of `refused` who may come back, and from which round on they are asked."""
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._names.update(self.sites or {})

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
        deadlines: Deadlines | None = None,
        settle: float = 0.0,
        reconnect: float = 0.0,
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
            deadlines=deadlines,
            settle=settle,
            reconnect=reconnect,
            stopped_early=found.stopped_early,
            run_id=found.run,
            started=found.started,
            done=found.done,
            _strategy_state=found.strategy,
            _stopping_state=found.stopping,
        )

    def stop(self) -> None:
        """End the run after its current round; from any thread, and for good. `stopped` says that it has."""
        self._stop.set()

    def run(self, grid: Grid) -> None:
        """All rounds still to do, unless the study's own rule or `stop` ends it; then `model` is the result.

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
        if self.observer is not None and not self._stop.is_set():
            self.observer.joined(tuple(sorted(cohort.values())), self.refused)
        strategy = strategy_of(self.study)
        if self._strategy_state:
            strategy.restore(self._strategy_state)
        while not self._finished and not self._stop.is_set():
            cohort = self._round(grid, cohort, strategy, stopping)
        self.stopped = not self._finished
        # Of a model that is half done the sites are asked no figure: each releases it once in a run.
        if not self.stopped:
            self._evaluate(grid, cohort)

    @property
    def _finished(self) -> bool:
        return self.done >= self.study.train.rounds or bool(self.stopped_early)

    @property
    def _deadlines(self) -> Deadlines:
        return self.deadlines or Deadlines.of(self.study)

    def _round(
        self, grid: Grid, cohort: dict[int, str], strategy: Strategy, stopping: Stopping | None
    ) -> dict[int, str]:
        """One round, lost or aggregated; returns the cohort that is left of it."""
        if self.started >= self.study.train.charged_rounds:
            raise TooFewSites(
                f"all {self.study.train.charged_rounds} rounds that the noise covers are used, "
                f"{self.done} of {self.study.train.rounds} could be aggregated"
            )
        if self.reconnect and not self._reunited(grid, cohort):
            return cohort
        number, before = self.started + 1, time.monotonic()
        returned = self._returned(grid, cohort, number)
        cohort = {**cohort, **returned}
        self._check_enough(cohort)
        self.started = number
        # Before anything goes out: a number that a site may have charged is never used again.
        self._save()
        expect(strategy, len(cohort))
        config = assignment_config(self._assignment(cohort, number))
        messages = list(
            strategy.configure_train(number, to_record(self.model), config, CohortGrid(grid, sorted(cohort)))
        )
        current = Round(
            number,
            cohort,
            quorum=self.study.quorum(len(cohort)),
            sums=self.study.least_sums(len(cohort)),
            template=self.model,
        )
        for reply in replies_of(grid, messages, self._deadlines.train):
            current.take(reply, summed=isinstance(grid, SummingGrid))
        sites: tuple[str, ...] = ()
        try:
            current.close()
        except TooFewSites as error:
            log.warning("%s", error)
        else:
            self._aggregate(current, strategy, stopping, messages[0])
            self._save()
            sites = tuple(sorted(current.included))
        if self.observer is not None:
            report = RoundReport(
                number=number,
                sites=sites,
                dropped=dict(current.dropped),
                seconds=time.monotonic() - before,
                returned=tuple(sorted(returned.values())),
            )
            self.observer.round_done(report, self.model)
        return self._still_in(cohort, current)

    def _aggregate(
        self, current: Round, strategy: Strategy, stopping: Stopping | None, request: Message
    ) -> None:
        """Make the next model of a round's accepted updates."""
        update = combine(current.accepted, current.members, self.study.secure_aggregation)
        # Views of the replies, which can be let go.
        current.accepted.clear()
        # Flower's strategies average weights, and sites encode deltas. In float64, so nothing is lost.
        weights = ArrayRecord()
        for name, array in update.items():
            weights[name] = Array(np.asarray(array + self.model[name]))
        content = RecordDict({ARRAYS: weights, METRICS: MetricRecord({WEIGHT: 1.0})})
        # The number of the aggregation: a lost round is no step of the server's optimizer.
        aggregate, _ = strategy.aggregate_train(self.done + 1, [Message(content, reply_to=request)])
        if aggregate is None:
            raise TooFewSites(f"round {current.number}: the strategy gave no model")
        self.model = _as_model(from_record(aggregate, copy=False), self.model, current.number)
        self.done += 1
        self._strategy_state = strategy.state()
        if stopping is not None and self.done < self.study.train.rounds:
            self.stopped_early = stopping.look(self.done, update, self.model)
            self._stopping_state = stopping.state()

    def _gather(self, grid: Grid) -> dict[int, str]:
        """Ask every node whether it will take part, once enough are connected; empty if told to stop."""
        nodes = self._wait_for_quorum(grid)
        if self._stop.is_set():
            return {}
        cohort: dict[int, str] = {}
        codes: list[int] = []
        unheard = set(nodes)
        for reply in replies_of(grid, [self._invitation(node) for node in nodes], self._deadlines.join):
            node = reply.metadata.src_node_id
            unheard.remove(node)
            if reply.has_error() and not is_passing(reply):
                codes.append(refusal_exit_code(reply))
            if (name := self._joining(reply, cohort, self.started)) is not None:
                cohort[node] = name
        for node in unheard:
            self._put_off(self._listed(node), NO_ANSWER, self.started)
        least = self.study.needed(len(cohort))
        if len(cohort) < least and not self._stop.is_set():
            said = (
                f"{len(cohort)} of {len(nodes)} sites take part, the study asks {least} ({self._refusals()})"
            )
            # What the sites refused for is what a person must mend, more than the number that is left.
            if PolicyRefused.exit_code in codes:
                raise PolicyRefused(said)
            raise TooFewSites(said)
        return cohort

    def _wait_for_quorum(self, grid: Grid) -> list[int]:
        """The connected nodes that may join: all that are known of, or what there is after `settle`."""
        least = self.study.secure_aggregation.min_sites
        now = time.monotonic()
        until, enough_at = now + self._deadlines.join, math.inf
        while True:
            nodes = self._connected(grid)
            now = time.monotonic()
            enough_at = min(enough_at, now) if len(nodes) >= least else math.inf
            complete = self.sites is not None and len(nodes) == len(self.sites)
            if len(nodes) >= least and (complete or now >= min(enough_at + self.settle, until)):
                return nodes
            if now > until:
                raise TooFewSites(f"{len(nodes)} sites are connected, the study asks {least}")
            if self._stop.wait(_POLL):
                return nodes

    def _reunited(self, grid: Grid, cohort: Mapping[int, str]) -> bool:
        """Wait until enough sites for a round are connected; False if told to stop.

        Where a network is down, round after round would be lost at once, and the run with them.

        Raises:
            TooFewSites: they do not come back.
        """
        least, until = self.study.needed(len(cohort)), time.monotonic() + self.reconnect
        while not self._stop.is_set():
            nodes = self._connected(grid)
            here = [n for n in nodes if n in cohort or self._may_return(n, self.started + 1)]
            if len(here) >= least:
                return True
            out = self.refused.keys() - self._ask_again.keys()
            if len(set(self._names.values()) - out) < least:
                # Nobody is left to wait for.
                self._check_enough(cohort)
            if time.monotonic() >= until:
                raise TooFewSites(
                    f"{len(here)} sites are connected before round {self.started + 1}, the study asks {least}"
                )
            self._stop.wait(_POLL)
        return False

    def _connected(self, grid: Grid) -> list[int]:
        return [node for node in sorted(grid.get_node_ids()) if self.sites is None or node in self.sites]

    def _invitation(self, node: int) -> Message:
        # No cohort yet: a site learns it, and may refuse it, with each message that asks for more.
        content = RecordDict({CONFIG: assignment_config(self._assignment({}, 0))})
        return Message(content, dst_node_id=node, message_type=JOIN)

    def _joining(self, reply: Message, cohort: Mapping[int, str], number: int) -> str | None:
        """The name under which the sender of a reply to a `JOIN` takes part; None, with its reason kept."""
        node = reply.metadata.src_node_id
        listed = self._listed(node)
        if reply.has_error():
            # A fault may pass, and so may what a site sits out for; a refusal would only be repeated.
            if is_passing(reply):
                self._put_off(listed, refusal_reason(reply), number)
            else:
                self._put_out(listed, refusal_reason(reply))
            return None
        name = _declared_name(reply)
        taken = name in cohort.values() or (name in self.refused and name not in self._ask_again)
        if name is None or taken or name != self._names.get(node, name):
            self._put_out(listed, "did not give the name it is known by")
            return None
        self._names[node] = name
        for known_as in (listed, name):
            self.refused.pop(known_as, None)
            self._ask_again.pop(known_as, None)
        return name

    def _returned(self, grid: Grid, cohort: Mapping[int, str], number: int) -> dict[int, str]:
        """Sites that take part from round `number` on: those that came late, or were silent and are back.

        One that refused, or sent what was malformed, is not asked.

        Under secure aggregation a cohort grows only where the round could lose a site again: else one that
        comes back, and is gone once more, would cost all the others a charged round.
        """
        if self.study.secure_aggregation.enabled:
            # Of fewer there would be no round, which is for `_check_enough` to say.
            least = self.study.needed(self.study.secure_aggregation.min_sites)
            sites = min(group_sizes(self.study, max(len(cohort) + 1, least)))
            if quorum_of(self.study, sites) == sites:
                return {}
        nodes = [n for n in self._connected(grid) if n not in cohort and self._may_return(n, number)]
        if not nodes:
            return {}
        returned: dict[int, str] = {}
        unheard = set(nodes)
        for reply in replies_of(grid, [self._invitation(node) for node in nodes], self._deadlines.join):
            node = reply.metadata.src_node_id
            unheard.remove(node)
            if (name := self._joining(reply, {**cohort, **returned}, number)) is not None:
                log.info("round %d: %s takes part from now on", number, name)
                returned[node] = name
        for node in unheard:
            self._put_off(self._listed(node), NO_ANSWER, number)
        return returned

    def _may_return(self, node: int, number: int) -> bool:
        listed = self._listed(node)
        return listed not in self.refused or number >= self._ask_again.get(listed, math.inf)

    def _listed(self, node: int) -> str:
        """The name a node is known by: given, or else what it has said itself, or else its number."""
        return self._names.get(node, f"node {node}")

    def _put_out(self, name: str, reason: str) -> None:
        """Leave a site out for good."""
        self.refused[name] = reason
        self._ask_again.pop(name, None)

    def _put_off(self, name: str, reason: str, number: int) -> None:
        """Leave a site out that missed round `number`, or a `JOIN` before it, until it is asked again.

        That is in the next round, and then after 2, 4, ... of them: a site that is connected and never
        answers in time must not hold up every round.
        """
        self._missed[name] += 1
        self.refused[name] = reason
        self._ask_again[name] = number + 2 ** max(0, self._missed[name] - PATIENCE)

    def _assignment(self, cohort: Mapping[int, str], number: int) -> Assignment:
        return Assignment(
            study=self.study,
            run=self.run_id,
            round=number,
            cohort=tuple(sorted(cohort.values())),
        )

    def _still_in(self, cohort: dict[int, str], current: Round) -> dict[int, str]:
        """The cohort without the sites that left, or have tried the server's patience."""
        for name in cohort.values():
            if name in current.left:
                self._put_out(name, current.dropped[name])
            elif name not in current.missed:
                self._missed[name] = 0
            elif self._missed[name] + 1 < PATIENCE:
                self._missed[name] += 1
            else:
                self._put_off(name, current.dropped[name], current.number)
            if name in self.refused:
                log.warning("round %d: %s is out: %s", current.number, name, self.refused[name])
        return {node: name for node, name in cohort.items() if name not in self.refused}

    def _check_enough(self, cohort: Mapping[int, str]) -> None:
        """Stop before a round that the sites would have to refuse, and would be charged for."""
        least = self.study.needed(len(cohort))
        if len(cohort) < least:
            raise TooFewSites(f"{len(cohort)} sites are left, the study asks {least} ({self._refusals()})")

    def _refusals(self) -> str:
        return "; ".join(f"{name}: {why}" for name, why in sorted(self.refused.items()))

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
        secure = self.study.secure_aggregation.enabled
        if secure and self.study.evaluation.release == "none":
            return
        number = self.study.evaluation_round if secure else 0
        config = assignment_config(self._assignment(cohort, number))
        content = RecordDict({ARRAYS: to_record(self.model), CONFIG: config})
        messages = [Message(content, dst_node_id=node, message_type=EVALUATE) for node in sorted(cohort)]
        if secure:
            self._pool(grid, messages)
            return
        for reply in replies_of(grid, messages, self._deadlines.evaluate):
            if reply.has_error() or METRICS not in reply.content.metric_records:
                continue
            # The study's metric and nothing else: what a site says here is kept with the run, for good.
            metric = self.study.task.metric
            value = reply.content.metric_records[METRICS].get(metric)
            if isinstance(value, float) and 0.0 <= value <= 1.0:
                self.released[cohort[reply.metadata.src_node_id]] = {metric: value}

    def _pool(self, grid: Grid, messages: list[Message]) -> None:
        """Figures from the sum of the sites' histograms. The model stands without them: nothing is raised."""
        try:
            for reply in replies_of(grid, messages, self._deadlines.evaluate):
                if reply.has_error():
                    log.warning(
                        "no histogram of node %d: %s", reply.metadata.src_node_id, refusal_reason(reply)
                    )
                elif isinstance(grid, SummingGrid):
                    sites = len(members_of(reply))
                    counts_2B = from_record(reply.content.array_records[ARRAYS])[COUNTS]
                    noise = noise_on_counts(self.study, cohort=len(messages), sites=sites)
                    self.pooled = pooled(counts_2B, self.study, sites=sites, noise=noise)
        except LeptonError as error:
            log.warning("no sum of histograms: %s", error)


def _as_model(aggregate: Arrays, before: Arrays, number: int) -> Arrays:
    """The aggregate in the model's float32.

    Raises:
        ProtocolError: it is not a finite model there, or one that no site would accept; the one before stays.
    """
    try:
        check_like(aggregate, before, limit=MAX_MAGNITUDE)
    except ProtocolError as error:
        raise ProtocolError(
            f"round {number}: the aggregate is no model: {error.message}",
            fix="train diverges: lower train.lr, or train.server_lr where there is one",
        ) from None
    return {name: array.astype(np.float32) for name, array in aggregate.items()}


def _declared_name(reply: Message) -> str | None:
    found = reply.content.config_records.get(CONFIG, ConfigRecord()).get("site")
    return found if isinstance(found, str) and is_site_name(found) else None
