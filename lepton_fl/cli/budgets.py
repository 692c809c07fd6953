"""The privacy budgets of one site or many, read from their policies and ledgers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lepton_fl.cli.terminal import print_table
from lepton_fl.errors import ConfigError, PolicyRefused
from lepton_fl.privacy import AnyLedger, Charge, Guarantee, Ledger, RehearsalLedger
from lepton_fl.privacy.ledger import Spent
from lepton_fl.site.config import files_of
from lepton_fl.site.policy import Policy, admit_study, load_policy
from lepton_fl.study import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteBudget:
    """One site's policy and where its ledger is."""

    site: str
    policy: Policy
    policy_file: Path
    ledger_file: Path

    @property
    def data_set(self) -> str:
        return self.policy.data.id

    @property
    def allowed(self) -> float:
        return self.policy.budget.epsilon_total

    def ledger(self) -> AnyLedger:
        """The site's ledger; where there is none yet, an empty one that is not written."""
        return Ledger(self.ledger_file) if self.ledger_file.exists() else RehearsalLedger()

    def spent(self) -> float:
        """Epsilon at delta_total over all studies on the data set."""
        ledger = self.ledger()
        try:
            return ledger.spent(self.data_set, self.policy.budget.delta_total)
        finally:
            ledger.close()

    def studies(self) -> list[Spent]:
        ledger = self.ledger()
        try:
            return ledger.studies(self.data_set)
        finally:
            ledger.close()

    def history(self) -> list[dict[str, object]]:
        ledger = self.ledger()
        try:
            return ledger.history(self.data_set)
        finally:
            ledger.close()

    def as_json(self) -> dict[str, object]:
        spent = self.spent()
        return {
            "site": self.site,
            "data_set": self.data_set,
            "units": list(self.policy.require.privacy_units),
            "epsilon_spent": spent,
            "epsilon_allowed": self.allowed,
            "epsilon_left": max(0.0, self.allowed - spent),
            "delta_total": self.policy.budget.delta_total,
            "studies": [
                {
                    "study": s.study,
                    "name": s.study_name,
                    "epsilon": s.epsilon,
                    "delta": s.delta,
                    "runs": s.runs,
                    "rounds": s.rounds,
                    "last": s.last,
                }
                for s in self.studies()
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Whether one more run fits at one site."""

    site: str
    before: float
    after: float
    allowed: float
    fits: bool
    reason: str

    def as_json(self) -> dict[str, object]:
        return {
            "site": self.site,
            "epsilon_before": self.before,
            "epsilon_after": self.after,
            "epsilon_allowed": self.allowed,
            "fits": self.fits,
            "reason": self.reason,
        }


def budgets(places: list[Path] | None, config: Path | None) -> list[SiteBudget]:
    """The budgets at `places` and of the site.toml `config`.

    A place is a policy.toml, a site.toml, or a folder with one or with SITE/ folders.

    Raises:
        ConfigError: nothing is named, or there is no policy at a place.
    """
    named = [*(places or []), *([config] if config else [])]
    if not named:
        raise ConfigError(
            "no site named", fix="lepton-fl budget show -c site.toml, or name a folder of policies"
        )
    return [budget for place in named for budget in _at(place)]


def _at(place: Path) -> list[SiteBudget]:
    if not place.is_dir() or (place / "site.toml").exists() or (place / "policy.toml").exists():
        return [_of(place)]
    # A quickstart's or a run's folder keeps its sites one level further down.
    found = sorted(place.glob("*/policy.toml")) or sorted(place.glob("sites/*/policy.toml"))
    if not found:
        raise ConfigError(f"{place}: holds no policy.toml, nor SITE/policy.toml")
    return [_of(path) for path in found]


def _of(place: Path) -> SiteBudget:
    files = files_of(place)
    return SiteBudget(
        site=files.name,
        policy=load_policy(files.policy),
        policy_file=files.policy,
        ledger_file=files.ledger,
    )


def plan_run(budget: SiteBudget, study: Study) -> RunPlan:
    """What one more run of `study` would cost at one site; spends nothing.

    Raises:
        ConfigError: the study adds no noise.
    """
    event = Guarantee.of(study).round_event
    if event is None or study.privacy.delta is None:
        raise ConfigError(f"study {study.study.name}: adds no noise, so no budget would cover it")
    charge = Charge(
        study=study.id,
        study_name=study.study.name,
        run="planned",
        round=1,
        event=event,
        clip=study.privacy.clip,
        unit=study.privacy.unit,
        delta=study.privacy.delta,
        fingerprint="",
    )
    rounds, limits = study.train.charged_rounds, budget.policy.budget
    ledger = budget.ledger()
    try:
        before = ledger.spent(budget.data_set, limits.delta_total)
        after = ledger.would_spend(charge, rounds=rounds, data_set=budget.data_set, delta=limits.delta_total)
        reason, file = "", str(budget.policy_file)
        try:
            admit_study(budget.policy, study, cohort=None, file=file, approvals=None)
            ledger.reserve(charge, rounds=rounds, budget=budget.policy.ledger_budget(file))
        except PolicyRefused as error:
            reason = error.message
    finally:
        ledger.close()
    return RunPlan(
        site=budget.site,
        before=before,
        after=after,
        allowed=limits.epsilon_total,
        fits=not reason,
        reason=reason,
    )


def show(found: list[SiteBudget]) -> None:
    """Two tables: by site, and by study where anything was spent."""
    rows, by_study = [], []
    for budget in found:
        spent = budget.spent()
        rows.append(
            (
                budget.site,
                budget.data_set,
                _up(spent) if budget.ledger_file.exists() else "no ledger yet",
                f"{budget.allowed:g}",
                f"{max(0.0, budget.allowed - float(_up(spent))):.3f}",
                f"{budget.policy.budget.delta_total:g}",
                ", ".join(budget.policy.require.privacy_units),
            )
        )
        by_study += [
            (
                budget.site,
                s.study_name,
                s.study[:12],
                f"{_up(s.epsilon)} at delta {s.delta:g}",
                str(s.runs),
                str(s.rounds),
                s.last[:19],
            )
            for s in budget.studies()
        ]
    print_table(
        "Privacy budget per unit, over all studies on each data set",
        ("site", "data set", "epsilon spent", "allowed", "left", "delta", "unit"),
        rows,
        right=(2, 3, 4),
    )
    if by_study:
        print_table(
            "By study (composed, not summed)",
            ("site", "study", "id", "epsilon", "runs", "rounds", "last"),
            by_study,
            right=(4, 5),
        )


def show_history(found: list[SiteBudget]) -> None:
    """A table for each site: every charge, oldest first."""
    names = ("at", "study_name", "run", "round", "noise_multiplier", "sampling_rate", "steps", "unit")
    for budget in found:
        rows = [[str(charge[name])[:32] for name in names] for charge in budget.history()]
        print_table(f"{budget.site}: data set {budget.data_set}", names, rows)


def show_plans(plans: list[RunPlan], study: Study) -> None:
    """What one more run would come to, by site."""
    rows = [
        (p.site, _up(p.before), _up(p.after), f"{p.allowed:g}", "fits" if p.fits else "does not fit")
        for p in plans
    ]
    title = f"{study.study.name}: epsilon per {study.privacy.unit}, before and after one run"
    print_table(title, ("site", "spent", "after", "allowed", ""), rows, right=(1, 2, 3))


def _up(epsilon: float) -> str:
    """To three decimals, rounded up: what is left is never overstated."""
    # The inner rounding takes off binary noise.
    return f"{math.ceil(round(1000 * epsilon, 6)) / 1000:.3f}"
