"""Flower records as payloads: the same records back, and nothing else is taken for a payload."""

import contextlib
import mmap
import resource
import stat

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from lepton_fl.errors import ProtocolError
from lepton_fl.fleet.protocol.fleet_pb2 import PayloadHeader
from lepton_fl.fleet.protocol.payload import CHUNK, SMALL, Payload
from lepton_fl.fleet.protocol.records import REPLY_HEADER, pack, unpack
from lepton_fl.messages import from_record, to_record


@pytest.fixture
def content() -> RecordDict:
    arrays = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "none": np.zeros((0, 3), np.float32)}
    return RecordDict(
        {
            "arrays": to_record(arrays),
            "config": ConfigRecord({"study": b"\x00\xff", "round": 3, "names": ["a", "b"], "on": True}),
            "metrics": MetricRecord({"num-examples": 1.0}),
        }
    )


def test_records_come_back(content, tmp_path):
    """Every record, key, type and array; the order of arrays too."""
    back = unpack(pack(content, tmp_path / "x").open())

    assert back.config_records["config"] == content.config_records["config"]
    assert back.metric_records["metrics"] == content.metric_records["metrics"]
    before, after = from_record(content["arrays"]), from_record(back.array_records["arrays"])
    assert list(before) == list(after)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_small_payload_makes_no_file(content, tmp_path):
    payload = pack(content, tmp_path / "x")

    assert payload.size <= SMALL
    assert payload.path is None
    assert list(tmp_path.iterdir()) == []


def test_a_large_payload_is_a_private_file_whose_arrays_are_views_of_it(tmp_path):
    """Nobody else on the machine reads an update, and no second copy of it is in memory."""
    large = np.ones(SMALL, np.float32)
    payload = pack(RecordDict({"arrays": to_record({"w": large})}), tmp_path / "x")

    assert payload.path is not None
    assert stat.S_IMODE(payload.path.stat().st_mode) == 0o600
    data = unpack(payload.open()).array_records["arrays"]["w"].data
    assert isinstance(data, memoryview)
    assert isinstance(data.obj, mmap.mmap)
    assert data.readonly


def test_a_payload_that_finds_no_room_leaves_none_of_it(tmp_path):
    """Each round's would stay, and a disk that is full would stay full."""
    content = RecordDict({"arrays": to_record({"w": np.ones(1 << 20, np.float32)})})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            pack(content, tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert list(tmp_path.iterdir()) == []


def test_same_content_same_bytes(content, tmp_path):
    """A digest names the content: equal requests are recognised by it."""
    assert pack(content, tmp_path / "x").sha256 == pack(content, tmp_path / "y").sha256


@pytest.mark.parametrize("change", ["magic", "length", "short", "long", "sizes", "header"])
def test_what_is_no_payload_is_refused(content, tmp_path, change):
    whole = bytearray(pack(content, tmp_path / "x").inline)
    size = int.from_bytes(whole[4:8], "little")
    match change:
        case "magic":
            whole[0] ^= 1
        case "length":
            whole[4:8] = (1 << 31).to_bytes(4, "little")
        case "short":
            del whole[-1]
        case "long":
            whole += b"\0"
        case "sizes":
            header = PayloadHeader.FromString(bytes(whole[8 : 8 + size]))
            header.sizes.append(0)
            data = header.SerializeToString()
            whole[4 : 8 + size] = len(data).to_bytes(4, "little") + data
        case "header":
            whole[8 : 8 + size] = b"\xff" * size

    with pytest.raises(ProtocolError):
        unpack(memoryview(bytes(whole)))


def test_a_header_that_is_longer_than_is_asked_for_is_not_parsed(content, tmp_path):
    """A site's reply of 16 MiB of empty arrays took a run's process 700 MiB and half a minute."""
    content["more"] = ConfigRecord({"x": bytes(REPLY_HEADER)})
    view = pack(content, tmp_path / "x").open()

    assert unpack(view).config_records["more"]["x"] == bytes(REPLY_HEADER)
    with pytest.raises(ProtocolError, match="longer"):
        unpack(view, max_header=REPLY_HEADER)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_a_payload_or_a_protocol_error(data, as_header):
    """Nothing that a peer sends raises anything else."""
    if as_header:
        data = b"LFP1" + len(data).to_bytes(4, "little") + data
    with contextlib.suppress(ProtocolError):
        unpack(memoryview(data))


@given(size=st.integers(1, 3 * CHUNK // 2), offset=st.integers(0, 3 * CHUNK // 2))
def test_chunks_from_an_offset_are_the_rest(size, offset):
    """In order, none larger than a chunk."""
    payload = Payload.of(bytes(size))
    chunks = list(payload.chunks(offset))

    assert all(0 < len(data) <= CHUNK for _, data in chunks)
    assert sum(len(data) for _, data in chunks) == max(0, size - offset)
    assert [start for start, _ in chunks] == list(range(offset, size, CHUNK))
