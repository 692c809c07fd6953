"""The controls of a site, as Flower mods round its ClientApp. No study and no message can leave them out.

Order, outermost first: `guard` turns errors into replies that tell a server no more than it may know;
`policy` refuses what the privacy officer does not allow; `secagg` takes what the app computed and lets it
leave masked; `ledger` spends before anything is computed. Either of the two commits before anything leaves.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod

from lepton_fl.errors import BadRequest, LeptonError, PolicyRefused
from lepton_fl.messages import (
    ARRAYS,
    COUNTS,
    EVALUATE,
    JOIN,
    PHASES,
    TRAIN,
    Assignment,
    error_reply,
    from_record,
    read_assignment,
    received,
)
from lepton_fl.privacy.ledger import Charge
from lepton_fl.secagg.encoding import digest
from lepton_fl.site.charges import figures_charge, round_charge
from lepton_fl.site.policy import admit_data, admit_study, may_release
from lepton_fl.site.secure import encoded, encoded_counts
from lepton_fl.site.site import Site, Surroundings
from lepton_fl.tasks.arrays import flatten

log = logging.getLogger(__name__)

TABLE_REFUSED = "the site does not take part in this study"
"""All that a server hears of a refusal that depends on the records."""


def mods_of(site: Site[Surroundings]) -> list[Mod]:
    """The controls of `site`, in their order."""
    return [_guard_mod(site), _policy_mod(site), _secagg_mod(site), _ledger_mod(site)]


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
            # It is kept, and would keep the frames it came through: the update in clear, a round's secrets.
            error.__traceback__ = error.__context__ = error.__cause__ = None
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


def _secagg_mod(site: Site[Surroundings]) -> Mod:
    """Under a study with secure aggregation nothing that the app computed leaves but in a sum."""

    def secagg(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        assignment = read_assignment(message)
        kind = message.metadata.message_type
        if not assignment.study.secure_aggregation.enabled:
            return call_next(message, context)
        if kind == JOIN:
            site.aggregation.join(assignment)
        if kind not in (TRAIN, EVALUATE):
            return call_next(message, context)
        template = site.bench(assignment.study).template
        # Before the ledger: a round that cannot be is not charged. And the model is not held meanwhile.
        ticket = site.aggregation.check(message, assignment, received(message, template), site.floor)
        reply = call_next(message, context)
        arrays = from_record(reply.content.array_records[ARRAYS], copy=False)
        noise, guarantee = site.noise.of(assignment.study.id), site.bench(assignment.study).guarantee
        if kind == TRAIN:
            words_L = encoded(flatten(arrays), assignment, ticket.context, noise)
            charged = guarantee.event is not None
        else:
            words_L = encoded_counts(arrays[COUNTS], assignment, ticket.context, noise)
            charged = _metrics_charge(site, assignment) is not None
        if charged:
            # What leaves is masked; what it was is committed to with its noise, never without.
            _commit(site, assignment, hashlib.sha256(words_L.astype("<u4", copy=False).data).digest())
        return site.aggregation.enter(ticket, words_L)

    return secagg


def _ledger_mod(site: Site[Surroundings]) -> Mod:
    """Is there budget? Spend before the first row is read for the round; commit before anything leaves."""

    def ledger(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        handler = handlers.get(message.metadata.message_type)
        if handler is None:
            raise unknown_type(message)
        assignment = read_assignment(message)
        charged = handler(assignment)
        reply = call_next(message, context)
        if charged and not assignment.study.secure_aggregation.enabled:
            _commit(site, assignment, _sha256(reply.content))
        return reply

    def reserve(assignment: Assignment) -> bool:
        charge = _charge(site, assignment)
        if charge is not None:
            rounds = assignment.study.train.charged_rounds
            beside = _metrics_charge(site, assignment)
            site.ledger.reserve(charge, rounds=rounds, budget=site.budget, beside=beside)
        return False

    def spend(assignment: Assignment) -> bool:
        last = assignment.study.train.charged_rounds
        if not 1 <= assignment.round <= last:
            raise BadRequest(f"round {assignment.round} of a study of {last} rounds, spare included")
        charge = _charge(site, assignment)
        if charge is not None:
            site.ledger.charge(charge, rounds=last, budget=site.budget)
        return charge is not None

    def judge(assignment: Assignment) -> bool:
        """Charge the noisy histogram, or note the exact one: both once a run, and before a row is read.

        The note stands for what may leave: whether the sum comes about is for others to say as well.
        """
        study = assignment.study
        if not study.secure_aggregation.enabled:
            # The app asks the policy, and notes what leaves.
            return False
        if study.evaluation.release == "exact":
            if not may_release(site.policy, study):
                raise PolicyRefused(
                    f"study {study.study.name} asks for exact figures, this site allows "
                    f"{site.policy.release.metrics!r} ({site.policy_file}, release.metrics)",
                    public="the site's policy releases no exact figures",
                )
            site.ledger.release(
                site.policy.data.id,
                study=study.id,
                run=assignment.run,
                what="scores of held-out records by label, in a sum over the sites",
                charged=site.bench(study).guarantee.event is not None,
            )
        charge = _metrics_charge(site, assignment)
        if charge is not None:
            site.ledger.charge(charge, rounds=1, budget=site.budget)
        return charge is not None

    def free(_: Assignment) -> bool:
        """Nothing is charged."""
        return False

    handlers: dict[str, Callable[[Assignment], bool]] = {
        JOIN: reserve,
        TRAIN: spend,
        EVALUATE: judge,
        # Of what was charged in the same round; without it the site is not in the round.
        **dict.fromkeys(PHASES.values(), free),
    }
    return ledger


def _commit(site: Site[Surroundings], assignment: Assignment, sha256: bytes) -> None:
    """One content for one charge, on disk before any of it leaves."""
    site.ledger.commit(site.budget.data_set, run=assignment.run, round=assignment.round, sha256=sha256)


def _sha256(content: RecordDict) -> bytes:
    """Of all arrays in what leaves."""
    return digest(
        "lepton-fl/released-arrays/1",
        [
            (name, key, array.dtype, list(array.shape), hashlib.sha256(array.data).digest())
            for name, record in sorted(content.array_records.items())
            for key, array in record.items()
        ],
    )


def _charge(site: Site[Surroundings], assignment: Assignment) -> Charge | None:
    """One round's charge; None where the policy allowed a study without noise."""
    study, bench = assignment.study, site.bench(assignment.study)
    return round_charge(
        study,
        bench.round_event(site.summed_with(assignment)),
        run=assignment.run,
        round=assignment.round,
        fingerprint=bench.fingerprint,
    )


def _metrics_charge(site: Site[Surroundings], assignment: Assignment) -> Charge | None:
    """That of the histogram of scores; None where none leaves with noise, or none of this site's records."""
    bench = site.bench(assignment.study)
    return figures_charge(site.policy, bench.guarantee, run=assignment.run, fingerprint=bench.fingerprint)
