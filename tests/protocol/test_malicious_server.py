"""What a server may try, with members colluding: each ends in the right error, and nothing is opened."""

from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest

from lepton_fl.errors import VerificationFailed
from lepton_fl.secagg import server as server_module
from lepton_fl.secagg import site as site_module
from lepton_fl.secagg.context import Attempt, Cohort, Forgetful
from lepton_fl.secagg.errors import (
    SERVER,
    BadCertificate,
    BadPayload,
    BadPhase,
    BadSignature,
    Equivocation,
    Phase,
    PolicyViolation,
    TooFewParticipants,
)
from lepton_fl.secagg.fixedpoint import Quantiser
from lepton_fl.secagg.keys import Suite
from lepton_fl.secagg.messages import Advert, Confirm, Confirmed, Post, Roll, Survivors, advert_digest

LSA1 = Suite.LSA1


def refused(net, party, error, culprit=SERVER):
    """That this site raised exactly this, in this name, and that nothing was opened."""
    found = net.errors[party]
    assert type(found) is error, repr(found)
    assert found.culprit == culprit
    assert party not in net.left[Phase.UNMASK]
    assert net.opened_nothing()


def forged(net, phase, forge, victims=None):
    """`on_requests` that gives `victims` (all, where none are named) a forged request in one phase."""

    def on_requests(now, requests):
        if now is phase:
            for party in victims or list(requests):
                requests[party] = forge(party, requests[party])
        return requests

    return on_requests


def until_stopped(net, **how):
    """A round that cannot be finished: the honest part of the server gives up."""
    with pytest.raises(TooFewParticipants):
        net.run(**how)


def change_roll(change):
    def forge(_, request):
        return change(Roll.decode(LSA1, request)).encode(LSA1)

    return forge


def with_advert(roll, place, advert):
    """The roll with another advert in one place, and its digest."""
    adverts, digests = list(roll.adverts), list(roll.digests)
    adverts[place], digests[place] = advert, advert_digest(LSA1, advert)
    return replace(roll, adverts=tuple(adverts), digests=tuple(digests))


# The dead and the living


@pytest.mark.parametrize("with_all", [False, True], ids=["its own half's", "everybody's"])
def test_a_site_both_alive_and_dead(make_net, with_all):
    """Half is told that a site survives and half that it dropped out: neither half has enough witnesses.

    Against Flower's SecAgg+ this opens every update, with the right aggregate and no error.
    """
    net = make_net(10, colluders=3)
    victim, others = net.parties[9], net.parties[:9]
    halves = {p: net.parties if p in net.parties[:5] or p == victim else others for p in net.parties}
    net.run(
        on_requests=forged(net, Phase.CONFIRM, lambda p, _: Survivors(halves[p]).encode(LSA1)),
        until=Phase.UNMASK,
    )

    for party in net.parties:
        witnesses = [p for p in halves[party] if with_all or halves[p] == halves[party]]
        net.exchange(Phase.UNMASK, {party: net.confirmed(witnesses)})
        refused(net, party, BadSignature if with_all else TooFewParticipants, SERVER if with_all else None)


def test_colluders_confirm_both_sets_of_survivors(make_net):
    """Three colluders sign for either half: 7 witnesses are not to be had twice from 7 honest sites and 3."""
    net = make_net(10, colluders=3)
    colluders, victim = net.parties[:3], net.parties[9]
    honest = net.parties[3:]
    both = {"alive": net.parties, "dead": net.parties[:9]}
    # As even a split as there is: four honest sites (the victim with them) and three.
    told = {p: "alive" if p in honest[:3] or p == victim else "dead" for p in honest}
    net.run(until=Phase.CONFIRM)
    net.server.confirm_requests()
    opened = []
    for party in honest:
        net.exchange(Phase.CONFIRM, {party: Survivors(both[told[party]]).encode(LSA1)})
    for party in honest:
        view = told[party]
        own = [p for p in honest if told[p] == view]
        confirms = {p: Confirm.decode(LSA1, net.left[Phase.CONFIRM][p]) for p in own}
        for p in colluders:
            site = net.sites[p]
            confirms[p] = Confirm.sign(LSA1, site._identity, site._r1, Survivors(both[view]))
        parties = tuple(sorted(confirms))
        request = Confirmed(parties=parties, confirms=tuple(confirms[p] for p in parties)).encode(LSA1)
        net.exchange(Phase.UNMASK, {party: request})
        opened += [view] if party in net.left[Phase.UNMASK] else []

    # The larger half is a full quorum of witnesses, and the one set that is ever opened.
    assert set(opened) <= {"alive"}


def test_islands(make_net):
    """Envelopes between two groups are withheld, so that their masks cancel within each."""
    net = make_net(10, colluders=3)
    islander = net.parties[0]

    def withhold(party, _):
        near = [p for p in net.parties if p != party]
        return net.post(party, near[:6] if party == islander else near).encode(LSA1)

    net.run(on_requests=forged(net, Phase.MASK, withhold), until=Phase.UNMASK)

    refused(net, islander, Equivocation)


def test_islands_below_the_threshold(make_net):
    """So few envelopes that the site would mask with fewer than the threshold: it does not mask."""
    net = make_net(10, colluders=3)
    until_stopped(
        net,
        on_requests=forged(
            net, Phase.MASK, lambda p, _: net.post(p, [q for q in net.parties if q != p][:5]).encode(LSA1)
        ),
    )

    for party in net.parties:
        refused(net, party, TooFewParticipants, None)
    assert not net.left[Phase.MASK]


@pytest.mark.parametrize(
    ("survivors", "error"),
    [
        (lambda ids: ids[1:], Equivocation),
        (lambda ids: (*ids, ids[-1] + 1), Equivocation),
        (lambda ids: ids[::-1], BadPayload),
        (lambda ids: (ids[0], *ids), BadPayload),
        (lambda ids: ids[:2], TooFewParticipants),
    ],
    ids=["without the site", "off the roll", "out of order", "twice", "too few"],
)
def test_impossible_survivors(make_net, survivors, error):
    net = make_net(4)
    first = net.parties[0]
    forge = forged(net, Phase.CONFIRM, lambda *_: Survivors(survivors(net.parties)).encode(LSA1), [first])
    net.run(on_requests=forge, until=Phase.UNMASK)

    refused(net, first, error, None if error is TooFewParticipants else SERVER)


def test_shared_noise_needs_more_survivors(make_net):
    """With min_sites = 4 of 4, nobody confirms three: the noise would be too small."""
    net = make_net(4, min_sites=4)
    net.run(
        on_requests=forged(net, Phase.CONFIRM, lambda *_: Survivors(net.parties[:3]).encode(LSA1)),
        until=Phase.UNMASK,
    )

    refused(net, net.parties[0], TooFewParticipants, None)


def test_second_confirmation(make_net):
    """A site speaks once: asked about other survivors, it is silent, and the first word stands."""
    net = make_net(4)
    net.run(until=Phase.UNMASK)
    site = net.sites[net.parties[0]]

    with pytest.raises(BadPhase):
        site.confirm(Survivors(net.parties[:3]).encode(LSA1))
    assert net.opened_nothing()


def test_second_unmask(make_net):
    """Another selection of confirmations after the shares left: there is nothing left to give."""
    net = make_net(4)
    net.run()

    for party in net.parties:
        with pytest.raises(BadPhase):
            net.sites[party].unmask(net.confirmed(net.parties[:3]))


# Confirmations


def unmask_with(net, change):
    """The first site's error over changed confirmations, after an honest confirm phase."""
    net.run(until=Phase.UNMASK)
    party = net.parties[0]
    confirmed = Confirmed.decode(LSA1, net.confirmed(net.parties))
    net.exchange(Phase.UNMASK, {party: change(confirmed).encode(LSA1)})
    return party


def test_forged_confirmation(make_net):
    net = make_net(4)

    def forge(confirmed):
        return replace(confirmed, confirms=(*confirmed.confirms[:3], Confirm(bytes(64))))

    refused(net, unmask_with(net, forge), BadSignature)


def test_confirmation_in_anothers_name(make_net):
    """One site's confirmation twice, the second time as another's."""
    net = make_net(4)
    double = lambda c: replace(c, confirms=(*c.confirms[:3], c.confirms[0]))

    refused(net, unmask_with(net, double), BadSignature)


def test_too_few_confirmations(make_net):
    net = make_net(4)
    few = lambda c: Confirmed(parties=c.parties[:2], confirms=c.confirms[:2])

    refused(net, unmask_with(net, few), TooFewParticipants, None)


def test_same_confirmation_counted_twice(make_net):
    net = make_net(4)
    twice = lambda c: Confirmed(
        parties=(*c.parties[:2], c.parties[1]), confirms=(*c.confirms[:2], c.confirms[1])
    )

    refused(net, unmask_with(net, twice), BadPayload)


def test_confirmation_of_a_party_that_did_not_survive(make_net):
    net = make_net(4)
    net.run(drops={Phase.MASK: net.parties[3:]}, until=Phase.UNMASK)
    net.left[Phase.CONFIRM][net.parties[3]] = Confirm(bytes(64)).encode(LSA1)
    net.exchange(Phase.UNMASK, {net.parties[0]: net.confirmed(net.parties)})

    refused(net, net.parties[0], Equivocation)


# The roll


@pytest.mark.parametrize("key", ["channel", "mask"])
def test_swapped_key(make_net, key):
    """The server's own key in a site's advert."""
    net = make_net(4)

    def swap(roll):
        advert = replace(Advert.decode(LSA1, roll.adverts[1]), **{key: bytes(31) + b"\x09"})
        return with_advert(roll, 1, advert.encode(LSA1))

    until_stopped(
        net, on_requests=forged(net, Phase.SHARE, change_roll(swap), [net.parties[0], net.parties[2]])
    )

    refused(net, net.parties[0], BadSignature, net.parties[1])


def test_own_advert_changed(make_net):
    net = make_net(4)
    advert = lambda roll: replace(Advert.decode(LSA1, roll.adverts[0]), nonce=bytes(16)).encode(LSA1)
    forge = forged(
        net, Phase.SHARE, change_roll(lambda roll: with_advert(roll, 0, advert(roll))), [net.parties[0]]
    )
    net.run(on_requests=forge, until=Phase.MASK)

    refused(net, net.parties[0], Equivocation)


def drop_place(values, place):
    return values[:place] + values[place + 1 :]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda r: replace(r, adverts=r.adverts[::-1]), Equivocation),
        (lambda r: replace(r, adverts=(*r.adverts, r.adverts[-1])), Equivocation),
        (lambda r: replace(r, adverts=r.adverts[:-1]), Equivocation),
        (lambda r: replace(r, adverts=r.adverts[1:]), Equivocation),
        (lambda r: replace(r, digests=(*r.digests[:-1], bytes(32))), Equivocation),
        (lambda r: replace(r, parties=(*r.parties[:-1], 9000)), Equivocation),
        (lambda r: replace(r, parties=(*r.parties, 9000), digests=(*r.digests, bytes(32))), Equivocation),
        (lambda r: replace(r, parties=r.parties[1:], digests=r.digests[1:]), Equivocation),
        (lambda r: replace(r, parties=r.parties[:2], digests=r.digests[:2]), TooFewParticipants),
        (lambda r: replace(r, parties=r.parties[::-1], digests=r.digests[::-1]), BadPayload),
        (lambda r: replace(r, digests=r.digests[:-1]), BadPayload),
        (lambda r: replace(r, adverts=(b"", *r.adverts[1:])), BadPayload),
    ],
    ids=[
        "adverts out of order",
        "an advert twice",
        "an advert kept back",
        "without its own advert",
        "a digest of nothing",
        "a stranger in a site's place",
        "a stranger more",
        "without the site",
        "below the quorum",
        "parties out of order",
        "a digest missing",
        "an empty advert",
    ],
)
def test_untrue_roll(make_net, change, error):
    net = make_net(4)
    first = net.parties[0]
    net.run(on_requests=forged(net, Phase.SHARE, change_roll(change), [first]), until=Phase.MASK)

    refused(net, first, error, None if error is TooFewParticipants else SERVER)
    assert first not in net.left[Phase.SHARE]


def test_two_rolls(make_net):
    """One half is told of a site that the other half is not: their envelopes do not fit together."""
    net = make_net(10, colluders=3)
    without = change_roll(
        lambda r: replace(
            r,
            parties=drop_place(r.parties, 9),
            digests=drop_place(r.digests, 9),
            adverts=drop_place(r.adverts, 9),
        )
    )
    half = net.parties[:5]
    net.run(on_requests=forged(net, Phase.SHARE, without, half), until=Phase.MASK)
    for party in half:
        other = net.parties[6]
        net.exchange(
            Phase.MASK, {party: net.post(party, [p for p in net.parties[:9] if p != party]).encode(LSA1)}
        )
        assert isinstance(net.errors[party], BadSignature)
        assert net.errors[party].culprit == other - 3
    assert not net.left[Phase.MASK]


TOLD = {
    "model": {"model": bytes(31) + b"\x01"},
    "study, with another sigma": {"study": bytes(31) + b"\x01"},
    "clip": {"quantiser": Quantiser(clip=2.0, bits=20, max_n=4)},
    "bits": {"quantiser": Quantiser(clip=1.0, bits=19, max_n=4)},
    "weights": {"weighted": True},
    "attempt": {"attempt": 2},
    "round": {"round": 2},
    "kind": {"kind": "evaluate"},
    "run": {"run": b"\x01" * 16},
    "length": {"coordinates": 200, "model": b"\x02" * 32},
    "threshold, by the cohort": {"colluders": 0},
    "survivors": {"min_sites": 4},
    "suite": {"suite": Suite.LSA1_PQ},
}


@pytest.mark.parametrize("told", TOLD, ids=str)
def test_one_site_is_told_something_else(make_net, context_of, world, told):
    """The server passes its advert on: every other site refuses, and nobody has dealt a share."""
    odd = world.ids(4)[3]
    net = make_net(4, net={"contexts": {odd: context_of(4, **TOLD[told])}})
    other = net.sites[odd].advertise()
    forge = change_roll(
        lambda r: with_advert(
            replace(r, parties=net.parties, digests=(*r.digests, bytes(32)), adverts=(*r.adverts, b"")),
            3,
            other,
        )
    )
    until_stopped(net, on_requests=forged(net, Phase.SHARE, forge))

    expected = BadPayload if told == "suite" else Equivocation
    for party in net.parties[:3]:
        refused(net, party, expected)
    assert not net.left[Phase.SHARE]
    assert type(net.blamed[odd]) is BadPayload


def test_another_roster(make_net, context_of, world):
    """A site with a newer roster makes another context."""
    assert context_of(4).digest != context_of(4, roster=2).digest


@pytest.mark.parametrize(
    "certificate", ["self-made", "off the roster", "expired", "revoked", "of another key"]
)
def test_sybil(make_net, world, certificate):
    """A party of the server's making stands in for a site that is away."""
    net = make_net(4)
    absent = net.parties[3]
    stranger = world.identity("stranger")
    signed = {
        "self-made": lambda: world.certify(absent, root=stranger, key=stranger),
        "off the roster": lambda: world.certify(9001, key=stranger),
        "expired": lambda: world.certify(absent, days=-1),
        "revoked": lambda: world.certify(absent, serial=77),
        "of another key": lambda: world.certify(absent, key=stranger),
    }[certificate]()
    if certificate == "revoked":
        revoking = world.consortium(net.parties, revoked=(77,))
        net.sites = {p: net.site(p, consortium=revoking) for p in net.parties}
    advert = Advert.sign(
        LSA1,
        stranger,
        certificate=signed,
        context=net.context.digest,
        channel=b"\x05" * 32,
        mask=b"\x06" * 32,
        nonce=bytes(16),
    ).encode(LSA1)
    forge = change_roll(
        lambda r: with_advert(
            replace(r, parties=net.parties, digests=(*r.digests, bytes(32)), adverts=(*r.adverts, b"")),
            3,
            advert,
        )
    )
    until_stopped(net, drops={Phase.ADVERTISE: [absent]}, on_requests=forged(net, Phase.SHARE, forge))

    culprit = {"self-made": None, "off the roster": 9001}.get(certificate, absent)
    for party in net.parties[:3]:
        refused(net, party, BadCertificate, culprit)
    assert not net.left[Phase.SHARE]


def test_certificate_that_expires_during_a_run(make_net, world):
    """Verified once is not verified for ever: the time is looked at in each round."""
    make_net(4).run()
    later = make_net(4, net={"now": world.NOW + timedelta(days=2)})
    until_stopped(later)

    assert all(isinstance(error, BadCertificate) for error in later.blamed.values())


POINTS = {
    "0": bytes(32),
    "1": b"\x01" + bytes(31),
    "order 8": bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
}


def of_low_order(net, monkeypatch, member, key, point):
    """This member advertises a key with which every secret is zero, and else does its part."""
    name = {"channel": "ChannelKey", "mask": "MaskKey"}[key]

    class LowOrder(getattr(site_module, name)):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.public = point

    advertise = net.sites[member].advertise

    def cheating():
        with monkeypatch.context() as patched:
            patched.setattr(site_module, name, LowOrder)
            return advertise()

    net.sites[member].advertise = cheating


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
@pytest.mark.parametrize("key", ["channel", "mask"])
def test_low_order_point(make_net, monkeypatch, key, point):
    """Passed on by a server that colludes with its owner: named at every site; nobody deals or masks."""
    net = make_net(4)
    member = net.parties[3]
    of_low_order(net, monkeypatch, member, key, point)
    monkeypatch.setattr(server_module, "_PROBES", {LSA1: SimpleNamespace(offer=lambda _: None)})
    until_stopped(net)

    for party in net.parties[:3]:
        refused(net, party, BadPayload, member)
        assert party not in net.left[Phase.SHARE if key == "channel" else Phase.MASK]


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
@pytest.mark.parametrize("key", ["channel", "mask"])
def test_server_refuses_a_low_order_point(make_net, monkeypatch, key, point):
    """Its owner alone is out. Else it would end every round for all the others, who could only name it."""
    net = make_net(4)
    member = net.parties[3]
    of_low_order(net, monkeypatch, member, key, point)
    result = net.run()

    assert (type(net.blamed[member]), net.blamed[member].culprit) == (BadPayload, member)
    assert result.survivors == net.parties[:3]
    assert not net.errors


def test_one_key_for_two_sites(make_net, world):
    """A colluding member advertises another's key as its own."""
    net = make_net(4)
    member = net.parties[3]
    net.run(until=Phase.SHARE)
    first = Advert.decode(LSA1, net.left[Phase.ADVERTISE][net.parties[0]])
    advert = Advert.sign(
        LSA1,
        world.identity(member),
        certificate=world.certificate(member),
        context=net.context.digest,
        channel=first.channel,
        mask=b"\x06" * 32,
        nonce=bytes(16),
    ).encode(LSA1)
    roll = Roll.decode(LSA1, net.server.share_requests()[net.parties[1]])
    net.exchange(Phase.SHARE, {net.parties[1]: with_advert(roll, 3, advert).encode(LSA1)})

    refused(net, net.parties[1], Equivocation)


# Envelopes


def change_post(net, receiver, change):
    def forge(_, request):
        return change(Post.decode(LSA1, request)).encode(LSA1)

    net.run(on_requests=forged(net, Phase.MASK, forge, [receiver]), until=Phase.CONFIRM)


@pytest.mark.parametrize("part", ["box", "commitments", "signature"])
def test_tampered_envelope(make_net, part):
    net = make_net(4)
    first, second = net.parties[:2]

    def tamper(post):
        value = getattr(post.envelopes[0], part)
        envelope = replace(post.envelopes[0], **{part: bytes([value[0] ^ 1]) + value[1:]})
        return replace(post, envelopes=(envelope, *post.envelopes[1:]))

    change_post(net, first, tamper)

    refused(net, first, BadSignature, second)
    assert first not in net.left[Phase.MASK]


def test_tampered_seed_commitment(make_net):
    net = make_net(4)
    change_post(net, net.parties[0], lambda post: replace(post, seeds=(bytes(32), *post.seeds[1:])))

    refused(net, net.parties[0], BadSignature, net.parties[1])


def test_misrouted_envelope(make_net):
    """The envelope for another site."""
    net = make_net(4)
    first, second, third = net.parties[:3]
    change_post(
        net,
        first,
        lambda post: replace(post, envelopes=(net.post(third, [second]).envelopes[0], *post.envelopes[1:])),
    )

    refused(net, first, BadSignature, second)


def test_envelopes_exchanged(make_net):
    """Each under the other sender's name."""
    net = make_net(4)
    change_post(net, net.parties[0], lambda post: replace(post, envelopes=post.envelopes[::-1]))

    refused(net, net.parties[0], BadSignature, net.parties[1])


def test_envelope_of_its_own_to_a_site(make_net):
    net = make_net(4)
    first = net.parties[0]
    change_post(net, first, lambda post: replace(post, senders=(first, *post.senders[1:])))

    refused(net, first, Equivocation)


def test_envelopes_of_an_earlier_attempt(make_net):
    """Keys are fresh and everything is bound to the roll: what was said in attempt 1 is void in attempt 2."""
    first = make_net(4)
    first.run(until=Phase.MASK)
    second = make_net(4, attempt=2, net={"histories": first.histories})
    second.run(until=Phase.MASK)
    victim = second.parties[0]
    second.exchange(Phase.MASK, {victim: first.post(victim).encode(LSA1)})

    refused(second, victim, BadSignature, second.parties[1])


def test_adverts_of_an_earlier_round(make_net):
    earlier = make_net(4)
    earlier.run()
    net = make_net(4, round=2)
    old = earlier.left[Phase.ADVERTISE][net.parties[1]]
    until_stopped(
        net,
        on_requests=forged(
            net, Phase.SHARE, change_roll(lambda r: with_advert(r, 1, old)), [net.parties[0], net.parties[2]]
        ),
    )

    refused(net, net.parties[0], Equivocation)


# Rounds and attempts


def test_a_released_round_is_over(make_net):
    """An update is in one sum at most: whoever released refuses any further attempt."""
    first = make_net(4)
    first.run()
    again = make_net(4, attempt=2, net={"histories": first.histories})
    until_stopped(again)

    assert {type(error) for error in again.errors.values()} == {BadPhase}
    assert not again.left[Phase.ADVERTISE]


def test_an_attempt_is_not_repeated(make_net):
    """Not even one that came to nothing, nor an earlier one: its keys are gone."""
    later = make_net(4, attempt=2)
    later.run(until=Phase.MASK)
    for attempt in (1, 2):
        again = make_net(4, attempt=attempt, net={"histories": later.histories})
        until_stopped(again)
        assert {type(error) for error in again.errors.values()} == {BadPhase}


def test_attempts_of_one_round_have_one_cohort(make_net, world):
    first = make_net(4)
    first.run(until=Phase.CONFIRM)
    other = make_net(5, attempt=2, net={"histories": first.histories})
    until_stopped(other)

    assert all(isinstance(other.errors[party], Equivocation) for party in first.parties)


def test_no_round_yields_two_sums(make_net):
    """Ten sites, two colluders. Five honest ones and they finish a first attempt among seven; the others
    and they do not make a second.

    A threshold of the seven who came (5) would let them: 5 honest sites have not released, and with two
    colluders they are seven, as many as an attempt needs. The threshold is that of the cohort.
    """
    first = make_net(10, colluders=2)
    away = first.parties[7:]
    result = first.run(drops={Phase.ADVERTISE: away})
    assert len(result.survivors) == 7
    second = make_net(10, colluders=2, attempt=2, net={"histories": first.histories})
    colluders = first.parties[:2]
    for party in colluders:  # They remember nothing.
        second.histories[party].write(replace_attempt(second.histories[party].read(bytes(16), "train", 1)))
    until_stopped(second)

    assert len(second.left[Phase.ADVERTISE]) == len(away) + len(colluders)


def replace_attempt(attempt):
    return Attempt(
        run=attempt.run,
        kind=attempt.kind,
        round=attempt.round,
        cohort=attempt.cohort,
        number=attempt.number,
        released=False,
    )


def test_two_releases_of_too_few_do_not_make_a_sum(make_net):
    """A first attempt in which one release left; the rest finish a second: no sum of the first is opened."""
    first = make_net(10, colluders=3)
    first.run(until=Phase.UNMASK)
    first.exchange(Phase.UNMASK, {first.parties[0]: first.confirmed(first.parties)})
    second = make_net(10, colluders=3, attempt=2, net={"histories": first.histories})
    result = second.run()

    assert first.opened_nothing()
    assert set(result.survivors) == set(first.parties[1:])


def test_replies_of_phases_out_of_order(make_net):
    """Each phase is due once those before it are done; being asked too soon changes nothing."""
    net = make_net(4)
    party = net.parties[0]
    site = net.sites[party]
    calls = {
        Phase.SHARE: lambda: site.share(b"", net.now),
        Phase.MASK: lambda: site.mask(b""),
        Phase.CONFIRM: lambda: site.confirm(b""),
        Phase.UNMASK: lambda: site.unmask(b""),
    }
    for due in list(Phase)[:5]:
        for phase in list(Phase)[list(Phase).index(due) + 1 : 5]:
            with pytest.raises(BadPhase) as early:
                calls[phase]()
            assert (early.value.phase, early.value.culprit) == (phase, SERVER)
        requests = {
            Phase.ADVERTISE: lambda: dict.fromkeys(net.parties, b""),
            Phase.SHARE: net.server.share_requests,
            Phase.MASK: net.server.mask_requests,
            Phase.CONFIRM: net.server.confirm_requests,
            Phase.UNMASK: net.server.unmask_requests,
        }[due]()
        net.exchange(due, requests)

    assert net.server.result().survivors == net.parties


@pytest.mark.parametrize("phase", list(Phase)[1:5])
def test_an_error_ends_the_attempt(make_net, phase):
    """What is malformed is not tried again with something better: every secret of the attempt is gone."""
    net = make_net(4)
    net.run(until=phase)
    party = net.parties[0]
    net.exchange(phase, {party: b"nonsense"})
    refused(net, party, BadPayload)
    site = net.sites[party]

    assert site.phase is Phase.OVER
    assert (site._channel_key, site._mask_key, site._seed, site._shares, site._update) == (
        None,
        None,
        b"",
        {},
        None,
    )
    with pytest.raises(BadPhase):
        net.call(phase, party, b"something else")


def test_secrets_are_gone_after_the_round(make_net):
    net = make_net(4)
    net.run()

    for site in net.sites.values():
        assert site.phase is Phase.OVER
        assert (site._channel_key, site._mask_key, site._seed, site._shares, site._update) == (
            None,
            None,
            b"",
            {},
            None,
        )
        with pytest.raises(BadPhase):
            site.mask(net.asked[Phase.MASK][site.party])


def test_nothing_is_released_that_is_not_on_disk(make_net):
    """The disk is full when the release is to be written: no share leaves, then or later."""

    class Full(Forgetful):
        def write(self, attempt):
            if attempt.released:
                raise OSError("no space left on device")
            super().write(attempt)

    net = make_net(4)
    party = net.parties[0]
    net.sites[party] = net.site(party, history=Full())
    net.run(until=Phase.UNMASK)
    request = net.server.unmask_requests()[party]

    with pytest.raises(OSError, match="no space"):
        net.sites[party].unmask(request)
    with pytest.raises(BadPhase):
        net.sites[party].unmask(request)
    assert not net.sites[party]._shares


def test_release_is_written_before_the_reply_leaves(make_net):
    net = make_net(4)
    net.run()

    for party in net.parties:
        assert net.histories[party].read(bytes(16), "train", 1).released


# Policy


@pytest.mark.parametrize(("n", "colluders", "most"), [(3, 2, 1), (4, 2, 1), (10, 4, 3), (1, 0, -1)])
def test_more_colluders_than_the_threshold_holds_against(world, n, colluders, most):
    """2t > n + n_C and two honest sites in every sum, or no cohort."""
    with pytest.raises(PolicyViolation, match=f"at most {most}"):
        Cohort(parties=world.ids(n), colluders=colluders, min_sites=0)


def test_errors_hold_no_secret(make_net):
    """Neither what is raised nor what may be told to others names a key, a share or a coordinate."""
    net = make_net(4)
    net.run(until=Phase.MASK)
    site = net.sites[net.parties[0]]
    secrets = [site._seed.hex(), site._mask_key.seed.hex(), site._mask_key.public.hex()]
    net.exchange(Phase.MASK, {net.parties[0]: net.post(net.parties[1]).encode(LSA1)})
    error = net.errors[net.parties[0]]

    assert not any(secret in f"{error!r} {error.public}" for secret in secrets)
    assert not isinstance(error, VerificationFailed)
