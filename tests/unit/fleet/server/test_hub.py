"""Exchanges that outlive connections. Sessions are their outboxes: what would be sent is looked at there."""

import asyncio
import hashlib
import os

import pytest

from lepton_fl.errors import ProtocolError
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.limits import MAX_REASON, TRANSFERS
from lepton_fl.fleet.protocol.payload import SMALL, Payload
from lepton_fl.fleet.protocol.transfer import Outbox
from lepton_fl.fleet.server.hub import Hub, Session

EXCHANGE = bytes(range(16))
ANSWER = b"an answer"
LONG = os.urandom(SMALL + 10)


def run(tmp_path, scenario):
    """Run `scenario` with a bench, and close what it leaves open."""

    async def whole():
        bench = Bench(tmp_path)
        try:
            await scenario(bench)
        finally:
            bench.hub.cancel(EXCHANGE)

    asyncio.run(whole())


def in_loop(scenario):
    """A test whose body runs in an event loop."""

    def test(tmp_path):
        run(tmp_path, scenario)

    test.__name__, test.__doc__ = scenario.__name__, scenario.__doc__
    return test


class Bench:
    """A hub, one exchange with party 101, and how it ended."""

    def __init__(self, spool, *, grace=3600.0):
        self.hub = Hub(grace=grace, payload_limit=1 << 20)
        self.spool = spool
        self.answers = []

    def session(self, party=101, instance=b"i" * 16):
        return Session(
            party=party,
            site=f"site-{party}",
            instance=instance,
            release="",
            device="",
            insecure_seed=False,
            outbox=Outbox(lambda: None),
        )

    def enter(self, party=101, instance=b"i" * 16):
        session = self.session(party, instance)
        self.hub.enter(session)
        return session

    def ask(self, deadline=3600.0, request=b"request", kind="train"):
        payload = Payload.of(request)
        assign = pb.Assign(
            exchange=EXCHANGE, type=kind, deadline_s=deadline, inline=request, size=payload.size
        )
        self.hub.send(assign, payload, party=101, spool=self.spool, arrived=self.answers.append)

    def announce(self, session, data, sha256=None, size=None):
        sha256 = hashlib.sha256(data).digest() if sha256 is None else sha256
        self.hub.result(
            session,
            pb.Result(exchange=EXCHANGE, size=len(data) if size is None else size, sha256=sha256),
        )

    def answer(self, session, data=ANSWER, exchange=EXCHANGE):
        payload = Payload.of(data)
        self.hub.result(
            session, pb.Result(exchange=exchange, size=payload.size, sha256=payload.sha256, inline=data)
        )


def sent(session):
    """Kinds of what was to be sent to a session since the last look."""
    found = []
    while (message := session.outbox.next()) is not None:
        found.append("chunk" if isinstance(message, pb.Chunk) else message.WhichOneof("kind"))
    return found


@in_loop
async def test_an_answer_arrives_once(bench):
    """A second one is acknowledged, so that the agent forgets it, and does not count."""
    session = bench.enter()
    bench.ask()
    bench.answer(session)
    bench.answer(session, b"another")

    assert [a.payload.inline for a in bench.answers] == [ANSWER]
    assert sent(session) == ["assign", "ack", "ack"]
    assert len(bench.hub) == 0


@in_loop
async def test_a_site_cannot_answer_for_another(bench):
    bench.enter()
    other = bench.enter(party=102)
    bench.ask()
    bench.answer(other)

    assert bench.answers == []
    assert len(bench.hub) == 1


@in_loop
async def test_a_request_is_sent_again_to_a_site_that_comes_back(bench):
    """With the same id: what it has worked on is not lost."""
    first = bench.enter()
    bench.ask()
    bench.hub.leave(first)
    second = bench.enter()
    bench.answer(second)

    assert bench.hub.open_for(101) == []
    assert sent(second) == ["assign", "ack"]
    assert bench.answers[0].payload.inline == ANSWER


@in_loop
async def test_a_site_that_stays_away_is_lost_after_the_grace(bench):
    bench.hub = Hub(grace=0.05, payload_limit=1 << 20)
    session = bench.enter()
    bench.ask()
    bench.hub.leave(session)
    await asyncio.sleep(0.2)

    assert [a.lost for a in bench.answers] == [True]
    assert len(bench.hub) == 0


@pytest.mark.parametrize(
    ("kind", "over"), [("train", False), ("query.secagg_mask", True), ("query.secagg_unmask", True)]
)
def test_an_agent_that_has_said_goodbye_ends_no_secure_round_later(tmp_path, kind, over):
    """Its process had the keys. What another one can answer waits for it."""

    async def scenario(bench):
        session = bench.enter()
        bench.ask(kind=kind)
        session.parted = True
        bench.hub.leave(session)

        assert [a.lost for a in bench.answers] == [True] * over
        assert len(bench.hub) == (not over)

    run(tmp_path, scenario)


@in_loop
async def test_an_agent_that_was_cut_off_is_waited_for_in_a_secure_round(bench):
    """It may be the same one that comes back, with the keys."""
    session = bench.enter()
    bench.ask(kind="query.secagg_mask")
    bench.hub.leave(session)
    await asyncio.sleep(0.01)

    assert bench.answers == []


@in_loop
async def test_a_site_that_is_refused_is_lost_at_once(bench):
    """Now, and whatever is asked of it later."""
    session = bench.enter()
    bench.ask()
    session.refused = True
    bench.hub.leave(session)
    await asyncio.sleep(0.01)
    bench.ask()
    await asyncio.sleep(0.01)

    assert [a.lost for a in bench.answers] == [True, True]


@in_loop
async def test_a_site_that_was_never_here_is_lost_at_once(bench):
    bench.ask()
    await asyncio.sleep(0.01)

    assert [a.lost for a in bench.answers] == [True]


@in_loop
async def test_the_deadline_ends_an_exchange_and_tells_the_site(bench):
    session = bench.enter()
    bench.ask(deadline=0.05)
    await asyncio.sleep(0.2)

    assert [a.lost for a in bench.answers] == [True]
    assert sent(session) == ["assign", "cancel"]


@in_loop
async def test_a_cancelled_exchange_has_no_answer(bench):
    session = bench.enter()
    bench.ask()
    bench.hub.cancel(EXCHANGE)
    bench.answer(session)

    assert bench.answers == []
    assert sent(session) == ["assign", "cancel", "ack"]


@in_loop
async def test_a_long_result_goes_to_a_file_and_goes_on_after_a_reconnection(bench):
    """The server names the offset that it has, and the file is the run's alone."""
    first = bench.enter()
    bench.ask()
    bench.announce(first, LONG)
    bench.hub.chunk(first, pb.Chunk(exchange=EXCHANGE, offset=0, data=LONG[:1000]))
    bench.hub.leave(first)
    second = bench.enter()
    bench.announce(second, LONG)
    offsets = []
    while (message := second.outbox.next()) is not None:
        offsets += [message.proceed.offset] if message.HasField("proceed") else []
    bench.hub.chunk(second, pb.Chunk(exchange=EXCHANGE, offset=1000, data=LONG[1000:]))

    (answer,) = bench.answers
    assert offsets == [1000]
    assert answer.payload.inline == b""
    assert answer.payload.path.read_bytes() == LONG
    assert answer.payload.path.stat().st_mode & 0o777 == 0o600


@in_loop
async def test_a_result_that_is_never_what_it_announces_is_given_up(bench):
    session = bench.enter()
    bench.ask()
    bench.announce(session, LONG, sha256=bytes(32))
    for _ in range(TRANSFERS):
        bench.hub.chunk(session, pb.Chunk(exchange=EXCHANGE, offset=0, data=LONG))

    assert [(a.payload, bool(a.error_code)) for a in bench.answers] == [(None, True)]
    assert sent(session) == ["assign", *["proceed"] * TRANSFERS, "ack"]
    assert list(bench.spool.iterdir()) == []


@in_loop
async def test_a_disk_that_is_full_ends_the_exchange_and_not_the_server(bench):
    session = bench.enter()
    bench.spool = bench.spool / "not there"
    bench.ask()
    bench.announce(session, LONG)

    assert "cannot store" in bench.answers[0].error_reason


@in_loop
async def test_a_sites_reason_is_short_and_printable(bench):
    session = bench.enter()
    bench.ask()
    reason = "no\n\x1b[31m" + "x" * 1000
    bench.hub.result(session, pb.Result(exchange=EXCHANGE, error_code=1004, error_reason=reason))

    found = bench.answers[0].error_reason
    assert found.startswith("no[31mx")
    assert len(found) == MAX_REASON


@pytest.mark.parametrize(
    "result",
    [
        pb.Result(exchange=b"short", size=1, sha256=bytes(32)),
        pb.Result(exchange=EXCHANGE, size=0, sha256=bytes(32)),
        pb.Result(exchange=EXCHANGE, size=(1 << 20) + 1, sha256=bytes(32)),
        pb.Result(exchange=EXCHANGE, size=10, sha256=b"short"),
        pb.Result(exchange=EXCHANGE, size=3, sha256=bytes(32), inline=b"abc"),
        pb.Result(exchange=EXCHANGE, error_code=-1),
    ],
    ids=["an id", "no bytes", "too long", "no digest", "another digest", "an error code"],
)
def test_a_malformed_result_is_a_breach(tmp_path, result):
    async def scenario(bench):
        session = bench.enter()
        bench.ask()
        with pytest.raises(ProtocolError):
            bench.hub.result(session, result)

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    "chunk",
    [(0, b"x" * 11), (5, b"x"), (0, b"")],
    ids=["more than announced", "not the next", "empty"],
)
def test_a_chunk_out_of_place_is_a_breach(tmp_path, chunk):
    async def scenario(bench):
        session = bench.enter()
        bench.ask()
        bench.announce(session, b"x" * 10)
        with pytest.raises(ProtocolError):
            bench.hub.chunk(session, pb.Chunk(exchange=EXCHANGE, offset=chunk[0], data=chunk[1]))

    run(tmp_path, scenario)


@in_loop
async def test_a_chunk_of_what_was_not_announced_is_a_breach(bench):
    session = bench.enter()
    bench.ask()
    with pytest.raises(ProtocolError):
        bench.hub.chunk(session, pb.Chunk(exchange=EXCHANGE, offset=0, data=b"x"))


@in_loop
async def test_another_agent_of_a_site_replaces_the_one_before(bench):
    first = bench.enter(instance=b"1" * 16)
    bench.ask()
    second = bench.enter(instance=b"2" * 16)
    bench.hub.leave(first)

    assert sent(first)[-1] == "goodbye"
    assert first.over
    assert sent(second) == ["assign"]
    assert bench.hub.sessions == {101: second}


@in_loop
async def test_the_same_agent_is_not_told_that_it_was_replaced(bench):
    """Its old connection is broken; a goodbye that reached it all the same would end it for good."""
    first = bench.enter()
    bench.enter()

    assert sent(first) == []
    assert first.gone.done()


@in_loop
async def test_a_goodbye_that_is_not_read_ends_all_the_same(bench):
    session = bench.enter()
    session.close(pb.Goodbye.REFUSED, "revoked")
    await asyncio.wait_for(session.gone, 30)

    assert session.over
