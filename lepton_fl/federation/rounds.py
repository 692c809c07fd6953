"""One round: who was asked, what was accepted, who was dropped and why. No I/O and no clock."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import ConfigRecord, Message

from lepton_fl.errors import BadReply, LeptonError, ProtocolError, TooFewSites
from lepton_fl.messages import (
    ARRAYS,
    CONFIG,
    MEMBERS,
    METRICS,
    WEIGHT,
    as_remark,
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
    content = reply.content
    if set(content.config_records) - ({CONFIG} if summed else set()):
        raise BadReply("reply: a site's reply carries no config record")
    if list(content.array_records) != [ARRAYS] or list(content.metric_records) != [METRICS]:
        raise BadReply("reply: holds other records than one update and its weight")
    if dict(content.metric_records[METRICS]) != {WEIGHT: 1.0}:
        raise BadReply("reply: a weight is a public constant of the study, 1, and no metric rides along")
    arrays = from_record(content.array_records[ARRAYS], copy=False)
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

    def __init__(self, number: int, asked: Mapping[int, str], *, quorum: int, template: Arrays) -> None:
        """`asked` maps the node ids of the cohort to site names; `quorum` of them must stay."""
        self.number = number
        self.quorum = quorum
        self._asked = dict(asked)
        self._template = template
        self._waiting = dict(asked)
        self.accepted: dict[str, Arrays] = {}
        """Each accepted reply's update, by its site's name; a sum's by the first of its members'."""
        self.included: set[str] = set()
        self.dropped: dict[str, str] = {}
        self.missed: set[str] = set()
        """Dropped without an answer, or with a fault that may pass: too often in a row, and they are out."""
        self.left: set[str] = set()
        """Dropped for a malformed reply, or refusing: not asked again in this run."""

    def take(self, reply: Message, *, summed: bool) -> None:
        """Accept or drop one reply. `summed`: it came from a SummingGrid and may hold several sites."""
        source = reply.metadata.src_node_id
        # Not asked, or answered before: a repeated reply counts once.
        if source not in self._waiting:
            return
        if reply.has_error():
            name = self._drop(source, refusal_reason(reply))
            # A site that has charged this round sits it out. An internal error may pass; any other refusal
            # would only be repeated.
            if sits_out(reply):
                return
            fault = refusal_exit_code(reply) == LeptonError.exit_code
            (self.missed if fault else self.left).add(name)
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

    def close(self) -> None:
        """No more replies: the rest is late.

        Raises:
            TooFewSites: fewer than the quorum are in; the round must not be aggregated.
        """
        for node in list(self._waiting):
            self.missed.add(self._drop(node, NO_ANSWER))
        if len(self.included) < self.quorum:
            reasons = "; ".join(f"{n}: {why}" for n, why in sorted(self.dropped.items()))
            raise TooFewSites(
                f"round {self.number}: {len(self.included)} of {len(self._asked)} sites are in, the study "
                f"asks {self.quorum} ({reasons})"
            )

    def _drop(self, node: int, reason: str) -> str:
        """Name the site at `node` with the reason; returns its name."""
        name = self._waiting.pop(node)
        self.dropped[name] = reason
        return name

    def _members(self, reply: Message) -> list[int]:
        members = _node_ids(reply)
        if not members or not set(members) <= set(self._waiting):
            raise BadReply("sum: names a site twice, or one that was not asked")
        return members


def _node_ids(reply: Message) -> list[int]:
    found = reply.content.config_records.get(CONFIG, ConfigRecord()).get(MEMBERS)
    if not isinstance(found, list) or len(set(found)) != len(found):
        return []
    return [node for node in found if isinstance(node, int)]
