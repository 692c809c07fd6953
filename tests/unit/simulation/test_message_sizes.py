"""What a plan says that secure aggregation adds for each other site is what a round sends."""

import re

import pytest

from lepton_fl.cli.planning import PER_PEER
from lepton_fl.messages import SECAGG
from lepton_fl.simulation import InProcessGrid
from lepton_fl.simulation.run import prepare


@pytest.fixture
def sent(make_study, splits, monkeypatch):
    """Bytes of the protocol to a site, and from it, in a round of so many."""

    def size(message):
        record = message.content.config_records.get(SECAGG, {})
        return sum(len(value) for value in record.values() if isinstance(value, bytes))

    def run(sites, suite):
        study = make_study(
            train={"rounds": 1, "spare_rounds": 0}, secure_aggregation={"suite": suite, "min_sites": 3}
        )
        table = next(iter(splits.values()))
        total = {"up": 0, "down": 0}
        push = InProcessGrid.push_messages

        def counting(self, messages):
            asked = list(messages)
            names = list(push(self, asked))
            total["down"] += sum(map(size, asked))
            total["up"] += sum(size(self._replies[name]) for name in names)
            return names

        monkeypatch.setattr(InProcessGrid, "push_messages", counting)
        started = prepare(study, {f"s{i}": table for i in range(sites)}, 0, masked=True)
        started.start()
        started.close()
        monkeypatch.undo()
        return {way: total[way] / sites for way in total}

    return run


@pytest.mark.parametrize("suite", ["LSA1", "LSA1-PQ"])
def test_each_other_site_adds_what_a_plan_says(sent, suite):
    """To within a tenth, by two cohorts that differ by two sites."""
    few, more = sent(4, suite), sent(6, suite)

    stated = dict(zip(("up", "down"), re.findall(r"([0-9.]+) kB", PER_PEER[suite]), strict=True))
    for way, kilobytes in stated.items():
        assert (more[way] - few[way]) / 2 == pytest.approx(1000 * float(kilobytes), rel=0.1)
