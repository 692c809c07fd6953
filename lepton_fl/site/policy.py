"""policy.toml: what the privacy officer allows. The agent obeys it over anything a server says."""

from __future__ import annotations

import json
import os
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
    officer_key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """The privacy officer's public key, in hex: who may renew the budget. Without it nobody may."""


class _Require(Strict):
    secure_aggregation: bool = True
    differential_privacy: bool = True
    """false: allow studies with noise = "none"."""
    min_sites: Annotated[int, Field(ge=1)] = 3
    """Smallest cohort, this site included, and smallest number of sites in a sum."""
    colluders: Annotated[int, Field(ge=0)] = 0
    """Fewest members, colluding with the server, that a secure round must protect this site against."""
    privacy_units: Array[str] = ("record",)
    min_rows: Annotated[int, Field(ge=1)] = 1
    min_positives: Annotated[int, Field(ge=0)] = 0
    approval: Literal["manual", "signed-study", "auto"] = "manual"


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
    if approvals is not None and (reason := approvals.refusal(study.id)) is not None:
        raise PolicyRefused(
            f"study {study.study.name} was refused here: {reason or 'no reason given'} ({approvals.path})",
            fix="lepton-fl study approve STUDY -c site.toml",
            public=f"refused by the site's people: {reason or 'no reason given'}",
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


class Approvals:
    """What people at this site said to studies: one JSON line each, append-only; the last one counts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, study_id: str) -> bool:
        """Whether this very study is approved; an unreadable file approves nothing."""
        entry = self._last(study_id)
        return entry is not None and "refused" not in entry

    def refusal(self, study_id: str) -> str | None:
        """Why people here refuse this study, as they told its operator; None where they do not."""
        entry = self._last(study_id)
        return None if entry is None or "refused" not in entry else str(entry["refused"])

    def add(self, study: Study) -> None:
        """Record the approval of a study."""
        self._append(study, {})

    def refuse(self, study: Study, reason: str) -> None:
        """Record a refusal, which holds whatever the policy says. The reason is told to the operator."""
        self._append(study, {"refused": reason})

    def _last(self, study_id: str) -> dict[str, object] | None:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.path}: approvals cannot be read: {error}") from None
        found = [entry for line in lines if (entry := _entry(line)).get("study") == study_id]
        return found[-1] if found else None

    def _append(self, study: Study, said: dict[str, object]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entry = {
            "study": study.id,
            "name": study.study.name,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            **said,
        }
        self.path.touch(mode=0o600)
        with self.path.open("ab+") as file:
            # A line that was cut off, as by a full disk, must not swallow this one.
            file.seek(-1 if file.seek(0, os.SEEK_END) else 0, os.SEEK_END)
            begin = b"" if file.read() in (b"", b"\n") else b"\n"
            file.write(begin + json.dumps(entry, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _entry(line: str) -> dict[str, object]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
