"""Rounds in and out of sessions, a hostile network and a server that lies: one sum a round, or an error."""

import functools
from collections import defaultdict
from dataclasses import replace

import numpy as np
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

from lepton_fl.secagg import keys, masks, session
from lepton_fl.secagg.errors import (
    BadPayload,
    BadPhase,
    BadSignature,
    Phase,
    SecaggError,
    SessionLost,
    TooFewParticipants,
)
from lepton_fl.secagg.exchanges import EncodedUpdate
from lepton_fl.secagg.messages import Survivors
from lepton_fl.secagg.session_server import SessionServerRound

PLACE = st.integers(0, 6)


class Uses:
    """Of keys, by all sites: a box key with one nonce once; a mask once at each end, with either sign."""

    def __init__(self, patch):
        self.sealed, self.masked, self.derived = set(), defaultdict(list), set()
        self.site = None
        """The party that is masking; None while the server takes masks out."""
        seal, apply, expand = keys.OneTimeKey.seal, masks.apply, session._expand

        def sealing(key, plaintext, aad, **nonce):
            use = key._key, nonce.get("nonce", bytes(12))
            assert use not in self.sealed
            self.sealed.add(use)
            return seal(key, plaintext, aad, **nonce)

        def applying(words, signed, **how):
            signed = list(signed)
            if self.site is not None:
                for sign, key in signed:
                    self.masked[key].append((self.site, sign))
                    ends, signs = zip(*self.masked[key], strict=True)
                    assert len(set(ends)) == len(set(signs)) == len(ends)
            return apply(words, signed, **how)

        def expanding(*args, **how):
            made = expand(*args, **how)
            self.derived |= set(made)
            return made

        patch.setattr(keys.OneTimeKey, "seal", sealing)
        patch.setattr(masks, "apply", applying)
        patch.setattr(session, "_expand", expanding)


class Sessions(RuleBasedStateMachine):
    """Rounds, attempts and sites, over a network that keeps everything it ever carried."""

    def __init__(self, make_run, adversary, patch):
        super().__init__()
        self.make_run, self.adversary = make_run, adversary
        self.uses = Uses(patch)

    @initialize(n=st.sampled_from([4, 7]))
    def begin(self, n):
        self.n = n
        self.run = self.make_run(n, colluders=1 if n == 4 else 2, min_sites=0, coordinates=4)
        self.parties = self.run.first.parties
        self.colluders = self.parties[: self.run.first.context.cohort.colluders]
        self.offer = self.run.first.server.session()
        self.at = {}
        """By party, the attempt that it is in."""
        self.carried, self.asked = [], []
        self.sums = {"session": 0, "ordinary": 0}
        self.new_round()

    def new_round(self):
        self.context = self.run.context()
        self.run.rounds += 1
        self.words = {
            p: self.run.rng.integers(-500, 500, 4).astype(np.int32).view(np.uint32) for p in self.parties
        }
        self.attempts, self.sum = [], None
        self.new_attempt()

    def new_attempt(self):
        """In the session, the first one of a round where there is one; else an ordinary one."""
        context = replace(self.context, attempt=len(self.attempts) + 1)
        step = self.offer.step(context) if self.offer and not self.attempts else None
        if step is None:
            self.now = type(self.run.first)(context, histories=self.run.histories)
            self.now.encoded = self.words
            self.now.sites = {}
        else:
            self.now = self.run.resume(context, step, self.words)
        self.attempts.append(self.now)
        self.phase, self.requests, self.lied = Phase.ADVERTISE, dict.fromkeys(self.parties, b""), False

    @property
    def in_session(self):
        return isinstance(self.now.server, SessionServerRound)

    def enter(self, party):
        """As an agent does: out of the attempt before, and into this one, in the session if it serves."""
        if party in self.at:
            self.at[party].forget()
        self.nothing_of_the_past(party)
        kept = self.run.sessions.get(party)
        if self.in_session:
            served = kept and kept.serves(self.now.context, self.run.id, self.now.step, self.run.first.now)
            if served:
                self.now.sites[party] = self.at[party] = self.now.site(party)
                return
        self.run.sessions.pop(party, None)
        first = self.run.first
        stray = type(first)(self.now.context, histories=self.run.histories) if self.in_session else self.now
        site = stray.site(party, sessions=True)
        site._update = EncodedUpdate(self.words[party].copy())
        stray.encoded = self.words
        self.now.sites[party] = self.at[party] = site

    def nothing_of_the_past(self, party):
        """No key that a chain ever gave is in this site's memory, but for the chains as they are."""
        kept = self.run.sessions.get(party)
        now = set(kept._chains.values()) if kept else set()
        memory = set(self.adversary.reachable(kept, self.at.get(party)))

        assert not memory & (self.uses.derived - now)

    def call(self, phase, party, request):
        self.uses.site = party
        try:
            if phase is Phase.SHARE:
                return self.now.sites[party].share(request, self.run.first.now)
            return self.now.call(phase, party, request)
        finally:
            self.uses.site = None

    def put(self, party, request):
        """A request to a site, which replies or raises."""
        site = self.now.sites[party]
        try:
            reply = self.call(self.phase, party, request)
        except SecaggError as error:
            return error
        earlier = self.now.left[self.phase].setdefault(party, reply)
        assert earlier is reply
        self.carried.append((self.now, self.phase, party, reply))
        if self.phase is not Phase.ADVERTISE:
            ask = functools.partial(getattr(site, self.phase.value), request)
            if self.phase is Phase.SHARE:
                ask = functools.partial(ask, self.run.first.now)
            self.asked.append((ask, reply))
        if self.phase is Phase.UNMASK:
            kept = self.run.histories[party].read(self.context.run, "train", self.context.round)
            assert kept.released
            if not self.in_session and site.session:
                self.run.sessions[party] = site.session
        return None

    @rule(place=PLACE)
    def ask(self, place):
        """The request of the phase arrives at a site, for the first time or again."""
        party = self.parties[place % self.n]
        if party not in self.requests:
            return
        if self.phase is Phase.ADVERTISE and party not in self.now.sites:
            self.enter(party)
        if self.at.get(party) is not self.now.sites.get(party) or party not in self.now.sites:
            return
        error = self.put(party, self.requests[party])

        # Who has seen the attempt, or released in the round, stays out; else only a lie is refused.
        assert error is None or self.lied or (type(error) is BadPhase and self.phase is Phase.ADVERTISE)

    @precondition(lambda self: self.phase is Phase.CONFIRM or (self.phase is Phase.MASK and self.in_session))
    @rule(places=st.sets(PLACE, min_size=1, max_size=4), out=st.sets(PLACE, max_size=2))
    def lie(self, places, out):
        """Some sites are told of another roll, or of other survivors, than the rest."""
        known = self.now.left[Phase.ADVERTISE if self.phase is Phase.MASK else Phase.MASK]
        told = tuple(p for place, p in enumerate(self.parties) if p in known and place not in out)
        for party in (self.parties[place % self.n] for place in places):
            if party not in self.requests or self.at.get(party) is not self.now.sites.get(party, 0):
                continue
            if self.phase is Phase.CONFIRM:
                request = Survivors(told).encode(self.context.suite)
            elif party in told:
                request = self.now.roll(party, told).encode(self.context.suite)
            else:
                continue
            self.lied = True
            self.put(party, request)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def repeat(self, data):
        """Any request that was ever answered arrives again: the same reply, or none."""
        ask, reply = data.draw(st.sampled_from(self.asked))
        try:
            again = ask()
        except BadPhase:
            return

        assert again is reply

    @precondition(lambda self: self.carried)
    @rule(data=st.data())
    def deliver(self, data):
        """Any reply that was ever sent reaches the server of today."""
        attempt, phase, party, reply = data.draw(st.sampled_from(self.carried))
        self.receive(attempt, phase, party, reply)

    def receive(self, attempt, phase, party, reply):
        if self.in_session and phase is Phase.SHARE:
            return
        refused = None
        try:
            self.now.receive(phase, party, reply)
        except SessionLost:
            self.new_attempt()
            return
        except (BadPhase, BadPayload, BadSignature) as error:
            refused = error
        assert refused is None or refused.culprit == party
        # What belongs here is taken, once.
        assert refused is None or attempt is not self.now or phase is not self.phase or self.lied

    def everybody_replies(self, gone=()):
        now = self.now
        for place in set(range(self.n)) - set(gone):
            self.ask(place)
        for attempt, phase, party, reply in list(self.carried):
            if attempt is now is self.now and phase is self.phase:
                self.receive(attempt, phase, party, reply)

    @rule(gone=st.sets(PLACE, max_size=2))
    def go_on(self, gone=()):
        """All but these reply in time; the phase is over."""
        now = self.now
        self.everybody_replies(gone)
        if self.now is now:
            self.close()

    @rule(gone=st.sets(PLACE, max_size=1))
    def finish(self, gone=()):
        """The attempt runs to its end, but for one site or none."""
        now = self.now
        while self.now is now:
            self.go_on(gone)

    @rule(place=PLACE)
    def crash(self, place):
        """A site forgets all but what is on its disk."""
        party = self.parties[place % self.n]
        self.at.pop(party, None)
        self.run.sessions.pop(party, None)

    @rule(steps=st.integers(1, 3))
    def skip(self, steps):
        """The server passes steps over."""
        if self.offer:
            self.offer._next = min(self.offer._next + steps, session.MAX_STEPS)

    @rule()
    def close(self):
        """The server's deadline has passed."""
        server = self.now.server
        ends = {
            Phase.ADVERTISE: server.mask_requests if self.in_session else None,
            Phase.MASK: server.confirm_requests,
            Phase.CONFIRM: server.unmask_requests,
            Phase.UNMASK: server.result,
        }
        if not self.in_session:
            ends |= {Phase.ADVERTISE: server.share_requests, Phase.SHARE: server.mask_requests}
        try:
            made = ends[self.phase]()
        except TooFewParticipants:
            self.offer = None if self.in_session else self.offer
            self.new_attempt() if len(self.attempts) < 4 else self.new_round()
            return
        except SecaggError:
            assert self.lied
            self.new_round()
            return
        if self.phase is not Phase.UNMASK:
            self.requests, self.phase = made, server.phase
            return
        if not self.lied:
            np.testing.assert_array_equal(made.mean_L, self.expected(made.survivors))
            self.sums["session" if self.in_session else "ordinary"] += 1
            self.sum = set(made.survivors)
            self.one_sum()
        if not self.in_session:
            self.offer = server.session()
            self.run.id = self.offer.id
        self.new_round()

    def expected(self, survivors):
        total = sum((self.words[p].astype(np.uint64) for p in survivors), np.zeros(4, np.uint64))
        words = (total % 2**32).astype(np.uint32)
        return self.context.quantiser.decode(words, n=len(survivors), total_weight=len(survivors))

    @invariant()
    def one_sum(self):
        """What the server and the colluders know of a round: nothing, or one sum over enough honest sites."""
        if not hasattr(self, "attempts"):
            return
        found = self.adversary.learned(*self.attempts, colluders=self.colluders)
        cohort = self.context.cohort

        assert len(found) <= 1
        assert all(len(group) >= cohort.quorum - cohort.colluders for group in found)
        assert self.sum is None or found == [self.sum - set(self.colluders)]


@pytest.fixture
def machine(make_run, adversary, monkeypatch):
    def make():
        # Each machine counts for itself.
        monkeypatch.undo()
        return Sessions(make_run, adversary, monkeypatch)

    return make


EXAMPLES = {"suppress_health_check": list(HealthCheck), "deadline": None}


def test_sessions_over_a_hostile_network(machine):
    run_state_machine_as_test(machine, settings=settings(max_examples=20, stateful_step_count=30, **EXAMPLES))


@pytest.mark.slow
def test_sessions_over_a_hostile_network_for_long(machine):
    run_state_machine_as_test(
        machine, settings=settings(max_examples=200, stateful_step_count=40, **EXAMPLES)
    )


def test_the_machine_reaches_sums_in_sessions_and_out_of_them(machine):
    """Or the test above would hold for a protocol that never finishes."""
    found = machine()
    found.begin(n=4)
    found.finish()
    found.finish()
    assert found.sums == {"session": 2, "ordinary": 0}
    found.crash(2)
    # The session attempt is lost with the crashed one's advert; the ordinary one follows, then a session.
    while sum(found.sums.values()) < 4:
        found.go_on()
        found.one_sum()

    assert found.sums == {"session": 3, "ordinary": 1}
    found.teardown()
