"""Holding out records to judge a model, and cutting one table into simulated sites.

N = records, U = units.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lepton_fl.data.table import Table
from lepton_fl.errors import ConfigError, DataError
from lepton_fl.study import Evaluation

Mask = NDArray[np.bool_]
Index = NDArray[np.int64]


def split(table: Table, evaluation: Evaluation, rng: np.random.Generator) -> tuple[Table, Table]:
    """Train and test tables, neither of them empty.

    split = "unit": `test_fraction` of the units, at random, with all their records, so the test
    shows people whom the model has not seen. Units with a positive record and units without are
    drawn apart; where the table has two of each, both sides get both.

    split = "time": the latest `test_fraction` of the records; those of one instant stay together. A
    unit may have records on both sides, as it has in use.

    Raises:
        DataError: fewer than two units, all records of one instant, or no time column.
    """
    test_N = (
        _by_time(table, evaluation)
        if evaluation.split == "time"
        else _by_unit(table, evaluation.test_fraction, rng)
    )
    return table.subset(~test_N), table.subset(test_N)


def partition(table: Table, how: str, sites: int, rng: np.random.Generator) -> list[Table]:
    """One table cut into simulated sites of nearly equal numbers of units, for simulations only.

    how = "iid": units at random. how = "dirichlet:ALPHA": each site's share of positive units is
    drawn from a Dirichlet distribution around the table's own, the further apart the smaller ALPHA,
    until one of the classes is used up (Hsu et al. 2019). All records of a unit go to one site.

    Raises:
        ConfigError: unknown `how`, or less than one site.
        DataError: fewer than two units for each site.
    """
    alpha = _alpha(how)
    if sites < 1:
        raise ConfigError.at("partition", "sites", found=sites, allowed="at least 1")
    if table.units < 2 * sites:
        raise DataError(
            f"{table.units} units cannot make {sites} sites of at least 2",
            fix=f"--sites {max(table.units // 2, 1)}",
        )
    sizes = [len(part) for part in np.array_split(np.arange(table.units), sites)]
    if alpha is None:
        shares = np.split(rng.permutation(table.units), np.cumsum(sizes)[:-1])
    else:
        shares = _skewed(_positive_units(table), sizes, alpha, rng)
    site_U = np.empty(table.units, dtype=np.int64)
    for site, share in enumerate(shares):
        site_U[share] = site
    return [table.subset(site_U[table.unit_N] == site) for site in range(sites)]


def _positive_units(table: Table) -> Mask:
    positive_U = np.zeros(table.units, dtype=bool)
    positive_U[table.unit_N[table.y_N == 1]] = True
    return positive_U


def _by_unit(table: Table, fraction: float, rng: np.random.Generator) -> Mask:
    if table.units < 2:
        raise DataError(f"{table.units} units cannot be split into train and test")
    positive_U = _positive_units(table)
    test_U = np.zeros(table.units, dtype=bool)
    for stratum in (np.flatnonzero(positive_U), np.flatnonzero(~positive_U)):
        # A single unit of its kind is worth more to training than to the test.
        held = min(max(_nearest(fraction * len(stratum)), 1), len(stratum) - 1)
        test_U[rng.permutation(stratum)[: max(held, 0)]] = True
    if not test_U.any():
        # One unit of each kind: the test gets the one without a positive.
        test_U[np.flatnonzero(~positive_U)] = True
    return test_U[table.unit_N]


def _by_time(table: Table, evaluation: Evaluation) -> Mask:
    if table.time_N is None:
        raise DataError(f"the table was loaded without its time column {evaluation.time_column!r}")
    held = min(max(_nearest(evaluation.test_fraction * len(table)), 1), len(table) - 1)
    start = np.sort(table.time_N)[len(table) - held]
    test_N: Mask = table.time_N >= start
    if test_N.all():
        test_N = table.time_N > start
    if not test_N.any():
        raise DataError(
            f"column {evaluation.time_column!r}: all {len(table)} records are of one instant, "
            "so none is the latest"
        )
    return test_N


def _alpha(how: str) -> float | None:
    """Concentration of a Dirichlet partition; None for iid."""
    if how == "iid":
        return None
    name, _, text = how.partition(":")
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if name != "dirichlet" or not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError.at("partition", "how", found=how, allowed="iid, dirichlet:ALPHA with ALPHA above 0")
    return alpha


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


def _nearest(number: float) -> int:
    # Not round(), which sends 2.5 to 2 and 3.5 to 4.
    return math.floor(number + 0.5)
