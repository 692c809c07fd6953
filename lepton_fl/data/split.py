"""Holding out records to judge a model, and cutting one table into simulated sites.

N = records, U = units, S = sites.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lepton_fl.data.growing import slices
from lepton_fl.data.identity import KEY_BYTES
from lepton_fl.data.table import Table
from lepton_fl.errors import ConfigError, DataError
from lepton_fl.study import Evaluation, read_number

Mask = NDArray[np.bool_]
Index = NDArray[np.int64]


SPLIT_LABEL = b"lepton-fl/split/1\n"
"""Domain separation: a key may serve other purposes. Changing it draws every split anew."""
LEAST_UNITS = 20
"""Of a site under quantity skew: at so few, 3 sites in 1,000 would hold out nobody (test_fraction 0.25)."""
PARTITIONS = (
    "iid, dirichlet:ALPHA, label-skew:RATIO, quantity-skew:ALPHA, with ALPHA of 0.001 to 1e6 and RATIO of 1 "
    "to 1e6"
)
_BOUNDS = {"dirichlet": (1e-3, 1e6), "label-skew": (1.0, 1e6), "quantity-skew": (1e-3, 1e6)}


def split(table: Table, evaluation: Evaluation, key: bytes) -> tuple[Table, Table]:
    """Train and test tables, neither of them empty.

    split = "unit": a unit is held out, with all its records, where BLAKE2b of its `key_U` under the site's
    secret `key` falls into the lowest `test_fraction` of all hashes. The test so shows people whom the
    model has not seen. Whoever is held out at one fraction is held out at every larger one.

    split = "time": records from `cutoff` on are held out. A unit may have records on both sides, as it has
    in use.

    Guarantee: a unit's side (a record's, by time) is a function of `key`, `evaluation` and that unit (that
    record) alone. Tables that differ by one unit have train tables that differ by at most that unit, so
    what is differentially private in the train table is so in the whole. As with every refusal of a table,
    the guarantee does not extend to the DataError.

    `key` is 16 to 64 bytes that do not change from run to run: with another one, the test would judge what
    it has taught. It is secret: with it, records could be made to be held out.

    Raises:
        DataError: all units, or records, are on one side, or there is no time column.
        ValueError: the key is too short or too long.
    """
    if not 16 <= len(key) <= hashlib.blake2b.MAX_KEY_SIZE:
        raise ValueError(f"a key of {len(key)} bytes cannot draw a split: 16 to 64 are needed")
    test_N = _by_time(table, evaluation) if evaluation.split == "time" else _by_unit(table, evaluation, key)
    return table.subset(~test_N), table.subset(test_N)


def partition(table: Table, how: str, sites: int, rng: np.random.Generator) -> list[Table]:
    """One table cut into simulated sites, for simulations only. All records of a unit go to one site.

    iid: units at random, sites of equal size (to within one unit), as in the next two.

    dirichlet:ALPHA: each site's share of positive units is drawn from a Dirichlet distribution around the
    table's own, the further apart the smaller ALPHA, until one of the classes is used up (Hsu et al. 2019).

    label-skew:RATIO: the sites' shares of positive units are a geometric progression; the last site's is
    RATIO times the first one's, to within one unit at each.

    quantity-skew:ALPHA: sizes in the proportions of one draw from a symmetric Dirichlet distribution, no
    site below LEAST_UNITS; labels as they come (Li et al. 2022, "Federated Learning on Non-IID Data
    Silos", III.E).

    Raises:
        ConfigError: unknown `how`, or less than one site.
        DataError: too few units for so many sites, or too few of a class for RATIO.
    """
    kind, number = _kind(how)
    if sites < 1:
        raise ConfigError.at("simulation", "sites", found=sites, allowed="at least 1")
    least = LEAST_UNITS if kind == "quantity-skew" else 2
    if table.units < least * sites:
        raise DataError(
            f"{table.units} units cannot make {sites} sites of at least {least}",
            fix=f"--sites {max(table.units // least, 1)}",
        )
    sizes = [len(part) for part in np.array_split(np.arange(table.units), sites)]
    match kind:
        case "dirichlet":
            shares = _skewed(table.positive_U, sizes, number, rng)
        case "label-skew":
            shares = _in_progression(table.positive_U, sizes, number, rng)
        case "quantity-skew":
            spread = rng.dirichlet(np.full(sites, number)) * (table.units - least * sites)
            shares = _cut(rng.permutation(table.units), least + _whole(spread))
        case _:
            shares = _cut(rng.permutation(table.units), sizes)
    site_U = np.empty(table.units, dtype=np.int64)
    for site, share in enumerate(shares):
        site_U[share] = site
    return [table.subset(site_U[table.unit_N] == site) for site in range(sites)]


def _by_unit(table: Table, evaluation: Evaluation, key: bytes) -> Mask:
    start = hashlib.blake2b(SPLIT_LABEL, key=key)
    hashes = bytearray()
    for part in slices(table.units):
        keys = table.key_U[part].tobytes()
        for place in range(0, len(keys), KEY_BYTES):
            digest = start.copy()
            digest.update(keys[place : place + KEY_BYTES])
            hashes += digest.digest()[:8]
    hash_U = np.frombuffer(bytes(hashes), dtype=">u8")
    # Exact: a float times a power of two. No fraction above 1/2 is allowed, so it fits.
    test_U: Mask = hash_U < np.uint64(math.ceil(math.ldexp(evaluation.test_fraction, 64)))
    if test_U.all() or not test_U.any():
        held = "all" if test_U.all() else "none"
        raise DataError(
            f"of {table.units} units {held} would be held out at test_fraction {evaluation.test_fraction:g}",
            fix="more units, or another test_fraction",
        )
    return test_U[table.unit_N]


def _by_time(table: Table, evaluation: Evaluation) -> Mask:
    name, cutoff = evaluation.time_column, evaluation.cutoff_number
    if table.time_N is None or cutoff is None:
        raise DataError(f"the table was loaded without its time column {name!r}")
    test_N: Mask = table.time_N >= cutoff
    if test_N.all() or not test_N.any():
        side = "at or after" if test_N.all() else "before"
        raise DataError(
            f"column {name!r}: all {len(table)} records are {side} the cutoff {evaluation.cutoff}",
            fix="study.toml: [evaluation] cutoff, written as the cells of the column are",
        )
    return test_N


def _kind(how: str) -> tuple[str, float]:
    """The form of a partition and its number (0 where it has none)."""
    if how == "iid":
        return how, 0.0
    kind, _, text = how.partition(":")
    low, high = _BOUNDS.get(kind, (math.inf, -math.inf))
    if not low <= (number := read_number(text)) <= high:
        raise ConfigError.at("simulation", "split", found=how, allowed=PARTITIONS)
    return kind, number


def _cut(units: Index, sizes: Sequence[int] | Index) -> list[Index]:
    return np.split(units, np.cumsum(sizes)[:-1])


def _whole(parts: NDArray[np.float64]) -> Index:
    """Whole numbers with the same sum, each the part rounded down or up (largest remainders)."""
    whole = np.floor(parts).astype(np.int64)
    missing = round(float(parts.sum())) - int(whole.sum())
    whole[np.argsort(whole - parts, kind="stable")[:missing]] += 1
    return whole


def _in_progression(
    positive_U: Mask, sizes: list[int], ratio: float, rng: np.random.Generator
) -> list[Index]:
    positives = rng.permutation(np.flatnonzero(positive_U))
    negatives = rng.permutation(np.flatnonzero(~positive_U))
    size_S = np.asarray(sizes)
    weight_S = size_S * ratio ** np.linspace(0, 1, len(sizes))
    wanted_S = len(positives) * weight_S / weight_S.sum()
    positive_S = _whole(wanted_S)
    if (len(sizes) == 1 and ratio != 1) or (wanted_S > size_S).any() or not positive_S.all():
        raise DataError(
            f"{len(positives)} positive of {len(positive_U)} units cannot make {len(sizes)} sites in "
            f"ratio {ratio:g}: they would hold {wanted_S[0]:.3g} of {sizes[0]} to "
            f"{wanted_S[-1]:.3g} of {sizes[-1]}",
            fix="a RATIO nearer to 1, or another number of sites",
        )
    with_label = zip(_cut(positives, positive_S), _cut(negatives, size_S - positive_S), strict=True)
    return [np.concatenate(classes) for classes in with_label]


def _skewed(positive_U: Mask, sizes: list[int], alpha: float, rng: np.random.Generator) -> list[Index]:
    positives = rng.permutation(np.flatnonzero(positive_U))
    negatives = rng.permutation(np.flatnonzero(~positive_U))
    share = len(positives) / len(positive_U)
    units: list[Index] = [np.empty(0, dtype=np.int64)] * len(sizes)
    # In random order: the last ones served take what is left, and must not always be the same.
    for site in rng.permutation(len(sizes)):
        size = sizes[site]
        both = 0 < share < 1
        # With two classes the Dirichlet distribution is the beta distribution.
        drawn = rng.binomial(size, rng.beta(alpha * share, alpha * (1 - share))) if both else 0
        wanted = min(max(int(drawn), size - len(negatives)), len(positives))
        units[site] = np.concatenate([positives[:wanted], negatives[: size - wanted]])
        positives, negatives = positives[wanted:], negatives[size - wanted :]
    return units
