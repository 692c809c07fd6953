"""Payloads in chunks: in order, whole, and never in the way of a control message."""

import hashlib
import stat

import pytest

from lepton_fl.errors import ProtocolError
from lepton_fl.fleet.protocol.fleet_pb2 import Chunk
from lepton_fl.fleet.protocol.payload import CHUNK, Payload
from lepton_fl.fleet.protocol.transfer import Incoming, Outbox

DATA = bytes(range(256)) * 10


@pytest.fixture
def incoming(tmp_path):
    found = Incoming(tmp_path / "x", size=len(DATA), sha256=hashlib.sha256(DATA).digest())
    yield found
    found.discard()


def chunk(offset: int, data: bytes) -> Chunk:
    return Chunk(exchange=b"x", offset=offset, data=data)


def test_a_payload_arrives_whole(incoming):
    """After its last chunk it is a private file with the announced digest."""
    assert not incoming.take(chunk(0, DATA[:100]))
    assert incoming.take(chunk(100, DATA[100:]))
    payload = incoming.finish()

    assert payload.path.read_bytes() == DATA
    assert stat.S_IMODE(payload.path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("offset", "data"),
    [(1, b"x"), (0, b""), (0, bytes(CHUNK + 1)), (0, DATA + b"x")],
    ids=["gap", "empty", "larger than a chunk", "more than announced"],
)
def test_a_chunk_that_is_not_the_next_one_is_refused(incoming, offset, data):
    with pytest.raises(ProtocolError):
        incoming.take(chunk(offset, data))


def test_a_repeated_chunk_is_refused(incoming):
    incoming.take(chunk(0, DATA[:10]))

    with pytest.raises(ProtocolError):
        incoming.take(chunk(0, DATA[:10]))


def test_a_payload_is_whole_for_whoever_has_it_mapped(incoming):
    """Also when another is announced under its name: a map that is cut short ends the process (SIGBUS)."""
    incoming.take(chunk(0, DATA))
    payload = incoming.finish()

    with payload.path.open("rb") as mapped:
        Incoming(payload.path, size=1, sha256=bytes(32)).discard()

        assert mapped.read() == DATA


def test_wrong_bytes_begin_again_from_nothing(incoming):
    """A payload without its digest is no payload, and what came of it is not built upon."""
    incoming.take(chunk(0, b"y" + DATA[1:]))

    assert incoming.finish() is None
    assert incoming.received == 0
    incoming.take(chunk(0, DATA))
    assert incoming.finish().path.read_bytes() == DATA


def test_a_discarded_payload_leaves_no_file(tmp_path):
    found = Incoming(tmp_path / "x", size=3, sha256=b"")
    found.take(chunk(0, b"ab"))
    found.discard()

    assert list(tmp_path.iterdir()) == []


def test_control_messages_go_before_chunks_and_transfers_take_turns():
    """A heartbeat does not wait for a gigabyte, nor a small payload for a large one."""
    outbox = Outbox(lambda: None)
    outbox.transfer(b"large", Payload.of(bytes(3 * CHUNK)), 0)
    outbox.transfer(b"small", Payload.of(bytes(5)), 0)
    first = outbox.next()
    outbox.put("heartbeat")
    rest = [outbox.next() for _ in range(6)]

    assert first.exchange == b"large"
    assert rest[0] == "heartbeat"
    assert [found.exchange for found in rest[1:4]] == [b"small", b"large", b"large"]
    assert rest[4:] == [None, None]


def test_a_transfer_begins_where_the_other_side_says():
    outbox = Outbox(lambda: None)
    outbox.transfer(b"x", Payload.of(b"abcdef"), 4)

    assert outbox.next() == Chunk(exchange=b"x", offset=4, data=b"ef")
    assert outbox.next() is None


def test_what_is_dropped_is_not_sent():
    outbox = Outbox(lambda: None)
    outbox.transfer(b"x", Payload.of(b"abcdef"), 0)
    outbox.drop(b"x")

    assert outbox.next() is None
