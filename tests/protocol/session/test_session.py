"""Rounds in a session: the sum whoever drops out when, the laws of the ratchet, and what memory holds."""

import contextlib
import copy
import itertools
import os
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from lepton_fl.errors import VerificationFailed
from lepton_fl.secagg import shamir
from lepton_fl.secagg.errors import Phase, TooFewParticipants
from lepton_fl.secagg.keys import Suite
from lepton_fl.secagg.session import MAX_STEPS
from lepton_fl.secagg.session_messages import (
    SessionAdvert,
    SessionConfirm,
    SessionConfirmed,
    SessionHeader,
    SessionRoll,
    SessionUnmask,
)
from lepton_fl.secagg.site import SiteRound

DROPS = [Phase.ADVERTISE, Phase.MASK, Phase.CONFIRM, Phase.UNMASK]


def test_rounds_follow_each_other(make_run):
    """Each has the plain sum, and takes the next step."""
    run = make_run()
    for step in range(5):
        attempt = run.attempt()
        result = attempt.run()

        assert attempt.step == step
        assert result.survivors == attempt.parties
        np.testing.assert_array_equal(result.mean_L, attempt.expected(attempt.parties))


@pytest.mark.parametrize("phase", DROPS)
@pytest.mark.parametrize("n", [3, 4, 7])
def test_every_dropout(make_run, n, phase):
    """In each phase each subset may drop out: the sum of those whose vector was there, or too few."""
    run = make_run(n, min_sites=0, coordinates=5)
    threshold = run.first.context.cohort.threshold
    # Up to one more than may.
    sizes = range(n - threshold + 2)
    subsets = [s for size in sizes for s in itertools.combinations(run.first.parties, size)]
    for step, gone in enumerate(subsets):
        attempt = run.attempt(step=step)
        if n - len(gone) < threshold:
            with pytest.raises(TooFewParticipants):
                attempt.run(drops={phase: gone})
            continue
        result = attempt.run(drops={phase: gone})

        early = phase in (Phase.ADVERTISE, Phase.MASK)
        survivors = tuple(p for p in attempt.parties if not (early and p in gone))
        assert result.survivors == survivors
        np.testing.assert_array_equal(result.mean_L, attempt.expected(survivors))


def test_dropouts_in_all_phases_at_once(make_run):
    """Of ten sites one never comes, one masks not, and one does not confirm."""
    run = make_run(10, colluders=3)
    a, b, c = run.first.parties[2:5]
    attempt = run.attempt()
    result = attempt.run(drops={Phase.ADVERTISE: [a], Phase.MASK: [b], Phase.CONFIRM: [c]})

    assert set(result.survivors) == set(attempt.parties) - {a, b}
    np.testing.assert_array_equal(result.mean_L, attempt.expected(result.survivors))


@pytest.mark.parametrize("suite", list(Suite))
def test_either_end_of_a_pair_is_recovered(make_run, suite):
    """Whether the lower or the higher of two parties drops out, in either suite."""
    for place in (0, 3):
        run = make_run(suite=suite)
        gone = run.first.parties[place]
        attempt = run.attempt()
        result = attempt.run(drops={Phase.MASK: [gone]})

        np.testing.assert_array_equal(result.mean_L, attempt.expected(result.survivors))


@pytest.mark.parametrize("n", [3, 4, 7])
def test_threshold_shares_rebuild_and_fewer_do_not(make_run, n):
    """Every set of t holders has b and k of every dealer; t - 1 shares of a secret fit any secret."""
    run = make_run(n, min_sites=0, coordinates=5)
    drawn = {}
    attempt = run.attempt()
    for party, site in attempt.sites.items():
        site._random = recording(drawn.setdefault(party, []))
    attempt.run(until=Phase.CONFIRM)
    t = attempt.context.cohort.threshold
    for dealer in attempt.parties:
        b, k = drawn[dealer][:2]
        for holders in itertools.combinations(attempt.parties, t):
            shares = {1 + attempt.parties.index(h): attempt.held[h][dealer] for h in holders}
            assert shamir.reconstruct(shares, parties=n) == b + k
        # One share fewer, and any other in its place: another secret, so these say nothing of it.
        x, _ = shares.popitem()
        assert shamir.reconstruct({**shares, x: bytes(64)}, parties=n) != b + k


def recording(into):
    def random(size):
        into.append(os.urandom(size))
        return into[-1]

    return random


def test_a_cohort_of_some_members(make_run):
    """Who was left out of a round has its chains passed on, and is in the next."""
    run = make_run(4)
    left_out, *some = run.first.parties
    smaller = run.attempt(cohort=some)
    np.testing.assert_array_equal(smaller.run().mean_L, smaller.expected(tuple(some)))
    whole = run.attempt()

    assert whole.step == 1
    assert run.sessions[left_out].next == 0
    np.testing.assert_array_equal(whole.run().mean_L, whole.expected(whole.parties))


def test_steps_may_be_passed_over(make_run):
    """Sites that skipped differently meet at the same step, up to the last one."""
    run = make_run()
    run.sessions[run.first.parties[0]].enter(17, Suite.LSA1)
    run.sessions[run.first.parties[1]].enter(90, Suite.LSA1)
    for step in (91, 255):
        attempt = run.attempt(step=step)
        np.testing.assert_array_equal(attempt.run().mean_L, attempt.expected(attempt.parties))


# The messages


def test_same_request_same_bytes(make_run):
    """Also where drawing again would be another advert."""
    attempt = make_run().attempt()
    party = attempt.parties[0]
    attempt.run(until=Phase.UNMASK)

    for phase in (Phase.ADVERTISE, Phase.CONFIRM):
        reply = attempt.left[phase][party]
        assert attempt.ask(phase, party, attempt.asked[phase][party]) == reply


def test_lengths(make_run):
    """At most 300 bytes a peer and a few hundred besides the vector, in all replies of a step together."""
    for n in (4, 10, 16):
        attempt = make_run(n).attempt()
        attempt.run()
        party = attempt.parties[0]
        replies = [attempt.left[phase][party] for phase in (Phase.ADVERTISE, Phase.CONFIRM, Phase.UNMASK)]
        assert sum(map(len, replies)) <= 300 * (n - 1) + 500, n


@pytest.mark.parametrize(
    "decode",
    [
        lambda data: SessionAdvert.decode(Suite.LSA1, data, 4),
        lambda data: SessionRoll.decode(Suite.LSA1, data),
        lambda data: SessionHeader.decode(Suite.LSA1, data),
        lambda data: SessionConfirm.decode(Suite.LSA1, data, 4),
        lambda data: SessionConfirmed.decode(Suite.LSA1, data),
        lambda data: SessionUnmask.decode(Suite.LSA1, data, 4),
    ],
    ids=["advert", "roll", "header", "confirm", "confirmed", "unmask"],
)
def test_what_is_decoded_encodes_back(make_run, decode):
    """Every message of a step, by the one decoder that takes it."""
    attempt = make_run().attempt()
    attempt.run()
    party = attempt.parties[0]
    messages = [
        *(attempt.left[phase][party] for phase in (Phase.ADVERTISE, Phase.CONFIRM, Phase.UNMASK)),
        attempt.left[Phase.MASK][party].header,
        attempt.asked[Phase.MASK][party],
        attempt.asked[Phase.UNMASK][party],
    ]
    taken = []
    for message in messages:
        with contextlib.suppress(VerificationFailed):
            taken.append(decode(message).encode(Suite.LSA1) == message)

    assert taken == [True]


# Where a session comes from


def test_no_session_of_who_was_sent_a_bad_box(make_net, monkeypatch):
    """It has no word with that member that both are sure of."""
    net = make_net(4)
    net.sites = {party: net.site(party, sessions=True) for party in net.parties}
    receiver, sender = net.parties[1:3]
    opens = SiteRound._open

    def fails(site, of, *arguments):
        if (site.party, of) == (receiver, sender):
            raise VerificationFailed("a box does not open")
        opens(site, of, *arguments)

    monkeypatch.setattr(SiteRound, "_open", fails)
    net.run()

    assert net.sites[receiver].session is None
    assert net.server.session() is None


def test_nothing_is_kept_where_sessions_are_off(make_net):
    net = make_net(4)
    net.run()

    for site in net.sites.values():
        assert site.session is None
        assert (site._sent, site._roots) == ({}, {})


def test_none_in_a_drawn_graph(context_of, world):
    net = world.Net(context_of(130, coordinates=4))

    assert not net.context.cohort.graph.complete
    assert not net.site(net.parties[0], sessions=True)._sessions


# What a site does not take part in


@pytest.mark.parametrize(
    "change",
    [
        {"run": b"another run 1234"},
        {"kind": "evaluate"},
        {"roster": 2},
        {"suite": Suite.LSA1_PQ},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_session_serves_nothing_else(make_run, world, change):
    run = make_run()
    session = next(iter(run.sessions.values()))
    context = run.context()

    assert session.serves(context, run.id, 0, world.NOW)
    assert not session.serves(replace(context, **change), run.id, 0, world.NOW)
    # Nor does the server propose it.
    assert run.first.server.session().step(context) == 0
    assert run.first.server.session().step(replace(context, **change)) is None


def test_a_session_serves_first_attempts_only(make_run, world):
    run = make_run()
    session = next(iter(run.sessions.values()))

    assert not session.serves(replace(run.context(), attempt=2), run.id, 0, world.NOW)


def test_a_session_serves_no_stranger(make_run, world, context_of):
    """Nor a cohort with one who left before the survivors were named, whatever id the server says."""
    run = make_run(4, drops={Phase.MASK: [world.ids(4)[1]]})
    session = next(iter(run.sessions.values()))
    survivors = [p for p in run.first.parties if p != world.ids(4)[1]]

    assert session.serves(run.context(cohort=survivors), run.id, 0, world.NOW)
    assert not session.serves(run.context(), run.id, 0, world.NOW)
    assert set(run.sessions) == set(survivors)
    for party, of_party in run.sessions.items():
        assert set(of_party._chains) == set(survivors) - {party}
    assert run.first.server.session().step(run.context()) is None


def test_a_session_ends_with_the_first_certificate(make_run, world):
    run = make_run()
    session = next(iter(run.sessions.values()))
    last = world.NOW + timedelta(days=1)

    assert session.serves(run.context(), run.id, 0, last - timedelta(seconds=1))
    assert not session.serves(run.context(), run.id, 0, last)


@pytest.mark.parametrize("step", [-1, 0, 256, 2**40])
def test_steps_only_go_up_and_end(make_run, world, step):
    """A step that is over, and one past the last, are refused both when asked and when taken."""
    run = make_run()
    session = next(iter(run.sessions.values()))
    session.enter(0, Suite.LSA1)

    assert not session.serves(run.context(), run.id, step, world.NOW)
    with pytest.raises(ValueError, match="step"):
        session.enter(step, Suite.LSA1)


def test_steps_end(make_run):
    """The server proposes each once, and then the session no more."""
    run = make_run()
    session = run.first.server.session()

    found = [session.step(run.context()) for _ in range(MAX_STEPS + 1)]
    assert found == [*range(MAX_STEPS), None]


def test_another_id_is_not_served(make_run, world):
    run = make_run()
    session = next(iter(run.sessions.values()))

    assert not session.serves(run.context(), bytes(32), 0, world.NOW)
    assert not session.serves(run.context(), b"", 0, world.NOW)


def test_sessions_of_two_rounds_have_nothing_in_common(make_run):
    """Their ids, their roots and their steps' keys."""
    one, two = make_run(), make_run(model=bytes(range(32)))
    party, peer = one.first.parties[:2]
    keys = [run.sessions[party].enter(0, Suite.LSA1)[peer] for run in (one, two)]

    assert one.id != two.id
    assert keys[0].seed != keys[1].seed
    assert keys[0].mac != keys[1].mac


@pytest.mark.parametrize("suite", list(Suite))
def test_both_ends_derive_the_same_and_no_two_keys_are_alike(make_run, suite):
    """Over pairs, purposes, directions, steps and suites; what one seals with, the other opens with."""
    run = make_run(suite=suite)
    seen = set()
    for step in (0, 1, 5):
        keys = {p: session.enter(step, suite) for p, session in run.sessions.items()}
        for i, j in itertools.combinations(keys, 2):
            here, there = keys[i][j], keys[j][i]
            assert (here.seal._key, here.open._key, here.mac, here.peer_mac) == (
                there.open._key,
                there.seal._key,
                there.peer_mac,
                there.mac,
            )
            assert here.seed == there.seed
            five = {here.seal._key, here.open._key, here.seed, here.mac, here.peer_mac}
            assert len(five) == 5
            assert not five & seen
            seen |= five


# Memory


def secrets_of(run, step):
    """Per pair: all that the chain gives up to this step, with the chain keys themselves."""
    found = set()
    for session in copy.deepcopy(run.sessions).values():
        found |= set(session._chains.values())
        for number in range(session.next, step + 1):
            for keys in session.enter(number, Suite.LSA1).values():
                found |= {keys.seal._key, keys.open._key, keys.seed, keys.mac, keys.peer_mac}
            if number < step:
                found |= set(session._chains.values())
    return found


def leaks(adversary, secrets, *roots):
    """How many of these secrets are anywhere below these objects."""
    memory = b"|".join(adversary.reachable(*roots))
    return sum(secret in memory for secret in secrets)


def test_the_search_finds_what_is_there(make_run, adversary):
    """Or the tests below would hold for anything."""
    run = make_run()
    secrets = secrets_of(run, 0)
    party = run.first.parties[0]
    attempt = run.attempt()
    before = leaks(adversary, secrets, run.sessions[party])
    attempt.sites[party].advertise()

    assert before == 3
    assert leaks(adversary, secrets, attempt.sites[party]) == 3 * 4


def test_the_chain_is_past_a_step_before_its_advert_leaves(make_run):
    """What is left does not tell the keys of the step, nor of those before."""
    run = make_run()
    before = {party: set(session._chains.values()) for party, session in run.sessions.items()}
    run.attempt().run(until=Phase.MASK)

    for party, session in run.sessions.items():
        assert session.next == 1
        assert not before[party] & set(session._chains.values())


def test_a_released_step_is_nowhere_in_memory(make_run, adversary):
    """After the release: no key of this step or one before, no b, no k, and no share of anybody's."""
    run = make_run()
    secrets = secrets_of(run, 2)
    drawn = {p: [] for p in run.first.parties}
    for _ in range(3):
        attempt = run.attempt()
        for party, site in attempt.sites.items():
            site._random = recording(drawn[party])
        attempt.run()
    for party, site in attempt.sites.items():
        released = set(site._to_release(32))
        others = {share for held in attempt.held.values() for share in held.values()}

        assert not released
        assert site._update is None
        assert Phase.MASK not in site._answered
        assert leaks(adversary, secrets, site, run.sessions[party]) == 0
        assert leaks(adversary, set(drawn[party]), site, run.sessions[party]) == 0
        assert leaks(adversary, others, site, run.sessions[party]) == 0


def test_who_reads_a_site_that_has_masked_cannot_open_what_it_sent(make_run, adversary):
    """Its box keys with the recorded boxes would open b and k as well as b and k themselves."""
    run = make_run()
    opens = set()
    for session in copy.deepcopy(run.sessions).values():
        opens |= set(session._chains.values())
        for keys in session.enter(0, Suite.LSA1).values():
            opens |= {keys.seal._key, keys.open._key, keys.seed}
    drawn = []
    attempt = run.attempt()
    party = attempt.parties[0]
    attempt.sites[party]._random = recording(drawn)
    attempt.run(until=Phase.CONFIRM)

    assert leaks(adversary, opens, attempt.sites[party], run.sessions[party]) == 0
    assert leaks(adversary, set(drawn), attempt.sites[party], run.sessions[party]) == 0


def test_who_reads_a_site_that_has_confirmed_cannot_confirm_again(make_run, adversary):
    """The keys of its own confirmations go with them; those of the others' are still needed."""
    run = make_run()
    party, *others = run.first.parties
    keys = copy.deepcopy(run.sessions[party]).enter(0, Suite.LSA1)
    attempt = run.attempt()
    attempt.run(until=Phase.UNMASK)

    assert leaks(adversary, {keys[peer].mac for peer in others}, attempt.sites[party]) == 0
    assert leaks(adversary, {keys[peer].peer_mac for peer in others}, attempt.sites[party]) == 3


@pytest.mark.parametrize("after", [Phase.MASK, Phase.UNMASK])
def test_who_reads_a_session_cannot_read_the_ordinary_round(make_run, adversary, after):
    """Of the round that it comes from nothing is left that opens a box or a mask, from its vector on."""
    first = make_run().first
    drawn = []
    net = type(first)(replace(first.context, round=2))
    net.sites = {p: net.site(p, sessions=True) for p in net.parties}
    party = net.parties[0]
    site = net.sites[party] = net.site(party, sessions=True, random=recording(drawn))
    net.run(until=Phase.MASK)
    secrets = set(site._sent.values())
    assert len(secrets) == 3
    # But for the nonce, which was sent in clear.
    secrets |= {draw for draw in drawn if len(draw) >= 32}
    net.exchange(Phase.MASK, net.server.mask_requests())
    if after is Phase.UNMASK:
        net.exchange(Phase.CONFIRM, net.server.confirm_requests())
        net.exchange(Phase.UNMASK, net.server.unmask_requests())
        assert site.session is not None

    assert leaks(adversary, secrets, site) == 0


def test_a_failed_check_ends_the_session(make_run, world, adversary):
    """Nothing of the step is left, and nothing of those to come."""
    run = make_run()
    attempt = run.attempt()
    party = attempt.parties[0]
    secrets = secrets_of(run, 1)
    attempt.run(until=Phase.MASK)
    attempt.ask(Phase.MASK, party, b"none of a roll")

    assert party in attempt.errors
    assert not run.sessions[party].serves(run.context(), run.id, 1, world.NOW)
    assert leaks(adversary, secrets, attempt.sites[party], run.sessions[party]) == 0


def test_a_copy_of_a_memory_uses_no_key_twice(make_run, monkeypatch):
    """A machine is brought back: the same step again, but no nonce with its key and no mask a second time."""
    from lepton_fl.secagg import keys, masks

    sealed, masked = [], []
    real_seal, real_apply = keys.OneTimeKey.seal, masks.apply

    def seal(self, plaintext, aad, **nonce):
        sealed.append((self._key, nonce.get("nonce", bytes(12))))
        return real_seal(self, plaintext, aad, **nonce)

    def apply(words, signed, **how):
        masked.extend(key for _, key in signed)
        return real_apply(words, signed, **how)

    run = make_run()
    party = run.first.parties[0]
    image = copy.deepcopy(run.sessions[party])
    monkeypatch.setattr(keys.OneTimeKey, "seal", seal)
    monkeypatch.setattr(masks, "apply", apply)
    one = run.attempt()
    one.run(until=Phase.CONFIRM)
    run.sessions[party] = image
    two = run.attempt(step=0, sites=[party])
    two.run(until=Phase.MASK)

    assert len(set(sealed)) == len(sealed) == 4 * 4 + 4
    # Each pair's mask is used at its two ends.
    assert len(masked) == 16
    assert len(set(masked)) == 4 + 6


# History


class Journal:
    """A history that says when it is written, and may be out of room."""

    def __init__(self, history, events, full=lambda attempt: False):
        self.history, self.events, self.full = history, events, full

    def read(self, *key):
        return self.history.read(*key)

    def write(self, attempt):
        if self.full(attempt):
            raise OSError("no space left on device")
        self.events.append("released" if attempt.released else "entered")
        self.history.write(attempt)


def test_what_is_remembered_is_written_first(make_run):
    """Entered before the chain moves and the advert leaves; released before the reply does."""
    run = make_run()
    events = []
    attempt = run.attempt()
    party = attempt.parties[0]
    site = attempt.sites[party]
    site._history = Journal(site._history, events)
    forget, enter = site.forget, run.sessions[party].enter

    def entering(*step):
        events.append("ratchet")
        return enter(*step)

    def forgetting():
        events.append("forgotten")
        forget()

    site.forget, run.sessions[party].enter = forgetting, entering
    attempt.run()

    assert events == ["entered", "ratchet", "released", "forgotten"]


def test_nothing_leaves_that_is_not_on_disk(make_run):
    """A disk that is full when the release is due: no share leaves, then or when asked again."""
    run = make_run()
    attempt = run.attempt()
    party = attempt.parties[0]
    site = attempt.sites[party]
    attempt.run(until=Phase.UNMASK)
    request = attempt.requests(Phase.UNMASK)[party]
    site._history = Journal(site._history, [], full=lambda found: found.released)

    with pytest.raises(OSError, match="no space"):
        site.unmask(request)
    assert attempt.ask(Phase.UNMASK, party, request) is None
    assert not site._to_release(32)


def test_a_disk_that_is_full_before_the_advert(make_run):
    run = make_run()
    attempt = run.attempt()
    site = attempt.sites[attempt.parties[0]]
    site._history = Journal(site._history, [], full=lambda found: True)

    with pytest.raises(OSError, match="no space"):
        site.advertise()
    assert site.phase is Phase.OVER
