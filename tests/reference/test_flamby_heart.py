"""Our accuracies on Fed-Heart-Disease lie within two standard errors of FLamby's published ones."""

import numpy as np
import pytest
from scipy import stats

pytestmark = pytest.mark.reference


def test_the_rows_are_those_that_flamby_publishes(flamby):
    """199/104, 172/89, 30/16 and 85/45 rows, and 486/254 in the pool."""
    data = flamby.data()

    sizes = [(len(train), len(test)) for train, test in data.sites.values()]
    assert sizes == [(199, 104), (172, 89), (30, 16), (85, 45)]
    assert tuple(len(table) for table in data.pooled) == (486, 254)


def test_each_table_is_scaled_by_its_own_training_rows(flamby):
    """Mean 0 and deviation 1 on the training rows, but for a cholesterol that Switzerland writes as 0."""
    for hospital, (train, _) in flamby.data().sites.items():
        deviation_F = train.x_NF.std(axis=0, ddof=1, dtype=np.float64)
        expected_F = [0 if (hospital, name) == ("switzerland", "chol") else 1 for name in flamby.NAMES]

        assert np.allclose(train.x_NF.mean(axis=0, dtype=np.float64), 0, atol=1e-5)
        assert np.allclose(deviation_F, expected_F, atol=1e-4)


def test_initial_weights_of_the_privacy_table_are_those_of_flamby(flamby):
    """1,500 full-batch steps from them give the published accuracies without privacy, to the last row."""
    data = flamby.data()
    train = [table for table, _ in data.sites.values()]
    x_NF = np.concatenate([table.x_NF for table in train]).astype(np.float64)
    y_N = np.concatenate([table.y_N for table in train])
    case = flamby.CASES["no-dp"]

    for seed, published in zip(case.seeds, case.published_S, strict=True):
        linear = flamby.privacy_weights(seed)
        weight_F = linear.weight.detach().numpy()[0].astype(np.float64)
        bias = linear.bias.item()
        for _ in range(1500):
            error_N = 1 / (1 + np.exp(-(x_NF @ weight_F + bias))) - y_N
            weight_F = weight_F - 1e-3 * (error_N @ x_NF) / len(y_N)
            bias -= 1e-3 * error_N.mean()
        right = [np.mean((test.x_NF @ weight_F + bias > 0) == test.y_N) for _, test in data.sites.values()]

        assert np.mean(right) == pytest.approx(published, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "key",
    [
        "pooled",
        "local-0",
        "local-1",
        "local-2",
        "local-3",
        "fedavg",
        "fedadam",
        "fedyogi",
        "no-dp",
        "dp-10",
        "dp-1",
    ],
)
def test_accuracy_is_within_two_standard_errors_of_the_published(flamby, key):
    """The mean over the published seeds, from the same initial weights."""
    case = flamby.CASES[key]
    ours_S = tuple(case.measure(seed) for seed in case.seeds)

    found = flamby.Comparison.of(case.published_S, ours_S)
    difference, error = found.difference, found.standard_error
    known = 0.0
    if key == "pooled":
        # Ours is one row of 254 above the published pool (docs/reference.md): too little for five seeds to
        # show that it is no more.
        known = 1 / 254
        ours_S = (*ours_S, *(case.measure(seed) for seed in range(142, 150)))
        difference = np.mean(ours_S) - np.mean(case.published_S)
        error = np.hypot(stats.sem(ours_S), stats.sem(case.published_S))
    assert abs(difference) <= 2 * error + known
