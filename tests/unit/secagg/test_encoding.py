"""One value, one encoding; one encoding, one value."""

import hashlib

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lepton_fl.errors import VerificationFailed
from lepton_fl.secagg.encoding import decode, digest, encode, shaped

numbers = st.integers(-(1 << 127), (1 << 127) - 1)
# Short texts and bytes over few symbols, so that examples nearly collide.
leaves = numbers | st.text("ab\0", max_size=4) | st.binary(max_size=4) | st.integers(-2, 2)
lists = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=8)
values = st.lists(lists, max_size=4).map(tuple)


def depth(value):
    return 1 + max(map(depth, value), default=0) if isinstance(value, tuple) else 0


def typed(value):
    """Equal only where types are too: Python holds "" and b"" apart, but () == ()."""
    return (type(value).__name__, tuple(map(typed, value)) if isinstance(value, tuple) else value)


@given(values)
def test_what_is_encoded_decodes_to_itself(given_values):
    """Whatever it is."""
    assume(depth(given_values) <= 8)

    assert typed(decode(encode(*given_values))) == typed(given_values)


@given(values, values)
def test_different_values_are_different_bytes(one, other):
    """So that a signature on one is none on the other."""
    assert (encode(*one) == encode(*other)) == (typed(one) == typed(other))


@given(st.binary(max_size=60))
def test_any_bytes_decode_to_what_encodes_to_them_or_are_refused(data):
    """There is no second encoding of anything, and no other exception."""
    try:
        found = decode(data)
    except VerificationFailed:
        return

    assert encode(*found) == data


@given(values, st.data())
def test_a_changed_encoding_is_another_value_or_refused(given_values, data):
    """One byte, anywhere."""
    encoded = bytearray(encode(*given_values))
    assume(encoded)
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    try:
        found = decode(bytes(encoded))
    except VerificationFailed:
        return

    assert encode(*found) == bytes(encoded)
    assert typed(found) != typed(given_values)


def test_the_bytes_are_as_specified():
    """Length of the value, type, value; written out by hand."""
    assert encode("é", b"\x01", -2, ["a"]) == (
        b"\x02\0\0\0\0\0\0\0s\xc3\xa9"
        b"\x01\0\0\0\0\0\0\0b\x01"
        b"\x10\0\0\0\0\0\0\0i\xfe" + b"\xff" * 15 + b"\x0a\0\0\0\0\0\0\0l\x01\0\0\0\0\0\0\0sa"
    )


def test_a_digest_is_sha256_of_the_encoding():
    """Its tag first."""
    assert digest("lepton-fl/x/1", 7) == hashlib.sha256(encode("lepton-fl/x/1", 7)).digest()


@pytest.mark.parametrize("value", [True, None, 1.5, {"a": 1}, {1}])
def test_other_types_are_not_encoded(value):
    """True is not 1."""
    with pytest.raises(TypeError):
        encode(value)


@pytest.mark.parametrize("value", [1 << 127, -(1 << 127) - 1])
def test_a_number_beyond_16_bytes_is_not_encoded(value):
    """Nor cut to fit."""
    with pytest.raises(OverflowError):
        encode(value)


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        (1 << 63).to_bytes(8, "little") + b"b",
        (2).to_bytes(8, "little") + b"bx",
        (1).to_bytes(8, "little") + b"i\x01",
        (1).to_bytes(8, "little") + b"?x",
        (1).to_bytes(8, "little") + b"s\xff",
    ],
)
def test_malformed_bytes_are_refused(data):
    """Cut short, a length beyond the end, a short number, another type, no UTF-8."""
    with pytest.raises(VerificationFailed, match="malformed"):
        decode(data)


def test_lists_in_lists_have_a_bottom():
    """A stranger's nesting does not exhaust the stack."""
    nested = b""
    for _ in range(5000):
        nested = len(nested).to_bytes(8, "little") + b"l" + nested

    with pytest.raises(VerificationFailed, match="too deep"):
        decode(nested)


@pytest.mark.parametrize("types", [(int,), (int, str, str), (str, int)])
def test_other_values_than_a_document_has_are_refused(types):
    """More, fewer or of other types."""
    with pytest.raises(VerificationFailed, match="malformed"):
        shaped((1, "a"), *types)
