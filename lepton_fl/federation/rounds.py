"""One round: who was asked, what was accepted, who was dropped and why. No I/O and no clock."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord

from lepton_fl.errors import BadReply, LeptonError, ProtocolError, TooFewSites
from lepton_fl.messages import (
    ARRAYS,
    CONFIG,
    MEMBERS,
    METRICS,
    WEIGHT,
    as_remark,
    blameless,
    from_record,
    refusal_exit_code,
    refusal_reason,
    sits_out,
)
from lepton_fl.tasks.arrays import MAX_MAGNITUDE, Arrays, check_like

NO_ANSWER = "no answer before the deadline"
"""Why a site is left out that was asked and said nothing."""


def read_update(reply: Message, template: Mapping[str, np.ndarray], *, summed: bool = False) -> Arrays:
    """The update in a site's reply, or in a sum over several, float32, shaped like the model.

    The arrays are read-only views of the reply's bytes: an update costs no memory beyond its message's.

    Raises:
        BadReply: it is not exactly one array record like `template`, of coordinates of magnitude up to
            `MAX_MAGNITUDE`, and the public constant weight.
    """
    records = dict(reply.content.items())
    configs = {name for name, record in records.items() if isinstance(record, ConfigRecord)}
    if configs - ({CONFIG} if summed else set()):
        raise BadReply("reply: a site's reply carries no config record")
    update, weight = records.get(ARRAYS), records.get(METRICS)
    others = records.keys() - configs - {ARRAYS, METRICS}
    if others or not isinstance(update, ArrayRecord) or not isinstance(weight, MetricRecord):
        raise BadReply("reply: holds other records than one update and its weight")
    if dict(weight.items()) != {WEIGHT: 1.0}:
        raise BadReply("reply: a weight is a public constant of the study, 1, and no metric rides along")
    arrays = from_record(update, copy=False)
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise BadReply(f"arrays: {name} has type {array.dtype}, an update is float32")
    try:
        check_like(arrays, template, limit=MAX_MAGNITUDE)
    except ProtocolError as error:
        raise BadReply(error.message) from None
    return arrays


class Round:
    """The state of one round; every reply is accepted once or dropped with a reason."""

    def __init__(
        self, number: int, asked: Mapping[int, str], *, quorum: int, template: Arrays, sums: int = 1
    ) -> None:
        """`asked` maps the node ids of the cohort to site names; `quorum` must stay, in `sums` replies."""
        self.number = number
        self.quorum = quorum
        self.sums = sums
        self._asked = dict(asked)
        self._template = template
        self._waiting = dict(asked)
        self.accepted: dict[str, Arrays] = {}
        """Each accepted reply's update, by its site's name; a sum's mean by the first of its members'."""
        self.members: dict[str, int] = {}
        """How many sites are in each of `accepted`."""
        self.included: set[str] = set()
        self.dropped: dict[str, str] = {}
        self.missed: set[str] = set()
        """Dropped without an answer, sitting out, or with a passing fault: out if too often in a row."""
        self.left: set[str] = set()
        """Dropped for a malformed reply, or refusing: not asked again in this run."""

    def take(self, reply: Message, *, summed: bool) -> None:
        """Accept or drop one reply. `summed`: it came from a SummingGrid and may hold several sites."""
        source = reply.metadata.src_node_id
        # Not asked, or answered before: a repeated reply counts once.
        if source not in self._waiting:
            name = self._asked.get(source, "")
            if summed and reply.has_error() and name in self.included and not is_passing(reply):
                # It cheated after its update was in the sum.
                self.dropped[name] = refusal_reason(reply)
                self.left.add(name)
            return
        if reply.has_error():
            name = self._drop(source, refusal_reason(reply))
            # A sum that did not come about is no fault of those who did their part.
            if not (summed and blameless(reply)):
                (self.missed if is_passing(reply) else self.left).add(name)
            return
        try:
            arrays = read_update(reply, self._template, summed=summed)
            members = self._members(reply) if summed else [source]
        except BadReply as error:
            # It may name the reply's arrays, in the site's own words.
            self.left.add(self._drop(source, as_remark(error.message)))
            return
        for node in members:
            del self._waiting[node]
        names = sorted(self._asked[node] for node in members)
        self.included.update(names)
        self.accepted[names[0]] = arrays
        self.members[names[0]] = len(names)

    def close(self) -> None:
        """No more replies: the rest is late.

        Raises:
            TooFewSites: fewer sites than the quorum are in, or fewer sums; it must not be aggregated.
        """
        for node in list(self._waiting):
            self.missed.add(self._drop(node, NO_ANSWER))
        if len(self.included) < self.quorum or len(self.accepted) < self.sums:
            reasons = "; ".join(f"{n}: {why}" for n, why in sorted(self.dropped.items()))
            raise TooFewSites(
                f"round {self.number}: {len(self.included)} of {len(self._asked)} sites are in"
                f"{f', in {len(self.accepted)} sums' if self.sums > 1 else ''}, the study asks "
                f"{self.quorum}{f' in {self.sums}' if self.sums > 1 else ''} ({reasons})"
            )

    def _drop(self, node: int, reason: str) -> str:
        """Name the site at `node` with the reason; returns its name."""
        name = self._waiting.pop(node)
        self.dropped[name] = reason
        return name

    def _members(self, reply: Message) -> list[int]:
        members = members_of(reply)
        if not members or not set(members) <= set(self._waiting):
            raise BadReply("sum: names a site twice, or one that was not asked")
        return members


def is_passing(reply: Message) -> bool:
    """Whether the sender of an error reply may answer the next time; a refusal would only be repeated."""
    return sits_out(reply) or refusal_exit_code(reply) == LeptonError.exit_code


def members_of(reply: Message) -> list[int]:
    """The node ids that a sum names; empty where it is none."""
    found = reply.content.config_records.get(CONFIG, ConfigRecord()).get(MEMBERS)
    if not isinstance(found, list) or len(set(found)) != len(found):
        return []
    return [node for node in found if isinstance(node, int)]
