"""policy.toml: what the privacy officer allows. The agent obeys it over anything a server says."""

from __future__ import annotations

from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lepton_fl.config import Array, Strict, load
from lepton_fl.errors import LeptonError, PolicyRefused
from lepton_fl.privacy import Guarantee
from lepton_fl.privacy.ledger import Budget
from lepton_fl.site.approvals import Approvals
from lepton_fl.study import Delta, Name, Positive, Study

PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""Ed25519, in hex."""


class _Data(Strict):
    id: Name
    """The budget belongs to this id, across all versions of the data and all runs."""


class _Budget(Strict):
    epsilon_total: Positive
    epsilon_per_study: Positive
    delta_total: Delta
    delta_per_study: Delta | None = None
    """Largest delta of one study; without it, `delta_total`."""
    officer_key: PublicKey | None = None
    """The privacy officer's public key: who may renew the budget. Without it nobody may."""


class _Require(Strict):
    secure_aggregation: bool = True
    differential_privacy: bool = True
    """false: allow studies with noise = "none"."""
    min_sites: Annotated[int, Field(ge=1)] = 3
    """Smallest cohort, this site included, and smallest number of sites in a sum."""
    colluders: Annotated[int, Field(ge=0)] = 0
    """Fewest members, colluding with the server, that a secure round must protect this site against."""
    privacy_units: Array[str] = ("record",)
    min_noise_multiplier: Annotated[float, Field(ge=0)] = 0.0
    """Smallest sigma: standard deviation of a step's noise over the clip, as calibrated to the epsilon."""
    max_sites_per_unit: Annotated[int, Field(ge=1, le=100)] = 1
    """Largest number of sites at which one person may have a unit: a study must account for so many, by its
    `privacy.max_sites_per_unit`."""
    min_rows: Annotated[int, Field(ge=1)] = 1
    min_positives: Annotated[int, Field(ge=0)] = 0
    approval: Literal["manual", "signed-study", "auto"] = "manual"
    study_key: PublicKey | None = None
    """Whose signature lets a study in without a person here, under `approval = "signed-study"`."""
    study_key_until: date | None = None
    """Last day (UTC) on which that key counts."""

    @model_validator(mode="after")
    def _somebody_signs(self) -> _Require:
        if self.approval == "signed-study" and self.study_key is None:
            raise ValueError(
                'approval = "signed-study" needs study_key, the public key of whoever signs studies; '
                "lepton-fl study key FILE prints it"
            )
        return self


class _Release(Strict):
    metrics: Literal["none", "dp", "exact"] = "none"
    """dp: evaluation figures leave with noise, charged, in a sum over the sites. exact: without it as well
    (by themselves where a study has no secure aggregation), and every report says so in red."""
    allow_models: Array[str] = ("logreg", "mlp")


class Policy(Strict):
    """A site's own limits. Absence of a key is the strict choice."""

    data: _Data
    budget: _Budget
    require: _Require = _Require()
    release: _Release = _Release()

    def ledger_budget(self, file: str) -> Budget:
        """The part that the ledger enforces."""
        return Budget(
            data_set=self.data.id,
            epsilon_total=self.budget.epsilon_total,
            epsilon_per_study=self.budget.epsilon_per_study,
            delta_total=self.budget.delta_total,
            file=file,
        )


def load_policy(path: Path) -> Policy:
    """The policy.toml at `path`.

    Raises:
        ConfigError: there is none, or it is not understood whole; a site without policy refuses all.
    """
    return load(Policy, path)


def admit_study(
    policy: Policy, study: Study, *, cohort: int | None, file: str, approvals: Approvals | None
) -> None:
    """Refuse a study that the policy forbids, from the study and the cohort's size alone: no row is read.

    `cohort` is None before it is formed; each later message is checked with it. `approvals` is None where
    the question is what the policy would say to a study once it were approved.

    Raises:
        PolicyRefused: naming what the study asks, what the site allows and in which key.
    """
    refuse = partial(_refusal, study, file)
    privacy, require, budget = study.privacy, policy.require, policy.budget
    if privacy.noise == "none":
        if require.differential_privacy:
            raise refuse("noise 'none'", "noise only", "require.differential_privacy")
    else:
        if privacy.epsilon is not None and privacy.epsilon > budget.epsilon_per_study:
            raise refuse(
                f"epsilon {privacy.epsilon:g} per {privacy.unit}",
                f"{budget.epsilon_per_study:g}",
                "budget.epsilon_per_study",
            )
        limit, key = budget.delta_total, "budget.delta_total"
        if budget.delta_per_study is not None and budget.delta_per_study < limit:
            limit, key = budget.delta_per_study, "budget.delta_per_study"
        if privacy.delta is not None and privacy.delta > limit:
            raise refuse(f"delta {privacy.delta:g}", f"{limit:g}", key)
    if privacy.unit not in require.privacy_units:
        raise refuse(
            f"privacy unit {privacy.unit!r}",
            ", ".join(repr(unit) for unit in require.privacy_units),
            "require.privacy_units",
        )
    if require.secure_aggregation and not study.secure_aggregation.enabled:
        raise refuse("no secure aggregation", "secure aggregation only", "require.secure_aggregation")
    least = max(require.min_sites, study.secure_aggregation.min_sites)
    if cohort is not None and cohort < least:
        key = "require.min_sites" if least == require.min_sites else "the study's own min_sites"
        raise refuse(f"a cohort of {cohort}", f"{least} or more", key)
    colluders = study.secure_aggregation.colluders
    if study.secure_aggregation.enabled and colluders < require.colluders:
        raise refuse(
            f"protection against {colluders} colluders", f"{require.colluders} or more", "require.colluders"
        )
    size = study.secure_aggregation.group_size
    if size is not None and size < require.min_sites:
        raise refuse(f"sums over groups of {size}", f"{require.min_sites} or more", "require.min_sites")
    if study.model_name not in policy.release.allow_models:
        raise refuse(
            f"model {study.model_name!r}",
            ", ".join(repr(name) for name in policy.release.allow_models),
            "release.allow_models",
        )
    if require.min_noise_multiplier:
        event = Guarantee.of(study).event
        sigma = 0.0 if event is None else event.noise_multiplier
        if sigma < require.min_noise_multiplier:
            raise refuse(
                f"noise multiplier {sigma:.4g}",
                f"{require.min_noise_multiplier:g} or more",
                "require.min_noise_multiplier",
            )
    if privacy.max_sites_per_unit < require.max_sites_per_unit:
        raise refuse(
            f"privacy.max_sites_per_unit {privacy.max_sites_per_unit}",
            f"{require.max_sites_per_unit} or more",
            "require.max_sites_per_unit",
            fix=f"privacy.max_sites_per_unit = {require.max_sites_per_unit} in the study, or lower the key",
        )
    if approvals is not None:
        _admit_by_approval(require, study, file, approvals)


def _refusal(study: Study, file: str, asks: str, allows: str, key: str, *, fix: str = "") -> PolicyRefused:
    return PolicyRefused(
        f"study {study.study.name} asks {asks}, this site allows {allows} ({file}, {key})",
        fix=fix,
        public=f"the site's policy refuses the study ({key})",
    )


def _admit_by_approval(require: _Require, study: Study, file: str, approvals: Approvals) -> None:
    """Refuse a study that people here refused, or that lacks the approval or signature that it needs."""
    if (reason := approvals.refusal(study.id)) is not None:
        raise PolicyRefused(
            f"study {study.study.name} was refused here: {reason or 'no reason given'} ({approvals.path})",
            fix="lepton-fl study approve STUDY -c site.toml",
            public=f"refused by the site's people: {reason or 'no reason given'}",
        )
    if require.approval == "signed-study":
        if flaw := _unsigned(require, study, approvals):
            error = _refusal(study, file, flaw, "those signed by its study_key only", "require.approval")
            error.fix = (
                "lepton-fl study sign STUDY.toml --key FILE, by the owner of that key, and submit again"
            )
            raise error
    elif require.approval == "manual" and not approvals.has(study.id):
        error = _refusal(study, file, "approval", "approved studies only", "require.approval")
        if flaw := approvals.flaw(study.id):
            error.message += f"; the approval in {approvals.path} {flaw}"
        error.fix = f"lepton-fl study approve {study.study.name} -c site.toml"
        raise error


def _unsigned(require: _Require, study: Study, approvals: Approvals) -> str:
    """What a study has instead of the signature that lets it in; empty where it has that."""
    try:
        signature = approvals.signature(study.id)
    except LeptonError as error:
        return f"to run by a signature that does not verify ({error.message})"
    if signature is None:
        return "to run without a signature"
    if signature.key.hex() != require.study_key:
        return f"to run by the signature of key {signature.key.hex()}"
    until = require.study_key_until
    if until is not None and datetime.now(UTC).date() > until:
        return f"to run by the signature of a key that counted until {until} (require.study_key_until)"
    return ""


def may_release(policy: Policy, study: Study) -> bool:
    """Whether scores of held-out records may be in the sum that the study asks for."""
    allowed = {"none": (), "dp": ("dp",), "exact": ("dp", "exact")}[policy.release.metrics]
    return study.evaluation.release in allowed


def admit_data(policy: Policy, study: Study, *, units: int, rows: int, positives: int, file: str) -> None:
    """Refuse a study that this site's own table is too small for.

    Raises:
        PolicyRefused: with counts, for the site's own people; a server hears nothing of them.
    """
    require = policy.require
    if rows < require.min_rows:
        raise PolicyRefused(
            f"{rows} training rows, this site asks {require.min_rows} ({file}, require.min_rows)",
        )
    if positives < require.min_positives:
        raise PolicyRefused(
            f"{positives} positive training rows, this site asks {require.min_positives} "
            f"({file}, require.min_positives)",
        )
    delta = study.privacy.delta
    if delta is not None and delta * units >= 1:
        raise PolicyRefused(
            f"study {study.study.name} asks delta {delta:g}, with {units} units here it must be below "
            f"{1 / units:.3g}: at delta >= 1/units one unit may be published whole",
            fix=f"lower privacy.delta below {1 / units:.3g}",
        )
