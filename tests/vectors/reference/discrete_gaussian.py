"""The discrete Gaussian in whole numbers of Python, one draw after the other.

Written to disagree: nothing of lepton_fl, no numpy, no tables by the first bits and no tricks.
"""

from bisect import bisect_right
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import accumulate

from reference.primitives import aes256_ctr

ONE = 2**300


def weights(variance, width):
    """exp(-k^2 / (2 variance)) for k = -width ... width, in units of 1 / ONE."""
    with localcontext() as context:
        context.prec = 110
        twice = Decimal(2 * variance.numerator) / Decimal(variance.denominator)
        half = [int((-Decimal(k * k) / twice).exp() * ONE) for k in range(width + 1)]
    return half[:0:-1] + half


def half_width(variance):
    width = 0
    while width**2 < 13**2 * variance:
        width += 1
    return width


def steps(variance):
    """P(x < k) in units of 2^-128, rounded down."""
    mass = weights(variance, half_width(variance))
    below = [0, *accumulate(mass)]
    return [b * 2**128 // below[-1] for b in below[:-1]]


def levels(sigma):
    """The multiplier and the variance of each level, outermost first."""
    count = 1 if sigma <= 2**8 else 2 if sigma <= 2**14 else 3
    m = 0
    while 2 * (m + 1) ** count <= sigma:
        m += 1
    inner = range(count - 1)
    last = (Fraction(sigma) ** 2 - sum(m ** (2 * j) * (2 * m) ** 2 for j in inner)) / m ** (2 * len(inner))
    return m, [Fraction((2 * m) ** 2) for _ in inner] + [last]


def draws(variance, count, key, lane):
    table, width = steps(variance), half_width(variance)
    with_a_step = {step >> 112 for step in table}
    first, further = (2 * lane) << 64, (2 * lane + 1) << 64
    out = []
    for i in range(count):
        at = 2 * i % 16
        u = int.from_bytes(aes256_ctr(key, first + 2 * i // 16, 16)[at : at + 2], "little") << 112
        if u >> 112 in with_a_step:
            block = aes256_ctr(key, further, 16)
            u += int.from_bytes(block[:6], "little") << 64
            u += int.from_bytes(block[8:], "little")
            further += 1
        out.append(bisect_right(table, u) - 1 - width)
    return out


def sample(sigma, count, key):
    m, variances = levels(sigma)
    total = [0] * count
    for lane, variance in enumerate(variances):
        parts = draws(variance, count, key, lane)
        total = [sum_ + m**lane * part for sum_, part in zip(total, parts, strict=True)]
    return total
