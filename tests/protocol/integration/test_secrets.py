"""What leaves the sites of a round, and what is left at them after it."""

import itertools
import os
from dataclasses import replace

import numpy as np
import pytest

from lepton_fl.messages import ARRAYS, PHASES, SECAGG, TRAIN, from_record
from lepton_fl.secagg.errors import Phase
from lepton_fl.secagg.keys import ChannelKey, MaskKey
from lepton_fl.secagg.messages import NONCE_BYTES
from lepton_fl.secagg.session_site import SessionRound
from lepton_fl.secagg.site import SiteRound
from lepton_fl.training import train_locally

VICTIM = 102
WIDE = {"model": {"name": "mlp", "hidden": [64, 64]}}
"""A model of some 4,000 parameters, so that a test of uniformity has something to count."""


def uniform(words):
    """Chi-square of the bytes against the uniform distribution, two-sided: the probability to fail is 1e-8.

    255 degrees of freedom: mean 255, deviation 22.6. Skewed to the right, hence eight deviations there.
    """
    counts = np.bincount(np.ascontiguousarray(words, "<u4").view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    return 255 - 6 * 22.6 < chi_square < 255 + 8 * 22.6


def masked(world):
    """The vectors that left, by party, in order of sending."""
    found = {}
    for passed in world.wire.tape:
        if passed.kind == PHASES[Phase.MASK] and passed.reply is not None:
            words = from_record(passed.reply.content.array_records[ARRAYS])["words"]
            found.setdefault(passed.party, []).append(words)
    return found


def test_the_test_of_uniformity_fails_for_updates(make_world):
    """Or it would show nothing below: clear updates, and the sum of them, are far from uniform."""
    world = make_world(**WIDE)
    world.train()
    words = list(world.plain.popitem()[1].values())

    assert len(words[0]) > 4000
    assert not any(uniform(w) for w in words)
    assert not uniform(sum(words))


def test_what_leaves_is_uniform_and_says_nothing_linear(make_world):
    """Masked vectors, what hides in them, and all their sums and differences but the one that is opened."""
    world = make_world(**WIDE)
    world.train()
    masks, (plain,) = masked(world), world.plain.values()
    vectors = {party: words[0] for party, words in masks.items()}
    assert list(vectors) == world.parties

    for party, words in vectors.items():
        assert uniform(words)
        # The mask itself; and the update taken out once too often.
        assert uniform(words - plain[party])
        assert uniform(words + plain[party])
    for size in range(2, len(vectors) + 1):
        for chosen in itertools.combinations(vectors, size):
            # All of them together too: each has its own mask beside those of the pairs.
            assert uniform(sum(vectors[party] for party in chosen))
    for one, other in itertools.combinations(vectors.values(), 2):
        assert uniform(one - other)


def test_the_same_update_in_two_attempts_is_masked_afresh(make_world):
    """Neither vector, nor their difference, in which the update itself would cancel."""
    world = make_world(3, **WIDE)
    gone = []

    def between(message, call):
        kind, party = message.metadata.message_type, message.metadata.dst_node_id
        reply = call(message)
        if kind == PHASES[Phase.MASK] and party == 103 and not gone:
            gone.append(party)
            return None
        return reply

    world.is_sum(world.train(between=between), world.parties)
    first, second = masked(world)[VICTIM]

    assert uniform(first)
    assert uniform(second)
    assert uniform(first - second)


def test_equal_updates_of_two_sites_look_unrelated(make_world, monkeypatch):
    """The same words at every site: no pair of vectors shows it."""
    world = make_world(**WIDE)
    monkeypatch.setattr(
        "lepton_fl.site.mods.encoded",
        lambda update_L, *_: np.full(len(update_L), 7, np.uint32),
    )
    world.train()

    for one, other in itertools.combinations([words[0] for words in masked(world).values()], 2):
        assert uniform(one - other)


def test_nothing_but_masked_words_leaves_as_an_array(make_world):
    """Every message of a site: one record, arrays in the masked reply alone; no clear word in any byte."""
    world = make_world(**WIDE)
    world.train()
    (plain,) = world.plain.values()

    for passed in world.wire.tape:
        content = passed.reply.content
        arrays = {ARRAYS} if passed.kind == PHASES[Phase.MASK] else set()
        assert set(content) == {SECAGG} | arrays
        assert set(content.config_records[SECAGG]) == {"body"}
        sent = passed.body + b"".join(a.data for r in content.array_records.values() for a in r.values())
        words = plain[passed.party].tobytes()
        # Any eight bytes of the update, wherever they would begin.
        assert not any(words[at : at + 8] in sent for at in range(0, len(words) - 8, 4))


def test_length_does_not_depend_on_the_update(make_world, monkeypatch):
    """Zeros and large numbers, from sites alike: the same messages, byte for byte as long."""
    lengths = []
    for factor in np.float32([0.0, 1.0, 1e6]):

        def scaled(*arguments, factor=factor):
            update = train_locally(*arguments)
            return replace(update, delta={name: array * factor for name, array in update.delta.items()})

        monkeypatch.setattr("lepton_fl.site.site.train_locally", scaled)
        world = make_world()
        world.train()
        lengths.append([(p.kind, p.party, len(p.body)) for p in world.wire.tape])

    assert lengths[0] == lengths[1] == lengths[2]


# What is left


def inverted(data):
    return bytes(byte ^ 255 for byte in data)


class Draws:
    """The operating system's bytes, and a note of them in which they are not found themselves."""

    def __init__(self):
        self.noted = set()

    def __call__(self, size):
        drawn = os.urandom(size)
        # A nonce is sent in clear.
        if size != NONCE_BYTES:
            self.noted.add(inverted(drawn))
        return drawn


def held(world, walk, draws, party=VICTIM):
    """(secrets, clear words) that can be reached from a site's app."""
    # The spy at the site's door is the test's own.
    plain = {key: dict(words) for key, words in world.plain.items()}
    world.plain.clear()
    found = walk(world.apps[party])
    world.plain.update(plain)
    drawn = [inverted(noted) for noted in draws.noted]
    clear = [words[party] for words in plain.values() if party in words]
    secrets = sum(isinstance(f, bytes) and any(secret in f for secret in drawn) for f in found)
    secrets += sum(isinstance(f, ChannelKey | MaskKey) for f in found)
    secrets += sum(isinstance(f, SiteRound | SessionRound) and bool(f._shares) for f in found)
    arrays = [f for f in found if isinstance(f, np.ndarray)]
    words = sum(np.array_equal(array.ravel(), words) for array in arrays for words in clear)
    return secrets, words


def watched(world, party=VICTIM):
    draws = Draws()
    world.sites[party].aggregation._random["random"] = draws
    return draws


@pytest.mark.parametrize("phase", [Phase.SHARE, Phase.MASK])
def test_secrets_are_found_while_they_are_needed(world, walk, phase):
    """Or the tests below would show nothing."""
    draws, found = watched(world), []

    def between(message, call):
        if (message.metadata.message_type, message.metadata.dst_node_id) == (PHASES[phase], VICTIM):
            found.append(held(world, walk, draws))
        return call(message)

    world.train(between=between)

    ((secrets, words),) = found
    assert secrets > 0
    assert words > 0


def test_nothing_is_left_after_the_release(world, walk):
    """Neither a key, a seed, a share nor the update in clear; nor a view that keeps it."""
    draws = watched(world)
    world.is_sum(world.train(), world.parties)

    assert draws.noted
    assert held(world, walk, draws) == (0, 0)


@pytest.mark.parametrize("phase", [Phase.SHARE, Phase.MASK, Phase.CONFIRM, Phase.UNMASK])
def test_no_secret_is_left_after_a_refusal(world, walk, phase):
    """Of an attempt that failed; the update stays for another attempt, and goes with the next round."""
    draws = watched(world)

    def between(message, call):
        if (message.metadata.message_type, message.metadata.dst_node_id) == (PHASES[phase], VICTIM):
            return call(world.later(VICTIM, phase, b"nonsense"))
        return call(message)

    world.train(between=between)
    assert held(world, walk, draws)[0] == 0

    world.train(2)
    assert held(world, walk, draws) == (0, 0)


def test_a_round_that_is_never_finished_goes_with_the_next(world, walk):
    draws = watched(world)
    world.train(between=lambda m, call: call(m) if m.metadata.message_type == TRAIN else None)
    assert min(held(world, walk, draws)) > 0

    world.train(2)
    assert held(world, walk, draws) == (0, 0)


def test_every_round_draws_afresh(make_world):
    """What is taken from a site that is broken into later opens no round before or after."""
    world = make_world(secure_aggregation={"sessions": False})
    draws = watched(world)
    world.train()
    first = set(draws.noted)
    world.train(2)

    assert len(draws.noted) == 2 * len(first)


def test_nothing_is_left_after_a_step_of_a_session(world, walk):
    """Nor are the keys from which the step's were made: what is left opens steps to come, and none before."""
    world.train()
    draws, found = watched(world), []
    (opened,) = world.sites[VICTIM].aggregation._open.values()
    chain = {inverted(key) for key in opened.session._chains.values()}
    assert chain

    def between(message, call):
        if (message.metadata.message_type, message.metadata.dst_node_id) == (PHASES[Phase.MASK], VICTIM):
            found.append(held(world, walk, draws))
        return call(message)

    del opened
    world.train(2, between=between)
    assert min(found[0]) > 0
    assert held(world, walk, draws) == (0, 0)
    draws.noted = chain
    assert held(world, walk, draws) == (0, 0)


def test_a_step_that_is_refused_leaves_no_session(world, walk):
    """Its keys are gone at once, those of the chain as well."""
    world.train()
    (opened,) = world.sites[VICTIM].aggregation._open.values()
    session = opened.session

    def between(message, call):
        if (message.metadata.message_type, message.metadata.dst_node_id) == (PHASES[Phase.MASK], VICTIM):
            return call(world.later(VICTIM, Phase.MASK, b"nonsense", number=2))
        return call(message)

    world.train(2, between=between)
    assert session._chains == {}
