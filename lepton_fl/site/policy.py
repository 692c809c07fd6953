"""policy.toml: what the privacy officer allows. The agent obeys it over anything a server says."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lepton_fl.config import Array, Strict, load
from lepton_fl.errors import ConfigError, PolicyRefused
from lepton_fl.privacy.ledger import Budget
from lepton_fl.study import Delta, Name, Positive, Study


class _Data(Strict):
    id: Name
    """The budget belongs to this id, across all versions of the data and all runs."""


class _Budget(Strict):
    epsilon_total: Positive
    epsilon_per_study: Positive
    delta_total: Delta


class _Require(Strict):
    secure_aggregation: bool = True
    differential_privacy: bool = True
    """false: allow studies with noise = "none"."""
    min_sites: Annotated[int, Field(ge=1)] = 3
    """Smallest cohort, this site included."""
    privacy_units: Array[str] = ("record",)
    min_rows: Annotated[int, Field(ge=1)] = 1
    min_positives: Annotated[int, Field(ge=0)] = 0
    approval: Literal["manual", "signed-study", "auto"] = "manual"


class _Release(Strict):
    metrics: Literal["none", "dp", "exact"] = "none"
    """exact: evaluation figures leave without noise, and every report says so in red."""
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

    def refuse(asks: str, allows: str, key: str) -> PolicyRefused:
        return PolicyRefused(
            f"study {study.study.name} asks {asks}, this site allows {allows} ({file}, {key})",
            public=f"the site's policy refuses the study ({key})",
        )

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
        if privacy.delta is not None and privacy.delta > budget.delta_total:
            raise refuse(f"delta {privacy.delta:g}", f"{budget.delta_total:g}", "budget.delta_total")
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
    if study.model_name not in policy.release.allow_models:
        raise refuse(
            f"model {study.model_name!r}",
            ", ".join(repr(name) for name in policy.release.allow_models),
            "release.allow_models",
        )
    if require.approval == "signed-study":
        raise refuse(
            "approval by its operator's signature (studies are not signed in this release)",
            "signed studies",
            "require.approval",
        )
    if require.approval == "manual" and approvals is not None and not approvals.has(study.id):
        error = refuse("approval", "approved studies only", "require.approval")
        error.fix = "lepton-fl study approve study.toml -c site.toml"
        raise error


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


class Approvals:
    """The studies that a person at this site approved: one JSON line each, append-only."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, study_id: str) -> bool:
        """Whether this very study was approved; an unreadable file approves nothing."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return False
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.path}: approvals cannot be read: {error}") from None
        return any(_study_in(line) == study_id for line in lines)

    def add(self, study: Study) -> None:
        """Record the approval of a study."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entry = {
            "study": study.id,
            "name": study.study.name,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, sort_keys=True) + "\n")


def _study_in(line: str) -> str | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    found = entry.get("study") if isinstance(entry, dict) else None
    return found if isinstance(found, str) else None
