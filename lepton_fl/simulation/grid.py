"""The in-process Grid: Flower's ClientApps called one after another, with nothing between but messages."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from lepton_fl.errors import ConfigError
from lepton_fl.federation.grids import OwnGrid
from lepton_fl.messages import CONFIG, JOIN, PHASES, ROUND, TRAIN
from lepton_fl.secagg.errors import Phase
from lepton_fl.site import Simulated, SiteApp

_PHASE_OF = {kind: phase for phase, kind in PHASES.items()}
_STEP = {phase: step for step, phase in enumerate(Phase)}
_DROP = re.compile(
    r"(?P<site>.+)@(?P<first>[0-9]{1,9})(-(?P<last>[0-9]{1,9}))?(:(?P<phase>share|mask|confirm|unmask))?"
)


@dataclass(frozen=True, slots=True)
class _Node:
    app: ClientApp
    context: Context


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """A site that is sent nothing in these rounds, as if its machine were down. Simulations only."""

    site: str
    first: int
    last: int | None = None
    """Inclusive; None: it never comes back."""
    phase: Phase = Phase.ADVERTISE
    """The exchange of the first round with which it goes down; a round begins with ADVERTISE."""

    @classmethod
    def parse(cls, text: str) -> Drop:
        """`SITE@ROUND`, from that round on, or `SITE@FIRST-LAST`; `:PHASE` is of the first round.

        Raises:
            ConfigError: it is none of them.
        """
        found = _DROP.fullmatch(text.strip())
        if found is None or int(found["last"] or found["first"]) < int(found["first"]):
            raise ConfigError.at(
                "command line",
                "--drop",
                found=text,
                allowed="SITE@ROUND, or SITE@FIRST-LAST in this order; and :share, :mask, :confirm or "
                ":unmask where the site goes down in the middle of a round",
            )
        last = None if found["last"] is None else int(found["last"])
        phase = Phase(found["phase"] or Phase.ADVERTISE)
        return cls(site=found["site"], first=int(found["first"]), last=last, phase=phase)

    def silences(self, number: int, phase: Phase = Phase.ADVERTISE) -> bool:
        """Whether this exchange of round `number` does not reach the site."""
        if number < self.first or (self.last is not None and number > self.last):
            return False
        return number > self.first or _STEP[phase] >= _STEP[self.phase]

    def __str__(self) -> str:
        """In words, for the labels of a run."""
        phase = "" if self.phase is Phase.ADVERTISE else f"{self.phase} of "
        return f"{self.site} from {phase}round {self.first}" + (
            "" if self.last is None else f" to {self.last}"
        )


class InProcessGrid(OwnGrid):
    """One node for each ClientApp, answering in order of node id.

    An app that takes longer than a round's deadline has answered too late: its reply is left out. A node
    that is down is not reached at all, so nothing is charged there. Only messages to train carry a number
    that counts. What comes before the first of them, or after the last, belongs to the round before; in
    between a node is listed, and asked to join again, if it is up in the round to come. Only simulated
    sites: between a deployed one and its server there is nothing but a network.
    """

    def __init__(
        self,
        apps: Mapping[int, SiteApp[Simulated]],
        *,
        drops: Mapping[int, Iterable[Drop]] | None = None,
        at: int = 0,
    ) -> None:
        """`drops` are by node id; `at` is the last round of the part of the run before this one."""
        # For callers that no type checker has read.
        if not all(_is_simulated(app) for app in apps.values()):
            raise TypeError("a site that is not simulated has no place in the in-process grid")
        super().__init__()
        self._drops = {node: tuple(found) for node, found in (drops or {}).items()}
        self._at = at
        self._phase = Phase.ADVERTISE
        """Of round `_at`, the furthest that a message has asked for."""
        self._begun = False
        self._nodes = {
            node: _Node(
                app,
                Context(run_id=0, node_id=node, node_config={}, state=RecordDict(), run_config={}),
            )
            for node, app in apps.items()
        }
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in self._nodes if not self._begun or not self._silent(node, self._at + 1)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in sorted(messages, key=lambda m: m.metadata.dst_node_id):
            # Flower gives no other way to name a message; its own grids do the same.
            message.metadata.__dict__["_message_id"] = name = uuid4().hex
            if self._reaches(message):
                node = self._nodes[message.metadata.dst_node_id]
                self._replies[name] = node.app(message, node.context)
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies: list[Message] = []
        for message in sorted(messages, key=lambda m: m.metadata.dst_node_id):
            before = time.monotonic()
            answers = self.pull_messages(self.push_messages([message]))
            if timeout is None or time.monotonic() - before <= timeout:
                replies += answers
        return replies

    def is_up(self, node: int, phase: Phase) -> bool:
        """Whether this exchange of the round that was begun last would reach the node."""
        return not self._silent(node, self._at, phase)

    def _reaches(self, message: Message) -> bool:
        kind, node = message.metadata.message_type, message.metadata.dst_node_id
        if not self._drops:
            return True
        if kind == TRAIN:
            self._at, self._begun = int(str(message.content.config_records[CONFIG][ROUND])), True
            self._phase = Phase.ADVERTISE
        elif kind == JOIN and self._begun:
            return not self._silent(node, self._at + 1)
        elif kind in _PHASE_OF:
            # Another attempt begins with the first exchange again: who went down in this round stays down.
            self._phase = max(self._phase, _PHASE_OF[kind], key=_STEP.__getitem__)
        return self.is_up(node, self._phase)

    def _silent(self, node: int, number: int, phase: Phase = Phase.ADVERTISE) -> bool:
        return any(drop.silences(number, phase) for drop in self._drops.get(node, ()))


def _is_simulated(app: ClientApp) -> bool:
    return not isinstance(app, SiteApp) or isinstance(app.site.surroundings, Simulated)
