"""The server's side of secure aggregation, as a Grid round a Grid: sums come out, and no site's update.

The protocol is docs/protocol.md; its steps are `ServerRound`, and what is here carries them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TypeAlias

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from lepton_fl.errors import BadReply, IdentityRefused, ProtocolError
from lepton_fl.federation.grids import SummingGrid, replies_of
from lepton_fl.messages import (
    ARRAYS,
    CONFIG,
    PHASES,
    SECAGG,
    SUMS,
    SecureRequest,
    blameless_reply,
    counts_reply,
    error_reply,
    from_record,
    read_assignment,
    read_secure_reply,
    refusal_reason,
    relayed,
    sits_out,
    update_reply,
)
from lepton_fl.secagg.context import Consortium, Context
from lepton_fl.secagg.errors import Phase, SecaggError, SessionLost
from lepton_fl.secagg.exchanges import Sum
from lepton_fl.secagg.identity import Roster
from lepton_fl.secagg.server import ServerRound
from lepton_fl.secagg.session import ServerSession
from lepton_fl.secagg.session_server import SessionServerRound
from lepton_fl.secure_rounds import TRAIN_SUM, context_of, decode_counts, digest_of, groups_of, resumes
from lepton_fl.tasks.arrays import Arrays, size_of, unflatten

log = logging.getLogger(__name__)

_Server: TypeAlias = ServerRound | SessionServerRound

ATTEMPTS = 2
"""At one round, where a site was gone for a moment; one in a session comes before these."""


class SecureGrid(SummingGrid):
    """Hands the round loop one reply for each group of sites: the mean of their updates.

    Of messages to evaluate it hands on one reply, with the sum of all sites' histograms.

    A site that does not answer, or not as it should, is left out and named: its error is handed on.
    """

    def __init__(
        self,
        inner: Grid,
        consortium: Callable[[], Consortium],
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`consortium`, with the newest roster, is asked once a round."""
        super().__init__(inner)
        self._consortium = consortium
        self._now = now
        self._sessions: dict[tuple[str, str], _Sessions] = {}
        """By run and kind."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        asked = list(messages)
        if not asked or asked[0].metadata.message_type not in SUMS:
            return self.inner.send_and_receive(asked, timeout=timeout)
        consortium = self._consortium()
        expelled = _expelled(asked, consortium.roster)
        if expelled:
            return expelled
        assignment, kind = read_assignment(asked[0]), SUMS[asked[0].metadata.message_type]
        sessions = None
        if resumes(assignment.study, kind):
            sessions = self._sessions.setdefault((assignment.run, kind), _Sessions())
        return _SecureRound(self.inner, asked, consortium, self._now, sessions).run(timeout)


def contexts_of(message: Message, roster: Roster) -> list[Context]:
    """The sums of the round that `message` begins, as the server makes them: one for each group."""
    assignment, kind = read_assignment(message), SUMS[message.metadata.message_type]
    model = _model_in(message)
    # Once, not for each group: it may be large.
    digest = digest_of(model)
    return [
        context_of(
            assignment.study,
            names=names,
            run=assignment.run,
            kind=kind,
            round=assignment.round,
            roster=roster,
            parameters=size_of(model),
            model=digest,
        )
        for names in groups_of(assignment.study, kind, assignment.cohort, assignment.round)
    ]


def ask(messages: Iterable[Message], request: SecureRequest) -> None:
    """Put the request into all messages. Many with one content stay so: a transport sends it once."""
    for content in {id(message.content): message.content for message in messages}.values():
        content[SECAGG] = request.record()


def sum_reply(message: Message, context: Context, mean_L: NDArray[np.float64], members: list[int]) -> Message:
    """The reply to `message` for all `members`: the mean of their updates, or the sum of their histograms."""
    if context.kind == TRAIN_SUM:
        mean = unflatten(mean_L.astype(np.float32), _model_in(message))
        return update_reply(message, mean, members=members)
    counts_2B = decode_counts(mean_L, context.quantiser, len(members))
    return counts_reply(message, counts_2B, members=members)


def _model_in(message: Message) -> Arrays:
    return from_record(message.content.array_records[ARRAYS], copy=False)


def _expelled(asked: Sequence[Message], roster: Roster) -> list[Message]:
    """Replies that end a round before it begins, where one of those asked is no member any more.

    Its name is in what would be sent to all, and they would have to refuse. Nobody is charged; the next round
    is without it.
    """
    members = {member.party for member in roster.members}
    strangers = {message.metadata.dst_node_id for message in asked} - members
    if not strangers:
        return []
    log.warning(
        "parties %s are no members in roster %d: no round with them", sorted(strangers), roster.version
    )
    gone = IdentityRefused(
        f"no member in roster {roster.version}",
        public=f"is no member of the consortium in roster {roster.version}",
    )
    return [
        error_reply(message, gone)
        if message.metadata.dst_node_id in strangers
        else blameless_reply(message, "the cohort has lost a member")
        for message in asked
    ]


class _Sessions:
    """What the sites of a run can resume. After each loss they rest longer, so that cheating costs little."""

    def __init__(self) -> None:
        self._kept: ServerSession | None = None
        self._losses = 0
        self._rest = 0
        """Ordinary rounds to come that leave nothing to resume."""

    def server(self, context: Context, consortium: Consortium) -> _Server:
        """For the first attempt at a round: in the session, where there is one that serves."""
        step = None if self._kept is None else self._kept.step(context)
        if self._kept is None or step is None:
            return ServerRound(context, consortium)
        return SessionServerRound(context, self._kept.id, step)

    def after(self, group: _Group) -> None:
        """An attempt is over. An ordinary one leaves what the next round resumes; a loss ends the session."""
        server = group.server
        if isinstance(server, ServerRound):
            self._kept = server.session() if group.sum and not self._rest else None
            self._rest = max(self._rest - 1, 0)
        elif group.sum is None or group.shaken:
            self._kept, self._rest, self._losses = None, self._losses, self._losses + 1


@dataclass(slots=True)
class _Group:
    """Sites whose updates become one sum."""

    context: Context
    server: _Server
    alive: set[int] = field(default_factory=set)
    """Parties that have entered the round, and neither refused nor cheated since."""
    silent: set[int] = field(default_factory=set)
    """Of these, who did not answer in this attempt; by the next one they may be back."""
    shaken: bool = False
    """A site has refused to unmask: it is in no session any more."""
    sum: Sum | None = None
    lost: SecaggError | None = None
    """Why this attempt ended without a sum."""

    @property
    def may_give_up(self) -> bool:
        """Whether a refusal ends this attempt: it is in a session, and nothing can be open yet."""
        return isinstance(self.server, SessionServerRound) and self.server.phase in (
            Phase.MASK,
            Phase.CONFIRM,
        )

    @property
    def may_try_again(self) -> bool:
        """Whether another attempt is allowed, since nothing can be open, and may succeed."""
        return (
            self.lost is not None
            and self.lost.retry
            and self.lost.phase is not Phase.UNMASK
            and len(self.alive) >= self.context.cohort.quorum
        )


class _SecureRound:
    """One round. Its groups go through the exchanges in step, each as far as it comes."""

    def __init__(
        self,
        inner: Grid,
        asked: Sequence[Message],
        consortium: Consortium,
        now: Callable[[], datetime],
        sessions: _Sessions | None,
    ) -> None:
        """`sessions` where rounds of this run and kind can be resumed, which are of one group."""
        self._inner = inner
        self._asked = {message.metadata.dst_node_id: message for message in asked}
        self._consortium = consortium
        self._now = now
        self._assignment = read_assignment(asked[0])
        self._kind = SUMS[asked[0].metadata.message_type]
        self._deadline = self._assignment.study.secure_aggregation.deadline
        self._errors: dict[int, Message] = {}
        """What a site gave in place of its part."""
        self._sessions = sessions
        self._groups = [
            _Group(
                context,
                sessions.server(context, consortium) if sessions else ServerRound(context, consortium),
            )
            for context in contexts_of(asked[0], consortium.roster)
        ]
        self._of = {party: group for group in self._groups for party in group.context.cohort.parties}

    def run(self, timeout: float | None) -> list[Message]:
        """A reply for each group with a sum, and one for each site that gave none and said why."""
        request, attempts = self._request(1), ATTEMPTS
        resumed = self._groups[0].server
        if isinstance(resumed, SessionServerRound):
            request, attempts = replace(request, session=resumed.session, step=resumed.step), ATTEMPTS + 1
        ask(self._asked.values(), request)
        self._attempt(self._groups, list(self._asked.values()), timeout)
        for number in range(2, attempts + 1):
            again = [group for group in self._groups if group.may_try_again]
            if not again:
                break
            log.warning("round %d: attempt %d: %s", self._assignment.round, number, again[0].lost)
            for group in again:
                group.context = replace(group.context, attempt=number)
                group.server, group.lost = ServerRound(group.context, self._consortium), None
                group.silent.clear()
            parties = [party for group in again for party in sorted(group.alive)]
            content = self._content(self._request(number))
            self._attempt(again, self._messages(Phase.ADVERTISE, dict.fromkeys(parties, content)))
        return [reply for group in self._groups for reply in self._replies(group)]

    def _attempt(
        self, groups: Sequence[_Group], first: Sequence[Message], timeout: float | None = None
    ) -> None:
        now = self._now()

        def advertised(server: _Server, party: int, reply: Message) -> None:
            self._of[party].alive.add(party)
            body, _ = read_secure_reply(reply)
            if isinstance(server, SessionServerRound):
                server.advertised(party, body)
            else:
                server.advertised(party, body, now)

        def share_requests(server: _Server) -> dict[int, bytes]:
            return server.share_requests() if isinstance(server, ServerRound) else {}

        def shared(server: _Server, party: int, reply: Message) -> None:
            if isinstance(server, ServerRound):
                server.shared(party, read_secure_reply(reply)[0])

        def masked(server: _Server, party: int, reply: Message) -> None:
            server.masked(party, *read_secure_reply(reply, masked=True))

        def confirmed(server: _Server, party: int, reply: Message) -> None:
            server.confirmed(party, read_secure_reply(reply)[0])

        def unmasked(server: _Server, party: int, reply: Message) -> None:
            server.unmasked(party, read_secure_reply(reply)[0])

        self._exchange(first, timeout or self._deadline, advertised)
        self._phase(groups, Phase.SHARE, share_requests, shared)
        self._phase(groups, Phase.MASK, lambda server: server.mask_requests(), masked)
        self._phase(groups, Phase.CONFIRM, lambda server: server.confirm_requests(), confirmed)
        self._phase(groups, Phase.UNMASK, lambda server: server.unmask_requests(), unmasked)
        for group in groups:
            if group.lost is None:
                try:
                    group.sum = group.server.result()
                except SecaggError as error:
                    self._lose(group, error)
                    continue
                for dealer, holders in group.sum.accused.items():
                    log.warning(
                        "round %d: parties %s found their shares of party %d's secrets bad: one cheats",
                        self._assignment.round,
                        holders,
                        dealer,
                    )
            if self._sessions is not None:
                self._sessions.after(group)

    def _phase(
        self,
        groups: Sequence[_Group],
        phase: Phase,
        requests: Callable[[_Server], dict[int, bytes]],
        take: Callable[[_Server, int, Message], None],
    ) -> None:
        """End what was before, and make the exchange of `phase`."""
        contents: dict[int, RecordDict] = {}
        for group in groups:
            if group.lost is not None:
                continue
            try:
                bodies = requests(group.server)
            except SecaggError as error:
                self._lose(group, error)
                continue
            # The same for all, as the survivors are: one content.
            made = {
                body: self._content(self._request(group.context.attempt, body))
                for body in set(bodies.values())
            }
            contents |= {party: made[body] for party, body in bodies.items()}
        if contents:
            self._exchange(self._messages(phase, contents), self._deadline, take)

    def _exchange(
        self,
        messages: Sequence[Message],
        timeout: float,
        take: Callable[[_Server, int, Message], None],
    ) -> None:
        silent = {message.metadata.dst_node_id for message in messages}
        for reply in replies_of(self._inner, messages, timeout):
            party = reply.metadata.src_node_id
            silent.remove(party)
            group = self._of[party]
            if reply.has_error():
                if group.may_give_up:
                    message = f"party {party} refuses: {refusal_reason(reply)}"
                    self._lose(group, SessionLost(message, phase=group.server.phase))
                    continue
                group.shaken = group.server.phase is Phase.UNMASK
                self._leave_out(party, self._excuse(reply))
                continue
            try:
                take(group.server, party, reply)
            except SessionLost as error:
                self._lose(group, error)
            except ProtocolError as error:
                log.warning("round %d: party %d: %s", self._assignment.round, party, error)
                self._accuse(party, error)
        for party in silent:
            self._of[party].silent.add(party)

    def _excuse(self, reply: Message) -> Message:
        """What a site gave in place of its part. Who sits out an exchange may do so for another's fault.

        Not the first: nothing that another site made has reached it by then.
        """
        asked = self._asked[reply.metadata.src_node_id]
        first = (*SUMS, PHASES[Phase.ADVERTISE])
        if sits_out(reply) and reply.metadata.message_type not in first:
            return blameless_reply(asked, refusal_reason(reply))
        return relayed(reply, asked)

    def _leave_out(self, party: int, error: Message) -> None:
        self._of[party].alive.discard(party)
        self._errors.setdefault(party, error)

    def _accuse(self, party: int, error: ProtocolError) -> None:
        """What is shown against a party counts for more than what it said before."""
        self._errors.pop(party, None)
        named = BadReply(error.message, public=error.public)
        self._leave_out(party, error_reply(self._asked[party], named))

    def _lose(self, group: _Group, error: SecaggError) -> None:
        group.lost = error
        if error.culprit in self._asked:
            self._accuse(error.culprit, error)

    def _request(self, attempt: int, body: bytes = b"") -> SecureRequest:
        return SecureRequest(
            kind=self._kind, attempt=attempt, roster=self._consortium.roster.version, body=body
        )

    def _content(self, request: SecureRequest) -> RecordDict:
        config = next(iter(self._asked.values())).content.config_records[CONFIG]
        return RecordDict({CONFIG: config, SECAGG: request.record()})

    def _messages(self, phase: Phase, contents: Mapping[int, RecordDict]) -> list[Message]:
        return [
            Message(content, dst_node_id=party, message_type=PHASES[phase])
            for party, content in sorted(contents.items())
        ]

    def _replies(self, group: _Group) -> Iterator[Message]:
        if group.sum is not None:
            members = list(group.sum.survivors)
            yield sum_reply(self._asked[members[0]], group.context, group.sum.mean_L, members)
        for party in group.context.cohort.parties:
            if party in self._errors:
                # Of a member of the sum as well, which cheated after its update was in.
                yield self._errors[party]
            elif group.lost is not None and party in group.alive - group.silent:
                # Did its part, and is to be asked again.
                yield blameless_reply(self._asked[party], f"no sum: {group.lost.message}")
