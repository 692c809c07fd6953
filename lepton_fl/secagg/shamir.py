"""Shamir's secret sharing over GF(2^8), or GF(2^16) where there are more than 255 shares.

A secret is cut into symbols, one byte each, or two in little-endian order, and every symbol is shared by a
polynomial of its own: the share at x of the symbol s is s + c_1 x + ... + c_(t-1) x^(t-1), with the c_k
uniform, the last one not excepted. Shares are as long as the secret.

The fields' polynomials are the first irreducible ones of their degree in the usual order of fewest terms,
then lowest exponents (Seroussi, HPL-98-135): x^8 + x^4 + x^3 + x + 1, which is AES's, and
x^16 + x^5 + x^3 + x + 1. GF(2^8) shares are those of draft-mcgrew-tss-03.

S = symbols of a secret, T = the threshold, N = shares that are dealt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lepton_fl.errors import VerificationFailed

Symbols: TypeAlias = NDArray[Any]
"""uint8 or little-endian uint16, as the field has it."""


@dataclass(frozen=True, slots=True)
class _Field:
    bits: int
    low: int
    """The polynomial without its first term."""
    dtype: DTypeLike

    @property
    def symbol_bytes(self) -> int:
        return self.bits // 8

    @property
    def last(self) -> int:
        """Largest element, and so the largest x."""
        return (1 << self.bits) - 1

    def symbols(self, data: bytes) -> Symbols:
        return np.frombuffer(data, self.dtype)

    def product(self, a: Symbols, b: Symbols) -> Symbols:
        """Element by element, broadcast.

        Guarantee: the same instructions at the same addresses whatever the elements are, so that secrets
        may be multiplied: shifts, and a mask of all ones or none for each bit. Tables of logarithms would
        be read at secret places.
        """
        total: Symbols = np.zeros(np.broadcast_shapes(a.shape, b.shape), self.dtype)
        for _ in range(self.bits):
            total ^= a & -(b & 1)
            b = b >> 1
            a = (a << 1) ^ (-(a >> (self.bits - 1)) & self.low)
        return total

    def inverse(self, a: Symbols) -> Symbols:
        """a^(2^bits - 2)."""
        power = a
        for _ in range(self.bits - 2):
            power = self.product(self.product(power, power), a)
        return self.product(power, power)


_GF8 = _Field(8, 0x1B, np.dtype("u1"))
_GF16 = _Field(16, 0x2B, np.dtype("<u2"))


def _field(parties: int) -> _Field:
    """The smaller field that has an x for each party."""
    for field in (_GF8, _GF16):
        if 1 <= parties <= field.last:
            return field
    raise ValueError(f"shares for {parties} parties: 1 to {_GF16.last}")


def deal(secret: bytes, *, threshold: int, xs: Sequence[int], random: Callable[[int], bytes]) -> list[bytes]:
    """The shares of a secret at each of `xs`, in that order; the field follows from the largest x.

    Guarantee: any `threshold` of them give the secret back; fewer are independent of it, whatever the
    computing power of who holds them, if `random(n)` gives n uniform bytes, as os.urandom does. The time
    taken depends on public sizes alone.

    Raises:
        ValueError: `threshold` is not in 1 ... len(xs), xs are not distinct or not in 1 ... 65,535, or the
            secret is empty or, for an x above 255, of an odd length.
    """
    field = _field(max(xs, default=0))
    _check_xs(xs)
    if not 1 <= threshold <= len(xs):
        raise ValueError(f"threshold {threshold} of {len(xs)} shares")
    if not secret or len(secret) % field.symbol_bytes:
        raise ValueError(f"a secret of {len(secret)} bytes in symbols of {field.symbol_bytes}")
    coefficients_TS = np.stack(
        [field.symbols(secret), *(field.symbols(random(len(secret))) for _ in range(threshold - 1))]
    )
    powers_NT = _powers(field, tuple(xs), threshold)
    terms_NTS = field.product(coefficients_TS, powers_NT[:, :, None])
    return [share_S.tobytes() for share_S in np.bitwise_xor.reduce(terms_NTS, axis=1)]


def reconstruct(shares: Mapping[int, bytes], *, parties: int) -> bytes:
    """The secret of which `shares` are the shares, by x.

    `parties` is the largest x that was dealt to, which names the field: the x at hand may all be smaller.

    Guarantee: with `threshold` shares or more, all of one dealing, the secret; with fewer, or a wrong one
    among them, other bytes without a sign. Whoever needs to know has a commitment to compare with. Shares
    of several secrets at the same x may be joined end to end, and so are the secrets.

    Raises:
        VerificationFailed: the shares are of different lengths, or of none that the field has.
        ValueError: there are none, or an x is not in 1 ... `parties`.
    """
    field = _field(parties)
    xs = tuple(sorted(shares))
    _check_xs(xs)
    if not xs or xs[-1] > parties:
        raise ValueError(f"shares at x = {xs[-1:]}: at least one, and none above {parties}")
    lengths = {len(share) for share in shares.values()}
    if len(lengths) != 1 or 0 in lengths or lengths.pop() % field.symbol_bytes:
        raise VerificationFailed("shares are of other lengths than their secret")
    share_TS = np.stack([field.symbols(shares[x]) for x in xs])
    weight_T1 = _lagrange(field, xs)[:, None]
    secret_S: Symbols = np.bitwise_xor.reduce(field.product(weight_T1, share_TS), axis=0)
    return secret_S.tobytes()


@functools.lru_cache(maxsize=64)
def _powers(field: _Field, xs: tuple[int, ...], count: int) -> Symbols:
    """x^0 ... x^(count - 1) of each x; public, and the same in every round of a cohort."""
    x_N = np.array(xs, field.dtype)
    power_NT: Symbols = np.ones((len(xs), count), field.dtype)
    for exponent in range(1, count):
        power_NT[:, exponent] = field.product(power_NT[:, exponent - 1], x_N)
    return power_NT


@functools.lru_cache(maxsize=64)
def _lagrange(field: _Field, xs: tuple[int, ...]) -> Symbols:
    """What each share counts in the value at 0; public, and the same for every secret of these responders."""
    x_T = np.array(xs, field.dtype)
    above_T, below_T = np.ones_like(x_T), np.ones_like(x_T)
    for position, x in enumerate(x_T):
        others_T = x_T ^ x
        others_T[position] = 1
        below_T = field.product(below_T, others_T)
        factor_T = np.full_like(x_T, x)
        factor_T[position] = 1
        above_T = field.product(above_T, factor_T)
    return field.product(above_T, field.inverse(below_T))


def _check_xs(xs: Sequence[int]) -> None:
    # 0 is where the secret is.
    if len(set(xs)) != len(xs) or any(x < 1 for x in xs):
        raise ValueError("shares are at distinct x, none below 1")
