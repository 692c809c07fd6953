"""Runs whose sites are summed in groups: the same with masks and without, and what a lost group costs."""

from dataclasses import replace

import numpy as np
import pytest

from lepton_fl.errors import TooFewSites
from lepton_fl.federation import Federation, SecureGrid
from lepton_fl.secure_rounds import TRAIN_SUM, group_with
from lepton_fl.simulation import InProcessGrid
from lepton_fl.simulation.functional import Functional, FunctionalGrid
from lepton_fl.simulation.grid import Drop
from lepton_fl.simulation.members import memberships
from lepton_fl.simulation.run import FIRST_SITE_NODE, first_model, open_sites, prepare
from lepton_fl.site import client_app
from lepton_fl.site.secure import LSA1
from lepton_fl.tasks import model_hash

ROUNDS = 2


@pytest.fixture
def grouped(make_study):
    """The study with groups of five, local noise unless told, and other keys of secure aggregation."""

    def make(sites, noise="local", **more):
        secure = {"min_sites": sites, "group_size": 5, **more}
        return make_study(
            privacy={"noise": noise},
            secure_aggregation=secure,
            train={"rounds": ROUNDS, "spare_rounds": 0},
        )

    return make


@pytest.fixture
def many(splits):
    """So many sites, the same few tables over and over."""
    tables = list(splits.values())

    return lambda count: {f"site-{i:02d}": tables[i % len(tables)] for i in range(count)}


class Seen:
    """An observer that keeps every report."""

    def __init__(self):
        self.rounds = []

    def joined(self, cohort, refused):
        self.refused = refused

    def round_done(self, report, model):
        self.rounds.append(report)


@pytest.fixture
def run(many):
    """Run to the end, in full or functional; the federation, and what an observer saw."""

    def go(study, count, how, drops=(), spoiler=None):
        splits, seen = many(count), Seen()
        nodes = {FIRST_SITE_NODE + i: name for i, name in enumerate(sorted(splits))}
        consortium, members = memberships(nodes)

        class Spoiled(how):
            """A member that uploads what is no encoded update."""

            def enter(self, ticket, words):
                return super().enter(ticket, np.full_like(words, 1 << 31))

        apps = {}
        for name, site in open_sites(study, splits, 7, None).items():
            kind = Spoiled if name == spoiler else how
            apps[name] = client_app(replace(site, aggregation=kind(members[name])))
        inner = InProcessGrid(
            {node: apps[name] for node, name in nodes.items()},
            drops={node: [drop for drop in drops if drop.site == name] for node, name in nodes.items()},
        )
        grid = (
            FunctionalGrid(inner, consortium) if how is Functional else SecureGrid(inner, lambda: consortium)
        )
        width = next(iter(splits.values()))[0].x_NF.shape[1]
        federation = Federation(study=study, model=first_model(study, width, 7), sites=nodes, observer=seen)
        failed = None
        try:
            federation.run(grid)
        except TooFewSites as error:
            failed = error
        return federation, seen, failed

    return go


@pytest.mark.parametrize(
    ("noise", "rule"), [("local", "mean"), ("shared", "median"), ("shared", "geometric-median")]
)
def test_groups_come_out_the_same_with_masks_and_without(run, grouped, noise, rule):
    """Bit for bit, of sixteen sites in groups of five, five and six."""
    study = grouped(15, noise, combine=rule)

    full, seen, _ = run(study, 16, LSA1)
    functional, _, _ = run(study, 16, Functional)

    assert full.done == ROUNDS
    assert [len(report.sites) for report in seen.rounds] == [16] * ROUNDS
    assert model_hash(full.model) == model_hash(functional.model)


def test_the_mean_of_groups_is_the_mean_over_sites(run, grouped, make_study):
    """Of sixteen sites in three groups, as from one sum; but for what float32 holds of each."""
    keys = {"privacy": {"noise": "none", "epsilon": None, "delta": None}}
    train = {"rounds": 1, "spare_rounds": 0, "optimizer": "sgd", "sample_rate": 1.0}
    found = [
        run(make_study(**keys, train=train, secure_aggregation={"min_sites": 15, **more}), 16, Functional)[0]
        for more in ({}, {"group_size": 5})
    ]

    for name, array in found[0].model.items():
        assert found[1].model[name] == pytest.approx(array, abs=1e-5)


@pytest.mark.parametrize("how", [LSA1, Functional])
def test_a_lost_group_does_not_lose_the_round(run, grouped, how):
    """Of four; its sites are in the next, but for the one that was gone."""
    study = grouped(15, combine="median")
    lost = group_with("site-03", study, TRAIN_SUM, sorted(f"site-{i:02d}" for i in range(20)), 1)

    federation, seen, failed = run(study, 20, how, [Drop(site="site-03", first=1, last=1)])

    assert failed is None
    assert federation.done == ROUNDS
    assert sorted(seen.rounds[0].dropped) == sorted(lost)
    assert len(seen.rounds[1].sites) == 20


@pytest.mark.parametrize("how", [LSA1, Functional])
def test_too_few_groups_lose_it(run, grouped, how):
    """Two of three are nothing to take a median of."""
    federation, seen, failed = run(
        grouped(15, combine="median"), 15, how, [Drop(site="site-03", first=1, last=1)]
    )

    assert (federation.done, seen.rounds[0].sites) == (1, ())
    assert "all 2 rounds that the noise covers are used, 1 of 2 could be aggregated" in str(failed)


@pytest.mark.parametrize("how", [LSA1, Functional])
def test_whoever_spoils_a_sum_spoils_that_of_its_group_alone(run, grouped, how):
    """Nobody can tell who it was, so nobody is put out; the others' median is the round's."""
    study = grouped(15, combine="median")
    cohort = sorted(f"site-{i:02d}" for i in range(20))

    federation, seen, failed = run(study, 20, how, spoiler="site-11")

    assert failed is None
    assert (federation.done, federation.refused) == (ROUNDS, {})
    for number, report in enumerate(seen.rounds, start=1):
        assert sorted(report.dropped) == sorted(group_with("site-11", study, TRAIN_SUM, cohort, number))


def test_a_charged_run_has_groups_too(grouped, many, tmp_path):
    """Through `prepare`, with ledgers and the whole protocol."""
    run = prepare(grouped(15, "shared", combine="median"), many(15), 7, folder=tmp_path)
    try:
        run.start()
    finally:
        run.close()

    assert run.federation.done == ROUNDS
