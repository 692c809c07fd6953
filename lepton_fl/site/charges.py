"""What a run of a study would be charged at a site: the same for who plans it and for who spends it."""

from __future__ import annotations

from lepton_fl.privacy import Charge, Guarantee
from lepton_fl.privacy.accounting import Event
from lepton_fl.site.policy import Policy, may_release
from lepton_fl.study import Study


def round_charge(
    study: Study, event: Event | None, *, run: str, round: int, fingerprint: str
) -> Charge | None:
    """One round of training, which costs `event`; None where the policy allowed a study without noise."""
    return _charge(study, event, run=run, round=round, fingerprint=fingerprint, clip=study.privacy.clip)


def figures_charge(policy: Policy, guarantee: Guarantee, *, run: str, fingerprint: str) -> Charge | None:
    """The histogram of scores; None where none leaves with noise, or none of this site's records."""
    study = guarantee.study
    event = guarantee.metrics if may_release(policy, study) else None
    # A unit moves one count by 1.
    return _charge(study, event, run=run, round=study.evaluation_round, fingerprint=fingerprint, clip=1.0)


def _charge(
    study: Study, event: Event | None, *, run: str, round: int, fingerprint: str, clip: float
) -> Charge | None:
    if event is None or study.privacy.delta is None:
        return None
    return Charge(
        study=study.id,
        study_name=study.study.name,
        run=run,
        round=round,
        event=event,
        clip=clip,
        unit=study.privacy.unit,
        delta=study.privacy.delta,
        fingerprint=fingerprint,
    )
