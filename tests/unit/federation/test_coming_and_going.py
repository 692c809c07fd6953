"""Who was silent or late may take part once it is there, who refused may not; and a run can be stopped."""

import threading
from collections import Counter

import pytest

from lepton_fl.errors import AlreadyCharged, PolicyRefused, TooFewSites
from lepton_fl.federation import Deadlines, Federation
from lepton_fl.federation.checkpoint import Checkpoint
from lepton_fl.federation.grids import CohortGrid, WrappingGrid
from lepton_fl.messages import CONFIG, EVALUATE, JOIN, ROUND, TRAIN, error_reply
from lepton_fl.simulation import Drop, InProcessGrid
from lepton_fl.tasks.arrays import model_hash

A, B, C = 101, 102, 103


def fault(message):
    return error_reply(message, None)


def refuse(message):
    return error_reply(message, PolicyRefused("x", public="policy"))


def charged(message):
    return error_reply(message, AlreadyCharged("x", public="round already charged"))


def in_turn(answers):
    """Each time the next of `answers`."""
    left = iter(answers)

    def answer(message):
        return next(left)(message)

    return answer


class Network(WrappingGrid):
    """A grid that lists, and reaches, only the nodes that are connected; `away` are the rounds without."""

    def __init__(self, inner, away=None):
        super().__init__(inner)
        self.away = away or {}
        self.number = 1
        self.sent = Counter()
        self.deadlines = {}

    def get_node_ids(self):
        return [n for n in self.inner.get_node_ids() if self.number not in self.away.get(n, ())]

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        for message in messages:
            self.sent[message.metadata.message_type, message.metadata.dst_node_id] += 1
            self.deadlines[message.metadata.message_type] = timeout
        here = set(self.get_node_ids())
        replies = self.inner.send_and_receive([m for m in messages if m.metadata.dst_node_id in here])
        if messages and messages[0].metadata.message_type == TRAIN:
            # What comes between two rounds belongs to the next.
            self.number = messages[0].content.config_records[CONFIG][ROUND] + 1
        return replies


@pytest.fixture
def make_network(make_grid):
    """Sites a, b and c behind a network, away in some rounds."""
    return lambda away=None, **trains: Network(make_grid(**trains), away)


@pytest.fixture
def long(make_study):
    """Twelve rounds, without secure aggregation."""
    return make_study(train={"rounds": 12})


def rounds_with(site, reports):
    return [report.number for report in reports if site in report.sites]


# --- coming back ---


def test_a_site_that_is_connected_again_takes_part_at_once(make_federation, make_network, long, seen):
    """Out after rounds 3 and 4, not asked while it is away, back in round 9, and said to be."""
    network = make_network({B: range(3, 9)})
    federation = make_federation(study=long)

    federation.run(network)

    assert rounds_with("b", seen.rounds) == [1, 2, 9, 10, 11, 12]
    assert {r.number: r.returned for r in seen.rounds if r.returned} == {9: ("b",)}
    assert [r.number for r in seen.rounds if r.dropped] == [3, 4]
    assert network.sent[JOIN, B] == 2
    assert federation.refused == {}


def test_a_silent_site_is_named_while_it_is_out(make_federation, make_network, long):
    """With the reason; that it is out is what a person reads at the end of the run."""
    federation = make_federation(study=long)

    federation.run(make_network({B: range(3, 13)}))

    assert federation.refused == {"b": "no answer before the deadline"}


def test_a_site_that_is_down_in_a_simulation_comes_back(make_federation, make_app, long, seen):
    """From the first round in which it is up, as a machine that connects again."""
    grid = InProcessGrid(
        {A: make_app("a"), B: make_app("b"), C: make_app("c")}, drops={B: [Drop(site="b", first=2, last=3)]}
    )

    make_federation(study=long).run(grid)

    assert rounds_with("b", seen.rounds) == [1, *range(4, 13)]


def test_a_site_that_joins_and_never_answers_is_asked_ever_more_rarely(
    make_federation, make_network, long, seen
):
    """Each time it holds up a round for its whole deadline."""
    make_federation(study=long).run(make_network(b=fault))

    assert [r.number for r in seen.rounds if r.dropped] == [1, 2, 3, 5, 9]
    assert [r.number for r in seen.rounds if r.returned] == [3, 5, 9]


def test_a_connected_site_that_never_joins_is_asked_ever_more_rarely(
    make_federation, make_network, altered, long
):
    """Each time the run waits for its answer."""
    network = make_network()

    def mute(replies):
        return [reply for reply in replies if reply.metadata.src_node_id != B]

    make_federation(study=long).run(altered(network, mute))

    # Before the first round, and before rounds 1, 2, 4 and 8.
    assert network.sent[JOIN, B] == 5


def test_a_site_that_is_back_and_answers_has_the_same_patience_again(
    make_federation, make_network, long, seen, good
):
    """Out after two faults; one more after its return is within the patience."""
    answers = [fault, fault, good, fault, *[good] * 8]

    make_federation(study=long).run(make_network(b=in_turn(answers)))

    assert [r.number for r in seen.rounds if r.dropped] == [1, 2, 4]
    assert [r.number for r in seen.rounds if r.returned] == [3]


@pytest.mark.parametrize("kind", ["a refusal", "NaN", "a weight of 1e12"])
def test_a_site_that_was_put_out_for_good_is_not_asked(make_federation, make_network, long, seen, bad, kind):
    """It would refuse again, or cannot be trusted."""
    network = make_network(b={"a refusal": refuse, **bad}[kind])
    federation = make_federation(study=long)

    federation.run(network)

    assert (network.sent[JOIN, B], network.sent[TRAIN, B]) == (1, 1)
    assert list(federation.refused) == ["b"]


def test_a_site_that_refused_to_join_is_not_asked_again(make_federation, make_app, long):
    """Its policy has decided."""
    network = Network(InProcessGrid({A: make_app("a"), B: lambda m, _: refuse(m), C: make_app("c")}))

    make_federation(study=long).run(network)

    assert network.sent[JOIN, B] == 1


def test_a_site_that_sits_out_round_after_round_is_put_off(make_federation, make_network, long, seen, good):
    """As a silent one: each round that is lost for it is charged to the others. It is asked again."""
    network = make_network(b=in_turn([*[charged] * 3, *[good] * 9]))
    federation = make_federation(study=long)

    federation.run(network)

    without = [report.number for report in seen.rounds if "b" not in report.sites]
    assert [r.number for r in seen.rounds if r.dropped] == [1, 2, 3]
    assert without == [1, 2, 3, 4]
    assert federation.refused == {}


def test_a_site_that_sits_out_an_invitation_is_invited_again(make_federation, make_app, long, seen):
    """It was paused, or about to stop, and refused nothing."""
    app, said = make_app("b"), iter([AlreadyCharged("x", public="the site is paused")])

    def paused_at_first(message, context):
        error = next(said, None) if message.metadata.message_type == JOIN else None
        return app(message, context) if error is None else error_reply(message, error)

    federation = make_federation(study=long)
    federation.run(InProcessGrid({A: make_app("a"), B: paused_at_first, C: make_app("c")}))

    assert rounds_with("b", seen.rounds) == list(range(1, 13))
    assert federation.refused == {}


def test_under_secure_aggregation_nobody_comes_back(make_federation, make_network, make_study, seen):
    """Were it gone again, the others would pay for the round."""
    study = make_study(train={"rounds": 12}, secure_aggregation={"enabled": True})
    network = make_network({B: range(3, 6)})
    federation = make_federation(study=study)

    federation.run(network)

    assert rounds_with("b", seen.rounds) == [1, 2]
    assert network.sent[JOIN, B] == 1
    assert federation.refused == {"b": "no answer before the deadline"}


def test_under_secure_aggregation_a_site_comes_back_where_the_round_may_lose_it(
    make_federation, make_app, make_study, seen
):
    """Four of which three are enough: were it gone again, nobody would pay for it."""
    secure = {"enabled": True, "min_sites": 3, "min_survivors": 3}
    study = make_study(train={"rounds": 12}, secure_aggregation=secure)
    four = InProcessGrid({101 + i: make_app(name) for i, name in enumerate("abcd")})
    federation = make_federation(study=study)

    federation.run(Network(four, {B: range(3, 6)}))

    assert rounds_with("b", seen.rounds) == [1, 2, *range(6, 13)]
    assert federation.refused == {}


# --- coming late ---


@pytest.mark.parametrize(
    "sites", [None, {A: "a", B: "b", C: "c"}], ids=["by their own names", "by given ones"]
)
def test_a_late_site_takes_part_from_then_on(make_federation, make_network, long, seen, sites):
    """Two were enough to begin with."""
    federation = make_federation(study=long, sites=sites)

    federation.run(make_network({B: range(1, 5)}))

    assert seen.cohort == ("a", "c")
    assert rounds_with("b", seen.rounds) == list(range(5, 13))
    assert {r.number: r.returned for r in seen.rounds if r.returned} == {5: ("b",)}
    assert federation.refused == {}


@pytest.mark.parametrize(
    "sites", [None, {A: "a", B: "b", C: "c"}], ids=["by their own names", "by given ones"]
)
def test_a_site_that_did_not_answer_at_first_is_asked_again(
    make_federation, make_network, altered, long, seen, sites
):
    """Its first answer is lost; until the next it is named as out."""
    lost = []

    def lose_one(replies):
        kept = [r for r in replies if lost or r.metadata.src_node_id != B]
        lost.extend(r for r in replies if r not in kept)
        return kept

    federation = make_federation(study=long, sites=sites)
    federation.run(altered(make_network(), lose_one))

    assert seen.cohort == ("a", "c")
    assert rounds_with("b", seen.rounds) == list(range(1, 13))
    assert federation.refused == {}


def test_a_late_node_under_a_name_that_is_taken_is_not_believed(make_federation, make_app, long, seen):
    """The site of that name takes part already."""
    grid = InProcessGrid({A: make_app("a"), B: make_app("b"), C: make_app("a")})
    federation = make_federation(study=long)

    federation.run(Network(grid, {C: [1]}))

    assert all(r.sites == ("a", "b") for r in seen.rounds)
    assert federation.refused == {"node 103": "did not give the name it is known by"}


def test_a_late_node_under_the_name_of_a_site_that_is_out_is_not_believed(
    make_federation, make_app, long, seen
):
    """Who refused does not come in by another door."""
    apps = {A: make_app("a"), B: make_app("b", refuse), C: make_app("c"), 104: make_app("b")}

    make_federation(study=long).run(Network(InProcessGrid(apps), {104: [1]}))

    assert rounds_with("b", seen.rounds) == []


def test_a_late_node_that_is_not_invited_is_not_asked(make_federation, make_network, long, seen):
    """As at the beginning."""
    network = make_network({C: [1]})

    make_federation(study=long, sites={A: "a", B: "b"}).run(network)

    assert network.sent[JOIN, C] == 0
    assert all(r.sites == ("a", "b") for r in seen.rounds)


class Arriving(WrappingGrid):
    """Node c connects after some looks."""

    def __init__(self, inner, looks):
        super().__init__(inner)
        self.looks = looks

    def get_node_ids(self):
        self.looks -= 1
        return [A, B] if self.looks >= 0 else [A, B, C]


SITES = {A: "a", B: "b", C: "c"}


def test_a_site_that_connects_just_after_the_quorum_is_in_the_first_cohort(make_federation, make_grid, seen):
    """It is waited for; and as soon as all are there, nobody waits for more."""
    grid = Arriving(make_grid(), looks=2)
    deadlines = Deadlines(join=20.0, train=5.0, evaluate=5.0)

    make_federation(sites=SITES, settle=20.0, deadlines=deadlines).run(grid)

    assert seen.cohort == ("a", "b", "c")
    # A third look that finds all of them, and one in each of three rounds.
    assert grid.looks == -4


@pytest.mark.parametrize(
    ("settle", "join"), [(0.0, 5.0), (0.3, 5.0), (3600.0, 0.3)], ids=["not at all", "a little", "deadline"]
)
def test_a_site_that_does_not_come_is_waited_for_a_little(make_federation, make_grid, seen, settle, join):
    """The quorum is there; never beyond the deadline."""
    deadlines = Deadlines(join=join, train=5.0, evaluate=5.0)

    make_federation(sites=SITES, settle=settle, deadlines=deadlines).run(CohortGrid(make_grid(), [A, B]))

    assert seen.cohort == ("a", "b")


def test_nodes_that_are_not_invited_make_no_quorum(make_federation, make_grid, make_study):
    """Three are connected, one of which is of the study."""
    study = make_study(train={"deadline": 0.3})

    with pytest.raises(TooFewSites, match="1 sites are connected, the study asks 2"):
        make_federation(study=study, sites={A: "a", 999: "z"}).run(make_grid())


# --- a network that is down ---


class Outage(WrappingGrid):
    """The network goes down in round 2, and for some looks after it nobody is seen."""

    def __init__(self, inner, looks):
        super().__init__(inner)
        self.looks = looks
        self.down = False

    def get_node_ids(self):
        self.looks -= self.down
        return [] if self.down and self.looks >= 0 else self.inner.get_node_ids()

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        if messages[0].content.config_records[CONFIG][ROUND] == 2:
            self.down = True
            return []
        return self.inner.send_and_receive(messages, timeout=timeout)


def test_a_run_comes_through_an_outage_of_the_network(make_federation, make_grid, make_study, seen):
    """One round is lost; the next takes its number when enough sites are connected again."""
    study = make_study(train={"spare_rounds": 1})

    make_federation(study=study, sites=SITES, reconnect=20.0).run(Outage(make_grid(), looks=3))

    assert [(r.number, len(r.sites)) for r in seen.rounds] == [(1, 3), (2, 0), (3, 3), (4, 3)]


def test_an_outage_that_lasts_ends_the_run_and_takes_no_number(make_federation, make_grid, make_study):
    """It may be resumed, with all its rounds but the one that was lost."""
    federation = make_federation(study=make_study(train={"spare_rounds": 1}), sites=SITES, reconnect=0.5)

    with pytest.raises(TooFewSites, match="0 sites are connected before round 3, the study asks 2"):
        federation.run(Outage(make_grid(), looks=1_000))

    assert federation.started == 2


def test_nobody_waits_for_sites_that_refuse(make_federation, make_network, good):
    """However long it would."""
    federation = make_federation(sites=SITES, reconnect=3600.0)

    with pytest.raises(TooFewSites, match="1 sites are left"):
        federation.run(make_network(b=in_turn([good, refuse]), c=in_turn([good, refuse])))


def test_a_run_that_waits_out_an_outage_can_be_stopped(make_federation, make_grid, make_study):
    federation = make_federation(study=make_study(train={"spare_rounds": 1}), sites=SITES, reconnect=3600.0)
    timer = threading.Timer(0.5, federation.stop)
    timer.start()
    try:
        federation.run(Outage(make_grid(), looks=1_000_000))
    finally:
        timer.join()

    assert (federation.stopped, federation.started) == (True, 2)


# --- deadlines ---


def test_each_phase_has_its_deadline(make_federation, make_network):
    """In seconds, as the grid is told."""
    network = make_network()

    make_federation(deadlines=Deadlines(join=1.0, train=2.0, evaluate=3.0)).run(network)

    assert network.deadlines == {JOIN: 1.0, TRAIN: 2.0, EVALUATE: 3.0}


def test_the_studys_deadline_is_every_phases(make_federation, make_network):
    """Where nothing else is said."""
    network = make_network()

    make_federation().run(network)

    assert network.deadlines == {JOIN: 5.0, TRAIN: 5.0, EVALUATE: 5.0}


# --- told to stop ---


@pytest.fixture
def stopping_after(seen):
    """An observer that tells the run to stop after that round."""

    class Stopper(type(seen)):
        federation = None

        def __init__(self, last):
            super().__init__()
            self.last = last

        def round_done(self, report, model):
            super().round_done(report, model)
            if report.number == self.last:
                self.federation.stop()

    return Stopper


@pytest.fixture
def stopped_run(make_federation, stopping_after, tmp_path):
    """A run of some grid that is told to stop after that round."""

    def run(last, grid, **more):
        observer = stopping_after(last)
        federation = make_federation(observer=observer, checkpoint=tmp_path / "checkpoint", **more)
        observer.federation = federation
        federation.run(grid)
        return federation

    return run


def test_a_stopped_run_ends_after_its_round_and_goes_on_later(
    stopped_run, make_federation, make_network, study, tmp_path
):
    """The checkpoint is whole, no site is asked to judge, and the end is the same to the bit."""
    network = make_network()
    whole = make_federation(observer=None)
    whole.run(make_network())

    federation = stopped_run(2, network)

    assert (federation.stopped, federation.done, federation.stopped_early) == (True, 2, "")
    assert Checkpoint.read(tmp_path / "checkpoint", study_id=study.id).done == 2
    assert EVALUATE not in network.deadlines
    resumed = Federation.resume(tmp_path / "checkpoint", study=study)
    resumed.run(make_network())
    assert (resumed.stopped, resumed.done) == (False, 3)
    assert model_hash(resumed.model) == model_hash(whole.model)


def test_a_run_that_is_stopped_in_its_last_round_is_done(stopped_run, make_network):
    """Nothing is left to do but what ends every run."""
    network = make_network()

    federation = stopped_run(3, network)

    assert (federation.stopped, federation.done) == (False, 3)
    assert network.sent[EVALUATE, A] == 1


def test_a_run_that_is_stopped_before_it_begins_asks_nobody(make_federation, make_network, seen):
    """No site reserves anything."""
    network = make_network()
    federation = make_federation()
    federation.stop()

    federation.run(network)

    assert (federation.stopped, federation.done, network.sent) == (True, 0, Counter())
    assert not hasattr(seen, "cohort")


def test_a_run_that_waits_for_sites_can_be_stopped(make_federation, make_grid):
    """From another thread, and long before its deadline."""
    federation = make_federation(deadlines=Deadlines(join=20.0, train=5.0, evaluate=5.0))
    timer = threading.Timer(0.1, federation.stop)
    timer.start()
    try:
        federation.run(CohortGrid(make_grid(), [A]))
    finally:
        timer.join()

    assert federation.stopped


def test_a_run_that_is_stopped_while_sites_join_raises_nothing(make_federation, make_grid, altered):
    """Too few have said yes, and it no longer matters."""
    federation = make_federation()

    def stop(_):
        federation.stop()
        return []

    federation.run(altered(make_grid(), stop))

    assert federation.stopped
