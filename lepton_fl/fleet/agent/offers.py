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
from lepton_fl.privacy import Ledger
from lepton_fl.privacy.ledger.chain import Custody, read_key
from lepton_fl.secagg.identity import IdentityKey
from lepton_fl.secure_rounds import check_protectable
from lepton_fl.site.approvals import Approvals, StudySignature
from lepton_fl.site.config import SiteFiles, files_of
from lepton_fl.site.policy import Policy, admit_study, load_policy
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
    """Of a refusal, or why an approval does not count: in full, for the site's own people."""
    public: str = ""
    """Of a refusal: what its operator is told."""


class Offers:
    """The offered studies of one site, as files `ID.canonical`, with `ID.sig` where one came signed."""

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

    def take(
        self, canonical: bytes, study_id: str, *, current: Collection[str], signature: bytes = b""
    ) -> Study:
        """Keep a study that the server offers; `current` are all that it offers now.

        Its `signature` is kept too, in place of the one before; whether its key is trusted is judged later.

        Raises:
            LeptonError: the bytes are not those of the id, no study that this release understands, or more
                than are kept; or it is signed, and the signature is none.
        """
        if len(canonical) > MAX_STUDY or hashlib.sha256(canonical).hexdigest() != study_id:
            raise PolicyRefused("study offered: too long, or not the bytes of its id", public="not a study")
        path = self._path(study_id)
        study = parse_canonical(canonical, study_id)
        signed = StudySignature.read(signature, study_id) if signature else None
        if not path.exists():
            self._make_room(current)
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(path, canonical, mode=0o600)
        if signed is not None:
            self.take_signature(study, signed)
        return study

    def take_signature(self, study: Study, signature: StudySignature) -> None:
        """Keep the signature of a study, in place of the one before."""
        path = self._approvals.signature_path(study.id)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        signature.save(path)

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

    def approve(self, study: Study, key: IdentityKey) -> None:
        """Approve a study with the site's `key`, for policies that ask it; it takes back a refusal.

        Raises:
            PolicyRefused: the policy forbids the study, approved or not.
        """
        self._admit(study)
        admit_study(self._policy(), study, cohort=None, file=self._policy_file, approvals=None)
        self._approvals.add(study, key)

    def judge(self, study: Study) -> Offered:
        """What this site says to a study now."""
        try:
            policy = self._policy()
            self._admit(study)
            admit_study(policy, study, cohort=None, file=self._policy_file, approvals=None)
            waits = policy.require.approval == "manual" and not self._approvals.has(study.id)
            if waits and self._approvals.refusal(study.id) is None:
                flaw = self._approvals.flaw(study.id)
                reason = f"the approval in {self._approvals.path} {flaw}" if flaw else ""
                return Offered(study=study, state="waiting", reason=reason)
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
            self._approvals.signature_path(path.stem).unlink(missing_ok=True)


def offers_of(site_toml: Path) -> Offers:
    """The offers of the institution whose site.toml this is.

    Raises:
        ConfigError: site.toml is not understood.
    """
    files = files_of(site_toml)
    key = _ledger_key(files)
    return Offers(
        files.state / "studies",
        approvals=Approvals(files.approvals, key=None if key is None else key.public),
        policy=lambda: load_policy(files.policy),
        policy_file=str(files.policy),
        admit=check_protectable,
    )


def approving_key(site_toml: Path) -> IdentityKey:
    """The key that this site's approvals are signed with: its ledger's, which is begun where there is none.

    Raises:
        ConfigError: it cannot be read or made, or the ledger is gone.
        VerificationFailed: the ledger was changed, or is gone.
    """
    files = files_of(site_toml)
    key = _ledger_key(files)
    if key is None:
        files.check_ledger()
        Ledger(files.ledger).close()
        key = read_key(Custody(files.ledger).key)
    return key


def _ledger_key(files: SiteFiles) -> IdentityKey | None:
    path = Custody(files.ledger).key
    return read_key(path) if path.exists() else None
