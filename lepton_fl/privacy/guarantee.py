"""The promise in words: an epsilon is never printed without its unit, its delta and whom it holds against."""

from __future__ import annotations

from dataclasses import dataclass

from lepton_fl.privacy.accounting import Gaussian, calibrate, epsilon
from lepton_fl.study import Study

SIMULATION_NOISE = "simulation noise"
"""Label of every result whose noise came from a seeded generator: a seed known to anyone is no privacy."""
CURATOR = "the simulator acts as curator"
"""Label of every result whose sums were formed by the simulator in place of secure aggregation."""
SIMULATED = "SIMULATED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarantee:
    """What one study promises the owner of one unit's records at one site.

    **Formal guarantee.** With noise multiplier sigma = `event.noise_multiplier`, the sequence of updates
    that a site releases in `event.steps` steps (under shared noise: of the sums that they enter) is
    (epsilon, delta)-differentially private under adding or removing one unit of that site (Abadi et al.
    2016, DP-SGD; composed by PLD). Exact figures that a policy lets out are not part of it.
    """

    study: Study
    event: Gaussian | None
    """None where the study adds no noise."""

    @classmethod
    def of(cls, study: Study) -> Guarantee:
        """Calibrate the study's noise to its epsilon over all rounds it may charge."""
        privacy = study.privacy
        if privacy.noise == "none" or privacy.epsilon is None or privacy.delta is None:
            return cls(study=study, event=None)
        rate, steps = study.train.sample_rate, study.charged_steps
        sigma = calibrate(epsilon=privacy.epsilon, delta=privacy.delta, sampling_rate=rate, steps=steps)
        event = Gaussian(noise_multiplier=sigma, sampling_rate=rate, steps=steps)
        return cls(study=study, event=event)

    @property
    def round_event(self) -> Gaussian | None:
        """What one round costs one site: the charge, before it is known to have left."""
        if self.event is None:
            return None
        return Gaussian(
            noise_multiplier=self.event.noise_multiplier,
            sampling_rate=self.event.sampling_rate,
            steps=self.study.train.local_steps,
        )

    def epsilon_after(self, rounds: int) -> float | None:
        """Epsilon after so many rounds at a site that took part in each."""
        event = self.round_event
        if event is None or self.study.privacy.delta is None:
            return None
        return epsilon([event.times(rounds)], self.study.privacy.delta)

    @property
    def unit(self) -> str:
        """The unit in words: `record`, or `customer_id (all records of one, at one site)`."""
        unit = self.study.privacy.unit
        return unit if unit == "record" else f"{unit} (all records of one, at one site)"

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
        if self.study.secure_aggregation.enabled:
            labels.append(CURATOR)
        return tuple(labels)

    def sentence(self) -> str:
        """One plain sentence for a privacy officer."""
        privacy = self.study.privacy
        if self.event is None:
            return "No differential privacy: updates are exact, and records may be read from them."
        return (
            f"Epsilon {privacy.epsilon:g}, delta {privacy.delta:g} per {self.unit} of this site, "
            f"against {self.holds_against}."
        )
