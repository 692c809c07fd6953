"""Fixed point: headroom at the extremes, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_fl.errors import BadReply, VerificationFailed
from lepton_fl.secagg import fixedpoint
from lepton_fl.secagg.fixedpoint import MAX_PARTIES, Quantiser
from lepton_fl.secagg.masks import TILE, Keystream, keystream

KEY = bytes(range(32))


@pytest.mark.parametrize(
    ("max_n", "bits"),
    [(1, 31), (2, 30), (3, 29), (4, 29), (5, 28), (10, 27), (100, 24), (128, 24), (129, 23), (10_000, 17)],
)
def test_most_bits_of_a_cohort(max_n, bits):
    """31 less the cohort's bits, as the protocol says; one more has no bit to spare and is refused."""
    Quantiser(clip=1.0, bits=bits, max_n=max_n)
    with pytest.raises(ValueError, match="bits"):
        Quantiser(clip=1.0, bits=bits + 1, max_n=max_n)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("max_n", [1, 2, 3, 10, 100, 1000])
def test_the_largest_sum_does_not_wrap(max_n, sign):
    """Every site at its clip and beyond, with all the bits that there are: the mean is the clip."""
    q = Quantiser(clip=0.5, bits=31 - (max_n - 1).bit_length(), max_n=max_n)
    update_L = np.array([sign * 0.5, sign * 3e38], np.float32)
    total_L = np.zeros(2, np.uint32)
    for _ in range(max_n):
        total_L += q.encode(update_L, weight=1, rounding_key=KEY)

    np.testing.assert_allclose(q.decode(total_L, n=max_n, total_weight=max_n), sign * 0.5, rtol=2**-52)


@pytest.mark.parametrize("bits", [2, 8, 24, 31])
def test_the_clip_itself_is_never_rounded_away_from_zero(bits):
    """Where rounding up could exceed `half`, no key does it."""
    q = Quantiser(clip=0.1, bits=bits, max_n=1)
    update_L = np.tile(np.array([0.1, -0.1, 1.0, -1.0], np.float32), 500)
    encoded_L = q.encode(update_L, weight=1, rounding_key=KEY).view(np.int32)

    assert set(encoded_L.tolist()) <= {q.half, q.half - 1, -q.half, -q.half + 1}
    assert set(encoded_L[2::4].tolist()) == {q.half}
    assert set(encoded_L[3::4].tolist()) == {-q.half}


@pytest.mark.parametrize("coordinates", [0, 7, TILE + 3])
def test_rows_are_what_each_key_encodes_by_itself(coordinates):
    q = Quantiser(clip=0.5, bits=20, max_n=9)
    update_KL = np.random.default_rng(1).normal(size=(4, coordinates))
    keys = [bytes([k]) * 32 for k in range(4)]
    rows = q.encode_each(update_KL, weight=1, rounding=[Keystream(key) for key in keys])

    assert rows.shape == update_KL.shape
    for row, update_L, key in zip(rows, update_KL, keys, strict=True):
        assert (row == q.encode(update_L, weight=1, rounding_key=key)).all()


def test_the_lowest_word_rounds_no_whole_product_up(monkeypatch):
    """Once in 2^32 the word is 0; a product on a step stays, one a hair above it goes up."""
    monkeypatch.setattr(fixedpoint.Keystream, "fill", lambda _, out_L, *, start: out_L.fill(0))
    q = Quantiser(clip=1.0, bits=2, max_n=1)
    update_L = np.array([-1.0, -1e-30, 0.0, 1e-30, 1.0], np.float32)

    assert q.encode(update_L, weight=1, rounding_key=KEY).view(np.int32).tolist() == [-1, 0, 0, 1, 1]


def test_the_highest_word_rounds_nothing_up(monkeypatch):
    monkeypatch.setattr(fixedpoint.Keystream, "fill", lambda _, out_L, *, start: out_L.fill(2**32 - 1))
    q = Quantiser(clip=1.0, bits=2, max_n=1)
    update_L = np.array([-1.0, -0.001, 0.0, 0.999, 1.0], np.float32)

    assert q.encode(update_L, weight=1, rounding_key=KEY).view(np.int32).tolist() == [-1, -1, 0, 0, 1]


def test_rounding_goes_on_from_one_tile_to_the_next():
    """Position p is rounded by word p of the key's stream wherever the tiles end."""
    q = Quantiser(clip=1.0, bits=8, max_n=1)
    size = 2 * TILE + 17
    update_L = np.full(size, 0.4 / 127, np.float32)
    up_L = keystream(KEY, count=size) < float(np.float32(0.4 / 127)) * 127 * 2**32

    assert (q.encode(update_L, weight=1, rounding_key=KEY) == up_L).all()


def test_words_that_are_no_sum_are_refused():
    """128 words that were not unmasked: each passes with probability below one half."""
    q = Quantiser(clip=1.0, bits=27, max_n=10)
    with pytest.raises(VerificationFailed, match="beyond what 10 sites"):
        q.decode(keystream(KEY, count=128), n=10, total_weight=10)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_step_beyond_what_the_sites_can_add_up_to_is_refused(sign):
    """The limit is that of the sites in this sum, not of the largest sum."""
    q = Quantiser(clip=1.0, bits=8, max_n=10)
    assert q.decode(np.array([sign * 127 * 3], np.int32).view(np.uint32), n=3, total_weight=3) == sign
    with pytest.raises(VerificationFailed, match="1 of 1 sums"):
        q.decode(np.array([sign * (127 * 3 + 1)], np.int32).view(np.uint32), n=3, total_weight=3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, TILE + 3])
def test_a_coordinate_that_is_not_finite_is_refused(value, position):
    """Infinity is not cut to the clip: an update that diverged is no update."""
    update_L = np.zeros(TILE + 10, np.float32)
    update_L[position] = value
    with pytest.raises(BadReply, match="not finite"):
        Quantiser(clip=1.0, bits=8, max_n=3).encode(update_L, weight=1, rounding_key=KEY)


@pytest.mark.parametrize("weight", [0, -1, 101, 2**64, 1.5, float("nan"), "7", None])
def test_a_weight_out_of_range_is_refused(weight):
    q = Quantiser(clip=1.0, bits=8, max_n=3, max_weight=100)
    with pytest.raises(BadReply, match="weight"):
        q.encode(np.zeros(1, np.float32), weight=weight, rounding_key=KEY)
    with pytest.raises(BadReply, match="weight"):
        q.weight_limbs(weight)


@pytest.mark.parametrize(
    "update",
    [np.zeros(4, np.float16), np.zeros(4, np.int32), np.zeros((2, 2), np.float32)],
    ids=["float16", "int32", "two dimensions"],
)
def test_another_type_of_update_is_refused(update):
    with pytest.raises(ValueError, match="one-dimensional float32"):
        Quantiser(clip=1.0, bits=8, max_n=3).encode(update, weight=1, rounding_key=KEY)


@pytest.mark.parametrize("total", [np.zeros(4, np.int32), np.zeros((2, 2), np.uint32)])
def test_another_type_of_sum_is_refused(total):
    with pytest.raises(ValueError, match="one-dimensional uint32"):
        Quantiser(clip=1.0, bits=8, max_n=3).decode(total, n=1, total_weight=1)


@pytest.mark.parametrize(("n", "total_weight"), [(0, 1), (4, 1), (3, 0), (3, 31)])
def test_a_sum_of_too_many_sites_or_another_weight_is_refused(n, total_weight):
    q = Quantiser(clip=1.0, bits=8, max_n=3, max_weight=10)
    with pytest.raises(ValueError, match="total weight"):
        q.decode(np.zeros(1, np.uint32), n=n, total_weight=total_weight)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("clip", clip) for clip in (0.0, -1.0, np.nan, np.inf, 1e-40, 1e39)),
        *(("bits", bits) for bits in (1, 0, -3)),
        *(("max_n", n) for n in (0, -1, MAX_PARTIES + 1)),
        *(("max_weight", weight) for weight in (0, -1, 2**64)),
    ],
)
def test_a_field_out_of_range_is_refused(field, value):
    fields = {"clip": 1.0, "bits": 8, "max_n": 3, field: value}
    with pytest.raises(ValueError, match=f"^{field} = "):
        Quantiser(**fields)


def test_the_weights_of_the_largest_cohort_are_exact():
    """65,536 sites of weight 2^64 - 1: no limb wraps, and no float is near."""
    q = Quantiser(clip=1.0, bits=2, max_n=MAX_PARTIES, max_weight=2**64 - 1)
    limbs = q.weight_limbs(2**64 - 1) * np.uint32(MAX_PARTIES)

    assert q.total_weight(limbs, n=MAX_PARTIES) == MAX_PARTIES * (2**64 - 1)


@pytest.mark.parametrize(
    "limbs",
    [[0, 0, 0, 0], [2, 0, 0, 0], [301, 0, 0, 0], [0, 1, 0, 0], [3, 0, 0], []],
    ids=["nothing", "less than one each", "more than each may", "a higher limb", "three limbs", "no limb"],
)
def test_limbs_that_are_no_sum_of_weights_are_refused(limbs):
    q = Quantiser(clip=1.0, bits=8, max_n=3, max_weight=100)
    with pytest.raises(VerificationFailed, match="weights of 3 sites"):
        q.total_weight(np.array(limbs, np.uint32), n=3)


def test_a_limb_beyond_what_the_sites_can_add_up_to_is_refused():
    """Whatever the total: three limbs of 16 bits are at most 196,605."""
    q = Quantiser(clip=1.0, bits=8, max_n=3, max_weight=2**64 - 1)
    assert q.total_weight(np.array([196_605, 0, 0, 0], np.uint32), n=3) == 196_605
    with pytest.raises(VerificationFailed, match="weights of 3 sites"):
        q.total_weight(np.array([196_606, 0, 0, 0], np.uint32), n=3)


def test_clip_ratio_counts_what_is_cut():
    q = Quantiser(clip=0.5, bits=8, max_n=3)

    assert q.clip_ratio(np.array([0.5, -0.5, 0.6, -7.0, 0.0], np.float32)) == 0.4
    assert q.clip_ratio(np.zeros(0, np.float32)) == 0


def test_a_float64_update_keeps_its_digits():
    q = Quantiser(clip=1.0, bits=31, max_n=1)
    fine_L = np.array([(2.0**29 + 1) / (2**30 - 1), -(2.0**28 + 1) / (2**30 - 1)])
    encoded_L = q.encode(fine_L, weight=1, rounding_key=KEY).view(np.int32)
    assert np.abs(encoded_L - [2**29 + 1, -(2**28) - 1]).max() <= 1
    wide_L = fine_L.astype(np.float32)
    alike = q.encode(wide_L, weight=1, rounding_key=KEY)
    assert np.array_equal(alike, q.encode(wide_L.astype(np.float64), weight=1, rounding_key=KEY))


@given(
    pairs=st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=20),
    bits=st.integers(2, 31),
    key=st.binary(min_size=32, max_size=32),
)
def test_rounding_moves_no_two_updates_apart_by_more_than_one(pairs, bits, key):
    """What the sensitivity of a rounded sum rests on (docs/accounting.md, Lemma 5)."""
    q = Quantiser(clip=1.0, bits=bits, max_n=1)
    ends_2L = np.array(pairs).T
    one_L, other_L = (q.encode(end_L, weight=1, rounding_key=key).view(np.int32) for end_L in ends_2L)
    apart_L = np.abs(ends_2L[0] - ends_2L[1]) * q.half
    assert (np.abs(one_L.astype(np.int64) - other_L) <= np.floor(apart_L * (1 + 1e-12)) + 1).all()


def test_room_for_what_is_added():
    """A sum may leave the range of encodings by `tails`, and no further; headroom counts them."""
    q = Quantiser(clip=1.0, bits=8, max_n=3, tails=50)
    most = 3 * q.half + 50
    inside_L = np.array([most, -most], np.int64).astype(np.uint32)
    assert q.decode(inside_L, n=3, total_weight=3) == pytest.approx([most / q.half / 3, -most / q.half / 3])
    with pytest.raises(VerificationFailed, match="1 of 2 sums"):
        q.decode(np.array([most + 1, 0], np.int64).astype(np.uint32), n=3, total_weight=3)
    Quantiser(clip=1.0, bits=29, max_n=3, tails=(1 << 30) - 1 - 3 * ((1 << 28) - 1))
    with pytest.raises(ValueError, match="tails"):
        Quantiser(clip=1.0, bits=29, max_n=3, tails=(1 << 30) - 3 * ((1 << 28) - 1))
