"""The promise in words: an epsilon is never printed without its unit, its delta and whom it holds against."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from lepton_fl.errors import ConfigError
from lepton_fl.privacy.accounting import DiscreteGaussian, Gaussian, calibrate, epsilon, gap_allowance
from lepton_fl.privacy.lattice import Lattice
from lepton_fl.secagg.context import Cohort
from lepton_fl.secagg.graph import COMPLETE
from lepton_fl.secagg.identity import FIRST_PARTY
from lepton_fl.study import Study

SIMULATION_NOISE = "simulation noise"
"""Label of every result whose noise came from a seeded generator: a seed known to anyone is no privacy."""
SIMULATED = "SIMULATED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """An epsilon, and whom it holds against."""

    against: str
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarantee:
    """What one study promises the owner of one unit's records at one site, or of one at each of m sites.

    **Formal guarantee.** With noise multiplier sigma = `event.noise_multiplier`, the sequence of updates that
    the sites release in the study's steps (under shared noise: of the sums that they enter) is
    (epsilon, delta)-differentially private under adding or removing one unit of one site, or, with
    m = `privacy.max_sites_per_unit`, one unit at each of up to m sites at once (Abadi et al. 2016, DP-SGD;
    docs/accounting.md; composed by PLD). Exact figures that a policy lets out are not part of it. With
    discrete noise on integers it is `discrete` that the steps cost, within the same (epsilon, delta).

    A site is charged what is promised: the loss of the person, whom it does not know to be at one site only.
    """

    study: Study
    event: Gaussian | None
    """The whole study's training, as continuous noise would have it. None where the study adds no noise.

    Of m sites it has m times the steps under local noise, where the release of each has noise of its own;
    under shared noise each step is one of `sites_per_unit` = m.
    """
    metrics: Gaussian | None = None
    """What the histogram of scores costs beside it, where the study releases one with noise.

    `event` and this one, composed, are within the study's (epsilon, delta). One held-out record of each unit
    is counted, so a unit moves one count by 1: that is the sensitivity to which the multiplier refers.
    """

    @classmethod
    @lru_cache(maxsize=16)
    def of(cls, study: Study) -> Guarantee:
        """Calibrate the study's noise to its epsilon over all rounds it may charge.

        With room in delta for the gap of discrete noise, whose parameters need not be known for it.
        """
        privacy = study.privacy
        if privacy.noise == "none" or privacy.epsilon is None or privacy.delta is None:
            return cls(study=study, event=None)
        apart, together = _sites_of_one(study)
        metrics = None
        if study.metrics_epsilon is not None:
            of_metrics = calibrate(
                epsilon=study.metrics_epsilon,
                delta=privacy.delta,
                sampling_rate=1.0,
                steps=apart,
                sites_per_unit=together,
            )
            metrics = Gaussian(
                noise_multiplier=of_metrics, sampling_rate=1.0, steps=apart, sites_per_unit=together
            )
        rate, steps = study.train.sample_rate, study.charged_steps * apart
        sigma = calibrate(
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            sampling_rate=rate,
            steps=steps,
            sites_per_unit=together,
            gap=gap_allowance(epsilon=privacy.epsilon, delta=privacy.delta),
            beside=metrics,
        )
        event = Gaussian(noise_multiplier=sigma, sampling_rate=rate, steps=steps, sites_per_unit=together)
        return cls(study=study, event=event, metrics=metrics)

    def __hash__(self) -> int:
        return hash(self.study)

    @property
    def round_event(self) -> Gaussian | None:
        """One round's part of `event`, for plans; what a site is charged is `discrete`."""
        if self.event is None:
            return None
        return replace(self.event, steps=self.event.steps // self.study.train.charged_rounds)

    def epsilon_after(self, rounds: int) -> float | None:
        """Epsilon after so many rounds at a site that took part in each."""
        event = self.round_event
        if event is None or self.study.privacy.delta is None:
            return None
        return epsilon([event.times(rounds)], self.study.privacy.delta)

    @lru_cache(maxsize=64)  # noqa: B019 - as few as there are studies and cohorts
    def shares(self, cohort: int) -> int:
        """Honest shares at least in what is opened, of which the calibrated noise consists; local: one.

        min_survivors - colluders: the shares of the largest allowed dropout may be missing, and colluders
        know their own. The study has made sure that one is left. Of a cohort whose graph is drawn (above 128
        sites) a server may have the sum opened in parts: then as many as the smallest part has, but for a
        probability of 2^-40 an attempt.
        """
        if self.study.privacy.noise != "shared":
            return 1
        colluders, survivors = self.study.secure_aggregation.colluders, self.study.survivors(cohort)
        if cohort <= COMPLETE:
            return survivors - colluders
        parties = tuple(range(FIRST_PARTY, FIRST_PARTY + cohort))
        drawn = Cohort(parties=parties, colluders=colluders, min_sites=survivors)
        return min(survivors - colluders, drawn.hidden_among)

    def noise_factor(self, cohort: int) -> float:
        """Noise on the sum over a whole cohort, as a multiple of what a trusted curator would add to it."""
        return 0.0 if self.event is None else math.sqrt(cohort / self.shares(cohort))

    def lattice(self, *, coordinates: int, cohort: int) -> Lattice:
        """The integers of a cohort's sums and shares, for a model of so many parameters.

        Raises:
            ConfigError: 32 bits have no room for them, or the study declares no expected batch or no noise.
        """
        batch = self.study.train.expected_batch
        if self.event is None or batch is None:
            raise ConfigError(
                f"study {self.study.study.name}: integers are chosen by privacy.epsilon and "
                "train.expected_batch, and it does not declare both"
            )
        return Lattice.of(
            clip=self.study.privacy.clip,
            noise_multiplier=self.event.noise_multiplier,
            coordinates=coordinates,
            cohort=cohort,
            shares=self.shares(cohort),
            expected_batch=batch,
        )

    def discrete(self, lattice: Lattice, *, sampler_distance: float) -> DiscreteGaussian:
        """What one round on this lattice costs one site: the charge, before it is known to have left.

        Guarantee: all rounds that the study may charge, each like this one at whatever cohort, are within
        its (epsilon, delta).

        Raises:
            ConfigError: the sampler is not close enough to the discrete Gaussian for so many draws.
        """
        privacy, train = self.study.privacy, self.study.train
        if self.event is None or privacy.epsilon is None or privacy.delta is None:
            raise ConfigError(f"study {self.study.study.name}: privacy.noise = 'none' costs nothing")
        apart, together = _sites_of_one(self.study)
        event = lattice.event(
            sampling_rate=train.sample_rate,
            steps=train.local_steps * apart,
            sampler_distance=sampler_distance,
            sites_per_unit=together,
        )
        gap = event.times(train.charged_rounds).gap
        allowed = gap_allowance(epsilon=privacy.epsilon, delta=privacy.delta)
        if gap > allowed or event.noise_multiplier < self.event.noise_multiplier:
            raise ConfigError(
                f"study {self.study.study.name}: {event.coordinates} parameters x {self.study.charged_steps} "
                f"steps of {event.shares} shares are {gap:.2g} from the noise that is accounted, allowed "
                f"{allowed:.2g} at epsilon {privacy.epsilon:g}, delta {privacy.delta:g}",
                fix="take a smaller epsilon, a larger delta, fewer rounds or a smaller model",
            )
        return event

    def exposures(self, event: DiscreteGaussian, cohort: int) -> tuple[Exposure, ...]:
        """Epsilon of the whole study at its delta, by who looks; `event` is one round at this cohort.

        An adversary is told by the shares it does not know; docs/accounting.md, "Who holds what".
        """
        privacy, colluders = self.study.privacy, self.study.secure_aggregation.colluders
        if privacy.delta is None:
            return ()
        if privacy.noise != "shared":
            hidden = {self.holds_against: event}
        else:
            members = f"{colluders} member{'' if colluders == 1 else 's'}"
            shares, survivors = self.shares(cohort), self.study.survivors(cohort)
            # In a part of the sum the colluders' shares need not be: none is counted.
            alone = survivors if cohort <= COMPLETE else shares
            most = replace(event, shares=shares)
            hidden = {"the server alone, and every reader of the model": replace(event, shares=alone)}
            if colluders:
                hidden[f"the server and {members} together"] = most
                hidden[f"{members}, by what {'it knows' if colluders == 1 else 'they know'}"] = most
            if shares > 1:
                # They know the person's records at their own sites.
                left = replace(event, shares=1, sites_per_unit=1)
                hidden["the server and all other members together"] = left
        return tuple(
            Exposure(
                against=against,
                epsilon=epsilon([seen.times(self.study.train.charged_rounds)], privacy.delta),
            )
            for against, seen in hidden.items()
        )

    @property
    def unit(self) -> str:
        """The unit in words: `record`, or `customer_id (all records of one, at one site)`."""
        unit, sites = self.study.privacy.unit, self.study.privacy.max_sites_per_unit
        where = "one site" if sites == 1 else f"up to {sites} sites together"
        if unit == "record":
            return unit if sites == 1 else f"record (one at each of {where})"
        return f"{unit} (all records of one, at {where})"

    @property
    def unit_said(self) -> str:
        """One plain sentence on what the unit is, and what it is not."""
        unit, sites = self.study.privacy.unit, self.study.privacy.max_sites_per_unit
        its = "" if unit == "record" else ", with all its records there"
        if sites == 1:
            where, more = "one site", "several sites has a unit at each"
        else:
            where, more = f"each of up to {sites} sites", f"more than {sites} sites has several units"
        return f"The unit is one {unit} at {where}{its}: whoever is at {more}, and what each costs adds up."

    @property
    def holds_against(self) -> str:
        """Whom the promise holds against, and on which condition."""
        if self.study.privacy.noise == "none":
            return "nobody: no noise is added"
        if self.study.privacy.noise == "local":
            return "the server, the other sites and every reader of the model"
        members = self.study.secure_aggregation.colluders
        return (
            "the server and every reader of the model, provided at most "
            f"{members} member{'s' if members != 1 else ''} collude{'s' if members == 1 else ''} "
            "with the server"
        )

    @property
    def simulation_labels(self) -> tuple[str, ...]:
        """What every output of a simulation of this study must say before any figure."""
        labels = [SIMULATED]
        if self.event is not None:
            labels.append(SIMULATION_NOISE)
        return tuple(labels)

    def sentence(self) -> str:
        """One plain sentence for a privacy officer."""
        privacy = self.study.privacy
        if self.event is None:
            return "No differential privacy: updates are exact, and records may be read from them."
        return (
            f"Epsilon {privacy.epsilon:g}, delta {privacy.delta:g} per {self.unit}"
            f"{' of this site' if privacy.max_sites_per_unit == 1 else ''}, against {self.holds_against}."
        )


def _sites_of_one(study: Study) -> tuple[int, int]:
    """At how many sites one person counts: (each under noise of its own, all in one sum under shared noise).

    One of the two is 1.
    """
    sites = study.privacy.max_sites_per_unit
    return (1, sites) if study.privacy.noise == "shared" else (sites, 1)
