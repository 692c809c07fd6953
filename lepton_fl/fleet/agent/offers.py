"""The studies that the server proposes, on the site's own disk, and what the site says to each.

What a site says is decided by its policy and its people alone; no record is read for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lepton_fl.errors import ConfigError, LeptonError, PolicyRefused
from lepton_fl.files import write_atomic
from lepton_fl.fleet.protocol.limits import MAX_STUDY
from lepton_fl.secure_rounds import check_protectable
from lepton_fl.site.config import files_of
from lepton_fl.site.policy import Approvals, Policy, admit_study, load_policy
from lepton_fl.study import Study, parse_canonical

MAX_OFFERS = 64
"""Studies that are kept. Of those that are offered no longer the oldest makes room."""

State = Literal["waiting", "approved", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """One study, and what this site says to it."""

    study: Study
    state: State
    reason: str = ""
    """Of a refusal: in full, for the site's own people."""
    public: str = ""
    """Of a refusal: what its operator is told."""


class Offers:
    """The offered studies of one site, as files `ID.canonical`."""

    def __init__(
        self,
        folder: Path,
        *,
        approvals: Approvals,
        policy: Callable[[], Policy],
        policy_file: str,
        admit: Callable[[Study], None],
    ) -> None:
        """`policy` is asked anew for each judgement; `admit` refuses what the surroundings cannot do."""
        self._folder = folder
        self._approvals = approvals
        self._policy = policy
        self._policy_file = policy_file
        self._admit = admit

    def take(self, canonical: bytes, study_id: str, *, current: Collection[str]) -> Study:
        """Keep a study that the server offers; `current` are all that it offers now.

        Raises:
            LeptonError: the bytes are not those of the id, no study that this release understands, or more
                than are kept.
        """
        if len(canonical) > MAX_STUDY or hashlib.sha256(canonical).hexdigest() != study_id:
            raise PolicyRefused("study offered: too long, or not the bytes of its id", public="not a study")
        path = self._path(study_id)
        study = parse_canonical(canonical, study_id)
        if not path.exists():
            self._make_room(current)
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(path, canonical, mode=0o600)
        return study

    def list(self) -> Sequence[Offered]:
        """Every study that is kept, newest offer first; files that are not whole are passed over."""
        return [self.judge(study) for study in self._studies()]

    def find(self, text: str) -> Study:
        """The study of this name, or whose id begins so.

        Raises:
            ConfigError: there is none, or more than one, which are named.
        """
        kept = self._studies()
        found = [s for s in kept if s.study.name == text or (len(text) >= 4 and s.id.startswith(text))]
        if len(found) == 1:
            return found[0]
        names = ", ".join(f"{s.study.name} ({s.id[:12]})" for s in found or kept)
        if found:
            raise ConfigError(f"study {text!r}: found more than one: {names}", fix="name one by its id")
        raise ConfigError(
            f"study {text!r}: not among those offered to this site: {names or 'none yet'}",
            fix="lepton-fl client start -c site.toml, and wait for the server's offer",
        )

    def refuse(self, study: Study, reason: str) -> None:
        """Refuse a study, whatever the policy says. The reason is told to the study's operator."""
        self._approvals.refuse(study, " ".join(reason.split()))

    def approve(self, study: Study) -> None:
        """Approve a study, for policies that ask it; it takes back a refusal.

        Raises:
            PolicyRefused: the policy forbids the study, approved or not.
        """
        self._admit(study)
        admit_study(self._policy(), study, cohort=None, file=self._policy_file, approvals=None)
        self._approvals.add(study)

    def judge(self, study: Study) -> Offered:
        """What this site says to a study now."""
        try:
            policy = self._policy()
            self._admit(study)
            admit_study(policy, study, cohort=None, file=self._policy_file, approvals=None)
            waits = policy.require.approval == "manual" and not self._approvals.has(study.id)
            if waits and self._approvals.refusal(study.id) is None:
                return Offered(study=study, state="waiting")
            admit_study(policy, study, cohort=None, file=self._policy_file, approvals=self._approvals)
        except LeptonError as error:
            return Offered(study=study, state="refused", reason=error.message, public=error.public)
        return Offered(study=study, state="approved")

    def _studies(self) -> Sequence[Study]:
        found = []
        for path in self._by_age():
            try:
                found.append(parse_canonical(path.read_bytes(), path.stem))
            except (OSError, LeptonError):
                continue
        return found[::-1]

    def _by_age(self) -> Sequence[Path]:
        if not self._folder.is_dir():
            return []
        return sorted(self._folder.glob("*.canonical"), key=lambda path: path.stat().st_mtime_ns)

    def _path(self, study_id: str) -> Path:
        return self._folder / f"{study_id}.canonical"

    def _make_room(self, current: Collection[str]) -> None:
        kept = self._by_age()
        over = len(kept) + 1 - MAX_OFFERS
        old = [path for path in kept if path.stem not in current]
        if over > len(old):
            raise PolicyRefused(
                f"{len(kept)} studies are offered already, and no more are kept ({self._folder})",
                public="the site keeps no more studies",
            )
        for path in old[: max(0, over)]:
            path.unlink(missing_ok=True)


def offers_of(site_toml: Path) -> Offers:
    """The offers of the institution whose site.toml this is.

    Raises:
        ConfigError: site.toml is not understood.
    """
    files = files_of(site_toml)
    return Offers(
        files.state / "studies",
        approvals=Approvals(files.approvals),
        policy=lambda: load_policy(files.policy),
        policy_file=str(files.policy),
        admit=check_protectable,
    )
