"""Whatever is lost, repeated, late or crashes, at either end: one true sum a round or none; no site twice."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lepton_fl.federation import SecureGrid
from lepton_fl.messages import ARRAYS, PHASES, SECAGG, TRAIN
from lepton_fl.secagg.context import Forgetful
from lepton_fl.secagg.errors import Phase

UNNOISED = {"privacy": {"noise": "none", "epsilon": None, "delta": None}}
"""No ledger counts its rounds: that no site is in one twice is for the protocol's own memory."""
ROUNDS = 6
FAULTS = [
    "request lost",
    "reply lost",
    "site crashes first",
    "site crashes after",
    "asked twice",
    "old one first",
]
KINDS = [TRAIN, *(PHASES[phase] for phase in PHASES if phase is not Phase.ADVERTISE)]


class ServerGone(Exception):
    """The server's process was killed."""


class Counting(Forgetful):
    """A history on a disk that outlives its process, and a count of what was released."""

    def __init__(self):
        super().__init__()
        self.releases = Counter()

    def write(self, attempt):
        super().write(attempt)
        if attempt.released:
            self.releases[attempt.run, attempt.kind, attempt.round] += 1


class Rounds(RuleBasedStateMachine):
    """Rounds by a server over a network that keeps everything it ever carried."""

    def __init__(self, make):
        super().__init__()
        self.make = make
        self.sums = Counter()

    @initialize(n=st.sampled_from([3, 4]))
    def begin(self, n):
        self.world = self.make(n, policy={"require": {"differential_privacy": False}}, **UNNOISED)
        self.histories = {party: Counting() for party in self.world.parties}
        self.world.histories.update(self.histories)
        for party in self.world.parties:
            self.world.start(party)
        self.number = 0

    def teardown(self):
        if hasattr(self, "world"):
            self.world.close()

    def party(self, place):
        return self.world.parties[place % self.world.n]

    @rule(
        faults=st.dictionaries(
            st.tuples(st.sampled_from(KINDS), st.integers(0, 3)), st.sampled_from(FAULTS), max_size=3
        ),
        server=st.none() | st.tuples(st.sampled_from(KINDS), st.integers(0, 3)),
        old=st.integers(0, 200),
    )
    def a_round(self, faults, server, old):
        """The next round, with these faults; `server` is where its process dies."""
        world = self.world
        number, run = self.number % ROUNDS + 1, f"{self.number // ROUNDS + 1:032x}"
        self.number += 1
        before = len(world.wire.tape)

        def between(message, call):
            kind, party = message.metadata.message_type, message.metadata.dst_node_id
            place = kind, world.parties.index(party)
            if place == server:
                raise ServerGone
            fault = faults.get(place)
            if fault == "request lost":
                return None
            if fault == "site crashes first":
                world.start(party)
            if fault == "old one first":
                self.replay(old)
            # By the app that there is now.
            reply = world.ask(message)
            if fault == "asked twice":
                again = world.ask(message)
                assert again.has_error() or again.content == reply.content
            if fault == "site crashes after":
                world.start(party)
            return None if fault == "reply lost" else reply

        try:
            replies = world.train(number, between=between, run=run)
        except ServerGone:
            world.grid = SecureGrid(world.wire, lambda: world.consortium)
            return
        found = world.sum_of(replies)
        if found is not None:
            self.sums[run, number] += 1
            members, _ = found
            assert len(members) >= 3
            is_mean(world, found, number, run)
        if not faults:
            assert found is not None
            assert found[0] == tuple(world.parties)
        # Nobody cheated: nobody is put out for good.
        assert world.judge(replies).left == set()
        assert len(world.wire.tape) > before

    @precondition(lambda self: self.world.wire.tape)
    @rule(at=st.integers(0, 200))
    def replay(self, at):
        """Any request that a site ever had: refused, or answered as it was then."""
        tape = self.world.wire.tape
        if not tape:
            return
        passed = tape[at % len(tape)]
        reply = self.world.ask(passed.request)
        # One that was lost on its way is no second one.
        if passed.reply is not None and not passed.reply.has_error():
            assert reply.has_error() or reply.content == passed.reply.content

    @rule(place=st.integers(0, 3))
    def crash(self, place):
        self.world.start(self.party(place))

    @invariant()
    def check(self):
        for history in self.histories.values():
            assert all(count == 1 for count in history.releases.values())
        assert all(count == 1 for count in self.sums.values())
        for passed in self.world.wire.tape:
            if passed.reply is not None and not passed.reply.has_error():
                arrays = {ARRAYS} if passed.kind == PHASES[Phase.MASK] else set()
                assert set(passed.reply.content) == {SECAGG} | arrays


def is_mean(world, found, number, run):
    members, mean = found
    for name, array in world.expected(number, members, run).items():
        assert (mean[name] == array).all()


@pytest.fixture
def machine(make_world):
    return lambda: Rounds(make_world)


@pytest.mark.parametrize("examples", [8, pytest.param(150, marks=pytest.mark.slow)])
def test_rounds_over_a_hostile_network(machine, examples):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=8,
            suppress_health_check=list(HealthCheck),
            deadline=None,
        ),
    )


def test_the_machine_reaches_sums(machine):
    """Or the test above would hold for a server that never finishes a round."""
    rounds = machine()
    rounds.begin(n=4)
    rounds.a_round({}, None, 0)
    rounds.a_round({(PHASES[Phase.MASK], 2): "reply lost"}, None, 0)
    rounds.a_round({}, (PHASES[Phase.UNMASK], 1), 0)
    rounds.a_round({(PHASES[Phase.SHARE], 0): "site crashes first", (TRAIN, 0): "asked twice"}, None, 0)
    rounds.check()

    assert len(rounds.sums) == 3
    assert sum(sum(h.releases.values()) for h in rounds.histories.values()) >= 3 + 4 + 1 + 3
    rounds.teardown()
