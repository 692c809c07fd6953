"""What a message carries is read in full or refused; a header is never believed before the bytes."""

import mmap
import pickle
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lepton_fl.config import parse
from lepton_fl.errors import (
    AlreadyCharged,
    BadReply,
    BadRequest,
    BudgetExhausted,
    ConfigError,
    Unwritable,
    VerificationFailed,
)
from lepton_fl.messages import (
    CONFIG,
    EVALUATE,
    ROUND,
    TRAIN,
    Assignment,
    assignment_config,
    blameless,
    blameless_reply,
    error_reply,
    from_record,
    identify,
    is_reply,
    read_assignment,
    refusal_exit_code,
    refusal_reason,
    relayed,
    sits_out,
    to_record,
)
from lepton_fl.study import Study

RUN = "0123456789abcdef" * 2
STUDY = parse(
    Study,
    {
        "study": {"name": "messages"},
        "task": {"kind": "binary", "target": "ill"},
        "privacy": {"noise": "none"},
        "train": {"rounds": 3, "sample_rate": 0.1, "lr": 0.1},
        "features": {"columns": {"age": {"type": "float", "range": [0, 100]}}},
    },
    file="study.toml",
)
F4 = b"{'descr': '<f4', 'fortran_order': False, 'shape': %s, }"


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("bytes from the wire were unpickled",)


def npy(header, data=b"", *, version=b"\x01\x00", size=None):
    header += b"\n"
    length = (len(header) if size is None else size).to_bytes(2, "little")
    return b"\x93NUMPY" + version + length + header + data


def read(data, *, stype="numpy.ndarray"):
    array = Array(dtype="float32", shape=(2,), stype=stype, data=data)
    return from_record(ArrayRecord({"w": array}))


@pytest.fixture(autouse=True)
def _known_to_flower():
    identify(RUN, 1)


@pytest.fixture
def make_message():
    """A message of round 2; `changes` replace its parts, None takes one away."""

    def make(changes):
        config = assignment_config(Assignment(study=STUDY, run=RUN, round=2, cohort=("a", "b", "c")))
        for key, value in changes.items():
            if value is None:
                del config[key]
            else:
                config[key] = value
        return Message(RecordDict({CONFIG: config}), dst_node_id=7, message_type=TRAIN)

    return make


@given(
    arrays.arrays(
        st.sampled_from(["<f2", "<f4", "<f8", "<i4", "<i8", "<u4", "|u1", "|b1"]),
        arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    )
)
def test_arrays_survive_the_wire(array):
    """Names, order, type, shape and every bit."""
    found = from_record(to_record({"z": array, "a": array}))

    assert list(found) == ["z", "a"]
    assert found["z"].dtype == array.dtype
    assert found["z"].shape == array.shape
    assert found["z"].tobytes() == array.tobytes()


def test_an_array_is_a_copy_out_of_the_message():
    """It can be written to."""
    found = from_record(to_record({"w": np.zeros(3, np.float32)}))

    found["w"][0] = 1.0

    assert found["w"].tolist() == [1, 0, 0]


@pytest.fixture
def mapped(tmp_path):
    """A record whose bytes lie in a mapped file, behind three others, so that no number is aligned."""
    whole = to_record({"w": np.arange(6, dtype=np.float32).reshape(2, 3)})
    data = whole["w"].data
    path = tmp_path / "payload"
    path.write_bytes(b"abc" + data)
    with path.open("rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Flower's constructor takes bytes only.
    whole["w"].data = memoryview(held)[3:]
    return whole


@pytest.mark.parametrize("copy", [True, False])
def test_arrays_in_a_mapped_file_are_read(mapped, copy):
    """As a transport hands them over that does not hold them in memory."""
    found = from_record(mapped, copy=copy)["w"]

    assert found.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found.flags.writeable == copy


@pytest.mark.parametrize("buffer", [bytes, bytearray], ids=["bytes", "a buffer that can be written to"])
def test_a_view_is_of_the_messages_own_bytes(buffer):
    """No copy, and nobody writes to them through it."""
    record = to_record({"w": np.zeros(3, np.float32)})
    data = buffer(record["w"].data)
    record["w"].data = memoryview(data)

    view = from_record(record, copy=False)["w"]

    assert np.shares_memory(view, np.frombuffer(data, np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1.0


@pytest.mark.parametrize("end", [-1, 0, 40])
def test_a_truncated_mapping_is_refused(mapped, end):
    """The length is what there is, and no header's word."""
    mapped["w"].data = mapped["w"].data[:end]

    with pytest.raises(BadReply, match="arrays: w"):
        from_record(mapped, copy=False)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(pickle.dumps(Bomb()), id="a pickle"),
        pytest.param(npy(F4.replace(b"<f4", b"|O") % b"(1,)", pickle.dumps(Bomb())), id="objects"),
        pytest.param(npy(F4.replace(b"False", b"True") % b"(2,)", bytes(8)), id="fortran order"),
        pytest.param(npy(F4 % b"(2,)", bytes(7)), id="truncated"),
        pytest.param(npy(F4 % b"(2,)", bytes(9)), id="bytes left over"),
        pytest.param(npy(F4 % b"(2,)", bytes(8), version=b"\x02\x00"), id="version 2.0"),
        pytest.param(npy(F4 % b"(2,)", bytes(8), size=9999), id="header longer than the array"),
        pytest.param(npy(F4 % b"(2,)", bytes(8), size=10), id="header cut short"),
        pytest.param(npy(F4 % b"(-2,)", bytes(8)), id="negative"),
        pytest.param(npy(F4 % b"(2)", bytes(8)), id="not a tuple"),
        pytest.param(npy(F4 % b"(2 2)", bytes(16)), id="no comma"),
        pytest.param(npy(F4 % b"(2L,)", bytes(8)), id="written by Python 2"),
        pytest.param(npy(F4 % (b"(" * 200), bytes(8)), id="too deep to parse"),
        pytest.param(npy(F4 % b"(0, 9999999999999999999999)"), id="no bytes of a shape beyond counting"),
        pytest.param(npy(F4.replace(b"<f4", b"|S0") % b"(1000000,)"), id="items of no bytes"),
        pytest.param(npy(F4.replace(b"<f4", b">f4") % b"(2,)", bytes(8)), id="big-endian"),
        pytest.param(npy(b"__import__('os').abort()"), id="code"),
    ],
)
def test_a_lying_array_is_refused(data):
    """A header that is not numpy's own for these very bytes, whatever else it is."""
    with pytest.raises(BadReply, match="arrays: w"):
        read(data)


def test_an_array_of_another_kind_is_refused():
    """Only numpy's bytes are read."""
    with pytest.raises(BadReply, match="arrays: w"):
        read(npy(F4 % b"(2,)", bytes(8)), stype="torch.tensor")


def test_a_huge_shape_allocates_nothing():
    """One gigabyte claimed by a hundred bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(BadReply):
            read(npy(F4 % b"(268435456,)"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 1_000_000


def test_an_assignment_survives_the_wire(make_message):
    """Study, run, round and cohort."""
    found = read_assignment(make_message({}))

    assert found == Assignment(study=STUDY, run=RUN, round=2, cohort=("a", "b", "c"))


@pytest.mark.parametrize("key", ["study", "study-id", "run", "cohort", ROUND])
def test_an_assignment_without_a_part_is_refused(make_message, key):
    """No part has a default."""
    with pytest.raises(BadRequest):
        read_assignment(make_message({key: None}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("study", STUDY.canonical.decode()),
        ("study-id", STUDY.id.encode()),
        ("run", 5),
        ("run", RUN.upper()),
        ("run", RUN + "0"),
        ("run", RUN + "\n"),
        ("cohort", "a"),
        ("cohort", [1, 2, 3]),
        (ROUND, "2"),
        (ROUND, 2.0),
        (ROUND, True),
        (ROUND, -1),
    ],
)
def test_a_part_of_another_type_is_refused(make_message, key, value):
    """Nothing is converted."""
    with pytest.raises(BadRequest):
        read_assignment(make_message({key: value}))


@pytest.mark.parametrize(
    "cohort",
    [
        ["b", "a", "c"],
        ["a", "a", "b"],
        ["", "a"],
        ["a", "b c"],
        ["a" * 65],
        [f"s{n:05}" for n in range(10_001)],
    ],
    ids=["unsorted", "a site twice", "no name", "a space", "too long a name", "too many"],
)
def test_a_bad_cohort_is_refused(make_message, cohort):
    """A cohort is a sorted list of different site names."""
    with pytest.raises(BadRequest):
        read_assignment(make_message({"cohort": cohort}))


def test_a_message_without_config_is_refused():
    """An empty message asks for nothing."""
    with pytest.raises(BadRequest):
        read_assignment(Message(RecordDict(), dst_node_id=7, message_type=TRAIN))


def test_a_message_with_a_bare_config_is_refused():
    """An empty config record asks for nothing."""
    content = RecordDict({CONFIG: ConfigRecord()})

    with pytest.raises(BadRequest):
        read_assignment(Message(content, dst_node_id=7, message_type=TRAIN))


def test_a_study_is_not_parsed_before_its_digest_is_checked(make_message, monkeypatch):
    """Bytes that are not those of the id meet no parser."""
    parsed = []
    monkeypatch.setattr("lepton_fl.study.json.loads", parsed.append)
    changed = STUDY.canonical.replace(b"messages", b"Messages")

    with pytest.raises(VerificationFailed):
        read_assignment(make_message({"study": changed}))

    assert parsed == []


def test_an_oversized_study_is_not_even_hashed(make_message, monkeypatch):
    """Five megabytes are refused by their length."""
    monkeypatch.setattr("lepton_fl.messages.parse_canonical", lambda *_: pytest.fail("read"))

    with pytest.raises(BadRequest, match="at most"):
        read_assignment(make_message({"study": bytes(5 << 20)}))


def test_an_error_reply_carries_the_public_part_only(make_message):
    """Counts, paths and the fix stay at the site."""
    error = BudgetExhausted("spent 7.9 of 8 (/srv/policy.toml)", fix="see /srv", public="no budget")

    reply = error_reply(make_message({}), error)

    assert reply.error.reason == "no budget"
    assert refusal_exit_code(reply) == BudgetExhausted.exit_code


def test_an_error_without_public_part_tells_its_class(make_message):
    """And not its message."""
    reply = error_reply(make_message({}), BadRequest("round 7 of patient 4711"))

    assert reply.error.reason == "BadRequest"


def test_an_internal_error_tells_nothing(make_message):
    """It is no refusal, so it may pass."""
    reply = error_reply(make_message({}), None)

    assert reply.error.reason == "internal error at the site"
    assert refusal_exit_code(reply) == 1


def test_a_site_that_has_charged_a_round_says_so(make_message):
    """By a code of its own, with the exit code of its class."""
    own = error_reply(make_message({}), AlreadyCharged("round 2 was charged before"))
    other = error_reply(make_message({}), BudgetExhausted("no"))

    assert (sits_out(own), refusal_exit_code(own)) == (True, AlreadyCharged.exit_code)
    assert (sits_out(other), refusal_exit_code(other)) == (False, BudgetExhausted.exit_code)


def test_a_disk_that_is_full_is_no_refusal_for_good(make_message):
    """As other files of the site that are wrong are."""
    assert sits_out(error_reply(make_message({}), Unwritable("no room")))
    assert not sits_out(error_reply(make_message({}), ConfigError("no such key")))


def test_no_site_says_of_itself_that_it_is_blameless(make_message):
    """What is relayed of it is that it sits out."""
    message = make_message({})
    claimed = blameless_reply(message, "did my part")

    assert blameless(claimed)
    assert (sits_out(relayed(claimed, message)), blameless(relayed(claimed, message))) == (True, False)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"_src_node_id": 8}, False),
        ({"_message_type": EVALUATE}, False),
        ({"_run_id": 1}, False),
    ],
    ids=["as it should be", "another node", "another type", "another run"],
)
def test_a_reply_is_of_its_requests_run_type_and_node(make_message, changes, expected):
    """Whatever came late or astray is none."""
    request = make_message({})
    reply = Message(RecordDict(), reply_to=request)
    reply.metadata.__dict__.update(changes)

    assert is_reply(reply, request) == expected


def test_a_sites_reason_is_short_and_printable(make_message):
    """It is shown on the operator's terminal, and the site is not trusted with that."""
    reply = Message(Error(1004, "\x1b[2Jno\n" + "!" * 10_000), reply_to=make_message({}))

    assert refusal_reason(reply) == "[2Jno" + "!" * 195


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<u4", "<i8", "|b1"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 1, 4)])
def test_arrays_travel_as_flower_writes_them(dtype, shape):
    """Byte for byte, whatever the memory's order."""
    array = np.ones(shape, dtype)
    for made in (array, np.asfortranarray(array)):
        found, expected = to_record({"w": made})["w"], Array(np.asarray(made, order="C"))

        assert (found.dtype, found.shape, found.stype) == (expected.dtype, expected.shape, expected.stype)
        assert found.data == expected.data
