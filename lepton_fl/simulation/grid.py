"""The in-process Grid: Flower's ClientApps called one after another, with nothing between but messages."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run


@dataclass(frozen=True, slots=True)
class _Node:
    app: ClientApp
    context: Context


class InProcessGrid(Grid):
    """One node for each ClientApp, answering in order of node id.

    An app that takes longer than a round's deadline has answered too late: its reply is left out.
    """

    def __init__(self, apps: Mapping[int, ClientApp]) -> None:
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
