"""A round counts each site once, or names it, whatever arrives in whatever order."""

import tracemalloc
from itertools import permutations

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lepton_fl.errors import AlreadyCharged, LeptonError, PolicyRefused, TooFewSites
from lepton_fl.federation.rounds import Round, read_update
from lepton_fl.messages import (
    METRICS,
    TRAIN,
    WEIGHT,
    blameless_reply,
    error_reply,
    identify,
    to_record,
    update_reply,
)

TEMPLATE = {"w": np.zeros(2, np.float32)}
SITES = {11: "ann", 12: "bob", 13: "cid", 14: "dot"}
UNKNOWN = 99


def asked(node):
    return Message(RecordDict(), dst_node_id=node, message_type=TRAIN)


def update(node, value=1.0):
    return update_reply(asked(node), {"w": np.full(2, value, np.float32)})


def garbage(node):
    return update_reply(asked(node), {"w": np.full(2, np.nan, np.float32)})


def summed(node, members):
    return update_reply(asked(node), {"w": np.ones(2, np.float32)}, members=members)


class Rounds(RuleBasedStateMachine):
    """Replies in any number and order, against a few lines that say what should be left of them."""

    @initialize(quorum=st.integers(1, 4))
    def begin(self, quorum):
        identify("0" * 32, 1)
        self.round = Round(1, SITES, quorum=quorum, template=TEMPLATE)
        self.included, self.dropped, self.missed, self.left = {}, set(), set(), set()
        self.closed = False

    def first_of(self, node):
        name = SITES.get(node)
        return name if not self.closed and name not in {None, *self.included, *self.dropped} else None

    @rule(node=st.sampled_from([*SITES, UNKNOWN]), value=st.floats(-9, 9, width=32))
    def update(self, node, value):
        if name := self.first_of(node):
            self.included[name] = value
        self.round.take(update(node, value), summed=False)

    @rule(node=st.sampled_from([*SITES, UNKNOWN]))
    def garbage(self, node):
        if name := self.first_of(node):
            self.dropped.add(name)
            self.left.add(name)
        self.round.take(garbage(node), summed=False)

    @rule(node=st.sampled_from([*SITES, UNKNOWN]))
    def refusal(self, node):
        if name := self.first_of(node):
            self.dropped.add(name)
            self.left.add(name)
        self.round.take(error_reply(asked(node), PolicyRefused("no")), summed=False)

    @rule(node=st.sampled_from([*SITES, UNKNOWN]))
    def fault(self, node):
        if name := self.first_of(node):
            self.dropped.add(name)
            self.missed.add(name)
        self.round.take(error_reply(asked(node), None), summed=False)

    @rule(node=st.sampled_from([*SITES, UNKNOWN]))
    def sitting_out(self, node):
        if name := self.first_of(node):
            self.dropped.add(name)
            self.missed.add(name)
        self.round.take(error_reply(asked(node), AlreadyCharged("once")), summed=False)

    @precondition(lambda self: not self.closed)
    @rule()
    def close(self):
        self.closed = True
        enough = len(self.included) >= self.round.quorum
        silent = set(SITES.values()) - set(self.included) - self.dropped
        self.dropped |= silent
        self.missed |= silent
        try:
            self.round.close()
        except TooFewSites:
            assert not enough
        else:
            assert enough

    @invariant()
    def each_site_is_counted_once_or_named(self):
        if hasattr(self, "round"):
            assert {name: a["w"][0] for name, a in self.round.accepted.items()} == self.included
            assert self.round.included == set(self.included)
            assert set(self.round.dropped) == self.dropped
            assert self.round.missed == self.missed
            assert self.round.left == self.left


TestRounds = Rounds.TestCase


@pytest.fixture
def round_1():
    return Round(1, SITES, quorum=2, template=TEMPLATE)


@pytest.mark.parametrize("late", list(SITES))
def test_a_late_site_is_named(round_1, late):
    """Without an answer at the close it is dropped, and may be asked again."""
    for node in SITES:
        if node != late:
            round_1.take(update(node), summed=False)

    round_1.close()

    assert round_1.dropped == {SITES[late]: "no answer before the deadline"}
    assert round_1.missed == {SITES[late]}
    assert round_1.left == set()


def test_a_round_below_its_quorum_names_every_reason(round_1):
    """One of four: nothing may be aggregated."""
    round_1.take(update(11), summed=False)
    round_1.take(garbage(12), summed=False)
    round_1.take(error_reply(asked(13), PolicyRefused("x", public="not approved")), summed=False)

    with pytest.raises(TooFewSites) as few:
        round_1.close()

    assert "1 of 4 sites are in, the study asks 2" in few.value.message
    assert "bob: arrays: w holds values that are not finite" in few.value.message
    assert "cid: not approved" in few.value.message
    assert "dot: no answer before the deadline" in few.value.message


def test_a_round_of_too_few_sums_is_none():
    """Three sites of four are in, in one sum, where two are to be combined."""
    current = Round(1, SITES, quorum=3, sums=2, template=TEMPLATE)
    current.take(summed(11, [11, 12, 13]), summed=True)

    with pytest.raises(TooFewSites, match="3 of 4 sites are in, in 1 sums, the study asks 3 in 2"):
        current.close()


def test_a_round_knows_how_many_sites_are_in_each_sum():
    """By the first of them."""
    current = Round(1, SITES, quorum=3, sums=2, template=TEMPLATE)
    current.take(summed(12, [12, 13, 14]), summed=True)
    current.take(summed(11, [11]), summed=True)

    current.close()

    assert current.members == {"ann": 1, "bob": 3}


def test_the_order_of_arrival_does_not_matter(round_1):
    """Each update is kept under its site's name, by which they are added up."""
    for order in permutations(SITES):
        current = Round(1, SITES, quorum=2, template=TEMPLATE)
        for node in order:
            current.take(update(node, float(node)), summed=False)
        current.close()

        found = {name: a["w"][0] for name, a in current.accepted.items()}
        assert found == {"ann": 11, "bob": 12, "cid": 13, "dot": 14}


def test_a_sum_counts_each_of_its_members(round_1):
    """From a grid that sums, three sites in one reply are three."""
    round_1.take(summed(11, [11, 12, 13]), summed=True)
    round_1.close()

    assert round_1.included == {"ann", "bob", "cid"}
    assert list(round_1.accepted) == ["ann"]


@pytest.mark.parametrize(
    "members",
    [[], [11, 11], [11, UNKNOWN], ["ann"], None],
    ids=["nobody", "twice", "one not asked", "names", "unsaid"],
)
def test_a_sum_over_strangers_is_refused(round_1, members):
    """Its members are nodes that were asked, each once."""
    reply = summed(11, [11])
    reply.content["config"] = ConfigRecord({} if members is None else {"members": members})

    round_1.take(reply, summed=True)

    assert round_1.included == set()
    assert round_1.dropped["ann"].startswith("sum:")


def test_a_site_counted_alone_cannot_be_in_a_sum_again(round_1):
    """Twelve was in already."""
    round_1.take(summed(12, [12]), summed=True)
    round_1.take(summed(11, [11, 12]), summed=True)

    assert round_1.included == {"bob"}
    assert list(round_1.dropped) == ["ann"]


def test_a_site_that_claims_members_is_refused(round_1):
    """Only a grid that sums is believed."""
    round_1.take(summed(11, [11, 12, 13]), summed=False)

    assert round_1.included == set()
    assert round_1.dropped == {"ann": "reply: a site's reply carries no config record"}


def test_an_error_code_of_flower_is_no_refusal(round_1):
    """A node that is gone for a moment is asked again."""
    round_1.take(Message(Error(3, "node unavailable"), reply_to=asked(11)), summed=False)

    assert round_1.dropped == {"ann": "node unavailable"}
    assert round_1.missed == {"ann"}
    assert round_1.left == set()


def test_a_site_that_has_charged_the_round_sits_it_out(round_1):
    """It refuses this round and no other; that counts as no answer."""
    round_1.take(error_reply(asked(11), AlreadyCharged("x", public="round already charged")), summed=False)

    assert round_1.dropped == {"ann": "round already charged"}
    assert (round_1.missed, round_1.left) == ({"ann"}, set())


@pytest.mark.parametrize(("summed", "missed"), [(True, set()), (False, {"ann"})])
def test_only_a_sum_says_that_a_site_did_its_part(round_1, summed, missed):
    """A site that says so of itself has given nothing."""
    round_1.take(blameless_reply(asked(11), "no sum"), summed=summed)

    assert (round_1.missed, round_1.left) == (missed, set())


@pytest.mark.parametrize(("value", "accepted"), [(1e6, True), (-1e6, True), (1.1e6, False), (-1.1e6, False)])
def test_an_enormous_coordinate_is_malformed(round_1, value, accepted):
    """One site could otherwise outweigh all others, or make the sum overflow."""
    round_1.take(update(11, value), summed=False)

    assert ("ann" in round_1.accepted) == accepted
    assert ("ann" in round_1.left) != accepted


def test_an_update_is_read_where_it_lies(round_1):
    """Sixteen megabytes arrive; neither a copy nor a temporary of that size is made of them."""
    large = {"w": np.zeros(1 << 22, np.float32)}
    reply = update_reply(asked(11), large)
    tracemalloc.start()
    try:
        read_update(reply, large)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 3 << 20


def test_a_weight_is_the_public_constant(round_1):
    """Two would count a site twice."""
    content = RecordDict({"arrays": to_record(TEMPLATE), METRICS: MetricRecord({WEIGHT: 2.0})})

    round_1.take(Message(content, reply_to=asked(11)), summed=False)

    assert "public constant" in round_1.dropped["ann"]


def test_every_error_class_but_the_root_is_a_refusal(round_1):
    """What a site refuses for once, it would refuse again."""
    for node, kind in zip(SITES, LeptonError.__subclasses__(), strict=False):
        round_1.take(error_reply(asked(node), kind("no")), summed=False)

    assert round_1.left == set(SITES.values())


@pytest.mark.parametrize("name", ["w" * 1_000_000, "w\n2026-11-22 round 7: ann is out", "\x1b[2J"])
def test_no_site_writes_into_the_servers_log_or_its_database(round_1, name):
    """The names of its arrays are its own words too, and are not what the server says of it."""
    round_1.take(update_reply(asked(11), {name: np.zeros(2, np.float64)}), summed=False)

    reason = round_1.dropped["ann"]
    assert reason.startswith("arrays: w" if name.startswith("w") else "arrays: [2J")
    assert len(reason) <= 200
    assert reason.isprintable()
