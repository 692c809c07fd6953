"""The hub under any order of events: each exchange ends once at most, with its own site's answer or none."""

import asyncio
import hashlib
import logging
import selectors
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from lepton_fl.errors import ProtocolError
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.payload import Payload
from lepton_fl.fleet.protocol.transfer import Outbox
from lepton_fl.fleet.server.hub import Hub, Reply, Session

GRACE, DEADLINE, LIMIT = 10.0, 25.0, 1000
PARTIES = st.integers(101, 103)
REQUEST = Payload.of(b"what every site is asked")


class Loop(asyncio.SelectorEventLoop):
    """A loop whose clock is the test's."""

    def __init__(self) -> None:
        super().__init__(selectors.SelectSelector())
        self.now = 0.0

    def time(self) -> float:
        return self.now


def reply_of(party: int, exchange: bytes) -> bytes:
    """What this site, and no other, answers to this exchange."""
    return hashlib.sha256(f"{party} {exchange.hex()}".encode()).digest() * 4


class Sessions(RuleBasedStateMachine):
    """Sites come and go, answer, repeat themselves, answer for others and break off; time passes."""

    exchanges = Bundle("exchanges")
    sessions = Bundle("sessions")
    STRANGER = st.one_of(st.none(), st.none(), sessions)
    """Who speaks in place of the site that was asked; mostly nobody does."""

    @initialize()
    def begin(self) -> None:
        logging.disable(logging.CRITICAL)
        self.folder = tempfile.TemporaryDirectory()
        self.spool = Path(self.folder.name)
        self.loop = Loop()
        self.hub = Hub(grace=GRACE, payload_limit=LIMIT)
        self.party: dict[bytes, int] = {}
        self.ended: dict[bytes, Reply] = {}
        self.cancelled: set[bytes] = set()
        self.live: dict[int, Session] = {}
        self.gone: dict[int, float] = {}
        """When a site that is away left."""
        self.opened: dict[bytes, float] = {}

    def do(self, action: Callable[[], None]) -> None:
        """In the loop, as all that the hub does."""

        async def step() -> None:
            action()

        self.loop.run_until_complete(step())

    def say(self, session: Session, action: Callable[[], None]) -> None:
        """A site speaks: it is heard while its stream is there, and closed when it breaks the protocol."""

        def heard() -> None:
            if session.over:
                return  # The service hears nothing more of it.
            try:
                action()
            except ProtocolError:
                session.close(pb.Goodbye.FAULT, "fault")
                self.leave(session)

        self.do(heard)

    def leave(self, session: Session) -> None:
        self.hub.leave(session)
        if self.live.get(session.party) is session:
            del self.live[session.party]
            self.gone[session.party] = self.loop.now

    def arrived(self, answer: Reply) -> None:
        exchange = answer.exchange
        party = self.party[exchange]
        away = party not in self.live and self.loop.now - self.gone.get(party, -GRACE) >= GRACE

        assert exchange not in self.ended, "ended twice"
        assert exchange not in self.cancelled, "ended after it was cancelled"
        assert not answer.lost or away or self.loop.now - self.opened[exchange] >= DEADLINE, "given up early"
        if answer.payload is not None:
            content = bytes(answer.payload.open())

            assert content == reply_of(party, exchange), "another site's answer"
            if answer.payload.path is not None:
                answer.payload.path.unlink()
        self.ended[exchange] = answer

    # A run

    @rule(target=exchanges, party=PARTIES, number=st.integers(0, 2**32))
    def send(self, party: int, number: int) -> bytes:
        exchange = hashlib.sha256(f"{number} {len(self.party)}".encode()).digest()[:16]
        self.party[exchange] = party
        self.opened[exchange] = self.loop.now
        assign = pb.Assign(exchange=exchange, size=REQUEST.size, sha256=REQUEST.sha256, deadline_s=DEADLINE)
        self.do(lambda: self.hub.send(assign, REQUEST, party=party, spool=self.spool, arrived=self.arrived))
        return exchange

    @rule(exchange=exchanges)
    def cancel(self, exchange: bytes) -> None:
        self.do(lambda: self.hub.cancel(exchange))
        if exchange not in self.ended:
            self.cancelled.add(exchange)

    # Sites

    @rule(target=sessions, party=PARTIES, instance=st.sampled_from([b"a" * 16, b"b" * 16]))
    def connect(self, party: int, instance: bytes) -> Session:
        made: list[Session] = []

        def enter() -> None:
            made.append(
                Session(
                    party=party,
                    site=f"site-{party}",
                    instance=instance,
                    release="1",
                    device="cpu",
                    insecure_seed=False,
                    outbox=Outbox(lambda: None),
                )
            )
            self.hub.enter(made[0])

        before = self.live.get(party)
        self.do(enter)
        self.live[party] = made[0]

        assert before is None or before.over, "two sessions of one site are live"
        return made[0]

    @rule(session=consumes(sessions))
    def disconnect(self, session: Session) -> None:
        self.do(lambda: self.leave(session))
        session.over = True

    def speaker(self, exchange: bytes, stranger: Session | None) -> Session | None:
        """Who speaks of an exchange: the site it is with, if it is there, or a stranger."""
        return stranger or self.live.get(self.party[exchange])

    @rule(exchange=exchanges, stranger=STRANGER)
    def answer(self, exchange: bytes, stranger: Session | None) -> None:
        """Each says what it would say itself: also for an exchange of another site, or one that is over."""
        if (session := self.speaker(exchange, stranger)) is None:
            return
        content = reply_of(session.party, exchange)
        said = pb.Result(
            exchange=exchange,
            size=len(content),
            sha256=hashlib.sha256(content).digest(),
            inline=content,
        )
        self.say(session, lambda: self.hub.result(session, said))

    @rule(exchange=exchanges, stranger=STRANGER)
    def refuse(self, exchange: bytes, stranger: Session | None) -> None:
        if (session := self.speaker(exchange, stranger)) is None:
            return
        said = pb.Result(exchange=exchange, error_code=1004, error_reason="no")
        self.say(session, lambda: self.hub.result(session, said))

    @rule(exchange=exchanges, stranger=STRANGER, honest=st.booleans())
    def announce(self, exchange: bytes, stranger: Session | None, honest: bool) -> None:
        """With another digest, where it is not honest."""
        if (session := self.speaker(exchange, stranger)) is None:
            return
        content = reply_of(session.party, exchange)
        digest = hashlib.sha256(content if honest else b"other").digest()
        said = pb.Result(exchange=exchange, size=len(content), sha256=digest)
        self.say(session, lambda: self.hub.result(session, said))

    @rule(
        exchange=exchanges,
        stranger=STRANGER,
        start=st.sampled_from([0, 0, 64, 32]),
        size=st.sampled_from([64, 128, 64, 129]),
    )
    def chunk(self, exchange: bytes, stranger: Session | None, start: int, size: int) -> None:
        """In order or not."""
        if (session := self.speaker(exchange, stranger)) is None:
            return
        content = reply_of(session.party, exchange) + b"x"
        said = pb.Chunk(exchange=exchange, offset=start, data=content[start : start + size])
        self.say(session, lambda: self.hub.chunk(session, said))

    @rule(exchange=exchanges, stranger=STRANGER, offset=st.sampled_from([0, 5, 24, 25, 2**64 - 1]))
    def accept(self, exchange: bytes, stranger: Session | None, offset: int) -> None:
        if (session := self.speaker(exchange, stranger)) is None:
            return
        said = pb.Accept(exchange=exchange, offset=offset)
        self.say(session, lambda: self.hub.accept(session, said))

    @rule(session=sessions)
    def read(self, session: Session) -> None:
        """What it is sent is its own."""
        while (message := session.outbox.next()) is not None:
            if isinstance(message, pb.Chunk):
                assert self.party[message.exchange] == session.party
                assert message.data == REQUEST.inline[message.offset :]
            elif isinstance(message, pb.ToAgent) and message.HasField("assign"):
                assert self.party[message.assign.exchange] == session.party

    @rule(seconds=st.sampled_from([0.5, GRACE + 1, DEADLINE + 1]))
    def wait(self, seconds: float) -> None:
        self.loop.now += seconds
        self.do(lambda: None)
        self.do(lambda: None)

    # What always holds

    @invariant()
    def what_is_open_is_neither_ended_nor_late(self) -> None:
        open_now = [exchange for party in (101, 102, 103) for exchange in self.hub.open_for(party)]

        assert len(open_now) == len(self.hub)
        assert set(open_now) == set(self.party) - set(self.ended) - self.cancelled
        assert all(self.opened[exchange] + DEADLINE > self.loop.now - 1e-9 for exchange in open_now)

    @invariant()
    def the_spool_holds_what_is_arriving(self) -> None:
        names = {path.name.removesuffix(".in") for path in self.spool.iterdir()}

        assert names <= {e.hex() for party in (101, 102, 103) for e in self.hub.open_for(party)}

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        self.wait(DEADLINE + 1)

        assert set(self.ended) | self.cancelled == set(self.party)
        assert len(self.hub) == 0
        assert list(self.spool.iterdir()) == []
        assert not self.hub._of_party
        self.loop.close()
        self.folder.cleanup()
        logging.disable(logging.NOTSET)


Sessions.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_every_exchange_ends_once_with_its_own_answer_or_none = Sessions.TestCase
