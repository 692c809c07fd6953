"""The in-process Grid: Flower's ClientApps called one after another, with nothing between but messages."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from lepton_fl.errors import ConfigError
from lepton_fl.messages import CONFIG, ROUND, TRAIN
from lepton_fl.site import Simulated, SiteApp


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

    @classmethod
    def parse(cls, text: str) -> Drop:
        """`SITE@ROUND`, from that round on, or `SITE@FIRST-LAST`.

        Raises:
            ConfigError: it is neither.
        """
        found = re.fullmatch(r"(?P<site>.+)@(?P<first>[0-9]{1,9})(-(?P<last>[0-9]{1,9}))?", text.strip())
        if found is None or int(found["last"] or found["first"]) < int(found["first"]):
            raise ConfigError.at(
                "command line", "--drop", found=text, allowed="SITE@ROUND, or SITE@FIRST-LAST in this order"
            )
        last = None if found["last"] is None else int(found["last"])
        return cls(site=found["site"], first=int(found["first"]), last=last)

    def __contains__(self, number: int) -> bool:
        """Whether the site is down in this round."""
        return self.first <= number and (self.last is None or number <= self.last)

    def __str__(self) -> str:
        """In words, for the labels of a run."""
        return f"{self.site} from round {self.first}" + ("" if self.last is None else f" to {self.last}")


class InProcessGrid(Grid):
    """One node for each ClientApp, answering in order of node id.

    An app that takes longer than a round's deadline has answered too late: its reply is left out. A node
    that is down is not reached at all, so nothing is charged there. Only messages to train carry a number
    that counts; what comes between, or after the last, belongs to the round before. Only simulated sites:
    between a deployed one and its server there is nothing but a network.
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
        self._drops = {node: tuple(found) for node, found in (drops or {}).items()}
        self._at = at
        self._nodes = {
            node: _Node(
                app,
                Context(run_id=0, node_id=node, node_config={}, state=RecordDict(), run_config={}),
            )
            for node, app in apps.items()
        }
        self._run = Run.create_empty(0)
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)

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

    def _reaches(self, message: Message) -> bool:
        if self._drops and message.metadata.message_type == TRAIN:
            self._at = int(str(message.content.config_records[CONFIG][ROUND]))
        return not any(self._at in drop for drop in self._drops.get(message.metadata.dst_node_id, ()))


def _is_simulated(app: ClientApp) -> bool:
    return not isinstance(app, SiteApp) or isinstance(app.site.surroundings, Simulated)
