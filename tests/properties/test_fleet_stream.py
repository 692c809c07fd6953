"""Whatever one side says: it is obeyed, or refused as a fault of the side that said it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet_harness import PARTY, RUN, client_app, make_site, make_study, request
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lepton_fl import __version__
from lepton_fl.errors import ConnectionFailed, ProtocolError
from lepton_fl.fleet.agent.agent import Agent
from lepton_fl.fleet.agent.exchanges import MAX_OPEN
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.payload import Payload
from lepton_fl.fleet.protocol.records import pack
from lepton_fl.fleet.protocol.transfer import Outbox
from lepton_fl.fleet.server.hub import Hub, Reply, Session
from lepton_fl.fleet.server.ledgers import Ledgers
from lepton_fl.fleet.server.service import FleetService
from lepton_fl.messages import identify
from lepton_fl.privacy.ledger import Witness
from lepton_fl.secagg.identity import IdentityKey
from lepton_fl.site import Simulated, Site

EXCHANGES = [bytes([n]) * 16 for n in range(4)]
IDS = st.one_of(st.sampled_from(EXCHANGES), st.binary(max_size=20))
SMALL = st.one_of(st.integers(0, 40), st.sampled_from([2**31 - 1, 2**31, 2**32 - 1]))
LARGE = st.one_of(SMALL, st.sampled_from([2**63 - 1, 2**64 - 1]))
SIGNED = st.one_of(st.integers(-40, 2000), st.sampled_from([-(2**63), 2**63 - 1]))
STUDY = make_study()
INLINE = pack(request(STUDY, "train", number=1), Path("/nonexistent"))


def _value(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return messages(field.message_type._concrete_class)
    if field.name == "exchange":
        return IDS
    return {
        FieldDescriptor.TYPE_BYTES: st.binary(max_size=40),
        FieldDescriptor.TYPE_STRING: st.one_of(
            st.text(max_size=20), st.sampled_from([RUN, STUDY.id, "train"])
        ),
        FieldDescriptor.TYPE_UINT32: SMALL,
        FieldDescriptor.TYPE_UINT64: LARGE,
        FieldDescriptor.TYPE_INT64: SIGNED,
        FieldDescriptor.TYPE_DOUBLE: st.floats(),
        FieldDescriptor.TYPE_BOOL: st.booleans(),
        FieldDescriptor.TYPE_ENUM: st.integers(0, 5),
    }[field.type]


def messages(kind: type[Message]) -> st.SearchStrategy[Any]:
    """Any message of this kind; of alternatives, one."""

    def build(given: dict[str, Any]) -> Message:
        return kind(**given)

    fields = kind.DESCRIPTOR.fields
    if kind.DESCRIPTOR.oneofs:
        return st.one_of(
            [st.just(kind()), *(_value(f).map(lambda v, f=f: kind(**{f.name: v})) for f in fields)]
        )
    values = {f.name: st.lists(_value(f), max_size=3) if f.is_repeated else _value(f) for f in fields}
    return st.fixed_dictionaries({}, optional=values).map(build)


def altered(whole: pb.Assign) -> st.SearchStrategy[pb.ToAgent]:
    """A sound request, or one that is wrong in one thing."""

    def build(exchange: bytes, change: tuple[str, Any] | None) -> pb.ToAgent:
        made = pb.Assign()
        made.CopyFrom(whole)
        made.exchange = exchange
        if change is not None:
            setattr(made, *change)
        return pb.ToAgent(assign=made)

    changes = [
        _value(field).map(lambda value, field=field: (field.name, value))
        for field in pb.Assign.DESCRIPTOR.fields
    ]
    return st.builds(build, st.sampled_from(EXCHANGES), st.one_of(st.none(), st.none(), *changes))


ASSIGN = pb.Assign(
    run=RUN,
    study_id=STUDY.id,
    round=1,
    type="train",
    size=INLINE.size,
    sha256=INLINE.sha256,
    deadline_s=60.0,
    inline=INLINE.inline,
)
ANNOUNCED = pb.Assign()
ANNOUNCED.CopyFrom(ASSIGN)
ANNOUNCED.ClearField("inline")
CHUNKS = st.builds(
    lambda exchange, start, size: pb.ToAgent(
        chunk=pb.Chunk(exchange=exchange, offset=start, data=INLINE.inline[start : start + size])
    ),
    st.sampled_from(EXCHANGES),
    st.sampled_from([0, 100]),
    st.sampled_from([100, INLINE.size]),
)
TO_AGENT = st.one_of(altered(ASSIGN), altered(ANNOUNCED), CHUNKS, CHUNKS, messages(pb.ToAgent))


class Silent:
    """A listener that does nothing."""

    def entered(self, session: Session, hello: pb.Hello) -> None: ...
    def answered(self, session: Session, answer: pb.Answer) -> None: ...
    def left(self, session: Session) -> None: ...
    def refused(self, reason: str) -> None: ...


def _session(party: int) -> Session:
    return Session(
        party=party,
        site=f"site-{party}",
        instance=bytes(16),
        release="1",
        device="cpu",
        insecure_seed=False,
        outbox=Outbox(lambda: None),
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site[Simulated]]:
    identify(RUN, 1)
    logging.disable(logging.CRITICAL)
    made = make_site("bank", tmp_path_factory.mktemp("bank"))
    yield made
    made.ledger.close()
    logging.disable(logging.NOTSET)


@given(st.lists(messages(pb.FromAgent), max_size=12))
def test_the_server_obeys_a_site_or_says_that_it_is_at_fault(said: list[pb.FromAgent]) -> None:
    """No other exception, no exchange of another site touched, and one answer at most."""
    request = Payload.of(b"request")
    party = dict(zip(EXCHANGES, (101, 101, 102, 102), strict=True))
    ended: list[Reply] = []

    async def main(folder: str) -> None:
        hub = Hub(grace=60.0, payload_limit=1000)
        witness = Witness(Path(folder) / "witness.db", name="the server", key=IdentityKey.generate())
        ledgers = Ledgers(hub, witness, lambda _: None)
        service: FleetService[Any] = FleetService(hub, None, Silent(), ledgers, heartbeat=5.0)  # type: ignore[arg-type]
        session, other = _session(101), _session(102)
        hub.enter(session)
        hub.enter(other)
        with tempfile.TemporaryDirectory() as spool:
            for exchange, whose in party.items():
                assign = pb.Assign(exchange=exchange, deadline_s=60.0)
                hub.send(assign, request, party=whose, spool=Path(spool), arrived=ended.append)
            with contextlib.suppress(ProtocolError):
                for message in said:
                    service._take(session, message)
            for exchange in party:
                hub.cancel(exchange)
        ledgers.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(folder))

    answered = [answer.exchange for answer in ended]

    assert len(answered) == len(set(answered))
    assert set(answered) <= {exchange for exchange, whose in party.items() if whose == 101}
    assert all(0 <= answer.error_code < 2**31 and len(answer.error_reason) <= 200 for answer in ended)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(said=st.lists(TO_AGENT, max_size=12))
def test_an_agent_obeys_its_server_or_ends_the_connection(
    site: Site[Simulated], said: list[pb.ToAgent]
) -> None:
    """No other exception reaches the loop; what is asked is bounded, and nothing stays in the spool."""

    async def main(state: Path) -> None:
        outbox, failures = Outbox(lambda: None), []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        agent = Agent(client_app(site), lambda: None, state)  # type: ignore[arg-type, return-value]
        welcome = pb.Welcome(protocol=1, release=__version__, heartbeat_s=5.0, party=PARTY["bank"])
        agent._take(pb.ToAgent(welcome=welcome), outbox)
        try:
            for message in said:
                agent._take(message, outbox)
        except (ConnectionFailed, ProtocolError):
            pass
        finally:
            waiting = len(agent._exchanges)
            agent._exchanges.disconnected()
            await asyncio.to_thread(agent._exchanges.close)
            # The worker's last words are on their way to the loop.
            await asyncio.sleep(0)

        assert failures == []
        assert waiting <= MAX_OPEN
        assert list((state / "spool").iterdir()) == []

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder)))
