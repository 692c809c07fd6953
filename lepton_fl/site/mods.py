"""The controls of a site, as Flower mods round its ClientApp. No study and no message can leave them out.

Order, outermost first: `guard` turns errors into replies that tell a server no more than it may know;
`policy` refuses what the privacy officer does not allow; `ledger` spends before anything is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod

from lepton_fl.errors import BadRequest, LeptonError, PolicyRefused
from lepton_fl.messages import (
    EVALUATE,
    JOIN,
    TRAIN,
    Assignment,
    error_reply,
    read_assignment,
)
from lepton_fl.privacy.ledger import Charge
from lepton_fl.site.policy import admit_data, admit_study
from lepton_fl.site.site import Site, Surroundings

log = logging.getLogger(__name__)

TABLE_REFUSED = "the site does not take part in this study"
"""All that a server hears of a refusal that depends on the records."""


def mods_of(site: Site[Surroundings]) -> list[Mod]:
    """The controls of `site`, in their order."""
    return [_guard_mod(site), _policy_mod(site), _ledger_mod(site)]


def unknown_type(message: Message) -> PolicyRefused:
    """The refusal of a message type that this release has no control for."""
    return PolicyRefused(
        f"message type {message.metadata.message_type!r} is not one that this site answers",
        public="message type not allowed",
    )


def _guard_mod(site: Site[Surroundings]) -> Mod:
    """Absence of an answer is a refusal, and a refusal tells no count, no path and no value."""

    def guard(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        try:
            with site.lock:
                return call_next(message, context)
        except LeptonError as error:
            site.refusals.append(error)
            log.info("site %s refused: %s", site.name, error)
            return error_reply(message, error)
        except Exception:
            # The text of an unforeseen error may quote a record: it stays in the site's own log.
            log.exception("site %s: internal error", site.name)
            return error_reply(message, None)

    return guard


def _policy_mod(site: Site[Surroundings]) -> Mod:
    """May this study run here? Decided on each message, from the message and this site's own files."""

    def policy(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        joining = message.metadata.message_type == JOIN
        _admit(site, read_assignment(message), joining=joining)
        return call_next(message, context)

    return policy


def _admit(site: Site[Surroundings], assignment: Assignment, *, joining: bool) -> None:
    """Refuse an assignment that this site's policy forbids. The cohort is not known while `joining`."""
    study = assignment.study
    if not joining and site.name not in assignment.cohort:
        raise BadRequest(f"message: the cohort does not name this site, {site.name}")
    site.surroundings.admit(study)
    admit_study(
        site.policy,
        study,
        cohort=None if joining else len(assignment.cohort),
        file=site.policy_file,
        approvals=site.approvals,
    )
    try:
        train = site.bench(study).data.train
        admit_data(
            site.policy,
            study,
            units=train.units,
            rows=len(train),
            positives=train.positives,
            file=site.policy_file,
        )
    except LeptonError as error:
        # Rows were read: which check failed would answer a question that the server chose.
        raise PolicyRefused(error.message, fix=error.fix, public=TABLE_REFUSED) from None


def _ledger_mod(site: Site[Surroundings]) -> Mod:
    """Is there budget? Spend before send, and before the first row is read for the round."""

    def ledger(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        handler = handlers.get(message.metadata.message_type)
        if handler is None:
            raise unknown_type(message)
        handler(read_assignment(message))
        return call_next(message, context)

    def reserve(assignment: Assignment) -> None:
        charge = _charge(site, assignment)
        if charge is not None:
            rounds = assignment.study.train.charged_rounds
            site.ledger.reserve(charge, rounds=rounds, budget=site.budget)

    def spend(assignment: Assignment) -> None:
        last = assignment.study.train.charged_rounds
        if not 1 <= assignment.round <= last:
            raise BadRequest(f"round {assignment.round} of a study of {last} rounds, spare included")
        charge = _charge(site, assignment)
        if charge is not None:
            site.ledger.charge(charge, rounds=last, budget=site.budget)

    def free(_: Assignment) -> None:
        """Evaluation is charged nothing because nothing of it leaves, unless policy says exact."""

    handlers: dict[str, Callable[[Assignment], None]] = {
        JOIN: reserve,
        TRAIN: spend,
        EVALUATE: free,
    }
    return ledger


def _charge(site: Site[Surroundings], assignment: Assignment) -> Charge | None:
    """One round's charge; None where the policy allowed a study without noise."""
    study, bench = assignment.study, site.bench(assignment.study)
    event = bench.guarantee.round_event
    if event is None or study.privacy.delta is None:
        return None
    return Charge(
        study=study.id,
        study_name=study.study.name,
        run=assignment.run,
        round=assignment.round,
        event=event,
        clip=study.privacy.clip,
        unit=study.privacy.unit,
        delta=study.privacy.delta,
        fingerprint=bench.fingerprint,
    )
