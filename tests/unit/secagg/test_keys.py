"""Keys of a round: both ends agree, either seed rebuilds, and nothing changed is accepted."""

import contextlib

import pytest

from lepton_fl.errors import VerificationFailed
from lepton_fl.secagg.keys import ChannelKey, MaskKey, OneTimeKey, Suite, kdf

ONE, OTHER, THIRD = (bytes([k]) * 32 for k in (1, 2, 3))
PAIR = (b"r1" * 16, 101, 205)
LOW_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    *((2**255 - 19 + k).to_bytes(32, "little") for k in (-1, 0, 1)),
]
"""Every u of order 1, 2, 4 or 8, on the curve or its twist (RFC 7748, section 6.1; cr.yp.to/ecdh.html)."""

both_suites = pytest.mark.parametrize("suite", list(Suite))
both_kinds = pytest.mark.parametrize("kind", [ChannelKey, MaskKey])


@pytest.fixture
def pair():
    """The lower and the higher site of a pair, in the post-quantum suite."""
    return MaskKey(ONE, Suite.LSA1_PQ), MaskKey(OTHER, Suite.LSA1_PQ)


@both_suites
@both_kinds
def test_both_ends_agree(kind, suite):
    one, other = kind(ONE, suite), kind(OTHER, suite)

    assert one.agree(other.public) == other.agree(one.public)


@both_suites
@both_kinds
@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point.hex()[:8])
def test_a_point_of_low_order_is_refused(kind, suite, point):
    """With it the secret would be zero, and the server would know it."""
    rest = kind(OTHER, suite).public[32:]
    with pytest.raises(VerificationFailed, match="low order"):
        kind(ONE, suite).agree(point + rest)


@both_suites
@pytest.mark.parametrize("length", [0, 31, 33, 1184, 1215, 1217])
def test_a_public_key_of_another_length_is_refused(suite, length):
    with pytest.raises(VerificationFailed, match="public key"):
        MaskKey(ONE, suite).agree(b"\2" * length)


def test_a_key_of_the_other_suite_is_refused():
    """No downgrade: neither half of a hybrid key stands alone."""
    plain, hybrid = MaskKey(ONE, Suite.LSA1), MaskKey(OTHER, Suite.LSA1_PQ)
    with pytest.raises(VerificationFailed, match="public key"):
        plain.secret(hybrid.public, *PAIR)
    with pytest.raises(VerificationFailed, match="public key"):
        hybrid.secret(plain.public, *PAIR)


def test_a_malformed_ml_kem_key_is_refused(pair):
    """FIPS 203, 7.2: coefficients that are not below 3329."""
    with pytest.raises(VerificationFailed, match="ML-KEM"):
        pair[0].offer(pair[1].public[:32] + b"\xff" * 1184, *PAIR)


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_seed_of_another_length_is_refused(length):
    with pytest.raises(ValueError, match="32 bytes"):
        MaskKey(bytes(length), Suite.LSA1)


def test_a_suite_read_from_text_is_that_suite():
    """Not the other one; and no third."""
    assert MaskKey(ONE, "lepton-fl/secagg/LSA1").public == MaskKey(ONE, Suite.LSA1).public
    with pytest.raises(ValueError, match="LSA0"):
        MaskKey(ONE, "lepton-fl/secagg/LSA0")


@both_suites
def test_either_seed_rebuilds_the_pair_secret(suite):
    """A site that dropped out is rebuilt from its shared seed, be it the lower or the higher of the pair."""
    low, high = MaskKey(ONE, suite), MaskKey(OTHER, suite)
    offer = low.offer(high.public, *PAIR)
    secret = low.secret(high.public, *PAIR)
    low_again, high_again = MaskKey(low.seed, suite), MaskKey(high.seed, suite)

    assert high.accept(low.public, offer, *PAIR) == secret
    assert low_again.secret(high.public, *PAIR) == secret
    assert high_again.accept(low.public, offer, *PAIR) == secret
    assert (low_again.public, high_again.public) == (low.public, high.public)


def test_another_seed_does_not(pair):
    low, high = pair
    offer = low.offer(high.public, *PAIR)
    wrong = MaskKey(THIRD, Suite.LSA1_PQ)

    assert wrong.secret(high.public, *PAIR) != low.secret(high.public, *PAIR)
    with pytest.raises(VerificationFailed, match="does not open"):
        wrong.accept(low.public, offer, *PAIR)


@pytest.mark.parametrize("bound", [(b"r2" * 16, 101, 205), (b"r1" * 16, 205, 101), (b"r1" * 16, 101, 206)])
def test_an_offer_of_another_round_or_pair_is_refused(pair, bound):
    low, high = pair
    with pytest.raises(VerificationFailed, match="does not open"):
        high.accept(low.public, low.offer(high.public, *PAIR), *bound)


@pytest.mark.parametrize("position", [0, 700, 1087, 1088, 1119, 1135])
def test_a_changed_offer_is_refused(pair, position):
    """In the ciphertext, in the box, in the box's tag."""
    low, high = pair
    offer = bytearray(low.offer(high.public, *PAIR))
    offer[position] ^= 1
    with pytest.raises(VerificationFailed, match="does not open"):
        high.accept(low.public, bytes(offer), *PAIR)


@pytest.mark.parametrize("length", [0, 1087, 1088, 1104, 1135, 1137])
def test_an_offer_of_another_length_is_refused(pair, length):
    low, high = pair
    offer = low.offer(high.public, *PAIR) + b"\0"
    with pytest.raises(VerificationFailed, match=r"offer|does not open"):
        high.accept(low.public, offer[:length], *PAIR)


@both_kinds
def test_an_offer_in_a_suite_that_has_none_is_refused(kind):
    one, other = kind(ONE, Suite.LSA1), kind(OTHER, Suite.LSA1)
    bound = PAIR if kind is MaskKey else ()
    with pytest.raises(VerificationFailed, match="malformed offer"):
        other.accept(one.public, b"\0", *bound)


def test_offers_are_fresh_and_the_secret_stays(pair):
    """Encapsulation takes no coins, so the secret must not come from it."""
    low, high = pair
    first, second = (low.offer(high.public, *PAIR) for _ in range(2))

    assert first != second
    assert high.accept(low.public, first, *PAIR) == high.accept(low.public, second, *PAIR)


@both_suites
def test_a_channel_carries_its_secret(suite):
    sender, receiver = ChannelKey(ONE, suite), ChannelKey(OTHER, suite)
    secret, offer = sender.offer(receiver.public)

    assert receiver.accept(sender.public, offer) == secret


def test_a_changed_channel_offer_gives_another_secret():
    sender, receiver = ChannelKey(ONE, Suite.LSA1_PQ), ChannelKey(OTHER, Suite.LSA1_PQ)
    secret, offer = sender.offer(receiver.public)
    changed = bytes([offer[0] ^ 1]) + offer[1:]

    assert receiver.accept(sender.public, changed) != secret
    with pytest.raises(VerificationFailed, match="malformed offer"):
        receiver.accept(sender.public, offer[:-1])


def test_the_two_kinds_of_key_have_nothing_in_common():
    """The same seed, by mistake, gives unrelated keys in the post-quantum suite."""
    assert ChannelKey(ONE, Suite.LSA1_PQ).public[:32] != MaskKey(ONE, Suite.LSA1_PQ).public[:32]


def test_other_labels_are_other_keys():
    """Suite, tag, ids and their order, salt and secret: each counts; so does where one label ends."""
    variants = [
        (ONE, b"", Suite.LSA1, "pairmask", 101, 205),
        (OTHER, b"", Suite.LSA1, "pairmask", 101, 205),
        (ONE, b"salt", Suite.LSA1, "pairmask", 101, 205),
        (ONE, b"", Suite.LSA1_PQ, "pairmask", 101, 205),
        (ONE, b"", Suite.LSA1, "channel", 101, 205),
        (ONE, b"", Suite.LSA1, "pairmask", 205, 101),
        (ONE, b"", Suite.LSA1, "pairmask", 101, 206),
        (ONE, b"", Suite.LSA1, "pair", "mask", 101, 205),
        (ONE, b"", Suite.LSA1, "pairmask", [101, 205]),
        (ONE, b"", Suite.LSA1, "pairmask"),
    ]

    assert len({kdf(*variant) for variant in variants}) == len(variants)


def test_a_one_time_key_seals_once():
    key = OneTimeKey(ONE)
    key.seal(b"first", b"")
    with pytest.raises(RuntimeError, match="second time"):
        key.seal(b"second", b"")


@pytest.mark.parametrize("box", [OneTimeKey(ONE).seal(b"share", b""), b"forged, and long enough"])
def test_a_key_that_opened_a_box_or_tried_to_seals_none(box):
    """One direction: the receiver cannot answer under the sender's key and nonce."""
    key = OneTimeKey(ONE)
    with contextlib.suppress(VerificationFailed):
        key.open(box, b"")
    with pytest.raises(RuntimeError, match="second time"):
        key.seal(b"answer", b"")


@pytest.mark.parametrize(
    ("key", "aad", "change"),
    [
        (OTHER, b"i to j", lambda box: box),
        (ONE, b"j to i", lambda box: box),
        (ONE, b"i to j", lambda box: bytes([box[0] ^ 1]) + box[1:]),
        (ONE, b"i to j", lambda box: box[:-1] + bytes([box[-1] ^ 0x80])),
        (ONE, b"i to j", lambda box: box[:-1]),
        (ONE, b"i to j", lambda box: box + b"\0"),
        (ONE, b"i to j", lambda box: box[:15]),
        (ONE, b"i to j", lambda box: b""),
    ],
    ids=["key", "aad", "ciphertext", "tag", "shorter", "longer", "less than a tag", "empty"],
)
def test_a_box_that_is_not_as_it_was_sealed_does_not_open(key, aad, change):
    box = OneTimeKey(ONE).seal(b"two shares", b"i to j")
    with pytest.raises(VerificationFailed, match="does not open"):
        OneTimeKey(key).open(change(box), aad)


@both_suites
def test_no_key_shows_itself(suite):
    """In a traceback or a log a key is its type."""
    for key in (MaskKey(ONE, suite), ChannelKey(ONE, suite), OneTimeKey(ONE)):
        shown = repr(key) + str(key)

        assert ONE.hex() not in shown
        assert repr(ONE) not in shown
