"""Whatever is lost, repeated, late, out of order or crashes: the sum of the plain, or a typed error; once."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lepton_fl.secagg.errors import BadPayload, BadPhase, BadSignature, Phase, TooFewParticipants

PLACE = st.integers(0, 6)


class Rounds(RuleBasedStateMachine):
    """Rounds and attempts over a network that keeps everything it ever carried."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    @initialize(n=st.sampled_from([3, 4, 7]))
    def begin(self, n):
        self.n, self.round, self.attempt = n, 1, 0
        self.histories = None
        self.sums = {}
        self.transit = []
        self.new_attempt()

    def new_attempt(self):
        self.attempt += 1
        kept = {} if self.histories is None else {"histories": self.histories}
        self.net = self.make(
            self.n, min_sites=0, coordinates=7, bits=8, round=self.round, attempt=self.attempt, net=kept
        )
        self.histories = self.net.histories
        self.phase = Phase.ADVERTISE
        self.requests = dict.fromkeys(self.net.parties, b"")

    def party(self, place):
        return self.net.parties[place % self.n]

    @rule(place=PLACE)
    def ask(self, place):
        """A request arrives, for the first time or again; a site that crashed has forgotten the attempt."""
        party = self.party(place)
        if party not in self.requests or self.net.sites[party] is None:
            return
        try:
            reply = self.net.call(self.phase, party, self.requests[party])
        except BadPhase:
            # It released in an earlier attempt.
            assert self.histories[party].read(bytes(16), "train", self.round).released
            return
        if self.net.left[self.phase].get(party) is not None:
            assert reply is self.net.left[self.phase][party]
        self.net.left[self.phase][party] = reply
        self.transit.append((self.net, self.phase, party, reply))

    @precondition(lambda self: self.transit)
    @rule(data=st.data())
    def deliver(self, data):
        """Any reply that was ever sent reaches the server of today."""
        net, phase, party, reply = data.draw(st.sampled_from(self.transit))
        refused = None
        try:
            self.net.receive(phase, party, reply)
        except (BadPhase, BadPayload, BadSignature) as error:
            refused = error
        assert refused is None or refused.culprit == party
        # What belongs here is taken, once.
        assert refused is None or net is not self.net or phase is not self.phase

    @rule()
    def everybody_replies(self):
        for place in range(self.n):
            self.ask(place)
        for net, phase, party, reply in list(self.transit):
            if net is self.net and phase is self.phase:
                self.net.receive(phase, party, reply)

    @rule(place=PLACE)
    def crash(self, place):
        self.net.sites[self.party(place)] = None

    @rule()
    def close(self):
        """The server's deadline has passed."""
        server = self.net.server
        ends = {
            Phase.ADVERTISE: server.share_requests,
            Phase.SHARE: server.mask_requests,
            Phase.MASK: server.confirm_requests,
            Phase.CONFIRM: server.unmask_requests,
            Phase.UNMASK: server.result,
        }
        try:
            made = ends[self.phase]()
        except TooFewParticipants:
            self.new_attempt()
            return
        if self.phase is not Phase.UNMASK:
            self.requests, self.phase = made, server.phase
            return
        np.testing.assert_array_equal(made.mean_L, self.net.expected(made.survivors))
        assert len(made.survivors) >= self.net.context.cohort.threshold
        assert self.round not in self.sums
        self.sums[self.round] = made
        # A server that wants a second sum of the same round, and then goes on.
        again = self.make(
            self.n,
            min_sites=0,
            coordinates=7,
            bits=8,
            round=self.round,
            attempt=self.attempt + 1,
            net={"histories": self.histories},
        )
        with pytest.raises(TooFewParticipants):
            again.run()
        self.round, self.attempt = self.round + 1, 0
        self.new_attempt()


def test_rounds_over_a_hostile_network(make_net):
    run_state_machine_as_test(
        lambda: Rounds(make_net),
        settings=settings(
            max_examples=60, stateful_step_count=40, suppress_health_check=list(HealthCheck), deadline=None
        ),
    )


def test_the_machine_reaches_a_sum(make_net):
    """Or the test above would hold for a protocol that never finishes."""
    machine = Rounds(make_net)
    machine.begin(n=4)
    for _ in range(5):
        machine.everybody_replies()
        machine.close()

    assert list(machine.sums) == [1]
    machine.teardown()
