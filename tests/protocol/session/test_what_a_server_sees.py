"""What a server sees of a session: words like any others, in each step afresh; and keys of either suite."""

import hashlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
from reference import primitives as p
from reference import sessions

from lepton_fl.secagg.errors import Phase
from lepton_fl.secagg.exchanges import EncodedUpdate
from lepton_fl.secagg.keys import Suite
from lepton_fl.secagg.messages import Roll, Shares
from lepton_fl.secagg.session_site import SessionRound

WORDS = 20_000
BINS = 256
# Chi-square with 255 degrees of freedom: 1e-6 on either side.
LOW, HIGH = 161.65, 377.08


def chi_square(words):
    """Of the top bytes, and of the bottom ones, against uniform."""
    return [
        float(((np.bincount(part, minlength=BINS) - len(words) / BINS) ** 2).sum() / (len(words) / BINS))
        for part in (words >> 24, words & 255)
    ]


def seeded(seed):
    return np.random.default_rng(seed).bytes


@pytest.fixture
def uploads(make_run):
    """What each of three sites sends in four steps, with the same update of zeros each time; fixed draws."""
    run = make_run(3, min_sites=0, coordinates=WORDS)
    # The chains of a file would do as well: what counts is that they do not change from run to run.
    for low, high in itertools.combinations(run.first.parties, 2):
        root = seeded(low * high)(32)
        run.sessions[low]._chains[high] = run.sessions[high]._chains[low] = root
    for session in run.sessions.values():
        session.id = run.id = bytes(32)
    steps = []
    for step in range(4):
        attempt = run.attempt(words=dict.fromkeys(run.first.parties, np.zeros(WORDS, np.uint32)))
        for party, site in attempt.sites.items():
            site._random = seeded(1000 * step + party)
        attempt.run()
        steps.append({party: masked.words for party, masked in attempt.left[Phase.MASK].items()})
    return steps


def test_what_is_uploaded_is_uniform(uploads):
    """A site's words in each step, and the differences between steps: neither too uneven nor too even."""
    for step in uploads:
        for words in step.values():
            assert all(LOW < found < HIGH for found in chi_square(words))
    for one, two in itertools.combinations(uploads, 2):
        for party in one:
            assert all(LOW < found < HIGH for found in chi_square(one[party] - two[party]))


def test_the_test_rejects_what_is_not_uniform():
    """Words of 31 bits, words with one bit stuck one time in eight, and a counter, which is too even."""
    words = np.random.default_rng(3).integers(0, 2**32, WORDS, np.uint32)
    stuck = words | (np.arange(WORDS) % 8 == 0).astype(np.uint32)

    assert chi_square(words >> 1)[0] > HIGH
    assert chi_square(stuck)[1] > HIGH
    assert chi_square(np.arange(WORDS // BINS * BINS, dtype=np.uint32) * np.uint32(2**24 + 1))[1] < LOW


def test_no_two_masks_are_alike(uploads):
    """Of any two vectors, of one site or of two, the words agree as seldom as words at random."""
    vectors = [words for step in uploads for words in step.values()]
    for one, two in itertools.combinations(vectors, 2):
        for other in (two, np.uint32(0) - two):
            # 20,000 / 2^32 are expected.
            assert (one == other).sum() <= 1


def test_sums_of_fewer_sites_are_uniform(uploads):
    """Pair masks alone would cancel over all sites, or over two steps; self masks do not let them."""
    for step in uploads:
        for some in itertools.chain(itertools.combinations(step, 2), [tuple(step)]):
            total = sum((step[party] for party in some), np.zeros(WORDS, np.uint32))
            assert all(LOW < found < HIGH for found in chi_square(total))


def test_a_session_of_the_post_quantum_suite_is_that_of_plain_integers(make_net):
    """Roots from seeds and what was sent, by the other implementation; and the adverts of a step."""
    suite = Suite.LSA1_PQ
    net = make_net(3, suite=suite, min_sites=0, coordinates=3)
    drawn = {party: [] for party in net.parties}

    def recording(party):
        source = seeded(party)

        def random(size):
            drawn[party].append(source(size))
            return drawn[party][-1]

        return random

    net.sites = {q: net.site(q, sessions=True, random=recording(q)) for q in net.parties}
    net.run()
    roll = Roll.decode(suite, next(iter(net.asked[Phase.SHARE].values())))
    r1 = sessions.sha(
        suite.value, "r1", net.context.digest, sessions.packed(net.parties), b"".join(roll.digests)
    )
    keys = {q: p.hybrid_keys(drawn[q][0], "channel") for q in net.parties}

    def channel(sender, receiver):
        """What the sender encapsulated to the receiver, as the receiver finds it."""
        shares = Shares.decode(suite, net.left[Phase.SHARE][sender])
        others = [q for q in net.parties if q != sender]
        offer = shares.envelopes[others.index(receiver)].channel_offer
        scalar, _, dk, _ = keys[receiver]
        shared = p.x25519(scalar, keys[sender][3][:32])
        return shared + p.ml_kem_decapsulate(dk, offer) + hashlib.sha256(offer).digest()

    roots = {
        (low, high): sessions.root(suite.value, r1, channel(low, high), channel(high, low), low, high)
        for low, high in itertools.combinations(net.parties, 2)
    }
    found = sessions.session_id(suite.value, r1, net.parties)
    for party, site in net.sites.items():
        expected = {peer: roots[sessions.ends(party, peer)] for peer in net.parties if peer != party}
        assert site.session.id == found
        assert site.session._chains == expected
    drawn = {party: [] for party in net.parties}
    context = replace(net.context, round=2)
    adverts = {}
    for party, site in net.sites.items():
        attempt = SessionRound(
            context,
            EncodedUpdate(np.zeros(3, np.uint32)),
            session=site.session,
            step=4,
            history=net.histories[party],
            random=recording(party),
        )
        adverts[party] = attempt.advertise()
    threshold = context.cohort.threshold
    plain = sessions.Step(suite.value, context.digest, found, 4, net.parties, threshold, roots, drawn)

    assert adverts == plain.adverts
