"""The fleet as Flower's Grid, in the process of one run. The front process does the talking."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from flwr.app import Error, Message, RecordDict

from lepton_fl.errors import ProtocolError
from lepton_fl.federation.grids import OwnGrid
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.frames import Frames
from lepton_fl.fleet.protocol.payload import Payload
from lepton_fl.fleet.protocol.records import REPLY_HEADER, pack, unpack
from lepton_fl.messages import round_of

_FOREVER = 365 * 86_400.0
_SLACK = 5.0
"""Seconds after a deadline in which the front must have said so itself."""


class FleetGrid(OwnGrid):
    """Requests go out once for all sites that are sent the same content; answers come as they arrive.

    Where a site gives no answer (gone, or too late) there is no reply for it, as Flower has it.
    """

    def __init__(
        self,
        frames: Frames[pb.ToRunner],
        spool: Path,
        *,
        stop: Callable[[], None],
        insecure: Callable[[], None],
    ) -> None:
        """`spool` is the run's folder for payloads.

        `stop` is called when the operator ends the run; `insecure` when a site is there whose noise comes
        from a known seed, before anything is asked of it.
        """
        super().__init__()
        self._frames = frames
        self._spool = spool
        self._stop = stop
        self._insecure = insecure
        self._connected: dict[int, str] = {}
        self._open: dict[bytes, Message] = {}
        self._replies: dict[bytes, Message | None] = {}
        self._packed = 0

    def get_node_ids(self) -> Iterable[int]:
        """The sites that are connected now."""
        while self._pump(0.0):
            pass
        return sorted(self._connected)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [exchange.hex() for exchange in self._send(list(messages), _FOREVER)]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        while self._pump(0.0):
            pass
        found = (self._replies.pop(bytes.fromhex(name), None) for name in message_ids)
        return [reply for reply in found if reply is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Replies in the order of their arrival; those that are late are left out."""
        limit = _FOREVER if timeout is None else timeout
        waiting = self._send(list(messages), limit)
        until = time.monotonic() + limit + _SLACK
        try:
            while waiting and (left := until - time.monotonic()) > 0:
                self._pump(left)
                for exchange in [name for name in waiting if name in self._replies]:
                    waiting.remove(exchange)
                    reply = self._replies.pop(exchange)
                    if reply is not None:
                        yield reply
        finally:
            for exchange in waiting:
                self._open.pop(exchange, None)
                self._frames.send(pb.FromRunner(cancel=pb.Cancel(exchange=exchange)))
            for path in self._spool.glob("*.out"):
                path.unlink(missing_ok=True)

    def _send(self, messages: list[Message], limit: float) -> list[bytes]:
        """Open an exchange for each message; same content, one payload."""
        groups: dict[int, list[Message]] = {}
        for message in messages:
            groups.setdefault(id(message.content), []).append(message)
        exchanges = []
        for group in groups.values():
            self._packed += 1
            content = group[0].content
            payload = pack(content, self._spool / f"{self._packed}.out")
            send = pb.Send(
                type=group[0].metadata.message_type,
                round=round_of(group[0]),
                deadline_s=limit,
                sha256=payload.sha256,
                body=payload.body(),
            )
            for message in group:
                exchange = os.urandom(16)
                # Flower gives no other way to name a message; its own grids do the same.
                message.metadata.__dict__["_message_id"] = exchange.hex()
                send.to.add(party=message.metadata.dst_node_id, exchange=exchange)
                self._open[exchange] = message
                exchanges.append(exchange)
            self._frames.send(pb.FromRunner(send=send))
        return exchanges

    def _pump(self, timeout: float) -> bool:
        """Take one message of the front, if one comes within `timeout` seconds."""
        found = self._frames.receive(timeout)
        if found is None:
            return False
        match found.WhichOneof("kind"):
            case "connected":
                self._connected = {m.party: m.site for m in found.connected.members}
                if any(member.insecure_seed for member in found.connected.members):
                    self._insecure()
            case "arrived":
                self._arrived(found.arrived)
            case "stop":
                self._stop()
        return True

    def _arrived(self, arrived: pb.Arrived) -> None:
        message = self._open.pop(arrived.exchange, None)
        payload = None if arrived.lost or arrived.error_code else Payload.at(arrived.body)
        reply = None
        if message is not None and arrived.error_code:
            reply = Message(Error(arrived.error_code, arrived.error_reason), reply_to=message)
        elif message is not None and payload is not None:
            try:
                reply = Message(unpack(payload.open(), max_header=REPLY_HEADER), reply_to=message)
            except ProtocolError:
                # An empty reply is one that the round drops, and it names the sender.
                reply = Message(RecordDict(), reply_to=message)
        if payload is not None and payload.path is not None:
            # What is mapped stays until nobody looks at it.
            payload.path.unlink(missing_ok=True)
        self._replies[arrived.exchange] = reply
