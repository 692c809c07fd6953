"""Who masks with whom, and who holds whose shares.

Up to 128 sites everybody does with everybody. Above, each site draws `degree` others at random: they and
the site itself hold the shares of its secrets, and it masks with them and with all who drew it. The draw
follows from a nonce in the site's advert and from the context, so every other site can check it; neither
the server nor colluding sites have a say in who holds the shares of an honest one.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import comb, exp2, inf, lgamma, log, log2

import numpy as np

from lepton_fl.secagg.encoding import digest
from lepton_fl.secagg.masks import keystream

COMPLETE = 128
"""Largest cohort in which everybody masks with everybody."""
LEAST_SHARE = 20
"""Bounds are taken for at least n / 20 colluders and as many dropouts, whatever a study says: with fewer, the
degree would be so small that a server could cut small groups out of the graph."""
PRIVACY_BITS = 40
"""2^-40: largest probability that some honest site has so many colluders among its holders that two sets of
survivors could both be opened."""
FAILURE_BITS = 20
"""2^-20: largest probability that some site's secret cannot be rebuilt, with the tolerated number of sites
gone at random."""


def rarer(bits: int, *, n: int, population: int, marked: int, drawn: int, least: int) -> bool:
    """Whether n P[X >= least] <= 2^-bits for the number X of marked ones among those drawn, in whole numbers.

    Drawn without replacement: X is hypergeometric. `n` is the union bound's.
    """
    rest = population - marked
    hit = max(least, 0, drawn - rest)
    if hit > min(drawn, marked):
        return True
    term = ways = comb(marked, hit) * comb(rest, drawn - hit)
    while hit < min(drawn, marked):
        term = term * (marked - hit) * (drawn - hit) // ((hit + 1) * (rest - drawn + hit + 1))
        ways += term
        hit += 1
    return n * ways << bits <= comb(population, drawn)


def is_safe(n: int, degree: int, threshold: int, *, colluders: int) -> bool:
    """Whether 2 t > degree + 1 + c for every site, of whose holders c collude, but for 2^-40."""
    least = 2 * threshold - degree - 1
    return rarer(PRIVACY_BITS, n=n, population=n - 1, marked=colluders, drawn=degree, least=least)


def is_live(n: int, degree: int, threshold: int, *, dropouts: int) -> bool:
    """Whether t of the degree + 1 holders of every site stay, itself among them, but for 2^-20."""
    least = degree + 2 - threshold
    return rarer(FAILURE_BITS, n=n, population=n - 1, marked=dropouts, drawn=degree, least=least)


def hides(n: int, degree: int, threshold: int, *, colluders: int) -> bool:
    """Whether `smallest_group` is n / 10 or more."""
    # Most that do not fail at the largest sizes.
    sizes = range(-(-n // 10) - 1, 1, -1)
    return _none(n, degree, colluders, least=2 * threshold - 1 - degree, sizes=sizes)


def is_single(n: int, degree: int, threshold: int, *, colluders: int) -> bool:
    """Whether every sum takes more than half of the honest sites to open, but for 2^-40.

    A site opens shares once threshold - c of its honest holders, itself among them, have confirmed what it
    has; so of the holders that it drew, threshold - 1 are colluders or honest sites that confirm alike. A
    site releases once a round: two such groups of more than half each cannot be.
    """
    sizes = range((n - colluders) // 2, 1, -1)
    return _none(n, degree, colluders, least=threshold - 1, sizes=sizes)


@functools.lru_cache(maxsize=256)
def degree_and_threshold(n: int, *, colluders: int, dropouts: int) -> tuple[int, int] | None:
    """The smallest even degree with a threshold that is safe, live, single and hides; and the smallest such.

    A site's secret has degree + 1 holders, itself among them. None where no degree below n - 1 will do: then
    the graph has to be complete.
    """
    for degree in range(2, n - 1, 2):
        # Safe rises with the threshold, live falls.
        safe = functools.partial(is_safe, n, degree, colluders=colluders)
        threshold = bisect.bisect_left(range(degree + 2), True, lo=degree // 2 + 1, key=safe)
        while threshold <= degree + 1 and is_live(n, degree, threshold, dropouts=dropouts):
            if all(holds(n, degree, threshold, colluders=colluders) for holds in (hides, is_single)):
                return degree, threshold
            threshold += 1
    return None


@functools.lru_cache(maxsize=256)
def smallest_group(n: int, degree: int, threshold: int, *, colluders: int) -> int:
    """How many honest sites an opened update is summed with at least, itself included, in a drawn graph.

    A server may leave out whom it likes once it has seen the graph, and withhold envelopes. But a site masks
    only with `threshold` of its holders at hand, and its self-mask is opened by `threshold` of them: those
    who did both, are honest, and are others than itself, number 2 threshold - 1 - degree - c or more, if c
    of its holders collude. Each of them hides the site as long as it is not in the sum itself. So in a group
    of s honest sites that is cut off from the others, every site has 2 threshold - 1 - degree of the
    holders that it drew among the group and the colluders. This returns the largest size below which there
    is no such group, but for a probability of 2^-40. (For s = 1 it is the bound of `is_safe`.)
    """
    honest, least = n - colluders, 2 * threshold - 1 - degree
    terms = (_group(n, degree, colluders, least=least, size=size) for size in range(2, honest))
    for size, total in enumerate(itertools.accumulate(terms), start=2):
        if total > 2.0**-PRIVACY_BITS:
            return size
    return honest


def _none(n: int, degree: int, colluders: int, *, least: int, sizes: Iterable[int]) -> bool:
    """Whether no group (see `_group`) of these sizes is closed, but for 2^-40."""
    terms = (_group(n, degree, colluders, least=least, size=size) for size in sizes)
    return all(total <= 2.0**-PRIVACY_BITS for total in itertools.accumulate(terms))


def _group(n: int, degree: int, colluders: int, *, least: int, size: int) -> float:
    """Bound on the probability that some group is closed: C(honest, size) P[least]^size.

    A group of `size` honest sites is closed if each has `least` of the holders that it drew, or more, among
    the group and the colluders.
    """
    each = _log2_tail(n - 1, size - 1 + colluders, degree, least)
    return exp2(min(_log2_comb(n - colluders, size) + size * each, 0.0))


def _log2_comb(n: int, k: int) -> float:
    return (lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)) / log(2)


def _log2_tail(population: int, marked: int, drawn: int, least: int) -> float:
    hits = range(max(least, drawn - (population - marked)), min(drawn, marked) + 1)
    terms = [
        _log2_comb(marked, hit) + _log2_comb(population - marked, drawn - hit) - _log2_comb(population, drawn)
        for hit in hits
    ]
    if not terms:
        return -inf
    top = max(terms)
    return top + log2(sum(2.0 ** (term - top) for term in terms))


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Holders by the site that drew them. In a complete graph everybody holds for everybody."""

    parties: tuple[int, ...]
    """The cohort, ascending."""
    degree: int
    """Others that a site draws; n - 1 in a complete graph."""
    threshold: int
    """Shares that rebuild a secret."""
    _drawn: dict[bytes, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def complete(self) -> bool:
        return self.degree == len(self.parties) - 1

    def holders(self, party: int, nonce: bytes, context: bytes, suite: str) -> tuple[int, ...]:
        """Who holds shares of this party's secrets, itself among them, ascending.

        The x of a share is 1 + its holder's place in here.
        """
        if self.complete:
            return self.parties
        key = digest(suite, "holders", context, party, nonce)
        if key not in self._drawn:
            self._drawn[key] = _draw(self.parties, party, key, self.degree)
        return self._drawn[key]


def _draw(parties: Sequence[int], party: int, key: bytes, degree: int) -> tuple[int, ...]:
    """`party` and `degree` others: those whose 64-bit words of the key's keystream are smallest."""
    others = np.array([other for other in parties if other != party], np.uint64)
    words = keystream(key, count=2 * len(others)).view("<u8")
    # Equal words go to the smaller party, which comes first: the sort is stable.
    chosen = others[np.argsort(words, kind="stable")[:degree]]
    return tuple(sorted([party, *chosen.tolist()]))
