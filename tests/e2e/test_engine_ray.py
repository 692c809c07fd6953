"""`--engine ray` and the Flower app of the template, up to where Flower's processes would start."""

import importlib.util
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate


def simulate(lepton, study, *options):
    return lepton("simulate", study, "--engine", "ray", "--out", "run", *options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--data", "."), "--data"),
        (("--dataset", "heart", "--seeds", "2"), "--seeds"),
        (("--dataset", "heart", "--curve", "1"), "--curve"),
        (("--dataset", "heart", "--secagg", "full"), "--secagg"),
        (("--dataset", "heart", "--policies", "."), "--policies"),
        (("--dataset", "heart", "--json"), "--json"),
        (("--dataset", "heart", "--open"), "--open"),
    ],
)
def test_what_stock_flower_cannot_do_is_refused(lepton, short_study, options, named):
    """Own records before all."""
    done = simulate(lepton, short_study, *options)

    assert done.code == 3
    assert f"has no {named}" in done.last
    assert not Path("run").exists()


def test_what_stock_flower_cannot_protect_is_refused(lepton, short_study):
    done = simulate(lepton, short_study, "--dataset", "heart")

    assert done.code == 3
    assert "does not run under stock Flower" in done.last
    assert not Path("run").exists()


def test_without_ray_the_extra_is_named(lepton, monkeypatch):
    lepton("init", "app", "--template", "flower")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    done = simulate(lepton, "app/study.toml", "--dataset", "heart")

    assert done.code == 3
    assert done.last.endswith("(fix: pip install 'lepton-fl[simulation]')")
    assert not Path("run").exists()


# flwr calls pathspec by a name that it has given up since.
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_flower_bundles_the_template_and_nothing_else(lepton):
    """Its configuration in order, without a warning."""
    lepton("init", "app", "--template", "flower")

    _, warnings = load_and_validate(Path("app/pyproject.toml"))
    with zipfile.ZipFile(BytesIO(build_fab_from_disk(Path("app")))) as bundle:
        names = set(bundle.namelist())

    assert warnings == []
    assert names == {"pyproject.toml", "flower_app.py", "study.toml", ".info/CONTENT"}


def test_flower_is_told_where_this_folder_is(lepton, tmp_path):
    """Its processes run wherever it likes."""
    lepton("init", "app", "--template", "flower")

    assert f'out = "{tmp_path}/app/runs"' in Path("app/pyproject.toml").read_text()
    assert f"FLWR_HOME={tmp_path}/app/.flwr" in Path("app/flower.env").read_text()


def test_a_template_overwrites_nothing(lepton):
    lepton("init", "app", "--template", "flower")

    done = lepton("init", "app", "--template", "flower")

    assert done.code == 3
    assert "is not overwritten" in done.last
