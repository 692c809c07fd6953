"""What breaks Flower's SecAgg+ does not break this protocol: one test for each published weakness."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from lepton_fl.errors import BadReply
from lepton_fl.messages import CONFIG, PHASES, SECAGG, TRAIN
from lepton_fl.secagg.errors import BadSignature, Phase
from lepton_fl.secagg.fixedpoint import Quantiser
from lepton_fl.secagg.identity import IdentityKey
from lepton_fl.secagg.keys import Suite
from lepton_fl.secagg.masks import keystream
from lepton_fl.secagg.messages import Advert, Confirm, Confirmed, Roll, Survivors, advert_digest

LSA1 = Suite.LSA1
VICTIM = 104


def body_of(message):
    return message.content.config_records[SECAGG]["body"]


def test_a_mask_has_all_256_bits_of_its_key():
    """Flower folds a seed to 32 bits of Mersenne Twister: seeds that fold alike have the same mask there.

    A search of 2^28 of them opened clients in seconds (flwrlabs/flower#7522).
    """
    one = bytes(range(32))
    alike = one[4:] + one[:4]
    flowers = [pseudo_rand_gen(seed, 1 << 32, [(50,)])[0] for seed in (one, alike)]
    np.testing.assert_array_equal(*flowers)

    masks = {keystream(one, start=0, count=50).tobytes(), keystream(alike, start=0, count=50).tobytes()}
    for bit in range(256):
        key = bytearray(one)
        key[bit // 8] ^= 1 << bit % 8
        masks.add(keystream(bytes(key), start=0, count=50).tobytes())
    assert len(masks) == 258


def test_a_site_both_alive_and_dead_opens_nothing(world):
    """Flower's clients hand out the shares of both its masks: every update is opened, without any error."""
    living, dead = Survivors((101, 102, 103, VICTIM)), Survivors((101, 102, 103))
    told = {101: living, VICTIM: living, 102: dead, 103: dead}
    signed = {}

    def between(message, call):
        kind, party = message.metadata.message_type, message.metadata.dst_node_id
        if kind == PHASES[Phase.CONFIRM]:
            signed[party] = call(world.later(party, Phase.CONFIRM, told[party].encode(LSA1)))
            return None
        return call(message) if kind != PHASES[Phase.ADVERTISE] else None

    assert world.sum_of(world.train(between=between)) is None
    confirms = {party: Confirm.decode(LSA1, body_of(reply)) for party, reply in signed.items()}
    for party in world.parties:
        witnesses = [p for p in world.parties if p in told[party].parties]
        confirmed = Confirmed(parties=tuple(witnesses), confirms=tuple(confirms[p] for p in witnesses))
        reply = world.ask(world.later(party, Phase.UNMASK, confirmed.encode(LSA1)))
        assert reply.error.reason == "BadSignature in unmask, by the server"
        assert isinstance(world.errors(party)[-1], BadSignature)
        assert not world.released(party)


@pytest.mark.parametrize("signer", ["nobody", "the server", "another site"])
def test_keys_of_the_servers_own(world, signer):
    """Flower's keys are not signed: a server that exchanges them reads all that is sealed with them."""
    found = {}

    def between(message, call):
        kind, party = message.metadata.message_type, message.metadata.dst_node_id
        if (kind, party) == (PHASES[Phase.SHARE], 101):
            roll = Roll.decode(LSA1, body_of(message))
            advert = Advert.decode(LSA1, roll.adverts[3])
            fields = {
                "certificate": advert.certificate,
                "context": advert.context,
                "channel": b"\x05" * 32,
                "mask": b"\x06" * 32,
                "nonce": advert.nonce,
            }
            forged = {
                "nobody": replace(advert, channel=fields["channel"], mask=fields["mask"]),
                "the server": Advert.sign(LSA1, IdentityKey.generate(), **fields),
                "another site": Advert.sign(LSA1, world.members["bravo"].identity, **fields),
            }[signer].encode(LSA1)
            lie = replace(
                roll,
                adverts=(*roll.adverts[:3], forged),
                digests=(*roll.digests[:3], advert_digest(LSA1, forged)),
            )
            found["reply"] = call(world.later(101, Phase.SHARE, lie.encode(LSA1)))
            return None
        return call(message)

    replies = world.train(between=between)

    assert found["reply"].error.reason == f"BadSignature in share, by party {VICTIM}"
    world.is_sum(replies, [102, 103, VICTIM])


def test_a_server_picks_no_parameter(make_world):
    """Flower's server sends threshold, modulus, clip and weights. Here the study fixes them."""
    picked = {
        "threshold": 1,
        "share_num": 2,
        "mod_range": 2,
        "clipping_range": 1e9,
        "target_range": 1 << 30,
        "max_weight": 1.0,
        "bits": 2,
        "degree": 1,
        "min_sites": 1,
        "colluders": 0,
    }
    plain, asked = make_world(), make_world()
    plain.train()

    def between(message, call):
        message.content.config_records[CONFIG].update(picked)
        secagg = dict(message.content.config_records[SECAGG])
        message.content[SECAGG] = ConfigRecord({**secagg, **picked})
        return call(message)

    asked.is_sum(asked.train(between=between), asked.parties)

    (one,), (other,) = plain.contexts.values(), asked.contexts.values()
    assert one.digest == other.digest


@pytest.mark.parametrize("phase", [Phase.ADVERTISE, Phase.SHARE])
def test_a_dropout_in_set_up_does_not_lose_the_round(world, phase):
    """In Flower it does."""
    kind = TRAIN if phase is Phase.ADVERTISE else PHASES[phase]

    def between(message, call):
        found = message.metadata.message_type, message.metadata.dst_node_id
        return None if found == (kind, VICTIM) else call(message)

    world.is_sum(world.train(between=between), [101, 102, 103])


def test_no_count_and_no_metric_in_clear(world):
    """Flower's clients send metrics and num_examples beside the masked vector."""
    world.train()

    for passed in world.wire.tape:
        content = passed.reply.content
        assert not content.metric_records
        assert {key: list(record) for key, record in content.config_records.items()} == {SECAGG: ["body"]}


@pytest.mark.parametrize("weight", [0, -1, 11, 2**70, 1.5, float("nan")])
def test_a_weight_that_does_not_fit_is_refused(weight):
    """Flower cuts it to max_weight and logs a warning: the mean is another one than was asked for."""
    quantiser = Quantiser(clip=1.0, bits=20, max_n=4, max_weight=10)

    with pytest.raises(BadReply, match="a whole number, 1 to 10"):
        quantiser.encode(np.zeros(3, np.float32), weight=weight, rounding_key=bytes(32))


def test_rounds_of_a_study_have_no_weights(world):
    """A count would be a release: each site's weight is the public constant 1."""
    world.train()

    (context,) = world.contexts.values()
    assert not context.weighted
