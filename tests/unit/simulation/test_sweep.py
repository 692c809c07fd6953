"""A grid of points, read and named; what is none is refused in one line."""

import os

import pytest

from lepton_fl.errors import ConfigError
from lepton_fl.results import SweepAxis
from lepton_fl.simulation.sweep import grid, locked, name_of, read_axes, study_at


def test_values_are_numbers_truths_or_text():
    """As they read."""
    axes = read_axes(
        ["train.rounds=10,20", "privacy.epsilon=0.5,3", "split=iid,dirichlet:0.3", "a.b=true,false"]
    )

    assert [axis.values for axis in axes] == [(10, 20), (0.5, 3), ("iid", "dirichlet:0.3"), (True, False)]
    assert [type(value) for value in axes[1].values] == [float, int]


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (["privacy.epsilon"], "without gaps"),
        (["privacy.epsilon="], "without gaps"),
        (["=1"], "without gaps"),
        (["privacy.epsilon=1,,3"], "without gaps"),
        (["privacy.epsilon=1,1"], "each value once"),
        (["privacy.epsilon=1", "privacy.epsilon=3"], "each key once"),
        (["epsilon=1"], "a dotted key of study.toml"),
        (["study.name=a,b"], "a key that trains"),
    ],
)
def test_what_is_no_axis_is_refused(texts, why):
    """Before anything runs, with what is allowed."""
    with pytest.raises(ConfigError, match=f"--sweep.*found .* allowed: .*{why}"):
        read_axes(texts)


def test_the_grid_is_every_combination():
    """The last key varies fastest."""
    axes = (SweepAxis(key="a.b", values=(1, 2)), SweepAxis(key="split", values=("iid", "label-skew:2")))

    points = grid(axes)

    assert [name_of(point) for point in points] == [
        "a.b=1,split=iid",
        "a.b=1,split=label-skew-2",
        "a.b=2,split=iid",
        "a.b=2,split=label-skew-2",
    ]


@pytest.mark.parametrize("text", ["../x", "a/b", "a\0b", "<b>", " "])
def test_a_name_can_be_a_folder(text):
    """Whatever a value is, its folder lies where the others do."""
    assert not set(name_of({"task.positive": text})) & set("/\0<> ")


def test_a_point_replaces_keys_of_the_study(study):
    """How the sites come to be is none."""
    changed = study_at(study, {"privacy.epsilon": 1, "split": "iid", "sites": 5})

    assert changed.privacy.epsilon == 1.0
    assert changed.train == study.train


def test_a_folder_holds_one_sweep(tmp_path):
    """A second would write into the first one's ledgers; afterwards it may."""
    with (
        locked(tmp_path),
        pytest.raises(ConfigError, match="another sweep is at work here"),
        locked(tmp_path),
    ):
        pass

    with locked(tmp_path):
        pass


def test_a_process_left_behind_holds_the_folder_too(tmp_path):
    """The lock is as long as any descriptor of it that was handed on."""
    with locked(tmp_path) as lock:
        inherited = os.dup(lock)
    try:
        with pytest.raises(ConfigError, match="another sweep"), locked(tmp_path):
            pass
    finally:
        os.close(inherited)
