"""What a site may try, and what a server finds of it: the culprit is named, and the others have their sum."""

import os
from dataclasses import replace

import numpy as np
import pytest

from lepton_fl.secagg import shamir
from lepton_fl.secagg import site as site_module
from lepton_fl.secagg.derivation import words_digest
from lepton_fl.secagg.errors import (
    BadPayload,
    BadPhase,
    BadShare,
    BadSignature,
    Phase,
    SumOutOfRange,
    TooFewParticipants,
)
from lepton_fl.secagg.keys import MaskKey, Suite
from lepton_fl.secagg.messages import (
    Advert,
    Confirm,
    Envelope,
    Header,
    MaskedUpdate,
    Shares,
    Survivors,
    Unmask,
)

LSA1 = Suite.LSA1


def cheat(phase, cheater, change):
    """`on_reply` that changes one site's reply in one phase."""

    def on_reply(now, party, reply):
        return change(reply) if (now, party) == (phase, cheater) else reply

    return on_reply


def sum_without(net, cheater, error, **how):
    """The round of the others, after this site was refused with this error."""
    result = net.run(**how)
    found = net.blamed[cheater]
    assert type(found) is error, repr(found)
    assert found.culprit == cheater
    np.testing.assert_array_equal(result.mean_L, net.expected(result.survivors))
    return result


def dealing(net, monkeypatch, cheater, **patches):
    """While this site shares, functions of its module are others."""
    share = net.sites[cheater].share

    def cheating(*arguments):
        with monkeypatch.context() as patched:
            for name, value in patches.items():
                patched.setattr(site_module, name, value)
            return share(*arguments)

    net.sites[cheater].share = cheating


# Malformed replies


@pytest.mark.parametrize("phase", [Phase.ADVERTISE, Phase.SHARE, Phase.CONFIRM, Phase.UNMASK])
@pytest.mark.parametrize(
    "change", [lambda b: b[:-1], lambda b: b + b"\x00", lambda _: b"", lambda _: os.urandom(300)]
)
def test_malformed_reply(make_net, phase, change):
    net = make_net(4)
    result = sum_without(net, net.parties[1], BadPayload, on_reply=cheat(phase, net.parties[1], change))

    assert (net.parties[1] in result.survivors) is (phase in {Phase.CONFIRM, Phase.UNMASK})


def test_malformed_header(make_net):
    net = make_net(4)
    change = lambda masked: MaskedUpdate(masked.header[:-1], masked.words)

    sum_without(net, net.parties[1], BadPayload, on_reply=cheat(Phase.MASK, net.parties[1], change))


def test_message_of_the_other_suite(make_net):
    """Well formed, but of LSA1-PQ."""
    net = make_net(4)
    change = lambda reply: Confirm.decode(LSA1, reply).encode(Suite.LSA1_PQ)

    sum_without(net, net.parties[1], BadPayload, on_reply=cheat(Phase.CONFIRM, net.parties[1], change))


def test_message_of_another_kind(make_net):
    """A confirmation where the shares are due."""
    net = make_net(4)
    change = lambda _: net.left[Phase.CONFIRM][net.parties[1]]

    sum_without(net, net.parties[1], BadPayload, on_reply=cheat(Phase.UNMASK, net.parties[1], change))


# Adverts


def test_advert_in_anothers_name(make_net):
    net = make_net(4)
    first, second = net.parties[:2]
    advert = net.sites[first].advertise()
    change = lambda _: advert
    with pytest.raises(TooFewParticipants):
        net.run(drops={Phase.ADVERTISE: [first]}, on_reply=cheat(Phase.ADVERTISE, second, change))

    assert type(net.blamed[second]) is BadPayload
    assert net.blamed[second].culprit == second


def test_advert_of_a_member_that_is_not_called(make_net, world):
    """On the roster and validly signed, but of no site of this cohort."""
    net = make_net(4)
    guest = 9001
    everybody = world.consortium((*net.parties, guest))
    server = type(net.server)(net.context, everybody)
    first = Advert.decode(LSA1, net.sites[net.parties[0]].advertise())
    advert = Advert.sign(
        LSA1,
        world.identity(guest),
        certificate=world.certificate(guest),
        context=first.context,
        channel=first.channel,
        mask=first.mask,
        nonce=first.nonce,
    )

    with pytest.raises(BadPayload, match="of none of the cohort"):
        server.advertised(guest, advert.encode(LSA1), net.now)


def test_advert_not_signed(make_net):
    net = make_net(4)
    change = lambda reply: replace(Advert.decode(LSA1, reply), nonce=bytes(16)).encode(LSA1)

    sum_without(net, net.parties[1], BadSignature, on_reply=cheat(Phase.ADVERTISE, net.parties[1], change))


def test_advert_with_anothers_key(make_net, world):
    net = make_net(4)
    cheater = net.parties[1]

    def change(reply):
        fields = Advert.decode(LSA1, reply)
        first = Advert.decode(LSA1, net.left[Phase.ADVERTISE][net.parties[0]])
        return Advert.sign(
            LSA1,
            world.identity(cheater),
            certificate=fields.certificate,
            context=fields.context,
            channel=first.channel,
            mask=fields.mask,
            nonce=fields.nonce,
        ).encode(LSA1)

    sum_without(net, cheater, BadPayload, on_reply=cheat(Phase.ADVERTISE, cheater, change))


def test_second_advert(make_net):
    """Another one, validly signed, after the first: the first stands."""
    net = make_net(4)
    cheater = net.parties[1]
    other = net.site(cheater, history=type(net.histories[cheater])()).advertise()
    net.run(until=Phase.SHARE)

    with pytest.raises(BadPhase):
        net.server.advertised(cheater, other, net.now)


# Shares


def test_missing_envelope(make_net):
    net = make_net(4)

    def change(reply):
        shares = Shares.decode(LSA1, reply)
        return replace(shares, envelopes=shares.envelopes[:-1]).encode(LSA1)

    sum_without(net, net.parties[1], BadPayload, on_reply=cheat(Phase.SHARE, net.parties[1], change))


def test_envelope_without_shares_for_a_holder(make_net, world):
    """Validly signed and well formed: the holder would be left without."""
    net = make_net(4)
    cheater, holder = net.parties[1], net.parties[0]
    site = net.sites[cheater]

    def change(reply):
        shares = Shares.decode(LSA1, reply)
        empty = Envelope.sign(
            LSA1,
            world.identity(cheater),
            site._r1,
            (cheater, holder),
            shares.seed,
            box=bytes(16),
            commitments=b"",
            channel_offer=b"",
            mask_offer=b"",
        )
        return replace(shares, envelopes=(empty, *shares.envelopes[1:])).encode(LSA1)

    result = sum_without(net, cheater, BadPayload, on_reply=cheat(Phase.SHARE, cheater, change))

    assert cheater not in result.survivors


def test_envelopes_in_another_order(make_net):
    net = make_net(4)

    def change(reply):
        shares = Shares.decode(LSA1, reply)
        return replace(shares, envelopes=shares.envelopes[::-1]).encode(LSA1)

    sum_without(net, net.parties[1], BadSignature, on_reply=cheat(Phase.SHARE, net.parties[1], change))


def test_share_that_is_not_the_one_committed_to(make_net, monkeypatch):
    """To one holder: it says so, the round goes on, and the sum has the dealer in it."""
    net = make_net(4)
    cheater, victim = net.parties[1], net.parties[2]
    true = site_module.share_commitments

    def lie(suite, r1, dealer, holder, share):
        return os.urandom(64) if holder == victim else true(suite, r1, dealer, holder, share)

    dealing(net, monkeypatch, cheater, share_commitments=lie)
    result = net.run()

    assert result.accused == {cheater: (victim,)}
    np.testing.assert_array_equal(result.mean_L, net.expected(net.parties))


def test_shares_that_nobody_can_use(make_net, monkeypatch):
    """To all holders: its secret cannot be rebuilt, and it is named."""
    net = make_net(4)
    cheater = net.parties[1]
    dealing(net, monkeypatch, cheater, share_commitments=lambda *_: os.urandom(64))

    with pytest.raises(BadShare, match="3 holders found theirs bad") as found:
        net.run()
    assert found.value.culprit == cheater


class Garbled:
    """Shares of no polynomial."""

    @staticmethod
    def deal(secret, *, threshold, xs, random):
        return [os.urandom(len(secret)) for _ in xs]

    reconstruct = staticmethod(shamir.reconstruct)


class OtherKey:
    """Shares of another mask key than the one advertised, and of the right seed."""

    @staticmethod
    def deal(secret, **arguments):
        return shamir.deal(secret[:32] + os.urandom(32), **arguments)


def test_inconsistent_polynomial(make_net, monkeypatch):
    """Every share is as committed, and together they are another secret than committed."""
    net = make_net(4)
    cheater = net.parties[1]
    dealing(net, monkeypatch, cheater, shamir=Garbled)

    with pytest.raises(BadShare, match="rebuild another secret") as found:
        net.run()
    assert found.value.culprit == cheater


def test_shares_of_another_mask_key(make_net, monkeypatch):
    """Found when the dealer drops out and its masks have to be removed; otherwise nothing is lost."""
    net = make_net(4)
    cheater = net.parties[1]
    dealing(net, monkeypatch, cheater, shamir=OtherKey)
    with pytest.raises(BadShare, match="rebuild another secret") as found:
        net.run(drops={Phase.MASK: [cheater]})
    assert found.value.culprit == cheater

    there = make_net(4)
    dealing(there, monkeypatch, cheater, shamir=OtherKey)
    np.testing.assert_array_equal(there.run().mean_L, there.expected(there.parties))


def test_useless_offer_of_the_post_quantum_suite(make_net):
    """An offer that opens nothing, validly signed: the receiver cannot mask with the sender, and names it."""
    net = make_net(4, suite=Suite.LSA1_PQ)
    cheater = net.parties[0]
    site = net.sites[cheater]

    class Liar(MaskKey):
        def offer(self, *arguments):
            return os.urandom(len(super().offer(*arguments)))

    net.exchange(Phase.ADVERTISE, dict.fromkeys(net.parties, b""))
    site._mask_key = Liar(site._mask_key.seed, Suite.LSA1_PQ)
    net.exchange(Phase.SHARE, net.server.share_requests())
    net.exchange(Phase.MASK, net.server.mask_requests())

    for party in net.parties[1:]:
        assert type(net.errors[party]) is BadPayload
        assert net.errors[party].culprit == cheater


# Uploads


def altered(masked):
    words = masked.words.copy()
    words[7] ^= 1
    return MaskedUpdate(masked.header, words)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (altered, BadPayload),
        (lambda m: MaskedUpdate(m.header, m.words[:-1]), BadPayload),
        (lambda m: MaskedUpdate(m.header, np.append(m.words, m.words[:1])), BadPayload),
        (lambda m: MaskedUpdate(m.header, m.words.view(np.int32)), BadPayload),
        (lambda m: MaskedUpdate(m.header, m.words.astype(np.float32)), BadPayload),
        (lambda m: MaskedUpdate(m.header, m.words.reshape(2, -1)), BadPayload),
        (lambda m: MaskedUpdate(m.header, m.words.astype(">u4")), BadPayload),
        (
            lambda m: MaskedUpdate(
                replace(Header.decode(LSA1, m.header), signature=bytes(64)).encode(LSA1), m.words
            ),
            BadSignature,
        ),
    ],
    ids=["a bit", "too short", "too long", "int32", "float32", "two-dimensional", "big-endian", "unsigned"],
)
def test_bad_upload(make_net, change, error):
    """Refused as it comes; the others are not touched by it."""
    net = make_net(4)
    cheater = net.parties[1]
    result = sum_without(net, cheater, error, on_reply=cheat(Phase.MASK, cheater, change))

    assert cheater not in result.survivors


def test_second_upload(make_net, world):
    """Another one, validly signed, is not added."""
    net = make_net(4)
    net.run(until=Phase.CONFIRM)
    cheater = net.parties[1]
    words = np.zeros(net.context.words, np.uint32)
    header = Header.sign(
        LSA1,
        world.identity(cheater),
        net.sites[cheater]._r1,
        cheater,
        len(words),
        digest=words_digest(words),
        bad=(),
    ).encode(LSA1)

    with pytest.raises(BadPhase):
        net.server.masked(cheater, header, words)


def test_upload_without_shares(make_net, world):
    """Of a site that was left out of the second phase: nobody masked with it."""
    net = make_net(4)
    late = net.parties[3]
    net.run(drops={Phase.SHARE: [late]}, until=Phase.MASK)
    net.exchange(Phase.MASK, net.server.mask_requests())
    words = np.zeros(net.context.words, np.uint32)
    r1 = net.sites[net.parties[0]]._r1
    header = Header.sign(LSA1, world.identity(late), r1, late, len(words), digest=words_digest(words), bad=())

    with pytest.raises(BadPhase, match="without shares"):
        net.server.masked(late, header.encode(LSA1), words)


def test_upload_that_is_no_update(make_net, world):
    """Random words, validly signed: the sum is refused. Who it was cannot be told, since all are hidden."""
    net = make_net(4)
    cheater = net.parties[1]

    def change(masked):
        words = np.frombuffer(os.urandom(4 * net.context.words), np.uint32)
        header = Header.sign(
            LSA1,
            world.identity(cheater),
            net.sites[cheater]._r1,
            cheater,
            len(words),
            digest=words_digest(words),
            bad=(),
        )
        return MaskedUpdate(header.encode(LSA1), words)

    with pytest.raises(SumOutOfRange) as found:
        net.run(on_reply=cheat(Phase.MASK, cheater, change))
    assert found.value.culprit is None


def test_accusing_who_sent_nothing(make_net, world):
    net = make_net(4)
    cheater = net.parties[1]

    def change(masked):
        header = Header.decode(LSA1, masked.header)
        forged = Header.sign(
            LSA1,
            world.identity(cheater),
            net.sites[cheater]._r1,
            cheater,
            net.context.words,
            digest=header.digest,
            bad=(cheater,),
        )
        return MaskedUpdate(forged.encode(LSA1), masked.words)

    result = sum_without(net, cheater, BadPayload, on_reply=cheat(Phase.MASK, cheater, change))
    assert cheater not in result.survivors


# Confirmations and shares


def test_confirmation_of_other_survivors(make_net, world):
    net = make_net(4)
    cheater = net.parties[1]
    site = net.sites[cheater]
    change = lambda _: Confirm.sign(
        LSA1, world.identity(cheater), site._r1, Survivors(net.parties[1:])
    ).encode(LSA1)

    sum_without(net, cheater, BadSignature, on_reply=cheat(Phase.CONFIRM, cheater, change))


def unmask_of(net, world, cheater, change):
    def forged(reply):
        site = net.sites[cheater]
        shares = change(list(Unmask.decode(LSA1, reply).shares))
        return Unmask.sign(LSA1, world.identity(cheater), site._r1, cheater, site._survivors, shares).encode(
            LSA1
        )

    return cheat(Phase.UNMASK, cheater, forged)


def test_wrong_share(make_net, world):
    """Of one dealer: named, ignored, and there are enough others."""
    net = make_net(4)
    cheater = net.parties[1]
    change = lambda shares: [os.urandom(32), *shares[1:]]

    result = sum_without(net, cheater, BadShare, on_reply=unmask_of(net, world, cheater, change))
    assert result.survivors == net.parties


def test_share_of_the_wrong_kind(make_net, world):
    """Of the mask key where that of the seed is due: it is not what its dealer committed to for this."""
    net = make_net(4)
    cheater, dealer = net.parties[1], net.parties[2]
    kept = {}

    def remember(phase, party, reply):
        if (phase, party) == (Phase.CONFIRM, cheater):
            kept.update(net.sites[cheater]._shares)
        return unmask_of(net, world, cheater, swap)(phase, party, reply)

    def swap(shares):
        place = net.parties.index(dealer)
        return [*shares[:place], kept[dealer][32:], *shares[place + 1 :]]

    sum_without(net, cheater, BadShare, on_reply=remember)


def test_wrong_shares_of_more_than_may_fail(make_net, world):
    """Two liars of four: both are named, and no sum is made."""
    net = make_net(4)
    liars = net.parties[1:3]

    def lie(phase, party, reply):
        change = lambda shares: [os.urandom(32) for _ in shares]
        return unmask_of(net, world, party, change)(phase, party, reply) if party in liars else reply

    with pytest.raises(TooFewParticipants):
        net.run(on_reply=lie)
    assert {party: type(error) for party, error in net.blamed.items()} == dict.fromkeys(liars, BadShare)


def test_share_too_few(make_net, world):
    net = make_net(4)
    cheater = net.parties[1]

    sum_without(net, cheater, BadPayload, on_reply=unmask_of(net, world, cheater, lambda shares: shares[1:]))


def test_shares_not_signed(make_net):
    net = make_net(4)
    change = lambda reply: replace(Unmask.decode(LSA1, reply), signature=bytes(64)).encode(LSA1)

    sum_without(net, net.parties[1], BadSignature, on_reply=cheat(Phase.UNMASK, net.parties[1], change))


def test_reply_in_a_phase_that_is_over(make_net):
    """A vector that comes when the survivors are fixed is not in the sum."""
    net = make_net(4)
    late = net.parties[3]
    held = {}

    def hold(phase, party, reply):
        if (phase, party) == (Phase.MASK, late):
            held[party] = reply
            return None
        return reply

    net.run(on_reply=hold, until=Phase.UNMASK)
    with pytest.raises(BadPhase):
        net.receive(Phase.MASK, late, held[late])
    net.exchange(Phase.UNMASK, net.server.unmask_requests())

    np.testing.assert_array_equal(net.server.result().mean_L, net.expected(net.parties[:3]))


def test_reply_of_a_stranger(make_net):
    """Of a party without an advert."""
    net = make_net(4)
    net.run(until=Phase.SHARE)
    net.server.share_requests()

    with pytest.raises(BadPhase, match="without an advert"):
        net.server.shared(9001, b"")
