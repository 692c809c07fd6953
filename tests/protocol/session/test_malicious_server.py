"""What a server may try in a session, with members colluding: each ends in the right error; nothing leaks."""

import contextlib
import itertools
from dataclasses import replace

import pytest

from lepton_fl.secagg import masks
from lepton_fl.secagg.errors import (
    SERVER,
    BadPayload,
    BadPhase,
    Equivocation,
    Phase,
    SessionLost,
    TooFewParticipants,
)
from lepton_fl.secagg.exchanges import EncodedUpdate
from lepton_fl.secagg.keys import Suite
from lepton_fl.secagg.messages import Survivors
from lepton_fl.secagg.session import confirmation
from lepton_fl.secagg.session_messages import SessionConfirmed, SessionRoll
from lepton_fl.secagg.session_site import SessionRound

LSA1 = Suite.LSA1
OTHER = bytes(range(32))
"""A digest that is no advert's."""


@pytest.fixture
def advertised(make_run):
    """Four sites that have advertised, none of which has been answered."""
    attempt = make_run().attempt()
    attempt.run(until=Phase.MASK)
    return attempt


@pytest.fixture
def uploaded(make_run):
    """Four sites whose vectors are there."""
    attempt = make_run().attempt()
    attempt.run(until=Phase.CONFIRM)
    attempt.requests(Phase.CONFIRM)
    return attempt


@pytest.fixture
def confirmed(uploaded):
    """Four sites that have confirmed all four."""
    for party in uploaded.parties:
        uploaded.ask(Phase.CONFIRM, party, Survivors(uploaded.parties).encode(LSA1))
    return uploaded


def refuses(attempt, phase, party, request, error, culprit=SERVER):
    """That the site raises exactly this, in this name, forgets all, and is in no session any more."""
    assert attempt.ask(phase, party, request) is None
    found = attempt.errors[party]
    assert type(found) is error, repr(found)
    assert (found.phase, found.culprit) == (phase, culprit)
    assert attempt.sites[party].phase is Phase.OVER
    assert not attempt.sites[party]._to_release(32)
    assert not attempt.run_.sessions[party]._chains


# Rolls


def test_a_roll_without_the_receiver(advertised):
    me, *others = advertised.parties
    roll = advertised.roll(me, others)
    # Of the right form: one party's box too few, as for a receiver among them.
    roll = replace(roll, commitments=roll.commitments[1:], boxes=roll.boxes[1:])

    refuses(advertised, Phase.MASK, me, roll.encode(LSA1), Equivocation)


def test_a_roll_with_a_party_that_is_not_of_the_cohort(make_run):
    run = make_run()
    stranger, *cohort = run.first.parties
    attempt = run.attempt(cohort=cohort)
    attempt.run(until=Phase.MASK)
    me = cohort[0]
    roll = attempt.roll(me, cohort)
    roll = replace(
        roll,
        parties=(stranger, *roll.parties),
        digests=(OTHER, *roll.digests),
        commitments=(roll.commitments[0], *roll.commitments),
        boxes=(roll.boxes[0], *roll.boxes),
    )

    refuses(attempt, Phase.MASK, me, roll.encode(LSA1), Equivocation)


def test_another_advert_of_the_receiver(advertised):
    me = advertised.parties[1]
    roll = advertised.roll(me, advertised.parties, digests={me: OTHER})

    refuses(advertised, Phase.MASK, me, roll.encode(LSA1), Equivocation)


def test_a_roll_below_the_quorum(advertised):
    """Two of four: a sum with one other would be the other's update."""
    me, other = advertised.parties[:2]
    roll = advertised.roll(me, (me, other))

    refuses(advertised, Phase.MASK, me, roll.encode(LSA1), TooFewParticipants, None)


def test_a_roll_below_what_the_study_asks_for(make_run):
    """min_sites counts where it is more than the threshold."""
    attempt = make_run(4, min_sites=4).attempt()
    attempt.run(until=Phase.MASK)
    me, *_ = some = attempt.parties[:3]

    refuses(attempt, Phase.MASK, me, attempt.roll(me, some).encode(LSA1), TooFewParticipants, None)


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (0, 1, 1, 3)], ids=["out of order", "twice"])
def test_parties_that_are_not_ascending(advertised, order):
    me = advertised.parties[0]
    roll = advertised.roll(me, advertised.parties)
    forged = replace(roll, parties=tuple(roll.parties[place] for place in order))

    refuses(advertised, Phase.MASK, me, forged.encode(LSA1), BadPayload)


@pytest.mark.parametrize(
    "change",
    [
        lambda roll: roll.encode(LSA1) + b"\0",
        lambda roll: roll.encode(LSA1)[:-1],
        lambda roll: roll.encode(Suite.LSA1_PQ),
        lambda roll: replace(roll, boxes=roll.boxes[1:]).encode(LSA1),
        lambda roll: replace(roll, boxes=(*roll.boxes, roll.boxes[0])).encode(LSA1),
        lambda roll: replace(roll, commitments=roll.commitments[1:]).encode(LSA1),
        lambda roll: replace(roll, digests=roll.digests[1:]).encode(LSA1),
        lambda roll: replace(roll, parties=()).encode(LSA1),
        lambda roll: b"",
    ],
    ids=["trailing", "cut", "suite", "box less", "box more", "commitment", "digest", "nobody", "empty"],
)  # fmt: skip
def test_a_roll_of_another_form(advertised, change):
    me = advertised.parties[0]
    roll = advertised.roll(me, advertised.parties)

    refuses(advertised, Phase.MASK, me, change(roll), BadPayload)


# Boxes


def with_box(roll, place, box=None, commitments=None):
    """The roll with another box, or other commitments, in one place."""
    boxes, found = list(roll.boxes), list(roll.commitments)
    if box is not None:
        boxes[place] = box
    if commitments is not None:
        found[place] = commitments
    return replace(roll, boxes=tuple(boxes), commitments=tuple(found)).encode(LSA1)


def test_a_box_for_another_receiver(advertised):
    me, sender, other, _ = advertised.parties
    roll = advertised.roll(me, advertised.parties)
    forged = with_box(roll, 0, advertised.box(sender, other), advertised.commitments(sender, other))

    refuses(advertised, Phase.MASK, me, forged, BadPayload, sender)


def test_the_receivers_own_box_comes_back(advertised):
    """Reflected: the key is of one direction."""
    me, sender = advertised.parties[:2]
    roll = advertised.roll(me, advertised.parties)
    forged = with_box(roll, 0, advertised.box(me, sender), advertised.commitments(me, sender))

    refuses(advertised, Phase.MASK, me, forged, BadPayload, sender)


def test_a_box_in_anothers_name(advertised):
    """Two senders' boxes are exchanged."""
    me, sender, other, _ = advertised.parties
    roll = advertised.roll(me, advertised.parties)
    forged = with_box(roll, 0, advertised.box(other, me), advertised.commitments(other, me))

    refuses(advertised, Phase.MASK, me, forged, BadPayload, sender)


@pytest.mark.parametrize("at", [0, 12, 63])
def test_commitments_other_than_those_in_the_box(advertised, at):
    """The server's own, so that it could call honest shares wrong. Only 12 bytes are in the nonce."""
    me, sender = advertised.parties[:2]
    roll = advertised.roll(me, advertised.parties)
    true = advertised.commitments(sender, me)
    changed = bytes(byte ^ (place == at) for place, byte in enumerate(true))

    refuses(advertised, Phase.MASK, me, with_box(roll, 0, commitments=changed), BadPayload, sender)


def test_a_box_of_an_earlier_step(make_run):
    """Replayed with its commitments: the step's number is in the key, and in what the box is bound to."""
    run = make_run()
    before, now = run.attempt(), run.attempt(step=1)
    before.run(until=Phase.MASK)
    now.run(until=Phase.MASK)
    me, sender = now.parties[:2]
    roll = now.roll(me, now.parties)
    forged = with_box(roll, 0, before.box(sender, me), before.commitments(sender, me))

    refuses(now, Phase.MASK, me, forged, BadPayload, sender)


def test_two_sites_at_two_steps(make_run):
    """A server proposes one step to some and another to others."""
    run = make_run()
    ahead = run.first.parties[1]
    attempt = run.attempt(step=0, steps={ahead: 1})
    for party in attempt.parties:
        attempt.ask(Phase.ADVERTISE, party, b"")
    me = attempt.parties[0]

    refuses(attempt, Phase.MASK, me, attempt.roll(me, attempt.parties).encode(LSA1), BadPayload, ahead)
    refuses(attempt, Phase.MASK, ahead, attempt.roll(ahead, attempt.parties).encode(LSA1), BadPayload, me)


@pytest.mark.parametrize("field", ["model", "study", "min_sites", "round"])
def test_two_sites_with_two_contexts(make_run, field):
    """One received another model, another study, thresholds or round: the boxes do not open."""
    run = make_run(5)
    context = run.context()
    changed = {
        "model": lambda: replace(context, model=OTHER),
        "study": lambda: replace(context, study=OTHER),
        "min_sites": lambda: replace(context, cohort=replace(context.cohort, min_sites=2)),
        "round": lambda: replace(context, round=context.round + 1),
    }[field]()
    odd = run.first.parties[1]
    attempt = run.attempt(contexts={odd: changed})
    with pytest.raises(BadPayload):
        attempt.receive(Phase.ADVERTISE, odd, attempt.sites[odd].advertise())
    for party in attempt.parties:
        attempt.ask(Phase.ADVERTISE, party, b"")
    me = attempt.parties[0]

    refuses(attempt, Phase.MASK, me, attempt.roll(me, attempt.parties).encode(LSA1), BadPayload, odd)


def test_a_roll_of_an_ordinary_attempt(advertised, make_run):
    """And a session's in an ordinary one: two protocols that read nothing of each other."""
    me = advertised.parties[0]
    ordinary = make_run().first
    again = type(ordinary)(replace(ordinary.context, round=2))
    again.run(until=Phase.SHARE)
    theirs = next(iter(again.server.share_requests().values()))
    ours = advertised.roll(me, advertised.parties).encode(LSA1)

    refuses(advertised, Phase.MASK, me, theirs, BadPayload)
    with pytest.raises(BadPayload):
        again.sites[me].share(ours, again.now)


# Survivors


def test_survivors_without_the_receiver(uploaded):
    me, *others = uploaded.parties

    refuses(uploaded, Phase.CONFIRM, me, Survivors(tuple(others)).encode(LSA1), Equivocation)


def test_survivors_that_were_not_on_the_roll(make_run):
    """Who was not in U1 has masked with nobody here."""
    attempt = make_run().attempt()
    late = attempt.parties[3]
    attempt.run(drops={Phase.ADVERTISE: [late]}, until=Phase.CONFIRM)

    refuses(attempt, Phase.CONFIRM, attempt.parties[0], Survivors(attempt.parties).encode(LSA1), Equivocation)


def test_too_few_survivors(uploaded):
    me, other = uploaded.parties[:2]

    refuses(uploaded, Phase.CONFIRM, me, Survivors((me, other)).encode(LSA1), TooFewParticipants, None)


def test_two_sets_of_survivors_to_one_site(confirmed):
    """One confirmation a step: the second set is refused, the first is answered with the same bytes."""
    me = confirmed.parties[0]
    first = confirmed.left[Phase.CONFIRM][me]
    fewer = Survivors(confirmed.parties[:3]).encode(LSA1)

    assert confirmed.ask(Phase.CONFIRM, me, fewer) is None
    assert type(confirmed.errors[me]) is BadPhase
    assert confirmed.ask(Phase.CONFIRM, me, Survivors(confirmed.parties).encode(LSA1)) == first


@pytest.mark.parametrize("colluding", [0, 3])
def test_a_site_both_alive_and_dead(make_run, adversary, colluding):
    """Every split of ten sites between two sets of survivors, colluders confirming both: one sum at most."""
    run = make_run(10, colluders=3, coordinates=4)
    parties, victim = run.first.parties, run.first.parties[9]
    colluders, honest = parties[:colluding], parties[colluding:]
    views = {"alive": parties, "dead": parties[:9]}
    for ahead in range(len(honest)):
        told = {p: "alive" if p == victim or place < ahead else "dead" for place, p in enumerate(honest)}
        attempt = run.attempt()
        attempt.run(until=Phase.CONFIRM)
        for party in honest:
            attempt.ask(Phase.CONFIRM, party, Survivors(views[told[party]]).encode(LSA1))
        for party in honest:
            view = told[party]
            # Everybody's word, those told otherwise too: it must count for nothing.
            macs = {
                p: attempt.mac(p, party)
                for p in honest
                if p != party and p in views[view] and party in views[told[p]]
            }
            macs |= {p: forged_mac(attempt, p, party, views[view]) for p in colluders}
            request = SessionConfirmed(parties=tuple(sorted(macs)), macs=tuple(macs[p] for p in sorted(macs)))
            attempt.ask(Phase.UNMASK, party, request.encode(LSA1))
        b, k = attempt.opened(colluders)
        enough = {view for view in views if list(told.values()).count(view) + colluding >= 7}
        expected = [set(honest)] if "alive" in enough else [set(honest) - {victim}] if enough else []

        assert not set(honest) & b & k
        assert len(enough) <= 1
        assert adversary.learned(attempt, colluders=colluders) == expected
        run.begin()


def test_confirmations_of_other_survivors(uploaded):
    """Two that were told of three survivors confirm nothing to one that was told of four."""
    me, one, two, gone = uploaded.parties
    uploaded.ask(Phase.CONFIRM, me, Survivors(uploaded.parties).encode(LSA1))
    for party in (one, two):
        uploaded.ask(Phase.CONFIRM, party, Survivors((me, one, two)).encode(LSA1))

    assert gone not in uploaded.sites[one]._survivors.parties
    refuses(uploaded, Phase.UNMASK, me, uploaded.confirmed(me, [one, two]), TooFewParticipants, None)


def forged_mac(attempt, colluder, receiver, survivors):
    """A colluder's word for any survivors: it has its keys."""
    _, mac, _ = attempt.keys[colluder][receiver]
    return confirmation(LSA1, mac, attempt.sites[receiver]._r1, Survivors(tuple(survivors)))


def test_two_rolls(make_run, adversary):
    """Every split of seven sites between two rolls: masks bound to one are none of the other."""
    run = make_run(7, colluders=2, coordinates=4)
    parties = run.first.parties
    colluders, honest = parties[:2], parties[2:]
    sums = []
    for ahead in range(len(honest) + 1):
        attempt = run.attempt()
        for party in parties:
            attempt.ask(Phase.ADVERTISE, party, b"")
        for place, party in enumerate(honest):
            # In the other roll a colluder has another advert.
            digests = {colluders[0]: OTHER} if place < ahead else {}
            attempt.ask(Phase.MASK, party, attempt.roll(party, parties, digests).encode(LSA1))
        for party in colluders:
            attempt.ask(Phase.MASK, party, attempt.roll(party, parties).encode(LSA1))
        for party in honest:
            attempt.ask(Phase.CONFIRM, party, Survivors(parties).encode(LSA1))
        for party in honest:
            witnesses = {p: attempt.mac(p, party) for p in honest if p != party}
            witnesses |= {p: forged_mac(attempt, p, party, parties) for p in colluders}
            ids = tuple(sorted(witnesses))
            request = SessionConfirmed(parties=ids, macs=tuple(witnesses[p] for p in ids))
            attempt.ask(Phase.UNMASK, party, request.encode(LSA1))
        sums.append(adversary.learned(attempt, colluders=colluders))
        run.begin()

    assert sums == [[set(honest)], *[[]] * (len(honest) - 1), [set(honest)]]


def test_a_pairs_mask_is_of_one_roll(make_run, monkeypatch):
    """Of two sites that were told different rolls no mask is the same, though they have the same seed."""
    attempt = make_run().attempt()
    for party in attempt.parties:
        attempt.ask(Phase.ADVERTISE, party, b"")
    me, peer, other, _ = attempt.parties
    used = []
    apply = masks.apply

    def applying(words, signed, **how):
        used.append({key for _, key in signed})
        return apply(words, signed, **how)

    monkeypatch.setattr(masks, "apply", applying)
    attempt.ask(Phase.MASK, me, attempt.roll(me, attempt.parties, {other: OTHER}).encode(LSA1))
    attempt.ask(Phase.MASK, peer, attempt.roll(peer, attempt.parties).encode(LSA1))
    attempt.ask(Phase.MASK, other, attempt.roll(other, attempt.parties).encode(LSA1))

    assert [len(keys) for keys in used] == [4, 4, 4]
    assert not used[0] & (used[1] | used[2])
    # Those that were told the same have one in common.
    assert len(used[1] & used[2]) == 1


def test_two_rolls_of_different_parties(make_run, adversary):
    """A part of the cohort is told that some never came: nobody's masks cancel across."""
    run = make_run(10, colluders=3, coordinates=4)
    parties = run.first.parties
    attempt = run.attempt()
    for party in parties:
        attempt.ask(Phase.ADVERTISE, party, b"")
    for place, party in enumerate(parties):
        u1 = parties if place >= 5 else parties[:7]
        attempt.ask(Phase.MASK, party, attempt.roll(party, u1).encode(LSA1))
    survivors = parties[:7]
    for party in survivors:
        attempt.ask(Phase.CONFIRM, party, Survivors(survivors).encode(LSA1))
    for party in survivors:
        request = attempt.confirmed(party, [p for p in survivors if p != party])
        refuses(attempt, Phase.UNMASK, party, request, TooFewParticipants, None)

    assert adversary.learned(attempt, colluders=parties[:3]) == []


# Confirmations


def test_too_few_confirmations(confirmed):
    """Of four, its own and one other's."""
    me, other = confirmed.parties[:2]

    refuses(confirmed, Phase.UNMASK, me, confirmed.confirmed(me, [other]), TooFewParticipants, None)


def test_confirmations_of_the_receiver_itself(confirmed):
    """Its own counts once, and is not to be sent."""
    me, other = confirmed.parties[:2]
    request = SessionConfirmed(
        parties=(me, other), macs=(confirmed.mac(other, me), confirmed.mac(other, me))
    ).encode(LSA1)

    refuses(confirmed, Phase.UNMASK, me, request, Equivocation)


def test_one_confirmation_twice(confirmed):
    me, other = confirmed.parties[:2]
    request = SessionConfirmed(parties=(other, other), macs=(confirmed.mac(other, me),) * 2).encode(LSA1)

    refuses(confirmed, Phase.UNMASK, me, request, BadPayload)


def test_the_receivers_own_confirmations_come_back(confirmed):
    """Reflected: what it said to others is no word of theirs."""
    me, *others = confirmed.parties
    macs = tuple(confirmed.mac(me, other) for other in others)
    request = SessionConfirmed(parties=tuple(others), macs=macs).encode(LSA1)

    refuses(confirmed, Phase.UNMASK, me, request, TooFewParticipants, None)


def test_confirmations_to_somebody_else(confirmed):
    me, neighbour, *others = confirmed.parties
    macs = tuple(confirmed.mac(other, neighbour) for other in others)
    request = SessionConfirmed(parties=tuple(others), macs=macs).encode(LSA1)

    refuses(confirmed, Phase.UNMASK, me, request, TooFewParticipants, None)


def test_confirmations_of_another_step(make_run):
    """The same survivors, one round before."""
    run = make_run()
    before = run.attempt()
    before.run()
    now = run.attempt()
    now.run(until=Phase.UNMASK)
    me, *others = now.parties
    macs = tuple(before.mac(other, me) for other in others)
    request = SessionConfirmed(parties=tuple(others), macs=macs).encode(LSA1)

    refuses(now, Phase.UNMASK, me, request, TooFewParticipants, None)


def test_a_confirmation_of_one_that_dropped_out(make_run):
    attempt = make_run().attempt()
    gone = attempt.parties[3]
    attempt.run(drops={Phase.MASK: [gone]}, until=Phase.UNMASK)
    me, other = attempt.parties[:2]
    request = SessionConfirmed(parties=(other, gone), macs=(attempt.mac(other, me), OTHER)).encode(LSA1)

    refuses(attempt, Phase.UNMASK, me, request, Equivocation)


def test_another_request_after_the_release(confirmed):
    """The first answer again; to anything else nothing."""
    me, *others = confirmed.parties
    request = confirmed.confirmed(me, others)
    reply = confirmed.ask(Phase.UNMASK, me, request)

    assert confirmed.ask(Phase.UNMASK, me, request) == reply
    assert confirmed.ask(Phase.UNMASK, me, confirmed.confirmed(me, others[:2])) is None
    assert type(confirmed.errors[me]) is BadPhase


def test_phases_out_of_order(make_run):
    """Nothing is opened before it is due, and asking too early costs nothing."""
    attempt = make_run().attempt()
    me = attempt.parties[0]
    early = {
        Phase.ADVERTISE: [Phase.MASK, Phase.CONFIRM, Phase.UNMASK],
        Phase.MASK: [Phase.CONFIRM, Phase.UNMASK],
        Phase.CONFIRM: [Phase.UNMASK],
    }
    for phase, wrong in early.items():
        for other in wrong:
            assert attempt.ask(other, me, Survivors(attempt.parties).encode(LSA1)) is None
            assert type(attempt.errors.pop(me)) is BadPhase
        for party, request in attempt.requests(phase).items():
            attempt.receive(phase, party, attempt.ask(phase, party, request))
    for party, request in attempt.requests(Phase.UNMASK).items():
        attempt.receive(Phase.UNMASK, party, attempt.ask(Phase.UNMASK, party, request))

    assert attempt.server.result().survivors == attempt.parties


# Two attempts, two rounds


def test_a_late_upload_of_one_whose_seeds_were_opened(make_run, adversary):
    """k of a site was opened since it seemed gone; its vector comes after all: b keeps it shut."""
    attempt = make_run().attempt()
    late = attempt.parties[3]
    requests = {}

    def keep(phase, asked):
        requests[phase] = dict(asked)
        return asked

    attempt.run(drops={Phase.MASK: [late]}, on_requests=keep)
    attempt.ask(Phase.MASK, late, requests[Phase.MASK][late])

    assert late in attempt.left[Phase.MASK]
    assert late in attempt.opened(())[1]
    assert adversary.learned(attempt) == [set(attempt.parties) - {late}]


def ordinary_attempt(run, attempt, number=2):
    """An ordinary attempt at the same round, of sites with the same histories."""
    return type(run.first)(replace(attempt.context, attempt=number), histories=run.histories)


def test_no_second_sum_after_a_session(make_run, adversary):
    """Who has released in the session is in no other attempt at the round."""
    run = make_run()
    attempt = run.attempt()
    silent = attempt.parties[3]
    attempt.run(drops={Phase.UNMASK: [silent]})
    again = ordinary_attempt(run, attempt)

    with pytest.raises(TooFewParticipants):
        again.run()
    assert {type(error) for error in again.errors.values()} == {BadPhase}
    assert set(again.left[Phase.ADVERTISE]) == {silent}
    assert adversary.learned(attempt, again) == [set(attempt.parties)]


@pytest.mark.parametrize("released", range(6))
def test_however_many_released_in_a_session_there_is_one_sum(make_run, adversary, released):
    """The server stops the session's last exchange anywhere, and asks for an ordinary attempt."""
    run = make_run(7, colluders=2, min_sites=0, coordinates=4)
    colluders, honest = run.first.parties[:2], run.first.parties[2:]
    attempt = run.attempt()
    attempt.run(until=Phase.UNMASK)
    requests = attempt.requests(Phase.UNMASK)
    for party in honest[:released]:
        attempt.ask(Phase.UNMASK, party, requests[party])
    again = ordinary_attempt(run, attempt)
    for party in colluders:
        # They have no history to mind.
        again.histories[party] = type(again.histories[party])()
        again.sites[party] = again.site(party)
    with contextlib.suppress(TooFewParticipants):
        again.run()

    # 3 honest sites and the 2 colluders are a threshold, and 3 of 5 are not to be had twice.
    in_it = honest if released >= 3 else honest[released:]
    assert adversary.learned(attempt, again, colluders=colluders) == [set(in_it)]


def test_a_session_for_some_and_an_ordinary_attempt_for_others(make_run):
    """Attempt 1 of one round, twice: a site is in one of the two, and neither half is a quorum."""
    run = make_run()
    in_session, not_in_it = run.first.parties[:2], run.first.parties[2:]
    attempt = run.attempt(sites=in_session)
    for party in in_session:
        attempt.ask(Phase.ADVERTISE, party, b"")
    other = ordinary_attempt(run, attempt, number=1)
    other.exchange(Phase.ADVERTISE, dict.fromkeys(other.parties, b""))

    assert set(other.left[Phase.ADVERTISE]) == set(not_in_it)
    assert {type(other.errors[party]) for party in in_session} == {BadPhase}
    with pytest.raises(TooFewParticipants):
        other.server.share_requests()


def test_the_same_round_again_in_a_later_step(make_run):
    """A second session attempt with the number of the first."""
    run = make_run()
    attempt = run.attempt()
    attempt.run(until=Phase.MASK)
    me = attempt.parties[0]
    again = SessionRound(
        attempt.context,
        EncodedUpdate(attempt.encoded[me].copy()),
        session=run.sessions[me],
        step=1,
        history=run.histories[me],
    )

    with pytest.raises(BadPhase):
        again.advertise()


def test_a_step_is_taken_once(make_run):
    """A server that asks for a step again, in the next round, gets nothing of it."""
    run = make_run()
    run.attempt().run()
    again = run.attempt(step=0)
    me = again.parties[0]

    with pytest.raises(ValueError, match="step 0"):
        again.sites[me].advertise()
    assert not run.sessions[me]._chains


def test_an_attempt_that_was_overtaken_releases_nothing(make_run):
    """All have confirmed in the session, and entered an ordinary attempt: the first cannot be finished."""
    run = make_run()
    attempt = run.attempt()
    attempt.run(until=Phase.UNMASK)
    requests = attempt.requests(Phase.UNMASK)
    again = ordinary_attempt(run, attempt)
    again.exchange(Phase.ADVERTISE, dict.fromkeys(again.parties, b""))
    for party, request in requests.items():
        assert attempt.ask(Phase.UNMASK, party, request) is None
        assert type(attempt.errors[party]) is BadPhase
    # The ordinary one goes on, and is the round's one sum.
    again.exchange(Phase.SHARE, again.server.share_requests())
    again.exchange(Phase.MASK, again.server.mask_requests())
    again.exchange(Phase.CONFIRM, again.server.confirm_requests())
    again.exchange(Phase.UNMASK, again.server.unmask_requests())

    assert again.server.result().survivors == attempt.parties


def test_one_that_left_the_session_ends_the_attempt(make_run):
    """Its ordinary advert is no fault: the attempt is lost, nothing is open, an ordinary one has the sum."""
    run = make_run()
    attempt = run.attempt(sites=run.first.parties[1:])
    out = run.first.parties[0]
    stray = ordinary_attempt(run, attempt, number=1)
    advert = stray.sites[out].advertise()
    for party in attempt.sites:
        attempt.receive(Phase.ADVERTISE, party, attempt.ask(Phase.ADVERTISE, party, b""))
    with pytest.raises(SessionLost):
        attempt.receive(Phase.ADVERTISE, out, advert)
    again = ordinary_attempt(run, attempt)

    assert again.run().survivors == attempt.parties


def test_no_pair_is_masked_alike_in_two_steps(make_run):
    """Two uploads of one update, told the same model: their difference is no sum of pair masks either."""
    run = make_run(3, coordinates=64)
    words = {p: run.rng.integers(0, 2**10, 64).astype("u4") for p in run.first.parties}
    vectors = []
    for _ in range(3):
        attempt = run.attempt(words=words)
        attempt.run()
        vectors.append({p: masked.words for p, masked in attempt.left[Phase.MASK].items()})
    for one, two in itertools.combinations(vectors, 2):
        for party in one:
            assert (one[party] != two[party]).mean() > 0.9


def test_a_roll_is_answered_once(advertised):
    """The same request has the same reply, and another one none."""
    me = advertised.parties[0]
    roll = advertised.roll(me, advertised.parties)
    reply = advertised.ask(Phase.MASK, me, roll.encode(LSA1))
    fewer: SessionRoll = advertised.roll(me, advertised.parties[:3])

    assert advertised.ask(Phase.MASK, me, roll.encode(LSA1)) is reply
    assert advertised.ask(Phase.MASK, me, fewer.encode(LSA1)) is None
    assert type(advertised.errors[me]) is BadPhase
