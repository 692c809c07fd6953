"""Secret sharing: what any t shares say, what t - 1 do not, and the two fields."""

import itertools
import os

import numpy as np
import pytest
from reference import primitives as plain

from lepton_fl.errors import VerificationFailed
from lepton_fl.secagg import shamir
from lepton_fl.secagg.shamir import _GF8, _GF16

SECRET = bytes(range(64))


def dealt(secret=SECRET, *, threshold=3, xs=range(1, 6), random=os.urandom):
    return dict(zip(xs, shamir.deal(secret, threshold=threshold, xs=list(xs), random=random), strict=True))


def test_vector_of_draft_mcgrew_tss_03():
    """Section 9: two shares of "test" and a zero byte."""
    shares = {1: bytes.fromhex("B9FA07E185"), 2: bytes.fromhex("F5409B4511")}

    assert shamir.reconstruct(shares, parties=2) == b"test\0"


@pytest.mark.parametrize("count", [3, 4, 5])
def test_any_three_or_more_of_five_give_the_secret(count):
    shares = dealt()
    for chosen in itertools.combinations(shares, count):
        assert shamir.reconstruct({x: shares[x] for x in chosen}, parties=5) == SECRET


def test_responders_with_low_x_of_a_large_neighbourhood():
    """The field is that of the dealing, though every x at hand would fit into the smaller one."""
    shares = dealt(threshold=200, xs=range(1, 301))
    first = {x: shares[x] for x in range(1, 201)}

    assert shamir.reconstruct(first, parties=300) == SECRET
    assert shamir.reconstruct(first, parties=255) != SECRET


@pytest.mark.parametrize("x", [1, 2, 255])
@pytest.mark.parametrize("byte", [0, 1, 0x80, 0xFF])
def test_one_share_of_two_says_nothing(x, byte):
    """Over all 256 coefficients a share takes each value once, whatever the secret."""
    share = dealt(bytes([byte]) * 256, threshold=2, xs=[x, x ^ 1 or 3], random=lambda _: bytes(range(256)))[x]

    assert sorted(share) == list(range(256))


@pytest.mark.parametrize("byte", [0, 0xA5])
def test_two_shares_of_three_say_nothing(byte):
    """Over all 65,536 pairs of coefficients two shares take each pair of values once."""
    rows = iter([bytes(range(256)) * 256, bytes(b for b in range(256) for _ in range(256))])
    shares = dealt(bytes([byte]) * 65_536, threshold=3, xs=[7, 200, 1], random=lambda _: next(rows))
    pairs = np.frombuffer(shares[7], "u1").astype(int) * 256 + np.frombuffer(shares[200], "u1")

    assert (np.bincount(pairs, minlength=65_536) == 1).all()


@pytest.mark.parametrize("symbol", [0, 0xBEEF])
def test_one_share_of_two_says_nothing_in_the_larger_field(symbol):
    """Over all 65,536 coefficients a share takes each value once, whatever the secret."""
    secret = np.full(65_536, symbol, "<u2").tobytes()
    every = np.arange(65_536, dtype="<u2").tobytes()
    share = dealt(secret, threshold=2, xs=[300, 1], random=lambda _: every)[300]

    assert (np.sort(np.frombuffer(share, "<u2")) == np.arange(65_536)).all()


def test_a_dealing_draws_as_many_bytes_as_it_needs_and_no_coefficient_is_left_out():
    """threshold - 1 rows as long as the secret; the last one changes the shares like the first."""
    asked = []

    def random(count, *, last=b"\0"):
        asked.append(count)
        return (last if len(asked) % 4 == 0 else b"\1") * count

    zero = dealt(threshold=5, random=random)
    one = dealt(threshold=5, random=lambda count: random(count, last=b"\1"))

    assert asked == [64] * 8
    assert all(zero[x] != one[x] for x in zero)


def test_too_few_shares_give_other_bytes():
    shares = dealt()

    assert shamir.reconstruct({1: shares[1], 2: shares[2]}, parties=5) != SECRET


@pytest.mark.parametrize("parties", [5, 300])
@pytest.mark.parametrize("bit", [0, 7, 511])
def test_a_wrong_bit_in_a_share_changes_its_symbol_of_the_secret_alone(parties, bit):
    shares = dealt(xs=[1, 2, parties])
    wrong = bytearray(shares[2])
    wrong[bit // 8] ^= 1 << bit % 8
    found = shamir.reconstruct({**shares, 2: bytes(wrong)}, parties=parties)
    size = 1 if parties <= 255 else 2
    changed = {position // size for position in range(64) if found[position] != SECRET[position]}

    assert changed == {bit // 8 // size}


def test_a_share_at_another_x_changes_the_secret():
    """Not so at x = 1, 2, 3, where all three count 1: a commitment names the x as well."""
    shares = dealt()

    assert shamir.reconstruct({1: shares[1], 2: shares[5], 5: shares[2]}, parties=5) != SECRET
    assert shamir.reconstruct({1: shares[1], 2: shares[3], 3: shares[2]}, parties=5) == SECRET


@pytest.mark.parametrize("parties", [5, 300])
def test_shares_of_several_secrets_may_be_joined(parties):
    one, other = dealt(xs=[1, 2, parties]), dealt(SECRET[::-1], xs=[1, 2, parties])
    joined = {x: one[x] + other[x] for x in one}

    assert shamir.reconstruct(joined, parties=parties) == SECRET + SECRET[::-1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"threshold": 0},
        {"threshold": 6},
        {"xs": []},
        {"xs": [0, 1, 2]},
        {"xs": [-1, 1, 2]},
        {"xs": [1, 2, 2]},
        {"xs": [1, 2, 65_536]},
        {"secret": b""},
        {"secret": b"odd", "xs": [1, 2, 256]},
    ],
    ids=str,
)
def test_a_dealing_that_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match=r"threshold|shares|secret"):
        dealt(**arguments)


@pytest.mark.parametrize(
    "shares",
    [{1: b"ab", 2: b"abc"}, {1: b"", 2: b""}, {1: b"abc", 2: b"abc"}],
    ids=["unequal", "empty", "half a symbol"],
)
def test_shares_of_other_lengths_are_refused(shares):
    with pytest.raises(VerificationFailed, match="lengths"):
        shamir.reconstruct(shares, parties=300)


@pytest.mark.parametrize("shares", [{}, {0: b"ab"}, {301: b"ab"}], ids=["none", "at 0", "at no party's x"])
def test_shares_that_nobody_was_dealt_are_refused(shares):
    with pytest.raises(ValueError, match="shares"):
        shamir.reconstruct(shares, parties=300)


@pytest.mark.parametrize("parties", [0, 65_536])
def test_a_neighbourhood_without_a_field_is_refused(parties):
    with pytest.raises(ValueError, match="parties"):
        shamir.reconstruct({1: b"ab"}, parties=parties)


def test_every_product_of_the_smaller_field():
    """All 65,536 of them, against polynomials in whole numbers."""
    a = np.arange(256, dtype="u1")
    table = _GF8.product(a[:, None], a[None, :])

    assert table.tolist() == [
        [plain.gf_times(x, y, plain.AES_POLYNOMIAL) for y in range(256)] for x in range(256)
    ]


def test_products_of_the_larger_field():
    """Powers of two by all 65,536: the product is linear, so these decide the rest."""
    b = np.arange(65_536, dtype="<u2")
    step = 97
    for power in range(16):
        found = _GF16.product(np.array([1 << power], "<u2"), b)
        expected = [plain.gf_times(1 << power, y, plain.POLYNOMIAL_16) for y in range(0, 65_536, step)]
        assert found[::step].tolist() == expected
        # Linear in b: the product with a sum is the sum of the products.
        assert (found[1:] ^ found[:-1] == _GF16.product(np.array([1 << power], "<u2"), b[1:] ^ b[:-1])).all()


@pytest.mark.parametrize("field", [_GF8, _GF16], ids=["GF(2^8)", "GF(2^16)"])
def test_every_inverse(field):
    a = np.arange(1, field.last + 1, dtype=field.dtype)

    assert (field.product(a, field.inverse(a)) == 1).all()


def irreducible(polynomial, degree):
    """Rabin's test for a degree that is a power of two."""

    def power_of_x(doublings):
        power = 0b10
        for _ in range(doublings):
            power = plain.gf_times(power, power, polynomial)
        return power

    def common(a, b):
        while b:
            a, b = b, plain.gf_divided(a, b)[1]
        return a

    return power_of_x(degree) == 0b10 and common(polynomial, power_of_x(degree // 2) ^ 0b10) == 1


@pytest.mark.parametrize("field", [_GF8, _GF16], ids=["GF(2^8)", "GF(2^16)"])
def test_the_polynomial_is_the_first_irreducible_one(field):
    """Three terms before five, then the lowest exponents: nobody chose it for a purpose."""

    def written(*exponents):
        return sum(1 << e for e in exponents) | 1 << field.bits | 1

    trinomials = [written(a) for a in range(1, field.bits)]
    pentanomials = [written(*e[::-1]) for e in itertools.combinations(range(1, field.bits), 3)]
    # By the largest of the three, then the next, then the least.
    pentanomials.sort()
    first = next(p for p in trinomials + pentanomials if irreducible(p, field.bits))

    assert first == 1 << field.bits | field.low
