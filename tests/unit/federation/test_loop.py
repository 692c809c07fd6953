"""One bad site never ends a run, no site is waited for without limit, and no round number is used twice."""

import time

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict

from lepton_fl.errors import PolicyRefused, ProtocolError, TooFewSites
from lepton_fl.federation import Federation
from lepton_fl.federation.checkpoint import Checkpoint
from lepton_fl.federation.grids import CohortGrid
from lepton_fl.messages import (
    EVALUATE,
    JOIN,
    METRICS,
    TRAIN,
    WEIGHT,
    counts_reply,
    error_reply,
    read_assignment,
    update_reply,
)
from lepton_fl.simulation import InProcessGrid
from lepton_fl.tasks.arrays import model_hash


def fault(message):
    return error_reply(message, None)


def refuse(message):
    return error_reply(message, PolicyRefused("x", public="policy"))


def slow(message):
    time.sleep(0.3)
    return update_reply(message, {"w": np.ones((1, 2), np.float32), "b": np.ones(1, np.float32)})


def in_turn(answers):
    """Each time the next of `answers`."""
    left = iter(answers)

    def answer(message):
        return next(left)(message)

    return answer


def b_of(federation):
    return federation.model["b"].item()


def test_a_run_of_good_sites_is_as_long_as_the_study(make_federation, make_grid, seen):
    """Otherwise what follows would show nothing."""
    federation = make_federation()

    federation.run(make_grid())

    assert [r.number for r in seen.rounds] == [1, 2, 3]
    assert all(r.sites == ("a", "b", "c") and r.dropped == {} for r in seen.rounds)
    assert b_of(federation) == 1.5


BAD = [
    "a name missing",
    "a name more",
    "names in another order",
    "a shape",
    "float64",
    "integers",
    "NaN",
    "infinity",
    "a weight of 1e12",
    "a weight of 0",
    "no weight",
    "a metric more",
    "members claimed",
    "another config",
    "two updates",
    "nothing at all",
]


@pytest.mark.parametrize("kind", BAD)
def test_a_malformed_reply_puts_its_site_out(make_federation, make_grid, seen, bad, kind):
    """The others go on without it, and the model is theirs."""
    federation = make_federation()

    federation.run(make_grid(b=bad[kind]))

    assert list(federation.refused) == ["b"]
    assert federation.refused["b"].startswith(("arrays:", "reply:"))
    assert [sorted(r.dropped) for r in seen.rounds] == [["b"], [], []]
    assert [r.sites for r in seen.rounds] == [("a", "c")] * 3
    assert b_of(federation) == 1.5


def test_every_malformed_reply_is_tried(bad):
    """The list above is the fixture's."""
    assert list(bad) == BAD


def test_a_refusing_site_is_put_out(make_federation, make_grid, seen):
    """It would refuse again; its public words are the reason."""
    federation = make_federation()

    federation.run(make_grid(b=refuse))

    assert federation.refused == {"b": "policy"}
    assert [r.sites for r in seen.rounds] == [("a", "c")] * 3


def test_a_faulty_site_is_asked_again(make_federation, make_grid, good, seen):
    """An internal error may pass."""
    answers = [fault, good, good]
    federation = make_federation()

    federation.run(make_grid(b=in_turn(answers)))

    assert federation.refused == {}
    assert seen.rounds[0].dropped == {"b": "internal error at the site"}
    assert [r.sites for r in seen.rounds] == [("a", "c"), ("a", "b", "c"), ("a", "b", "c")]


def test_a_late_site_is_left_out_of_its_round(make_federation, make_grid, make_study, seen):
    """And named."""
    federation = make_federation(study=make_study(train={"deadline": 0.1, "rounds": 1}))

    federation.run(make_grid(b=slow))

    assert seen.rounds[0].dropped == {"b": "no answer before the deadline"}
    assert seen.rounds[0].sites == ("a", "c")


def test_too_few_good_sites_end_the_run(make_federation, make_grid, bad):
    """One is left of two that the study asks, and the reasons are given."""
    federation = make_federation()

    with pytest.raises(TooFewSites, match="1 sites are left, the study asks 2") as few:
        federation.run(make_grid(b=bad["NaN"], c=refuse))

    assert "b: arrays: b holds values that are not finite; c: policy" in few.value.message
    assert federation.done == 0


def test_a_lost_round_changes_no_model(make_federation, make_grid, make_study, seen, good):
    """All three must stay; the round that loses one is done again under the next number."""
    answers = [fault, good]
    all_stay = {"enabled": True, "min_survivors": "all"}
    federation = make_federation(study=make_study(secure_aggregation=all_stay, train={"rounds": 1}))

    federation.run(make_grid(b=in_turn(answers)))

    assert [(r.number, r.sites) for r in seen.rounds] == [(1, ()), (2, ("a", "b", "c"))]
    assert b_of(federation) == 0.5


def test_without_secure_aggregation_the_smallest_cohort_keeps_a_round(
    make_federation, make_grid, make_study, seen, good
):
    """No mask and no share of the noise is missed where a site is."""
    federation = make_federation(study=make_study(secure_aggregation={"min_survivors": "all"}))

    federation.run(make_grid(b=in_turn([fault, good, good])))

    assert [r.sites for r in seen.rounds] == [("a", "c"), ("a", "b", "c"), ("a", "b", "c")]


def test_used_up_spare_rounds_end_the_run(make_federation, make_grid, make_study, seen, good):
    """The noise covers four rounds, and each loses one site or another."""
    federation = make_federation(
        study=make_study(secure_aggregation={"enabled": True, "min_survivors": "all"})
    )
    b, c = in_turn([fault, good] * 2), in_turn([good, fault] * 2)

    with pytest.raises(TooFewSites, match="all 4 rounds that the noise covers are used, 0 of 3"):
        federation.run(make_grid(b=b, c=c))

    assert [r.number for r in seen.rounds] == [1, 2, 3, 4]


def test_a_site_that_misses_two_rounds_in_a_row_is_put_out(make_federation, make_grid, make_study, seen):
    """Each lost round is charged to the sites that did answer. What can lose one keeps the site out."""
    federation = make_federation(study=make_study(secure_aggregation={"enabled": True}))

    federation.run(make_grid(b=fault))

    assert federation.refused == {"b": "internal error at the site"}
    assert [sorted(r.dropped) for r in seen.rounds] == [["b"], ["b"], []]


def test_a_site_that_misses_every_other_round_stays(make_federation, make_grid, seen, good):
    """What counts is in a row."""
    federation = make_federation()

    federation.run(make_grid(b=in_turn([fault, good, fault])))

    assert federation.refused == {}
    assert [sorted(r.dropped) for r in seen.rounds] == [["b"], [], ["b"]]


def test_sites_that_all_refuse_are_no_outage(make_federation, make_app, site_refusing):
    """Exit code 4: their policies are what must be mended."""
    grid = InProcessGrid({101: site_refusing, 102: site_refusing, 103: make_app("c")})

    with pytest.raises(PolicyRefused, match="1 of 3 sites take part, the study asks 2") as refused:
        make_federation().run(grid)

    assert "node 101: policy; node 102: policy" in refused.value.message
    assert refused.value.exit_code == 4


@pytest.fixture
def site_refusing():
    """A site that will not join."""
    return lambda message, _: refuse(message)


@pytest.mark.parametrize("nodes", [[], [101]], ids=["nobody", "one of two"])
def test_missing_sites_are_not_waited_for_without_limit(make_federation, make_grid, make_study, nodes):
    """The deadline of a round is the limit."""
    federation = make_federation(study=make_study(train={"deadline": 0.3}))
    before = time.monotonic()

    with pytest.raises(TooFewSites, match=f"{len(nodes)} sites are connected, the study asks 2"):
        federation.run(CohortGrid(make_grid(), nodes))

    assert 0.3 <= time.monotonic() - before < 3


def test_sites_that_come_later_are_waited_for(make_federation, make_grid, seen):
    """Nobody is connected at the first look."""

    class Waking(CohortGrid):
        def get_node_ids(self):
            nodes, self._nodes = self._nodes, [101, 102, 103]
            return nodes

    make_federation().run(Waking(make_grid(), []))

    assert seen.cohort == ("a", "b", "c")


def test_silent_sites_are_no_refusal(make_federation, make_grid, altered):
    """Connected, and never answering: exit code 6."""
    with pytest.raises(TooFewSites, match="0 of 3 sites take part") as few:
        make_federation().run(altered(make_grid(), lambda _: []))

    assert "node 101: no answer before the deadline" in few.value.message


def test_a_repeated_reply_counts_once(make_federation, make_grid, altered, seen):
    """Every message twice is the same run."""
    federation = make_federation()

    federation.run(altered(make_grid(), lambda replies: replies + replies))

    assert [r.sites for r in seen.rounds] == [("a", "b", "c")] * 3
    assert b_of(federation) == 1.5


def test_a_stranger_counts_nothing(make_federation, make_grid, altered, good, seen):
    """A reply from a node that was not asked."""
    stranger = Message(RecordDict(), dst_node_id=999, message_type=TRAIN)

    federation = make_federation()
    federation.run(altered(make_grid(), lambda replies: [good(stranger), *replies]))

    assert seen.cohort == ("a", "b", "c")
    assert seen.refused == {}
    assert b_of(federation) == 1.5


@pytest.mark.parametrize("change", [{"_message_type": EVALUATE}, {"_run_id": 1}], ids=["type", "run"])
@pytest.mark.parametrize("kind", [JOIN, TRAIN])
def test_a_reply_to_something_else_is_no_answer(make_federation, make_grid, altered, seen, change, kind):
    """It is left aside, as if its site had said nothing."""

    def misdirect(replies):
        for reply in replies:
            if (reply.metadata.src_node_id, reply.metadata.message_type) == (102, kind):
                reply.metadata.__dict__.update(change)
        return replies

    make_federation().run(altered(make_grid(), misdirect))

    assert [r.sites for r in seen.rounds] == [("a", "c")] * 3


def deltas(**b):
    """Updates whose sum in float64 depends on the order."""
    weights = np.ones((1, 2), np.float32)
    return {
        name: lambda m, v=v: update_reply(m, {"w": weights, "b": np.array([v], np.float32)})
        for name, v in b.items()
    }


def test_the_order_of_arrival_does_not_change_the_model(make_federation, make_grid, make_study, altered):
    """Bit for bit, where adding in another order gives another sum."""
    orders = [lambda r: r, lambda r: r[::-1], lambda r: [r[0], r[2], r[1]]]
    found = []
    for order in orders:
        federation = make_federation(study=make_study(train={"rounds": 1}))
        federation.run(altered(make_grid(**deltas(a=1e6, b=1e-12, c=-1e6)), order))
        found.append(model_hash(federation.model))

    assert len(set(found)) == 1


def test_two_sites_of_one_name_are_not_both_believed(make_federation, make_app, seen):
    """The first to answer has it."""
    grid = InProcessGrid({101: make_app("a"), 102: make_app("b"), 103: make_app("a")})

    make_federation().run(grid)

    assert seen.cohort == ("a", "b")
    assert seen.refused == {"node 103": "did not give the name it is known by"}


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "b\n"])
def test_a_name_that_is_none_is_refused(make_federation, make_app, seen, name):
    """It goes into every later message and onto a screen."""
    make_federation().run(InProcessGrid({101: make_app("a"), 102: make_app("b"), 103: make_app(name)}))

    assert seen.cohort == ("a", "b")


def test_a_site_under_anothers_name_is_refused(make_federation, make_grid, seen):
    """Where the server knows who is behind a node."""
    federation = make_federation(sites={101: "a", 102: "b", 103: "d"})

    federation.run(make_grid())

    assert seen.cohort == ("a", "b")
    assert seen.refused == {"d": "did not give the name it is known by"}


def test_a_node_that_is_not_invited_is_not_asked(make_federation, make_grid, seen):
    """It is connected, and not on the list."""
    make_federation(sites={101: "a", 102: "b"}).run(make_grid())

    assert seen.cohort == ("a", "b")
    assert seen.refused == {}


def test_every_message_carries_what_a_site_must_judge(make_federation, make_grid, good, study):
    """Study, run, a fresh round number and the cohort as it stands."""
    asked = []

    def keep(message):
        asked.append(read_assignment(message))
        return good(message)

    federation = make_federation()
    federation.run(make_grid(a=keep, b=lambda m: refuse(m) if len(asked) > 1 else good(m)))

    assert [a.round for a in asked] == [1, 2, 3]
    assert [a.cohort for a in asked] == [("a", "b", "c"), ("a", "b", "c"), ("a", "c")]
    assert {a.run for a in asked} == {federation.run_id}
    assert {a.study.id for a in asked} == {study.id}


def test_released_figures_are_kept_by_site(make_federation, make_grid, altered):
    """What did not come, or came from elsewhere, is not among them."""

    def figures(replies):
        if replies[0].metadata.message_type != EVALUATE:
            return replies
        content = RecordDict({METRICS: MetricRecord({WEIGHT: 1.0, "auc": 0.75})})
        stranger = Message(RecordDict(), dst_node_id=999, message_type=EVALUATE)
        return [
            Message(content, reply_to=Message(RecordDict(), dst_node_id=101, message_type=EVALUATE)),
            Message(content, reply_to=stranger),
            fault(Message(RecordDict(), dst_node_id=102, message_type=EVALUATE)),
        ]

    federation = make_federation()
    federation.run(altered(make_grid(), figures))

    assert federation.released == {"a": {"auc": 0.75}}


@pytest.mark.parametrize(
    "said", [{"x" * 9_000_000: 0.5}, {"auc": float("nan")}, {"auc": 7.0}, {"auc": [0.5]}]
)
def test_a_released_figure_is_the_metric_of_the_study(make_federation, make_grid, altered, said):
    """It goes with the run into the server's database: no site decides what else does."""

    def figures(replies):
        if replies[0].metadata.message_type != EVALUATE:
            return replies
        content = RecordDict({METRICS: MetricRecord({WEIGHT: 1.0, **said})})
        return [Message(content, reply_to=Message(RecordDict(), dst_node_id=101, message_type=EVALUATE))]

    federation = make_federation()
    federation.run(altered(make_grid(), figures))

    assert federation.released == {}


def test_a_run_id_is_128_random_bits(study):
    """A site charges each (run, round) once: two runs must not share an id."""
    first, second = Federation(study=study, model={}), Federation(study=study, model={})

    assert first.run_id != second.run_id
    assert len(bytes.fromhex(first.run_id)) == 16


def test_a_join_names_no_cohort_yet(make_federation, make_grid, altered):
    """It is formed of those who join."""
    kinds = []

    def look(replies):
        kinds.extend(reply.metadata.message_type for reply in replies)
        return replies

    make_federation().run(altered(make_grid(), look))

    assert kinds == [JOIN] * 3 + [TRAIN] * 9 + [EVALUATE] * 3


def test_a_quorum_above_the_cohort_ends_before_anything_is_charged(make_federation, make_grid, make_study):
    """More survivors than there are sites: every round would be lost, and charged."""
    survivors = {"enabled": True, "min_survivors": 4}
    federation = make_federation(study=make_study(secure_aggregation=survivors))

    with pytest.raises(TooFewSites, match="the study asks 4"):
        federation.run(make_grid())

    assert federation.started == 0


def test_an_aggregate_that_no_site_would_take_does_not_become_a_model(
    make_federation, make_study, make_grid, tmp_path
):
    """Updates that may pass add up to what may not; the model before stays, on disk too."""
    huge = {"w": np.full((1, 2), 9e5, np.float32), "b": np.zeros(1, np.float32)}
    sites = {name: lambda message: update_reply(message, huge) for name in "abc"}
    study, path = make_study(train={"lr": 1.0}), tmp_path / "checkpoint"
    federation = make_federation(study=study, model=dict(huge), checkpoint=path)

    with pytest.raises(ProtocolError, match=r"round 1: the aggregate is no model: .* beyond 1e\+06"):
        federation.run(make_grid(**sites))

    kept = Checkpoint.read(path, study_id=study.id)
    assert kept.done == 0
    assert model_hash(kept.model) == model_hash(federation.model) == model_hash(huge)


def test_a_histogram_of_one_site_is_believed_of_no_site(make_federation, make_grid, make_study, altered):
    """Only a grid that sums may say that it did."""

    def claims(replies):
        if replies[0].metadata.message_type != EVALUATE:
            return replies
        request = Message(RecordDict(), dst_node_id=101, message_type=EVALUATE)
        return [counts_reply(request, np.ones((2, 4096)), members=[101, 102, 103])]

    study = make_study(secure_aggregation={"enabled": True}, evaluation={"release": "exact"})
    federation = make_federation(study=study)

    federation.run(altered(make_grid(), claims))

    assert federation.pooled is None
    assert federation.released == {}
