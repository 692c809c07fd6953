"""Laws of masks, fixed point and secret sharing."""

from fractions import Fraction

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from reference import primitives as plain

from lepton_fl.secagg import masks, shamir
from lepton_fl.secagg.fixedpoint import Quantiser

KEYS = st.binary(min_size=32, max_size=32)
SIGNED_KEYS = st.lists(st.tuples(st.sampled_from([1, -1]), KEYS), max_size=4)
VECTORS = arrays.arrays(np.uint32, st.integers(0, 70))


@given(VECTORS, SIGNED_KEYS, st.integers(0, 2**40), st.integers(1, 80), st.integers(1, 3))
@settings(max_examples=60)
def test_masks_are_those_of_the_plain_integers_for_any_tile_and_threads(vector_L, keys, start, tile, threads):
    expected = plain.masked(vector_L.tolist(), keys, start)
    masks.apply(vector_L, keys, start=start, tile=tile, threads=threads)

    assert vector_L.tolist() == expected


@given(VECTORS, SIGNED_KEYS, st.integers(0, 2**40), st.data())
@settings(max_examples=60)
def test_a_vector_may_be_masked_in_parts_and_the_keys_in_any_order(vector_L, keys, start, data):
    whole_L = vector_L.copy()
    masks.apply(whole_L, keys, start=start)
    cut = data.draw(st.integers(0, len(vector_L)))
    masks.apply(vector_L[cut:], data.draw(st.permutations(keys)), start=start + cut)
    masks.apply(vector_L[:cut], data.draw(st.permutations(keys)), start=start)

    assert (vector_L == whole_L).all()


@given(VECTORS, SIGNED_KEYS, st.integers(1, 80))
@settings(max_examples=40)
def test_a_mask_is_taken_away_by_its_negative(vector_L, keys, tile):
    masked_L = vector_L.copy()
    masks.apply(masked_L, keys, tile=tile)
    masks.apply(masked_L, [(-sign, key) for sign, key in keys])

    assert (masked_L == vector_L).all()


@given(arrays.arrays(np.uint32, st.tuples(st.integers(2, 6), st.integers(1, 40))), st.randoms())
@settings(max_examples=40)
def test_pairwise_masks_cancel_in_the_sum(update_NL, random):
    """The lower of a pair adds, the higher takes away: the sum of the masked is the sum of the plain."""
    n = len(update_NL)
    masked_NL = update_NL.copy()
    for low in range(n):
        for high in range(low + 1, n):
            key = random.randbytes(32)
            masks.apply(masked_NL[low], [(1, key)])
            masks.apply(masked_NL[high], [(-1, key)])

    assert (masked_NL.sum(0, dtype=np.uint32) == update_NL.sum(0, dtype=np.uint32)).all()


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
CLIPS = st.floats(2.0**-100, 2.0**100)


@st.composite
def cohorts(draw):
    """A quantiser, and the updates, weights and rounding keys of some sites."""
    max_n = draw(st.integers(1, 300))
    q = Quantiser(
        clip=draw(CLIPS),
        bits=draw(st.integers(2, 31 - (max_n - 1).bit_length())),
        max_n=max_n,
        max_weight=draw(st.sampled_from([1, 2, 1000, 2**40 + 1, 2**64 - 1])),
    )
    n, size = draw(st.integers(1, min(max_n, 5))), draw(st.integers(1, 6))
    near = st.floats(-2.0, 2.0).map(lambda x: float(np.float32(x * q.clip)))
    coordinate = st.one_of(
        FINITE, near, st.sampled_from([q.clip, -q.clip]).map(lambda x: float(np.float32(x)))
    )
    updates = [
        np.array(draw(st.lists(coordinate, min_size=size, max_size=size)), np.float32) for _ in range(n)
    ]
    weights = [draw(st.integers(1, q.max_weight)) for _ in range(n)]
    return q, updates, weights, [draw(KEYS) for _ in range(n)]


def cut(q, x):
    return min(max(Fraction(float(x)), -Fraction(q.clip)), Fraction(q.clip))


SLACK = Fraction(1, 2**20)
"""Of a step: what float64 leaves out."""


@given(cohorts())
def test_every_integer_is_next_to_the_exact_product_and_within_half(cohort):
    q, updates, weights, keys = cohort
    for update_L, weight, key in zip(updates, weights, keys, strict=True):
        encoded_L = q.encode(update_L, weight=weight, rounding_key=key).view(np.int32)
        for x, found in zip(update_L, encoded_L.tolist(), strict=True):
            exact = cut(q, x) * q.half * weight / (Fraction(q.clip) * q.max_weight)

            assert abs(found - exact) < 1 + SLACK
            assert abs(found) <= q.half


@given(cohorts())
def test_decoding_the_sum_is_within_its_bound_of_the_weighted_mean(cohort):
    q, updates, weights, keys = cohort
    n, total = len(updates), sum(weights)
    sum_L = np.zeros(len(updates[0]), np.uint32)
    for update_L, weight, key in zip(updates, weights, keys, strict=True):
        sum_L += q.encode(update_L, weight=weight, rounding_key=key)
    bound = n * Fraction(q.clip) * q.max_weight / (q.half * total) * (1 + SLACK)
    for found, *xs in zip(q.decode(sum_L, n=n, total_weight=total), *updates, strict=True):
        mean = sum(cut(q, x) * weight for x, weight in zip(xs, weights, strict=True)) / total

        assert abs(Fraction(float(found)) - mean) <= bound


@given(st.integers(1, 65_536), st.data())
@example(65_536, None)
@example(1, None)
def test_no_cohort_can_overflow(max_n, data):
    """The guarantee as a statement of whole numbers, for the most bits that the constructor takes."""
    most = 31 - (max_n - 1).bit_length()
    bits = data.draw(st.integers(2, most)) if data else most
    q = Quantiser(clip=1.0, bits=bits, max_n=max_n)

    assert max_n * (2**bits - 1) < 2**32
    assert max_n * q.half < 2**30
    assert 2 * max_n * q.half + 1 <= 2**31, "more than half of all words would pass for sums"


@given(st.lists(st.integers(1, 2**64 - 1), min_size=1, max_size=20))
def test_weights_add_up_exactly(weights):
    q = Quantiser(clip=1.0, bits=8, max_n=100, max_weight=2**64 - 1)
    limbs = np.sum([q.weight_limbs(weight) for weight in weights], axis=0, dtype=np.uint32)

    assert q.total_weight(limbs, n=len(weights)) == sum(weights)


@given(
    st.binary(min_size=1, max_size=24), st.integers(1, 6), st.sampled_from([9, 255, 256, 65_535]), st.data()
)
@settings(max_examples=60)
def test_any_threshold_of_shares_gives_the_secret(half, threshold, parties, data):
    secret = half + half[::-1]
    xs = [*data.draw(st.lists(st.integers(1, parties - 1), min_size=5, max_size=7, unique=True)), parties]
    coefficients = [
        data.draw(st.binary(min_size=len(secret), max_size=len(secret))) for _ in range(threshold - 1)
    ]
    rows = iter(coefficients)
    shares = shamir.deal(secret, threshold=threshold, xs=xs, random=lambda _: next(rows))
    chosen = data.draw(st.lists(st.sampled_from(xs), min_size=threshold, unique=True))
    at = dict(zip(xs, shares, strict=True))

    assert shares == plain.shamir_deal(secret, coefficients, xs)
    assert shamir.reconstruct({x: at[x] for x in chosen}, parties=parties) == secret
