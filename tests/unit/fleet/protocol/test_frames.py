"""Frames between two processes of one machine."""

import asyncio
import socket

import pytest

from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.frames import LIMIT, Frames, frame, read_frame


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_frames_come_one_by_one_however_the_bytes_are_cut(pair):
    ours, theirs = pair
    frames = Frames(theirs, pb.ToRunner)
    sent = [pb.ToRunner(arrived=pb.Arrived(exchange=bytes([n]) * 16)) for n in range(3)]
    data = b"".join(frame(message) for message in sent)
    ours.sendall(data[:7])

    assert frames.receive(0.0) is None
    ours.sendall(data[7:])
    assert [frames.receive(1.0) for _ in sent] == sent
    assert frames.receive(0.0) is None


def test_an_empty_message_is_a_frame_too(pair):
    ours, theirs = pair
    ours.sendall(frame(pb.ToRunner()))

    assert Frames(theirs, pb.ToRunner).receive(1.0) == pb.ToRunner()


def test_the_other_end_gone_is_told(pair):
    ours, theirs = pair
    ours.close()

    with pytest.raises(EOFError):
        Frames(theirs, pb.ToRunner).receive(1.0)


def test_a_frame_beyond_the_limit_ends_the_stream():
    """Nothing is allocated for it."""

    async def read() -> object:
        reader = asyncio.StreamReader()
        reader.feed_data((LIMIT + 1).to_bytes(4, "little"))
        reader.feed_eof()
        return await read_frame(reader, pb.FromRunner)

    assert asyncio.run(read()) is None
