"""What comes over the wire is read whole, or refused as ProtocolError; nothing else can happen."""

import tempfile
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from lepton_fl.errors import BadReply, ProtocolError
from lepton_fl.fleet.protocol.fleet_pb2 import PayloadHeader
from lepton_fl.fleet.protocol.records import pack, unpack
from lepton_fl.messages import from_record, to_record

NAMES = st.text(min_size=1, max_size=8)
SCALARS = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.booleans(), st.text(max_size=8)
)
METRICS = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.lists(st.floats(allow_nan=False), max_size=3),
)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def contents(draw: st.DrawFn) -> RecordDict:
    """Any records that a message may carry."""
    arrays = draw(st.dictionaries(NAMES, st.dictionaries(NAMES, SHAPES, max_size=3), max_size=2))
    configs = draw(st.dictionaries(NAMES, st.dictionaries(NAMES, SCALARS, max_size=3), max_size=2))
    metrics = draw(st.dictionaries(NAMES, st.dictionaries(NAMES, METRICS, max_size=3), max_size=2))
    rng = np.random.default_rng(0)
    records = {
        **{f"a{n}": to_record({k: rng.normal(size=s) for k, s in v.items()}) for n, v in arrays.items()},
        **{f"c{n}": ConfigRecord(v) for n, v in configs.items()},
        **{f"m{n}": MetricRecord(v) for n, v in metrics.items()},
    }
    return RecordDict(records)


def packed(content: RecordDict) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return bytes(pack(content, Path(folder) / "payload").open())


def read(data: bytes) -> RecordDict | None:
    """The records in `data`, down to the numbers; None where they are refused as they should be."""
    try:
        content = unpack(memoryview(data))
        for record in content.array_records.values():
            from_record(record)
    except (ProtocolError, BadReply):
        return None
    return content


@given(contents())
def test_records_come_out_as_they_went_in(content: RecordDict) -> None:
    """Names, order, numbers."""
    found = read(packed(content))

    assert found is not None
    assert list(found) == list(content)
    assert {n: dict(r) for n, r in found.config_records.items()} == {
        n: dict(r) for n, r in content.config_records.items()
    }
    assert {n: dict(r) for n, r in found.metric_records.items()} == {
        n: dict(r) for n, r in content.metric_records.items()
    }
    for name, record in content.array_records.items():
        before, after = from_record(record), from_record(found.array_records[name])

        assert list(before) == list(after)
        assert all(np.array_equal(before[key], after[key]) for key in before)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    read(data)
    read(b"LFP1" + data)
    read(b"LFP1" + len(data).to_bytes(4, "little") + data)


@given(contents(), st.data())
def test_damaged_bytes_are_read_or_refused(content: RecordDict, data: st.DataObject) -> None:
    """Bytes changed, cut out, put in or cut off, anywhere."""
    whole = bytearray(packed(content))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, max(0, len(whole) - 1)))
        end = data.draw(st.integers(start, min(len(whole), start + 8)))
        whole[start:end] = data.draw(st.binary(max_size=8))
    read(bytes(whole))


@given(contents(), st.integers(1, 64))
def test_a_payload_that_is_cut_short_is_refused(content: RecordDict, missing: int) -> None:
    """There is no part of a message."""
    whole = packed(content)

    assert read(whole[: max(0, len(whole) - missing)]) is None


@given(contents(), st.binary(min_size=1, max_size=64))
def test_a_payload_with_more_behind_it_is_refused(content: RecordDict, more: bytes) -> None:
    assert read(packed(content) + more) is None


@given(contents(), st.data())
def test_a_whole_header_with_damaged_records_is_read_or_refused(
    content: RecordDict, data: st.DataObject
) -> None:
    """The frame is sound, and so are its lengths; Flower's records inside are not."""
    whole = packed(content)
    end = 8 + int.from_bytes(whole[4:8], "little")
    header = PayloadHeader.FromString(whole[8:end])
    records = bytearray(header.records)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, max(0, len(records) - 1)))
        records[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    header.records = bytes(records)
    damaged = header.SerializeToString()
    read(b"LFP1" + len(damaged).to_bytes(4, "little") + damaged + whole[end:])
