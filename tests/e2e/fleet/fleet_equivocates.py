"""A run's process that sends another model to one site, and hides it from itself: a malicious server's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from flwr.app import Message, RecordDict

from lepton_fl.fleet.server import runner
from lepton_fl.fleet.server.grid import FleetGrid
from lepton_fl.messages import ARRAYS, TRAIN, from_record, to_record
from lepton_fl.secagg.messages import Advert
from lepton_fl.secagg.server import ServerRound

VICTIM = 101


class Equivocating(FleetGrid):
    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        return super().send_and_receive([self._sent(message) for message in messages], timeout=timeout)

    @staticmethod
    def _sent(message: Message) -> Message:
        if message.metadata.message_type != TRAIN or message.metadata.dst_node_id != VICTIM:
            return message
        arrays = from_record(message.content.array_records[ARRAYS])
        other = to_record({name: array + 1 for name, array in arrays.items()})
        content = RecordDict({**message.content, ARRAYS: other})
        return Message(content, VICTIM, TRAIN)


taken = ServerRound.advertised


def advertised(self: ServerRound, party: int, reply: bytes, now: datetime) -> None:
    """Takes an advert of whatever context."""
    memo: dict[str, Any] = self.context.__dict__
    own = self.context.digest
    memo["digest"] = Advert.decode(self.context.suite, reply).context
    try:
        taken(self, party, reply, now)
    finally:
        memo["digest"] = own


if __name__ == "__main__":
    runner.FleetGrid = Equivocating  # type: ignore[misc]
    ServerRound.advertised = advertised  # type: ignore[method-assign]
    runner.main()
