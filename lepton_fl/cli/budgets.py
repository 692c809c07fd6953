"""The privacy budgets of one site or many, read from their policies and ledgers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from lepton_fl.cli.keys import read_key
from lepton_fl.cli.terminal import make_writable, print_table, say
from lepton_fl.errors import ConfigError, PolicyRefused
from lepton_fl.files import lock, write_atomic
from lepton_fl.privacy import AnyLedger, Guarantee, Ledger, RehearsalLedger
from lepton_fl.privacy.accounting import Event
from lepton_fl.privacy.ledger import Head, Recovered, Renewal, Spent, Witness, recover
from lepton_fl.privacy.ledger.chain import Custody
from lepton_fl.privacy.ledger.receipts import NO_ENTRY, from_file, to_bytes
from lepton_fl.site.charges import figures_charge, round_charge
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
    approvals_file: Path

    @property
    def data_set(self) -> str:
        return self.policy.data.id

    @property
    def allowed(self) -> float:
        return self.policy.budget.epsilon_total

    def ledger(self) -> AnyLedger:
        """The site's ledger, verified; where there was never one, an empty one that is not written."""
        there = self.ledger_file.exists() or Custody(self.ledger_file).of_a_ledger() is not None
        return Ledger(self.ledger_file) if there else RehearsalLedger()

    def read(self) -> Reading:
        """What the ledger says of the data set now."""
        with closing(self.ledger()) as ledger:
            return Reading(
                spent=ledger.spent(self.data_set, self.policy.budget.delta_total),
                studies=ledger.studies(self.data_set),
                renewals=ledger.data_set(self.data_set).renewals,
                lost=ledger.lost(),
                head=ledger.head() if isinstance(ledger, Ledger) else NO_ENTRY,
                key=ledger.key.hex() if isinstance(ledger, Ledger) else "",
            )

    def spent(self) -> float:
        """Epsilon at delta_total over all studies on the data set."""
        return self.read().spent

    def history(self) -> list[dict[str, object]]:
        with closing(self.ledger()) as ledger:
            return ledger.history(self.data_set)

    def as_json(self) -> dict[str, object]:
        found = self.read()
        return {
            "site": self.site,
            "data_set": self.data_set,
            "units": list(self.policy.require.privacy_units),
            "epsilon_spent": found.spent,
            "epsilon_allowed": self.allowed,
            "epsilon_left": max(0.0, self.allowed - found.spent),
            "delta_total": self.policy.budget.delta_total,
            "renewals": found.renewals,
            "ledger": {
                "entries": found.head.counter,
                "head": found.head.digest.hex(),
                "key": found.key,
                "entries_lost": found.lost,
            },
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
                for s in found.studies
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A verified ledger, as far as one data set is concerned."""

    spent: float
    studies: list[Spent]
    renewals: int
    lost: int
    head: Head
    key: str


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


def budgets(
    places: list[Path] | None, config: Path | None, *, command: str = "lepton-fl budget show -c site.toml"
) -> list[SiteBudget]:
    """The budgets at `places` and of the site.toml `config`.

    A place is a policy.toml, a site.toml, or a folder with one or with SITE/ folders. `command` is how they
    are named rightly.

    Raises:
        ConfigError: nothing is named, or there is no policy at a place.
    """
    named = [*(places or []), *([config] if config else [])]
    if not named:
        raise ConfigError("no site named", fix=f"{command}, or name a folder of policies")
    return [budget for place in named for budget in _at(place, command)]


def _at(place: Path, command: str) -> list[SiteBudget]:
    if not place.is_dir() or (place / "site.toml").exists() or (place / "policy.toml").exists():
        return [budget_at(place, command)]
    # A quickstart's or a run's folder keeps its sites one level further down.
    found = sorted(place.glob("*/policy.toml")) or sorted(place.glob("sites/*/policy.toml"))
    if not found:
        raise ConfigError(
            f"{place}: holds no site.toml or policy.toml, nor any SITE/policy.toml or sites/SITE/policy.toml",
            fix=command,
        )
    return [budget_at(path, command) for path in found]


def budget_at(place: Path, command: str = "name a site.toml with -c") -> SiteBudget:
    """The budget of the one site at `place`: its site.toml, its policy.toml, or their folder.

    Raises:
        ConfigError: it is not there, or has no policy.
    """
    if not place.exists():
        raise ConfigError(
            f"{place}: no such file or folder, where a site.toml, policy.toml or folder of sites was "
            "looked for",
            fix=command,
        )
    files = files_of(place)
    if not files.policy.exists():
        raise ConfigError(
            f"{files.policy}: no such file, where the policy of {place} was looked for", fix=command
        )
    return SiteBudget(
        site=files.name,
        policy=load_policy(files.policy),
        policy_file=files.policy,
        ledger_file=files.ledger,
        approvals_file=files.approvals,
    )


def plan_run(budget: SiteBudget, study: Study) -> RunPlan:
    """What one more run of `study` would cost at one site; spends nothing.

    Guarantee: it fits by this if and only if the site's agent would take the run on now, as far as policy
    and budget go; a study without train.expected_batch, which no agent takes, is judged for a simulation.

    Raises:
        ConfigError: the study adds no noise.
    """
    guarantee = Guarantee.of(study)
    charge = round_charge(study, _event(guarantee), run="planned", round=1, fingerprint="")
    if charge is None:
        raise ConfigError(f"study {study.study.name}: adds no noise, so no budget would cover it")
    beside = figures_charge(budget.policy, guarantee, run="planned", fingerprint="")
    rounds, limits = study.train.charged_rounds, budget.policy.budget
    with closing(budget.ledger()) as ledger:
        before = ledger.spent(budget.data_set, limits.delta_total)
        after = ledger.would_spend(
            charge, rounds=rounds, data_set=budget.data_set, delta=limits.delta_total, beside=beside
        )
        reason, file = "", str(budget.policy_file)
        try:
            admit_study(budget.policy, study, cohort=None, file=file, approvals=None)
            ledger.reserve(charge, rounds=rounds, budget=budget.policy.ledger_budget(file), beside=beside)
        except PolicyRefused as error:
            reason = error.message
    return RunPlan(
        site=budget.site,
        before=before,
        after=after,
        allowed=limits.epsilon_total,
        fits=not reason,
        reason=reason,
    )


def _event(guarantee: Guarantee) -> Event | None:
    """What a round costs, as a site reckons when a run is proposed: in the smallest sum."""
    from lepton_fl import secure_rounds
    from lepton_fl.cli.planning import parameters

    study = guarantee.study
    if guarantee.event is None or study.train.expected_batch is None:
        # Its integers are chosen by the batch, which a simulation fills in: without it, as continuous noise.
        return guarantee.round_event
    sites = secure_rounds.smallest_sum(study)
    return secure_rounds.round_event(guarantee, coordinates=parameters(study), sites=sites)


def renew(budget: SiteBudget, officer: Path, reason: str) -> Renewal:
    """Begin the budget of a site's data set anew, signed with the key in the officer's file.

    Raises:
        ConfigError: policy.toml names no officer, or the key cannot be read.
        PolicyRefused: the key is another's.
    """
    declared = budget.policy.budget.officer_key
    if declared is None:
        raise ConfigError.at(
            str(budget.policy_file),
            "budget.officer_key",
            found=None,
            allowed="the public key of the privacy officer, who alone may renew a budget",
            fix="lepton-fl budget officer-key FILE, and put what it prints under [budget]",
        )
    key = read_key(officer)
    if not budget.ledger_file.exists():
        raise ConfigError(f"{budget.ledger_file}: there is no ledger yet, so there is nothing to renew")
    with closing(Ledger(budget.ledger_file)) as ledger:
        renewal = Renewal.sign(
            key,
            ledger=ledger.key,
            data_set=budget.data_set,
            number=ledger.data_set(budget.data_set).renewals + 1,
            reason=reason,
        )
        ledger.renew(renewal, officer=bytes.fromhex(declared))
    return renewal


def recover_ledger(budget: SiteBudget, files: list[Path], *, accept_loss: bool) -> Recovered:
    """Have a site's ledger go on after a loss, charged for what the receipts in `files` show.

    Raises:
        ConfigError: the site's agent is running.
        PolicyRefused: the receipts do not explain all that is lost.
    """
    from lepton_fl.fleet.agent.local import LOCK

    given = [receipt for file in files for receipt in from_file(file)]
    folder = budget.ledger_file.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = lock(folder / LOCK)
    if handle is None:
        raise ConfigError(f"{folder}: the site's agent is running", fix="lepton-fl client stop -c site.toml")
    try:
        return recover(budget.ledger_file, given, site=budget.site, accept_loss=accept_loss)
    finally:
        os.close(handle)


def write_receipts(seen: Path, opened: Callable[[], Witness], site: str, file: Path) -> None:
    """Put all that the witness in `seen` can show of a site's ledger into `file`, for that site's people.

    Raises:
        ConfigError: it has seen nothing of it, or the file is there.
    """
    if file.exists():
        raise ConfigError(f"{file}: exists, and is not overwritten", fix="name another file")
    found = []
    # Made by the process that witnesses, with its rights; not by a question.
    if seen.exists():
        with closing(opened()) as witness:
            found = witness.receipts(site)
    if not found:
        raise ConfigError(f"{seen}: nothing was seen of a ledger of {site!r}")
    make_writable(file.absolute().parent)
    write_atomic(file, to_bytes(found), mode=0o600)
    say(f"wrote {len(found)} receipts of {site}'s ledger to {file}")


def show(found: list[SiteBudget]) -> None:
    """Two tables: by site, and by study where anything was spent."""
    rows, by_study = [], []
    for budget in found:
        read = budget.read()
        there = read.head.counter > 0
        rows.append(
            (
                budget.site,
                budget.data_set,
                _up(read.spent) if there else "no ledger yet",
                f"{budget.allowed:g}",
                f"{max(0.0, budget.allowed - float(_up(read.spent))):.3f}",
                f"{budget.policy.budget.delta_total:g}",
                ", ".join(budget.policy.require.privacy_units),
                _custody(read) if there else "",
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
            for s in read.studies
        ]
    print_table(
        "Privacy budget per unit, over all studies on each data set",
        ("site", "data set", "epsilon spent", "allowed", "left", "delta", "unit", "ledger"),
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


def _custody(read: Reading) -> str:
    """The state of a ledger's chain, in a few words."""
    said = [f"verified, {read.head.counter} entries"]
    if read.renewals:
        said.append(f"renewed {read.renewals} times")
    if read.lost:
        said.append(f"{read.lost} entries lost")
    return "; ".join(said)


def show_history(found: list[SiteBudget]) -> None:
    """A table for each site: every charge, oldest first."""
    common = ("seq", "at", "study_name", "run", "round", "mechanism")
    other = {*common, "data_set", "study", "unit", "outcome", "delta", "clip", "fingerprint"}
    for budget in found:
        rows = [
            [
                *(str(charge[name])[:32] for name in common),
                ", ".join(f"{name} {value}" for name, value in charge.items() if name not in other),
                str(charge["unit"]),
                str(charge["outcome"]),
            ]
            for charge in budget.history()
        ]
        names = (*common, "parameters", "unit", "outcome")
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
