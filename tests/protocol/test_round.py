"""Rounds of honest parties: the sum of the masked is the sum of the plain, for every tolerated dropout."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from lepton_fl.secagg.context import Floor
from lepton_fl.secagg.errors import Phase, PolicyViolation, TooFewParticipants
from lepton_fl.secagg.fixedpoint import Quantiser
from lepton_fl.secagg.graph import Graph
from lepton_fl.secagg.keys import Suite
from lepton_fl.secagg.messages import to_wire
from lepton_fl.secagg.site import Update


@pytest.mark.parametrize("suite", Suite)
@pytest.mark.parametrize(("n", "colluders"), [(3, 1), (4, 1), (10, 3)])
def test_sum_is_that_of_the_updates(make_net, n, colluders, suite):
    """Exactly, to the last bit."""
    net = make_net(n, colluders=colluders, suite=suite)

    result = net.run()

    assert result.survivors == net.parties
    np.testing.assert_array_equal(result.mean_L, net.expected(net.parties))


def test_thirty_sites(make_net):
    net = make_net(30, colluders=10)

    result = net.run(drops={Phase.MASK: net.parties[::10], Phase.UNMASK: net.parties[5:6]})

    np.testing.assert_array_equal(result.mean_L, net.expected(result.survivors))
    assert len(result.survivors) == 27


@pytest.mark.parametrize("phase", list(Phase)[:5])
@pytest.mark.parametrize(("n", "colluders", "tolerated"), [(3, 1, 0), (4, 1, 1), (10, 3, 3)])
def test_as_many_as_tolerated_may_drop_out_in_any_phase(make_net, n, colluders, tolerated, phase):
    """0 of 3, 1 of 4, 3 of 10; one more, and there is no sum."""
    net = make_net(n, colluders=colluders)
    gone = net.parties[1 : 1 + tolerated]
    result = net.run(drops={phase: gone})
    in_the_sum = phase in {Phase.CONFIRM, Phase.UNMASK}

    assert set(result.survivors) == set(net.parties) - (set() if in_the_sum else set(gone))
    np.testing.assert_array_equal(result.mean_L, net.expected(result.survivors))

    beyond = make_net(n, colluders=colluders)
    with pytest.raises(TooFewParticipants) as refused:
        beyond.run(drops={phase: beyond.parties[1 : 2 + tolerated]})
    assert refused.value.phase is phase
    assert refused.value.retry
    if phase is not Phase.UNMASK:
        assert not beyond.left[Phase.UNMASK]


@pytest.mark.parametrize("n", [3, 4, 7])
def test_every_subset_of_masking_dropouts(make_net, n):
    """Every set of sites that vanish after they shared: the exact sum of the rest, or none at all."""
    for size in range(n - (2 * n // 3 + 1) + 2):
        for gone in itertools.combinations(range(n), size):
            net = make_net(n, colluders=1, coordinates=9, min_sites=0)
            drops = {Phase.MASK: [net.parties[place] for place in gone]}
            if n - size < net.context.cohort.threshold:
                with pytest.raises(TooFewParticipants):
                    net.run(drops=drops)
                assert net.opened_nothing()
            else:
                result = net.run(drops=drops)
                np.testing.assert_array_equal(result.mean_L, net.expected(result.survivors))


def test_drops_in_several_phases_add_up(make_net):
    """One before it shared, one before it masked, one before it confirmed: three of ten."""
    net = make_net(10, colluders=3)
    one, two, three = net.parties[2:5]

    result = net.run(drops={Phase.SHARE: [one], Phase.MASK: [two], Phase.CONFIRM: [three]})

    assert set(result.survivors) == set(net.parties) - {one, two}
    np.testing.assert_array_equal(result.mean_L, net.expected(result.survivors))


@pytest.mark.parametrize("side", [0, -1], ids=["lowest", "highest"])
def test_dropout_under_the_post_quantum_suite(make_net, side):
    """Either end's seed rebuilds a pair's secret: of the one that made the offer, of the one that took it."""
    net = make_net(4, suite=Suite.LSA1_PQ)

    result = net.run(drops={Phase.MASK: [net.parties[side]]})

    np.testing.assert_array_equal(result.mean_L, net.expected(result.survivors))


def test_weights_are_summed_exactly(make_net, world):
    """Where a study has weights, their limbs travel under the masks."""
    quantiser = Quantiser(clip=1.0, bits=20, max_n=4, max_weight=1 << 40)
    vectors = np.random.default_rng(3).uniform(-1, 1, (4, 200)).astype(np.float32)
    weights = [1, 1 << 40, 12_345_678_901, 7]
    updates = {p: Update(v, w) for p, v, w in zip(world.ids(4), vectors, weights, strict=True)}
    net = make_net(4, quantiser=quantiser, weighted=True, net={"updates": updates})

    result = net.run(drops={Phase.UNMASK: net.parties[:1]})

    assert result.total_weight == sum(weights)
    np.testing.assert_array_equal(result.mean_L, net.expected(net.parties))


@pytest.mark.slow
def test_hundred_and_fifty_sites(make_net):
    """Above 128 sites each masks with a few; dropouts in two phases."""
    net = make_net(150, min_sites=146, coordinates=50)
    assert net.context.cohort.graph.degree == 26

    result = net.run(drops={Phase.MASK: net.parties[10:12], Phase.CONFIRM: net.parties[30:32]})

    assert set(result.survivors) == set(net.parties) - set(net.parties[10:12])
    np.testing.assert_array_equal(result.mean_L, net.expected(result.survivors))


@pytest.mark.parametrize("suite", Suite)
def test_drawn_graph(make_net, suite):
    """Twenty sites of which each draws eight: who holds no share of another masks with it all the same."""
    plain = make_net(20, coordinates=50, suite=suite)
    graph = Graph(parties=plain.parties, degree=8, threshold=6)
    plain.context.cohort.__dict__["graph"] = graph
    net = type(plain)(replace(plain.context))

    result = net.run(drops={Phase.MASK: net.parties[4:5], Phase.CONFIRM: net.parties[9:10]})

    assert set(result.survivors) == set(net.parties) - {net.parties[4]}
    np.testing.assert_array_equal(result.mean_L, net.expected(result.survivors))


def test_what_the_server_sees_is_uniform(make_net, world):
    """Chi-square over the bytes of a site's masked vector, of an update that is all zeros; two-sided."""
    zeros = Update(np.zeros(20_000, np.float32))
    net = make_net(4, coordinates=20_000, net={"updates": dict.fromkeys(world.ids(4), zeros)})
    net.run()

    for masked in net.left[Phase.MASK].values():
        counts = np.bincount(np.frombuffer(to_wire(masked)[1], np.uint8), minlength=256)
        expected = counts.sum() / 256
        chi_square = ((counts - expected) ** 2 / expected).sum()
        # 255 degrees of freedom: mean 255, deviation 22.6; six deviations either way.
        assert 120 < chi_square < 390


def test_two_sites_are_refused_by_default(make_net):
    with pytest.raises(PolicyViolation, match="min_sites is 2, this site's policy asks for 3"):
        make_net(2, colluders=0, min_sites=0)


def test_two_sites_where_both_policies_say_so(make_net):
    net = make_net(2, colluders=0, min_sites=0, net={"floor": Floor(min_sites=2)})
    result = net.run()

    np.testing.assert_array_equal(result.mean_L, net.expected(net.parties))


def test_one_site_is_refused(context_of):
    """A sum of one is the update."""
    with pytest.raises(PolicyViolation, match="0 colluders of 1 sites are too many"):
        context_of(1, colluders=0, min_sites=0)


def test_upload_is_four_bytes_a_coordinate_and_at_most_300_bytes_a_peer(make_net):
    """Everything a site sends in a round, its advert and one signature for each phase aside."""
    sent = {}
    for n in (10, 30):
        net = make_net(n, colluders=1, coordinates=100)
        net.run()
        party = net.parties[0]
        sent[n] = sum(len(net.left[phase][party]) for phase in (Phase.SHARE, Phase.CONFIRM, Phase.UNMASK))
        header, vector = to_wire(net.left[Phase.MASK][party])
        assert len(vector) == 4 * 100
        sent[n] += len(header)

    assert (sent[30] - sent[10]) / 20 <= 300


def test_retransmission_returns_the_same_bytes(make_net):
    """Whatever was asked is answered again alike, in every phase, as long as the round is on."""
    net = make_net(4)
    net.run(until=Phase.UNMASK)
    party = net.parties[0]

    for phase in list(Phase)[:4]:
        assert net.call(phase, party, net.asked[phase][party]) is net.left[phase][party]

    requests = net.server.unmask_requests()
    net.exchange(Phase.UNMASK, requests)
    for party in net.parties:
        assert net.call(Phase.UNMASK, party, requests[party]) == net.left[Phase.UNMASK][party]


def test_replies_in_any_order_and_twice_change_nothing(make_net):
    net = make_net(4)

    def twice(phase, party, reply):
        net.receive(phase, party, reply)
        return reply

    result = net.run(order=lambda requests: sorted(requests, reverse=True), on_reply=twice)

    assert not net.blamed
    np.testing.assert_array_equal(result.mean_L, net.expected(net.parties))
