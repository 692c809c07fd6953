"""What a study costs and says, from the study alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lepton_fl.cli.terminal import print_table
from lepton_fl.data import Contract
from lepton_fl.errors import ConfigError
from lepton_fl.privacy import Exposure, Guarantee
from lepton_fl.privacy import epsilon as composed_epsilon
from lepton_fl.secure_rounds import check_protectable, exposures, what_hides, what_leaves
from lepton_fl.study import Study, check_delta, override
from lepton_fl.tasks import build_model

BYTES_PER_NUMBER = 4
PER_PEER = {"LSA1": "0.3 kB up and 1 kB down", "LSA1-PQ": "2 kB up and 5 kB down"}
"""What secure aggregation adds, by suite; a test holds it against a round."""
MARKS = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Shares of the rounds at which a plan states epsilon."""
ENOUGH_SIGNAL = 3.0
"""Signal over noise below which a site is called too small; see `_signal`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One epsilon of a plan."""

    epsilon: float
    noise_multiplier: float
    by_round: dict[int, float]
    """Epsilon after so many rounds."""
    exposures: tuple[Exposure, ...]
    """Epsilon of the whole study by who looks, where that makes a difference."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPlan:
    """A plan, printable in two forms."""

    study: Study
    numbers: int
    """Parameters that a site sends in each round."""
    options: tuple[Option, ...]
    sites: int | None
    """Where it is known of how many sites the plan is."""

    @property
    def bytes_per_round(self) -> int:
        """Numbers sent by, and to, one site in one round."""
        return self.numbers * BYTES_PER_NUMBER

    def as_json(self) -> dict[str, object]:
        study = self.study
        return {
            "study": study.id,
            "model": study.model_name,
            "numbers_per_round": self.numbers,
            "bytes_per_round_up": self.bytes_per_round,
            "bytes_per_round_down": self.bytes_per_round,
            "rounds": study.train.rounds,
            "charged_rounds": study.train.charged_rounds,
            "delta": study.privacy.delta,
            "unit": study.privacy.unit,
            "unit_said": Guarantee.of(study).unit_said,
            "leaves_a_site": what_leaves(study, self.numbers, self.sites),
            "hiding": what_hides(study, self.sites),
            "options": [
                {
                    "epsilon": o.epsilon,
                    "noise_multiplier": o.noise_multiplier,
                    "epsilon_by_round": o.by_round,
                    "epsilon_against": {e.against: e.epsilon for e in o.exposures},
                    "warnings": list(o.warnings),
                }
                for o in self.options
            ],
        }

    def print(self) -> None:
        study = self.study
        delta = f"{study.privacy.delta:g}" if study.privacy.delta is not None else "-"
        marks = sorted({r for o in self.options for r in o.by_round})
        rows = [
            (
                f"{o.epsilon:g}",
                f"{o.noise_multiplier:.4f}",
                *(f"{o.by_round[r]:.3f}" for r in marks),
            )
            for o in self.options
        ]
        print_table(
            f"{study.study.name} ({study.id[:12]}): {study.model_name}, {study.train.strategy}, "
            f"{study.train.rounds} rounds (noise covers {study.train.charged_rounds}), "
            f"delta {delta} per {study.privacy.unit}",
            ("epsilon", "sigma", *(f"after {r} rounds" for r in marks)),
            rows,
            right=range(2 + len(marks)),
        )
        from typer import echo

        secure = study.secure_aggregation
        more = f", {PER_PEER[secure.suite]} for each other site" if secure.enabled else ""
        echo(
            f"each round: {self.numbers} numbers, {self.bytes_per_round:,} bytes up and as many down for "
            f"each site (and some kB of message{more}); numbers of the whole run "
            f"{2 * self.bytes_per_round * study.train.rounds / 1e6:.2f} MB a site"
        )
        echo(what_leaves(study, self.numbers, self.sites))
        echo(what_hides(study, self.sites))
        echo(Guarantee.of(study).unit_said)
        for option in self.options:
            if option.exposures:
                against = "; ".join(f"{e.epsilon:.3g} against {e.against}" for e in option.exposures)
                echo(f"at epsilon {option.epsilon:g}, by who looks: {against}")
            for warning in option.warnings:
                echo(f"warning: at epsilon {option.epsilon:g}: {warning}")


def plan_study(study: Study, epsilons: tuple[float, ...], units: list[int]) -> StudyPlan:
    """Plan `study` at each of `epsilons` (its own if none) for sites of so many training units.

    Raises:
        ConfigError: the study adds no noise, delta is not below one over the smallest site's units, or a
            cohort that it allows cannot be protected against its colluders.
    """
    check_protectable(study)
    if study.privacy.epsilon is None or study.privacy.delta is None:
        raise ConfigError(
            f"study {study.study.name}: privacy.noise = 'none' has no epsilon to plan",
            fix="set noise = 'local' with epsilon and delta",
        )
    if units:
        check_delta(study, min(units), "the smallest of --sites")
    numbers = parameters(study)
    options = []
    for epsilon in epsilons or (study.privacy.epsilon,):
        guarantee = Guarantee.of(override(study, {"privacy.epsilon": epsilon}))
        event = guarantee.round_event
        if event is None:
            raise ConfigError("study: adds no noise")
        sigma = event.noise_multiplier
        rounds = sorted({max(1, round(study.train.rounds * share)) for share in MARKS})
        options.append(
            Option(
                epsilon=epsilon,
                noise_multiplier=sigma,
                by_round={n: composed_epsilon([event.times(n)], study.privacy.delta) for n in rounds},
                exposures=exposures(guarantee, coordinates=numbers, sites=len(units) or None),
                warnings=tuple(_warnings(study, sigma, numbers, units)),
            )
        )
    return StudyPlan(study=study, numbers=numbers, options=tuple(options), sites=len(units) or None)


def _warnings(study: Study, sigma: float, numbers: int, units: list[int]) -> list[str]:
    warnings = []
    if study.model.name == "auto" and study.train.expected_batch is None:
        warnings.append(
            f"model 'auto' is {study.model_name} only while train.expected_batch is undeclared: with it the "
            "size of the federation is known, and may choose another"
        )
    if not units:
        return warnings
    smallest = min(units)
    signal = _signal(study, sigma, numbers, smallest)
    if signal >= ENOUGH_SIGNAL:
        return warnings
    warning = (
        f"a site of {smallest} units is too small: over the run its clipped gradients add up to at most "
        f"{signal:.1f} times its own noise; take more rounds or units, a larger sample_rate, or shared noise"
    )
    return [*warnings, warning]


def _signal(study: Study, sigma: float, numbers: int, units: int) -> float:
    """Largest possible signal of a site over the norm of its noise, both summed over the run.

    T steps of q*n units clipped at C add up to T*q*n*C; the noise to sqrt(T*d)*sigma*C.
    """
    steps = study.train.rounds * study.train.local_steps
    return math.sqrt(steps) * study.train.sample_rate * units / (sigma * math.sqrt(numbers))


def parameters(study: Study) -> int:
    """Numbers in the study's model."""
    model = build_model(study, Contract.of(study).width, torch.Generator())
    return sum(p.numel() for p in model.parameters())


def describe(study: Study) -> dict[str, object]:
    """The study in plain words, for `study show` and `study approve`.

    Raises:
        ConfigError: a cohort that it allows cannot be protected against its colluders.
    """
    check_protectable(study)
    numbers = parameters(study)
    stops = study.train.early_stopping
    early = "" if stops is None else f", fewer if early stopping by {stops.signal} says so"
    return {
        "study": study.study.name,
        "id": study.id,
        "purpose": study.study.purpose or "not stated",
        "model": f"{study.model_name}, {numbers} numbers",
        "training": f"{study.train.strategy}, {study.train.rounds} rounds{early}, sample rate "
        f"{study.train.sample_rate:g}",
        "leaves_the_site": what_leaves(study, numbers),
        "hiding": what_hides(study),
        "promise": Guarantee.of(study).sentence(),
        "unit": Guarantee.of(study).unit_said,
        **_by_who_looks(study),
    }


def _by_who_looks(study: Study) -> dict[str, str]:
    found = exposures(Guarantee.of(study), coordinates=parameters(study))
    said = "; ".join(f"{e.epsilon:.3g} for {e.against}" for e in found)
    return {"epsilon_by_who_looks": said} if said else {}


def promises(study: Study, sites: int) -> list[str]:
    """What a cohort of so many sites is told before a run: what leaves, what hides it, and the epsilon."""
    return [
        what_leaves(study, parameters(study), sites),
        what_hides(study, sites),
        Guarantee.of(study).sentence(),
        Guarantee.of(study).unit_said,
    ]
