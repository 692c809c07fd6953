"""The servicer of the stream, without a network: its context and its callers are played."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.methods import PROTOCOL
from lepton_fl.fleet.server.hub import Hub
from lepton_fl.fleet.server.service import FleetService


class Gate:
    """Lets everybody in: the certificate is the site's number."""

    def admit(self, pem):
        return SimpleNamespace(party=int(pem), site=f"site{int(pem)}")

    def check(self, admission):
        pass


class Listener:
    """Hears nothing."""

    def entered(self, session, hello): ...
    def left(self, session): ...
    def refused(self, reason): ...


class Unasked:
    """In the place of the ledgers, of which nothing is asked here."""

    key = b""

    def take(self, site, statement, request=None):
        pass

    def receipts(self, site):
        return pb.ToAgent(receipts=pb.Receipts())

    def entered(self, session):
        pass


class Caller:
    """One agent's stream. It says hello and no more; `stuck`: it reads its welcome and nothing after."""

    def __init__(self, service, party, *, stuck=False):
        self.said = []
        self.welcomed = asyncio.Event()
        self._party = party
        self._stuck = stuck
        self.task = asyncio.create_task(service.connect(self._words(), self))

    async def _words(self):
        hello = pb.Hello(
            protocol=PROTOCOL, site=f"site{self._party}", instance=self._party.to_bytes(16, "big")
        )
        yield pb.FromAgent(hello=hello)
        await asyncio.Event().wait()

    def auth_context(self):
        return {"x509_pem_cert": [str(self._party).encode()]}

    async def write(self, message):
        if self._stuck and self.welcomed.is_set():
            await asyncio.Event().wait()
        self.said.append(message)
        if message.HasField("welcome"):
            self.welcomed.set()


def test_agents_that_come_back_do_not_keep_a_server_from_leaving():
    """One does not read its farewell, and meanwhile another is here again: it is sent away at the door."""

    async def scenario():
        service = FleetService(
            Hub(grace=1.0, payload_limit=1 << 20), Gate(), Listener(), Unasked(), heartbeat=10.0
        )
        first, stuck = Caller(service, 101), Caller(service, 102, stuck=True)
        await first.welcomed.wait()
        await stuck.welcomed.wait()
        leaving = asyncio.create_task(service.farewell("the server is leaving"))
        await first.task
        again = Caller(service, 101)
        await asyncio.wait_for(leaving, 20)
        await again.task
        await stuck.task
        return first.said, again.said

    first, again = asyncio.run(scenario())

    assert first[-1].goodbye.code == again[-1].goodbye.code == pb.Goodbye.LEAVING
    assert [message.WhichOneof("kind") for message in again] == ["goodbye"]
