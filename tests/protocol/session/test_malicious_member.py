"""What members may send in a session that they should not: named where it shows, and never opened more."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from lepton_fl.secagg import session_site, shamir
from lepton_fl.secagg.errors import (
    BadPayload,
    BadPhase,
    BadShare,
    Phase,
    SecaggError,
    SessionLost,
    SumOutOfRange,
    TooFewParticipants,
)
from lepton_fl.secagg.keys import Suite
from lepton_fl.secagg.session_messages import SessionAdvert, SessionConfirm, SessionHeader, SessionUnmask

LSA1 = Suite.LSA1
OTHER = bytes(range(32))


def changed(attempt, party, change):
    """`on_reply` with which this party's replies are `change(phase, reply)`."""

    def on_reply(phase, sender, reply):
        return change(phase, reply) if sender == party else reply

    return on_reply


def flipped(data, at=0):
    return bytes(byte ^ (place == at) for place, byte in enumerate(data))


def with_advert(attempt, party, change):
    def on(phase, reply):
        if phase is not Phase.ADVERTISE:
            return reply
        sent = change(SessionAdvert.decode(LSA1, reply, len(attempt.parties))).encode(LSA1)
        # A cheat finds its own advert on the roll.
        attempt.sites[party]._advert = sent
        return sent

    return changed(attempt, party, on)


# Adverts


@pytest.mark.parametrize(
    "change",
    [
        lambda advert: advert + b"\0",
        lambda advert: advert[:-1],
        lambda advert: SessionAdvert.decode(LSA1, advert, 4).encode(Suite.LSA1_PQ),
        lambda advert: replace(SessionAdvert.decode(LSA1, advert, 4), pairs=()).encode(LSA1),
        lambda advert: replace(SessionAdvert.decode(LSA1, advert, 4), boxes=()).encode(LSA1),
        lambda advert: replace(SessionAdvert.decode(LSA1, advert, 4), commitments=()).encode(LSA1),
        lambda advert: replace(SessionAdvert.decode(LSA1, advert, 4), recovery=b"").encode(LSA1),
        lambda advert: replace(SessionAdvert.decode(LSA1, advert, 4), context=OTHER).encode(LSA1),
        lambda advert: b"",
    ],
    ids=["trailing", "cut", "suite", "no pairs", "no boxes", "no shares", "no recovery", "context", "empty"],
)  # fmt: skip
def test_an_advert_of_another_form(make_run, change):
    """Refused in its sender's name, and the others go on without it."""
    attempt = make_run().attempt()
    bad = attempt.parties[2]
    on_reply = changed(attempt, bad, lambda phase, r: change(r) if phase is Phase.ADVERTISE else r)
    result = attempt.run(on_reply=on_reply)

    assert type(attempt.blamed[bad]) is BadPayload
    assert attempt.blamed[bad].culprit == bad
    assert result.survivors == tuple(p for p in attempt.parties if p != bad)


def test_two_adverts(make_run):
    attempt = make_run().attempt()
    one, two = attempt.parties[:2]
    for party in (one, two):
        attempt.receive(Phase.ADVERTISE, party, attempt.sites[party].advertise())

    with pytest.raises(BadPhase) as refused:
        attempt.receive(Phase.ADVERTISE, one, attempt.sites[two].advertise())
    assert refused.value.culprit == one


def test_an_advert_of_none_of_the_cohort(make_run):
    run = make_run()
    stranger, *cohort = run.first.parties
    attempt = run.attempt(cohort=cohort)

    with pytest.raises(BadPayload):
        attempt.receive(Phase.ADVERTISE, stranger, attempt.sites[cohort[0]].advertise())


def test_an_advert_after_the_roll(make_run):
    attempt = make_run().attempt()
    late = attempt.parties[3]
    attempt.run(drops={Phase.ADVERTISE: [late]}, until=Phase.CONFIRM)

    with pytest.raises(BadPhase):
        attempt.receive(Phase.ADVERTISE, late, attempt.sites[late].advertise())


def test_other_keys_with_one_party(make_run):
    """Commitments to a pair's seed that differ: the attempt is lost before anything is uploaded."""
    attempt = make_run().attempt()
    bad = attempt.parties[2]
    forge = with_advert(attempt, bad, lambda a: replace(a, pairs=(flipped(a.pairs[0]), *a.pairs[1:])))

    with pytest.raises(SessionLost) as lost:
        attempt.run(on_reply=forge)
    assert lost.value.culprit is None
    assert lost.value.retry
    assert not attempt.left[Phase.MASK]


def test_other_keys_with_one_that_never_came(make_run):
    """Only pairs of U1 matter: who stays away cannot be held against those that came."""
    attempt = make_run().attempt()
    bad, gone = attempt.parties[2:]
    forge = with_advert(attempt, bad, lambda a: replace(a, pairs=(*a.pairs[:2], flipped(a.pairs[2]))))
    result = attempt.run(on_reply=forge, drops={Phase.ADVERTISE: [gone]})

    assert result.survivors == attempt.parties[:3]


def test_a_box_that_does_not_open(make_run):
    """Its receiver refuses before it has masked, names the sender, and is in no session any more."""
    run = make_run()
    attempt = run.attempt()
    victim, bad = attempt.parties[0], attempt.parties[2]
    forge = with_advert(attempt, bad, lambda a: replace(a, boxes=(flipped(a.boxes[0]), *a.boxes[1:])))
    attempt.run(on_reply=forge, until=Phase.CONFIRM)

    assert type(attempt.errors[victim]) is BadPayload
    assert attempt.errors[victim].culprit == bad
    assert victim not in attempt.left[Phase.MASK]
    assert not run.sessions[victim]._chains


def test_shares_other_than_those_committed_to(make_run, monkeypatch):
    """A box that opens, and holds what the server could not compare."""
    run = make_run()
    attempt = run.attempt()
    victim, bad = attempt.parties[0], attempt.parties[2]
    real = session_site.share_commitments

    def committing(suite, sctx, dealer, holder, share):
        return real(suite, sctx, dealer, holder, OTHER * 2 if (dealer, holder) == (bad, victim) else share)

    monkeypatch.setattr(session_site, "share_commitments", committing)
    advert = attempt.sites[bad].advertise()
    monkeypatch.undo()
    attempt.run(until=Phase.CONFIRM)

    assert attempt.left[Phase.ADVERTISE][bad] == advert
    assert type(attempt.errors[victim]) is BadPayload
    assert attempt.errors[victim].culprit == bad


# Vectors


@pytest.mark.parametrize(
    "change",
    [
        lambda words: words[:-1],
        lambda words: words.astype("<u8"),
        lambda words: words.astype(">u4"),
        lambda words: words.reshape(2, -1),
        lambda words: words + np.uint32(1),
    ],
    ids=["short", "wide", "big-endian", "shape", "other"],
)
def test_a_vector_other_than_announced(make_run, change):
    """It is not added; the others have a sum without its sender."""
    attempt = make_run().attempt()
    bad = attempt.parties[2]

    def forge(phase, reply):
        return replace(reply, words=change(reply.words)) if phase is Phase.MASK else reply

    result = attempt.run(on_reply=changed(attempt, bad, forge))
    others = tuple(p for p in attempt.parties if p != bad)

    assert type(attempt.blamed[bad]) is BadPayload
    assert result.survivors == others
    np.testing.assert_array_equal(result.mean_L, attempt.expected(others))


def test_a_header_of_another_form(make_run):
    attempt = make_run().attempt()
    bad = attempt.parties[2]

    def forge(phase, reply):
        return replace(reply, header=reply.header + b"\0") if phase is Phase.MASK else reply

    result = attempt.run(on_reply=changed(attempt, bad, forge))

    assert type(attempt.blamed[bad]) is BadPayload
    assert bad not in result.survivors


def test_a_vector_without_an_advert(make_run):
    attempt = make_run().attempt()
    stray, other = attempt.parties[3], attempt.parties[0]
    attempt.run(drops={Phase.ADVERTISE: [stray]}, until=Phase.CONFIRM)

    with pytest.raises(BadPhase) as refused:
        attempt.receive(Phase.MASK, stray, attempt.left[Phase.MASK][other])
    assert refused.value.culprit == stray


def test_a_second_vector(make_run):
    attempt = make_run().attempt()
    attempt.run(until=Phase.CONFIRM)
    one, two = attempt.parties[:2]

    with pytest.raises(BadPhase):
        attempt.receive(Phase.MASK, one, attempt.left[Phase.MASK][two])


def test_noise_in_place_of_a_vector(make_run):
    """Nobody can be named: that is what the masks are for."""
    attempt = make_run(coordinates=200).attempt()
    bad = attempt.parties[2]
    noise = np.random.default_rng(5).integers(0, 2**32, 200, np.uint32)

    def forge(phase, reply):
        if phase is not Phase.MASK:
            return reply
        header = replace(
            SessionHeader.decode(LSA1, reply.header), digest=hashlib.sha256(noise.tobytes()).digest()
        )
        return replace(reply, header=header.encode(LSA1), words=noise)

    with pytest.raises(SumOutOfRange) as refused:
        attempt.run(on_reply=changed(attempt, bad, forge))
    assert refused.value.culprit is None


# Confirmations


def wrong_macs(phase, reply):
    if phase is not Phase.CONFIRM:
        return reply
    confirm = SessionConfirm.decode(LSA1, reply, 4)
    return replace(confirm, macs=tuple(flipped(mac) for mac in confirm.macs)).encode(LSA1)


def test_one_that_confirms_wrongly_stops_nobody(make_run):
    """Of four, three are enough, each of which counts itself."""
    attempt = make_run().attempt()
    bad = attempt.parties[2]
    result = attempt.run(on_reply=changed(attempt, bad, wrong_macs))

    assert not attempt.errors
    np.testing.assert_array_equal(result.mean_L, attempt.expected(attempt.parties))


def test_two_that_confirm_wrongly_are_too_many(make_run, adversary):
    """The others release nothing to fewer than a threshold that was told the same."""
    attempt = make_run().attempt()
    bad = attempt.parties[2:]

    def on_reply(phase, party, reply):
        return wrong_macs(phase, reply) if party in bad else reply

    with pytest.raises(SecaggError):
        attempt.run(on_reply=on_reply)
    assert {type(attempt.errors[p]) for p in attempt.parties[:2]} == {TooFewParticipants}
    assert adversary.learned(attempt) == []


def test_confirmations_of_another_length(make_run):
    attempt = make_run().attempt()
    bad = attempt.parties[2]

    def forge(phase, reply):
        return reply + b"\0" if phase is Phase.CONFIRM else reply

    result = attempt.run(on_reply=changed(attempt, bad, forge))

    assert type(attempt.blamed[bad]) is BadPayload
    assert result.survivors == attempt.parties


def test_a_confirmation_of_one_that_dropped_out(make_run):
    attempt = make_run().attempt()
    gone, other = attempt.parties[3], attempt.parties[0]
    attempt.run(drops={Phase.MASK: [gone]}, until=Phase.CONFIRM)
    requests = attempt.requests(Phase.CONFIRM)
    reply = attempt.ask(Phase.CONFIRM, other, requests[other])

    with pytest.raises(BadPhase):
        attempt.receive(Phase.CONFIRM, gone, reply)


# Shares


def wrong_shares(places, n=4):
    def forge(phase, reply):
        if phase is not Phase.UNMASK:
            return reply
        unmask = SessionUnmask.decode(LSA1, reply, n)
        shares = tuple(
            flipped(share) if place in places else share for place, share in enumerate(unmask.shares)
        )
        return replace(unmask, shares=shares).encode(LSA1)

    return forge


def test_a_wrong_share(make_run):
    """It names its holder and counts for nothing; those of the others rebuild the secret."""
    attempt = make_run().attempt()
    bad = attempt.parties[0]
    result = attempt.run(on_reply=changed(attempt, bad, wrong_shares({1})))

    assert type(attempt.blamed[bad]) is BadShare
    assert attempt.blamed[bad].culprit == bad
    np.testing.assert_array_equal(result.mean_L, attempt.expected(attempt.parties))


def test_a_wrong_share_of_k(make_run):
    """With one site gone and one wrong share too few are left, and the liar is named."""
    attempt = make_run().attempt()
    bad, gone = attempt.parties[0], attempt.parties[3]

    with pytest.raises(TooFewParticipants):
        attempt.run(on_reply=changed(attempt, bad, wrong_shares({3})), drops={Phase.MASK: [gone]})
    assert attempt.blamed[bad].culprit == bad


def test_shares_of_the_other_kind(make_run):
    """A share of k where one of b is due is a wrong share."""
    attempt = make_run().attempt()
    bad = attempt.parties[0]

    def forge(phase, reply):
        if phase is not Phase.UNMASK:
            return reply
        held = attempt.held[bad]
        unmask = SessionUnmask.decode(LSA1, reply, 4)
        return replace(unmask, shares=tuple(held[dealer][32:] for dealer in attempt.parties)).encode(LSA1)

    attempt.run(on_reply=changed(attempt, bad, forge))

    assert type(attempt.blamed[bad]) is BadShare


def test_shares_of_another_length(make_run):
    attempt = make_run().attempt()
    bad = attempt.parties[0]

    def forge(phase, reply):
        return reply[:-1] if phase is Phase.UNMASK else reply

    result = attempt.run(on_reply=changed(attempt, bad, forge))

    assert type(attempt.blamed[bad]) is BadPayload
    np.testing.assert_array_equal(result.mean_L, attempt.expected(attempt.parties))


def test_shares_of_one_that_dropped_out(make_run):
    """What its shares would open is not asked of it, and is not taken."""
    attempt = make_run().attempt()
    gone, other = attempt.parties[3], attempt.parties[0]
    attempt.run(drops={Phase.MASK: [gone]}, until=Phase.UNMASK)
    reply = attempt.ask(Phase.UNMASK, other, attempt.requests(Phase.UNMASK)[other])

    with pytest.raises(BadPhase) as refused:
        attempt.receive(Phase.UNMASK, gone, reply)
    assert refused.value.culprit == gone


@pytest.mark.parametrize("field", ["seed", "key"])
def test_a_dealer_that_committed_to_another_secret(make_run, field):
    """What its shares rebuild is not what it said: b where it survives, k where it does not."""
    attempt = make_run().attempt()
    bad = attempt.parties[2]
    forge = with_advert(attempt, bad, lambda a: replace(a, **{field: flipped(getattr(a, field))}))
    drops = {Phase.MASK: [bad]} if field == "key" else {}

    with pytest.raises(BadShare) as refused:
        attempt.run(on_reply=forge, drops=drops)
    assert refused.value.culprit == bad


def test_a_dealer_whose_shares_are_of_no_polynomial(make_run, monkeypatch):
    """Each is as it committed to, and together they are no secret."""
    attempt = make_run(7, min_sites=0, colluders=2).attempt()
    bad = attempt.parties[2]
    real = shamir.deal

    def dealing(secret, **how):
        return [
            bytes([place]) * 64 if place % 2 else share for place, share in enumerate(real(secret, **how))
        ]

    monkeypatch.setattr(shamir, "deal", dealing)
    attempt.sites[bad].advertise()
    monkeypatch.undo()

    with pytest.raises(BadShare) as refused:
        attempt.run()
    assert refused.value.culprit == bad


@pytest.mark.parametrize("how", ["does not open", "holds other seeds"])
def test_a_dealer_whose_recovery_is_useless(make_run, monkeypatch, how):
    """It drops out, and what k opens is not what was committed to with the other end."""
    attempt = make_run().attempt()
    bad = attempt.parties[2]
    site = attempt.sites[bad]
    if how == "does not open":
        forge = with_advert(attempt, bad, lambda a: replace(a, recovery=flipped(a.recovery)))
    else:
        real = session_site.recovery_key

        class Sealing:
            def __init__(self, key):
                self.key = key

            def seal(self, seeds, aad):
                return self.key.seal(flipped(seeds), aad)

        monkeypatch.setattr(session_site, "recovery_key", lambda *of: Sealing(real(*of)))
        site.advertise()
        monkeypatch.undo()
        forge = None

    with pytest.raises(BadShare) as refused:
        attempt.run(on_reply=forge, drops={Phase.MASK: [bad]})
    assert refused.value.culprit == bad


def test_a_recovery_that_is_not_needed_is_not_looked_at(make_run):
    """Its dealer survives: k stays shut, so nobody can know what the box holds."""
    attempt = make_run().attempt()
    bad = attempt.parties[2]
    forge = with_advert(attempt, bad, lambda a: replace(a, recovery=flipped(a.recovery)))
    result = attempt.run(on_reply=forge)

    np.testing.assert_array_equal(result.mean_L, attempt.expected(attempt.parties))


# Replies that come late


@pytest.mark.parametrize("phase", [Phase.ADVERTISE, Phase.MASK, Phase.CONFIRM, Phase.UNMASK])
def test_a_reply_of_an_earlier_step(make_run, phase):
    """It is of another step, and changes nothing: the right one is taken after it."""
    run = make_run()
    before = run.attempt()
    before.run()
    late = before.parties[1]
    now = run.attempt()
    tried = []

    def on_reply(at, party, reply):
        if (at, party) == (phase, late):
            with pytest.raises(BadPayload) as refused:
                now.receive(at, party, before.left[at][party])
            tried.append(refused.value.culprit)
        return reply

    result = now.run(on_reply=on_reply)

    assert tried == [late]
    np.testing.assert_array_equal(result.mean_L, now.expected(now.parties))


# What members see


@pytest.mark.parametrize("n", [4, 7])
def test_colluders_learn_the_sum_and_no_more(make_run, adversary, n):
    """With all the server has: one sum of the others, whoever of the honest drops out."""
    run = make_run(n, colluders=1 if n == 4 else 2, min_sites=0, coordinates=4)
    colluders = run.first.parties[: run.first.context.cohort.colluders]
    honest = run.first.parties[len(colluders) :]
    for gone in (None, *honest):
        attempt = run.attempt()
        attempt.run(drops={Phase.CONFIRM if gone == honest[0] else Phase.MASK: [gone]} if gone else None)
        survivors = set(attempt.server._survivors.parties)

        assert adversary.learned(attempt, colluders=colluders) == [survivors - set(colluders)]


def test_a_member_is_sent_its_own_boxes_and_nobodys(make_run):
    """Neither commitments to seeds of others' pairs, nor others' boxes, nor what k opens, pass through it."""
    attempt = make_run().attempt()
    attempt.run()
    me, *others = attempt.parties
    seen = b"".join(attempt.asked[phase][me] for phase in (Phase.MASK, Phase.CONFIRM, Phase.UNMASK))

    for sender in others:
        advert = attempt.advert(sender)
        assert attempt.box(sender, me) in seen
        assert advert.recovery not in seen
        assert not any(pair in seen for pair in advert.pairs)
        assert not any(attempt.box(sender, other) in seen for other in others if other != sender)
