"""What our grids have in common."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from lepton_fl.messages import is_reply

log = logging.getLogger(__name__)


class OwnGrid(Grid):
    """A grid whose nodes are ours to reach; subclasses say which there are, and how."""

    def __init__(self) -> None:
        self._run = Run.create_empty(0)

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


class WrappingGrid(Grid):
    """A grid that passes everything on to an inner one; subclasses change what they must."""

    def __init__(self, inner: Grid) -> None:
        self.inner = inner

    def set_run(self, run: Run) -> None:
        self.inner.set_run(run)

    @property
    def run(self) -> Run:
        return self.inner.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return self.inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.inner.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.inner.send_and_receive(messages, timeout=timeout)


class CohortGrid(WrappingGrid):
    """Shows a strategy the nodes of one cohort and no others.

    Flower's strategies sample from, and wait without limit for, whatever nodes are connected; under
    secure aggregation the cohort is fixed before the round begins.
    """

    def __init__(self, inner: Grid, nodes: Sequence[int]) -> None:
        super().__init__(inner)
        self._nodes = list(nodes)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)


class SummingGrid(WrappingGrid):
    """A grid whose replies to train messages are sums over sites, and name the sites in them.

    Only from a grid of this type does the round loop believe a reply that claims several members: a
    site's own reply that does is refused.
    """

    @abstractmethod
    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """One reply with the mean of the accepted updates, then the replies that were refused."""


def replies_of(grid: Grid, messages: Sequence[Message], deadline: float | None) -> Iterator[Message]:
    """For each message the first reply to it that `grid` brings, in `deadline` seconds if there is one."""
    waiting = {message.metadata.dst_node_id: message for message in messages}
    for reply in grid.send_and_receive(messages, timeout=deadline):
        node = reply.metadata.src_node_id
        if node in waiting and is_reply(reply, waiting[node]):
            del waiting[node]
            yield reply
        else:
            log.warning("a message from node %d that nobody asked for is left aside", node)
