"""Ledgers verified offline, for `lepton-fl audit verify`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lepton_fl.cli.budgets import SiteBudget, budgets
from lepton_fl.errors import VerificationFailed
from lepton_fl.privacy.ledger.audit import Audited, audit, check_limits
from lepton_fl.privacy.ledger.book import Study
from lepton_fl.privacy.ledger.receipts import from_file
from lepton_fl.site.approvals import Approvals


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A ledger of which nothing is wrong."""

    audited: Audited
    policy: str
    """Whose limits the sums were held against; empty where only the ledger was given."""
    approved: int = 0
    """Studies charged since the last renewal that people at the site have approved, by signature."""
    signed: int = 0
    """Such studies with a signature by the key that the policy names."""
    signed_by_others: int = 0
    """Such studies with a sound signature by a key that it does not name, or names no more."""

    @property
    def rounds(self) -> list[str]:
        """What became of each round that was charged, over all data sets."""
        book = self.audited.book
        return [
            round.outcome
            for data_set in book.data_sets
            for rounds in book.of(data_set).rounds.values()
            for round in rounds.values()
        ]

    def as_json(self) -> dict[str, object]:
        book = self.audited.book
        return {
            "ledger": str(self.audited.path),
            "entries": book.head.counter,
            "head": book.head.digest.hex(),
            "key": book.key.hex(),
            "data_sets": list(book.data_sets),
            "rounds_charged": len(self.rounds),
            "rounds_released": self.rounds.count("released"),
            "rounds_recovered": self.rounds.count("recovered"),
            "entries_lost": book.lost,
            "renewals": len(self.audited.renewals),
            "compared_with": list(self.audited.compared),
            "studies_approved": self.approved,
            "studies_signed": self.signed,
            "studies_signed_by_others": self.signed_by_others,
            "policy": self.policy or None,
        }

    def as_row(self) -> tuple[str, ...]:
        book = self.audited.book
        words = {
            "approval": self.approved,
            "signature": self.signed,
            "other signature": self.signed_by_others,
        }
        let_in = [f"{count} {word}{'' if count == 1 else 's'}" for word, count in words.items() if count]
        return (
            str(self.audited.path),
            str(book.head.counter),
            book.head.digest.hex()[:16],
            book.key.hex()[:16],
            str(len(self.rounds)),
            str(self.rounds.count("released")),
            ", ".join([*self.audited.compared, *let_in]) or "nothing beside it",
            f"within {self.policy}" if self.policy else "none given",
        )


def verify(place: Path, files: list[Path], key: bytes | None) -> list[Verified]:
    """Verify the ledger at `place`, or those of the sites there, against their policies and approvals.

    Raises:
        VerificationFailed: the first entry that is wrong, or the approval or signature of a study that was
            charged.
        ConfigError: there is no ledger.
    """
    given = [receipt for file in files for receipt in from_file(file)]
    if place.is_file() and place.suffix != ".toml":
        return [Verified(audited=audit(place, given=given, key=key), policy="")]
    found = budgets([place], None, command="lepton-fl audit verify LEDGER.db, or the folder of a site")
    return [_of(budget, audit(budget.ledger_file, given=given, key=key)) for budget in found]


def _of(budget: SiteBudget, audited: Audited) -> Verified:
    officer = budget.policy.budget.officer_key
    check_limits(
        audited,
        budget.policy.ledger_budget(str(budget.policy_file)),
        officer=None if officer is None else bytes.fromhex(officer),
    )
    approvals = Approvals(budget.approvals_file, key=audited.book.key)
    charged = audited.book.of(budget.data_set).studies
    keys = _signers(approvals, charged)
    return Verified(
        audited=audited,
        policy=str(budget.policy_file),
        approved=_approved(approvals, charged),
        signed=keys.count(budget.policy.require.study_key or ""),
        signed_by_others=sum(key != budget.policy.require.study_key for key in keys),
    )


def _approved(approvals: Approvals, charged: Mapping[str, Study]) -> int:
    """How many of the charged studies people had approved, each by the ledger's key."""
    for study_id, study in charged.items():
        if flaw := approvals.flaw(study_id):
            raise VerificationFailed(
                f"{approvals.path}: the approval of study {study.name}, {study_id[:12]}, {flaw}",
                fix=f"lepton-fl study approve {study.name} -c site.toml, if it was",
            )
    return sum(map(approvals.has, charged))


def _signers(approvals: Approvals, charged: Mapping[str, Study]) -> list[str]:
    """The keys, in hex, that signed charged studies, as far as they are signed.

    Which key the policy named when a study was charged, nobody has written down: another than it names now
    is counted, and is no failure.
    """
    keys = []
    for study_id, study in charged.items():
        try:
            signature = approvals.signature(study_id)
        except VerificationFailed as error:
            raise VerificationFailed(
                f"{approvals.signature_path(study_id)}: the signature of study {study.name}, "
                f"{study_id[:12]}, does not verify",
                fix=error.fix,
            ) from None
        if signature is not None:
            keys.append(signature.key.hex())
    return keys
