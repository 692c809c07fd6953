"""Secure aggregation without its masks: the same integers and the same noise, added up by the simulator.

For rehearsals, of which there are many: bit by bit the sum that the protocol opens, without its cost. Only
simulated sites have it: what leaves them here is in clear.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message, RecordDict
from numpy.typing import NDArray

from lepton_fl.errors import BadRequest, VerificationFailed
from lepton_fl.federation.grids import SummingGrid, replies_of
from lepton_fl.federation.secure import ask, contexts_of, sum_reply
from lepton_fl.messages import (
    ARRAYS,
    SUMS,
    Assignment,
    SecureRequest,
    blameless_reply,
    from_record,
    to_record,
)
from lepton_fl.secagg.context import Consortium, Context, Floor
from lepton_fl.secagg.errors import Phase
from lepton_fl.secagg.masks import Words
from lepton_fl.simulation.grid import InProcessGrid
from lepton_fl.site.secure import Aggregation, Membership, Ticket, begun
from lepton_fl.tasks.arrays import Arrays

_WORDS = "words"


class Functional(Aggregation):
    """A simulated site's side: it says what it would have masked."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    def check(self, message: Message, assignment: Assignment, model: Arrays, floor: Floor) -> Ticket:
        roster = self._membership.consortium().roster
        context = begun(message, assignment, self._membership.name, roster, model)
        floor.check(context)
        return Ticket(
            message=message,
            assignment=assignment,
            context=context,
            consortium=self._membership.consortium(),
            floor=floor,
        )

    def enter(self, ticket: Ticket, words: Words) -> Message:
        content = RecordDict({ARRAYS: to_record({_WORDS: words})})
        return Message(content, reply_to=ticket.message)

    def answer(self, message: Message, assignment: Assignment) -> Message:  # noqa: ARG002 - an Aggregation's form
        raise BadRequest("message: a rehearsal has one exchange")


class FunctionalGrid(SummingGrid):
    """The simulator's side: adds up, and decodes.

    The exchanges that it leaves out would reach the same sites: who goes down before the masked vectors are
    asked for is not in the sum, and where fewer than the threshold are left after that there is none. In a
    drawn graph, above 128 sites, the protocol asks a little more.
    """

    def __init__(self, inner: InProcessGrid, consortium: Consortium) -> None:
        super().__init__(inner)
        self._is_up = inner.is_up
        self._roster = consortium.roster

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        asked = list(messages)
        if not asked or asked[0].metadata.message_type not in SUMS:
            return self.inner.send_and_receive(asked, timeout=timeout)
        return self._sum(asked, timeout)

    def _sum(self, asked: list[Message], timeout: float | None) -> list[Message]:
        by_node = {message.metadata.dst_node_id: message for message in asked}
        contexts = contexts_of(asked[0], self._roster)
        ask(asked, SecureRequest(kind=contexts[0].kind, attempt=1, roster=self._roster.version))
        groups = [_Group(context, np.zeros(context.words, np.uint32)) for context in contexts]
        group_of = {party: group for group in groups for party in group.context.cohort.parties}
        sums: list[Message] = []
        rest: list[Message] = []
        for reply in replies_of(self.inner, asked, timeout):
            if reply.has_error():
                rest.append(reply)
                continue
            if not self._is_up(node := reply.metadata.src_node_id, Phase.MASK):
                continue
            group_of[node].total += from_record(reply.content.array_records[ARRAYS], copy=False)[_WORDS]
            group_of[node].members.append(node)
        for group in groups:
            members = sorted(group.members)
            alive = [node for node in members if self._is_up(node, Phase.UNMASK)]
            try:
                mean_L = group.mean_L(len(alive))
            except VerificationFailed as error:
                rest += [blameless_reply(by_node[node], f"no sum: {error}") for node in alive]
                continue
            sums.append(sum_reply(by_node[members[0]], group.context, mean_L, members))
        return [*sums, *rest]


@dataclass(slots=True)
class _Group:
    """Sites whose updates become one sum; added up as they come, so that not all are held at once."""

    context: Context
    total: Words
    members: list[int] = field(default_factory=list)

    def mean_L(self, alive: int) -> NDArray[np.float64]:
        """Of the members' updates, where so many of them are there to the end.

        Raises:
            VerificationFailed: the sum would not be opened, or is none of encoded updates.
        """
        n, cohort = len(self.members), self.context.cohort
        for there, needed in ((n, cohort.quorum), (alive, cohort.threshold)):
            if there < needed:
                raise VerificationFailed(f"{there} sites, at least {needed} are needed")
        return self.context.quantiser.decode(self.total, n=n, total_weight=n)
