"""What both ends of a secure round work out for themselves, from the study and who is in the round.

Nothing here is sent: a site that was told something else than the others computes another context, and no
round is finished with it (docs/protocol.md).

L = coordinates of an update, all parameters of the model one after another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError, PolicyRefused
from lepton_fl.privacy.accounting import DiscreteGaussian
from lepton_fl.privacy.discrete_gaussian import distance
from lepton_fl.privacy.guarantee import Exposure, Guarantee
from lepton_fl.privacy.lattice import Lattice
from lepton_fl.secagg.context import Cohort, Context, model_digest
from lepton_fl.secagg.encoding import digest
from lepton_fl.secagg.errors import Phase, PolicyViolation
from lepton_fl.secagg.fixedpoint import Quantiser, most_bits
from lepton_fl.secagg.identity import FIRST_PARTY, Roster
from lepton_fl.secagg.keys import Suite
from lepton_fl.study import Study

if TYPE_CHECKING:
    from lepton_fl.tasks.arrays import Arrays  # with torch, for which a look at a study must not wait

TRAIN_SUM = "train"
"""Kind of the rounds that sum updates."""
EVALUATE_SUM = "evaluate"
"""Kind of the one round that sums histograms of scores; its number is `Study.evaluation_round`."""
COUNT_STEPS = 16
"""Integers that a count has where noise is added to it, so that noise on integers can be fine."""
_GROUPS = "lepton-fl/secagg/groups/1"


def groups_of(study: Study, kind: str, names: Sequence[str], round: int) -> list[tuple[str, ...]]:
    """The cohort of a round in the groups whose parts become one sum each. Histograms: all sites in one.

    Groups of updates have `group_size` sites or more, as even as can be: none has more than one over another.
    Drawn anew every round, by a hash of what was agreed before the run (study, names) and of the round's
    number, so that neither the server nor a site chooses with whom a site is grouped once the cohort stands.
    Whoever leaves the cohort changes the groups of the rounds after it: what is promised must hold for every
    partition (docs/robustness.md).
    """
    count = 1 if kind == EVALUATE_SUM else study.groups(len(names))
    if count == 1:
        return [tuple(names)]
    drawn = sorted(names, key=lambda name: digest(_GROUPS, study.id, round, name))
    return [tuple(drawn[first::count]) for first in range(count)]


def resumes(study: Study, kind: str) -> bool:
    """Whether a round of this kind leaves what the next can resume: a next one, and of the same sites."""
    secure = study.secure_aggregation
    return kind == TRAIN_SUM and secure.sessions and secure.group_size is None


def group_sizes(study: Study, cohort: int) -> set[int]:
    """How many sites the groups of a cohort of this size have: one number, or two that follow each other."""
    count = study.groups(cohort)
    return {cohort // count, -(-cohort // count)}


def smallest_sum(study: Study) -> int:
    """Sites in the smallest sum of the smallest cohort: what is known before a cohort is formed."""
    return min(group_sizes(study, study.secure_aggregation.min_sites))


def group_with(site: str, study: Study, kind: str, names: Sequence[str], round: int) -> tuple[str, ...]:
    """The sites, of a cohort, with which this one's part is added up."""
    return next(group for group in groups_of(study, kind, names, round) if site in group)


def cohort_of(study: Study, names: Sequence[str], roster: Roster) -> Cohort:
    """The sites of one sum, `names` of them, as the protocol sees them.

    Raises:
        PolicyViolation: a name is on no member of the roster, or so few sites cannot be protected against
            the study's colluders.
    """
    by_name = {member.name: member.party for member in roster.members}
    unknown = sorted(set(names) - set(by_name))
    if unknown:
        raise PolicyViolation(
            f"{unknown[0]} is not a member in roster {roster.version}", phase=Phase.ADVERTISE
        )
    return _cohort(study, sorted(by_name[name] for name in names))


@lru_cache(maxsize=64)
def context_of(
    study: Study,
    *,
    names: tuple[str, ...],
    run: str,
    kind: str,
    round: int,
    roster: Roster,
    parameters: int,
    model: bytes,
) -> Context:
    """The first attempt at one sum; `parameters` is how many the model has, `model` its `digest_of`.

    Raises:
        PolicyViolation: as `cohort_of`, or the study has no sum of this kind.
    """
    cohort = cohort_of(study, names, roster)
    if kind == TRAIN_SUM:
        coordinates, quantiser = parameters, update_quantiser(study, cohort.n, parameters)
    elif kind == EVALUATE_SUM and (bins := study.score_bins):
        coordinates, quantiser = 2 * bins, count_quantiser(study, cohort.n)
        if study.evaluation.release == "exact":
            # Without noise what is opened is the whole cohort's, or nothing.
            cohort = replace(cohort, min_sites=cohort.n)
    else:
        raise PolicyViolation(f"study {study.study.name} sums no {kind!r}", phase=Phase.ADVERTISE)
    return Context(
        run=bytes.fromhex(run),
        kind=kind,
        round=round,
        attempt=1,
        cohort=cohort,
        coordinates=coordinates,
        quantiser=quantiser,
        weighted=False,
        model=model,
        study=bytes.fromhex(study.id),
        roster=roster.version,
        suite=Suite(f"lepton-fl/secagg/{study.secure_aggregation.suite}"),
    )


def update_quantiser(study: Study, sites: int, coordinates: int) -> Quantiser:
    """How updates become integers, in a sum over at most so many sites.

    Under shared noise on the lattice that the noise is for; else with all the bits there is room for.

    Raises:
        ConfigError: 32 bits have no room for the noise.
    """
    lattice = shared_lattice(study, sites, coordinates)
    if lattice is not None:
        # Updates are gradients divided by the batch.
        return lattice.quantiser(divisor=lattice.expected_batch)
    return Quantiser(clip=update_bound(study), bits=most_bits(sites), max_n=sites)


def shared_lattice(study: Study, sites: int, coordinates: int) -> Lattice | None:
    """The integers of shared noise in a sum over so many sites; None where noise is not shared.

    Raises:
        ConfigError: 32 bits have no room for them.
    """
    guarantee = Guarantee.of(study)
    if guarantee.event is None or study.privacy.noise != "shared":
        return None
    return guarantee.lattice(coordinates=coordinates, cohort=sites)


def update_bound(study: Study) -> float:
    """Largest magnitude of a coordinate of a site's update; beyond it a site cuts its own.

    Public, and generous: no coordinate reaches it but by the noise's tails or by a model that runs away. A
    power of two, so that every platform has the same.
    """
    event, train, clip = Guarantee.of(study).event, study.train, study.privacy.clip
    gradient = clip if event is not None else 1.0
    if event is not None:
        gradient += 4 * event.noise_multiplier * clip / (train.expected_batch or 1.0)
    if train.strategy == "lockstep":
        step = 2 * gradient
    else:
        # Adam's steps are of the size of the rate whatever the gradient is, the first ones up to 1 / (1 - b).
        step = train.lr * (10.0 if train.optimizer == "adam" else 2 * gradient)
    fraction, exponent = math.frexp(step * train.local_steps)
    # The next power of two, exactly; a platform's logarithm may be off at one.
    return math.ldexp(1.0, exponent - (fraction == 0.5))


def count_quantiser(study: Study, sites: int) -> Quantiser:
    """How counts become integers, in a sum over at most so many sites: a power of two for each, so exactly.

    Raises:
        PolicyViolation: the noise on them would need more room than 32 bits leave.
    """
    noise = count_noise(study, sites)
    quantiser = Quantiser.at_scale(COUNT_STEPS if noise else 1, max_n=sites)
    if 16 * noise > quantiser.half // 2:
        raise PolicyViolation(
            f"noise of {noise:.0f} integers on the counts of each of {sites} sites has no room beside them; "
            "raise evaluation.share",
            phase=Phase.ADVERTISE,
        )
    return quantiser


def encode_counts(counts_2B: NDArray[np.int64], quantiser: Quantiser) -> NDArray[np.int64]:
    """A site's counts as integers, one after another: [L]. Exact up to half of the range, where they are cut.

    The other half is for the noise, which is added to these and cut nowhere.
    """
    steps = round(quantiser.half / quantiser.clip)
    return np.minimum(counts_2B.ravel(), quantiser.half // 2 // steps) * steps


def decode_counts(mean_L: NDArray[np.float64], quantiser: Quantiser, sites: int) -> NDArray[np.float64]:
    """The sum of the counts [2, B] from the mean of so many encodings: exactly what was added up."""
    steps = round(quantiser.half / quantiser.clip)
    # The mean is within 2^-50 of an integer over `sites * steps`, and that integer is below 2^30.
    return (np.rint(mean_L * sites * steps) / steps).reshape(2, -1)


def count_noise(study: Study, sites: int) -> float:
    """Parameter (standard deviation) of one site's noise on each count, in integers; 0 for exact counts.

    **Formal guarantee.** Let m shares be unknown to whoever looks: `Guarantee.shares` at least. Then the
    opened sum is within a total variation of 2^-100 of what can be computed from the counts plus one
    continuous Gaussian of deviation sigma = `Guarantee.metrics.noise_multiplier`:

    1. a sum of m discrete Gaussians of a parameter t >= 4 is within m 2^-224 a count of the one of parameter
       t sqrt(m) (Kairouz, Liu and Steinke 2021, Theorem 12);
    2. which is, within 2^-110, a continuous Gaussian of variance m t^2 - 4 about the counts' integers,
       rounded to a discrete Gaussian of parameter 2 about where it fell (Peikert 2010, Theorem 3.1);
    3. and m t^2 - 4 is at least (COUNT_STEPS sigma)^2, while a unit at one site moves one integer by
       COUNT_STEPS; one person's units at several sites are several such, as `Guarantee.metrics` has them.
    """
    guarantee = Guarantee.of(study)
    metrics = guarantee.metrics
    if metrics is None:
        return 0.0
    shares = guarantee.shares(sites)
    return max(4.0, math.sqrt(((COUNT_STEPS * metrics.noise_multiplier) ** 2 + 4) / shares))


def noise_on_counts(study: Study, *, cohort: int, sites: int) -> float:
    """Standard deviation of the noise on each summed count: of `sites`, in a round called for `cohort`.

    Each of them has added its share, those that hold on to their records too.
    """
    return count_noise(study, cohort) / COUNT_STEPS * math.sqrt(sites)


def check_protectable(study: Study, sites: int | None = None) -> None:
    """That every cohort which the study allows can be protected against its colluders; or one of `sites`.

    Each sum by itself: all colluders may be in one group.

    Raises:
        ConfigError: naming the smallest cohort that cannot, or the smallest group.
    """
    secure = study.secure_aggregation
    if not secure.enabled:
        return
    least = study.needed(secure.min_sites)
    # What a sum holds out against falls by one where n = 1 mod 3, and else rises: six sizes tell. Groups have
    # had all their sizes twice by the time that there are two more of them.
    sizes = [sites] if sites is not None else range(least, least + max(6, 2 * (secure.group_size or 0)))
    for n in sorted(set().union(*(group_sizes(study, cohort) for cohort in sizes))):
        try:
            _any_cohort(study, n)
        except (PolicyRefused, ValueError) as error:
            grouped = secure.group_size is not None
            who, key = (f"a group of {n}", "group_size") if grouped else (str(n), "min_sites")
            raise ConfigError.at(
                f"study {study.study.name}",
                "secure_aggregation.colluders",
                found=secure.colluders,
                allowed=f"what {who} sites can be protected against ({error})",
                fix=f"raise secure_aggregation.{key}, or lower colluders",
            ) from None


def round_event(guarantee: Guarantee, *, coordinates: int, sites: int) -> DiscreteGaussian | None:
    """What one round costs one site, in a sum over `sites`; None where the study adds no noise.

    Raises:
        ConfigError: 32-bit integers have no room for the study's noise, or the noise is not fine enough.
    """
    if guarantee.event is None:
        return None
    summed = sites if guarantee.study.privacy.noise == "shared" else 1
    lattice = guarantee.lattice(coordinates=coordinates, cohort=summed)
    return guarantee.discrete(lattice, sampler_distance=distance(lattice.share))


def quorum_of(study: Study, sites: int) -> int:
    """Sites of so many that a round needs to the end.

    Raises:
        PolicyViolation: so few cannot be protected against the study's colluders.
    """
    return _any_cohort(study, sites).quorum


def sum_of(study: Study, sites: int | None = None) -> Cohort:
    """The smallest sum of a round of so many sites; by default, and at least, of the study's smallest cohort.

    Raises:
        ConfigError: it cannot be protected.
    """
    least = study.needed(study.secure_aggregation.min_sites)
    sites = max(sites or least, least)
    check_protectable(study, sites)
    n = min(group_sizes(study, sites))
    return _any_cohort(study, n)


def noise_factor(study: Study, sites: int | None = None) -> float | None:
    """Shared noise on such a sum, nobody missing, over what a trusted curator would add; else None.

    sqrt(sites / `Guarantee.shares`). With all of the noise at each site it would be sqrt(sites).
    """
    if study.privacy.noise != "shared":
        return None
    return Guarantee.of(study).noise_factor(sum_of(study, sites).n)


def exposures(guarantee: Guarantee, *, coordinates: int, sites: int | None = None) -> tuple[Exposure, ...]:
    """Epsilon by who looks, in such a sum; nothing where noise is local, and everyone sees the same.

    Raises:
        ConfigError: 32-bit integers have no room for the study's noise.
    """
    study = guarantee.study
    if study.privacy.noise != "shared" or study.train.expected_batch is None:
        return ()
    n = sum_of(study, sites).n
    event = round_event(guarantee, coordinates=coordinates, sites=n)
    return () if event is None else guarantee.exposures(event, n)


def what_leaves(study: Study, numbers: int, sites: int | None = None) -> str:
    """In plain sentences what leaves a site, under a model of so many numbers; `sites` as in `sum_of`."""
    each = f"Each round releases {numbers} numbers"
    if not study.secure_aggregation.enabled:
        return f"{each}, which the server sees for each site."
    said = f"{each}, only as a sum over at least {sum_of(study, sites).quorum} sites."
    counts = (
        f"After training, once: held-out records counted by label and {study.score_bins} bins of the score"
    )
    match study.evaluation.release:
        case "exact":
            return (
                f"{said} {counts}, WITHOUT noise and covered by no epsilon, only as a sum over all sites "
                "of the run, and only if the policy of each allows it."
            )
        case "dp":
            return (
                f"{said} {counts}, with noise, only as such a sum: epsilon {study.metrics_epsilon:g} "
                "of the study's."
            )
        case _:
            return said


def what_hides(study: Study, sites: int | None = None) -> str:
    """What secure aggregation promises a site, and what the noise is; or that there is none."""
    if not study.secure_aggregation.enabled:
        return "Secure aggregation is off: the server sees each site's update."
    cohort = sum_of(study, sites)
    said = f"In a cohort of {cohort.n}: {cohort.promise()[0].lower()}{cohort.promise()[1:]}"
    if cohort.quorum == 2:
        said += " Of a sum of two each site can work out the other's part."
    factor = noise_factor(study, sites)
    if factor is not None:
        said += (
            f" The noise on the sum is {factor:.2f} times what a trusted curator would add; if each site "
            f"added all of it, it would be {math.sqrt(cohort.n):.2f} times."
        )
    return said


def _any_cohort(study: Study, sites: int) -> Cohort:
    return _cohort(study, range(FIRST_PARTY, FIRST_PARTY + sites))


def _cohort(study: Study, parties: Sequence[int]) -> Cohort:
    return Cohort(
        parties=tuple(parties),
        colluders=study.secure_aggregation.colluders,
        min_sites=study.survivors(len(parties)),
    )


def digest_of(model: Arrays) -> bytes:
    """The digest in a context of the model that a party sends, or received."""
    little = {name: np.ascontiguousarray(a, dtype="<f4") for name, a in model.items()}
    return model_digest((name, "<f4", tuple(map(int, a.shape)), a.data) for name, a in little.items())
