"""Baselines are computed once for the same records, and anew for any others."""

from dataclasses import replace

import numpy as np
import pytest

from lepton_fl.simulation.kept import kept_scores


@pytest.fixture
def score(tmp_path):
    """Score, and count what was computed."""

    class Score:
        computed = 0

        def __call__(self, splits, *, arm="local", seed=0, folder=tmp_path / "kept"):
            def compute():
                self.computed += 1
                return {name: (test.y_N, test.x_NF[:, 0] / 3.0) for name, (_, test) in splits.items()}

            return kept_scores(folder, arm, splits, seed, compute)

    return Score()


def test_the_same_records_are_scored_once(score, splits):
    """And what is read is what was computed, bit for bit."""
    first, second = score(splits), score(splits)

    assert score.computed == 1
    for name in splits:
        for a, b in zip(first[name], second[name], strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


def test_without_a_folder_nothing_is_kept(score, splits):
    """Computed each time."""
    score(splits, folder=None)
    score(splits, folder=None)

    assert score.computed == 2


@pytest.mark.parametrize("other", [{"arm": "pooled"}, {"seed": 1}])
def test_another_arm_or_seed_is_another_score(score, splits, other):
    """Nothing is mixed up."""
    score(splits)
    score(splits, **other)

    assert score.computed == 2


@pytest.mark.parametrize("column", ["x_NF", "y_N", "raw_NC"])
def test_one_changed_cell_is_another_table(score, splits, column):
    """In what the study reads, or in what only trees do."""
    score(splits)
    train, test = splits["a"]
    cells = getattr(train, column).copy()
    cells.flat[0] += 1

    score({**splits, "a": (replace(train, **{column: cells}), test)})

    assert score.computed == 2


def test_another_scikit_learn_is_another_score(score, splits, monkeypatch):
    """What an older release scored is no figure of this one."""
    score(splits)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.1")
    score(splits)

    assert score.computed == 2


def test_a_damaged_file_is_computed_anew(score, splits, tmp_path):
    """And replaced."""
    score(splits)
    (file,) = (tmp_path / "kept").iterdir()
    file.write_bytes(b"none")

    score(splits)
    score(splits)

    assert score.computed == 2
