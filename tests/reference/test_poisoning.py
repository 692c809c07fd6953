"""The table of docs/robustness.md, one seed of it: what one poisoned site of fifteen does to each rule."""

import pytest

from lepton_fl.tasks.metrics import Bootstrap

pytestmark = [pytest.mark.slow, pytest.mark.reference]


@pytest.fixture
def auc(poisoning):
    """Of all held-out records, scored by the model of a run without privacy."""

    def judged(attack, rule):
        scored = poisoning.scored(((15, 1), "no privacy", attack, rule), 0)
        return Bootstrap("auc", {"case": [scored]}, seed=0, resamples=1).judge("case")[2].mean

    return judged


@pytest.mark.parametrize("attack", ["sign flip, 10 times", "up to the range check"])
def test_one_site_ruins_a_sum_and_no_robust_rule(auc, attack):
    """It takes ten points of the mean, seventeen by the table over its seeds, and not three of the median."""
    unharmed = auc("nobody", "one sum")

    assert auc(attack, "one sum") < unharmed - 0.1
    assert auc(attack, "mean") < unharmed - 0.1
    assert auc(attack, "median") > unharmed - 0.03
    assert auc(attack, "geometric median") > unharmed - 0.03
