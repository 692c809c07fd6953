"""results.json: what is written is read back, and what is none is refused in one line."""

import json
from pathlib import Path

import pytest
from scipy.stats import binomtest

from lepton_fl.errors import ConfigError
from lepton_fl.results import (
    Interval,
    Promise,
    Results,
    Sweep,
    SweepAxis,
    SweepPoint,
    read_results,
    read_sweep,
    schema,
    sweep_schema,
    wilson,
    write_results,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def results():
    return Results(
        status="completed",
        verdict="caf\u00e9",
        labels=("SIMULATED",),
        study_id="0" * 64,
        study_name="heart",
        purpose="",
        run_id="r",
        metric="auc",
        strategy="lockstep",
        model=None,
        promise=Promise(
            epsilon=3.0,
            delta=1e-5,
            unit="record",
            holds_against="the server",
            noise="local",
            clip=1.0,
            noise_multiplier=1.2,
            sample_rate=0.1,
            steps=21,
        ),
        rounds_planned=20,
        rounds=(),
        sites=(),
        arms=(),
        gain=Interval(mean=0.01, low=-0.02, high=0.04),
        seeds=(0,),
        bootstrap=100,
        command="lepton-fl simulate",
        versions={},
        hardware="",
        started="2026-01-01T00:00:00+00:00",
        seconds=1.0,
    )


def test_results_are_read_as_they_were_written(results, tmp_path):
    """Every figure to the last bit."""
    write_results(results, tmp_path / "results.json")

    assert read_results(tmp_path / "results.json") == results


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"format": "lepton-fl/results/1"}',
    ],
    ids=lambda content: repr(content[:12]),
)
def test_garbage_is_refused(tmp_path, content):
    """By the file's name and the format it lacks."""
    path = tmp_path / "results.json"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=r"results.json: not a file of format lepton-fl/results/1"):
        read_results(path)


def test_another_format_is_refused(results, tmp_path):
    """Its figures may not mean what this release takes them for."""
    path = tmp_path / "results.json"
    write_results(results, path)
    path.write_text(path.read_text(encoding="utf-8").replace("results/1", "results/2"), encoding="utf-8")

    with pytest.raises(ConfigError, match="not a file of format"):
        read_results(path)


def test_an_unknown_key_is_refused(results, tmp_path):
    """A figure that this release does not know would be lost in its report."""
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**results.model_dump(mode="json"), "more": 1}), encoding="utf-8")

    with pytest.raises(ConfigError, match="not a file of format"):
        read_results(path)


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_what_cannot_be_read_names_the_command_that_writes_it(tmp_path, name):
    """No file, or a folder."""
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        read_results(tmp_path / name)

    assert caught.value.fix.startswith("lepton-fl simulate")


def test_the_published_schema_is_the_models():
    """docs/results.schema.json is generated; whoever changes the one changes the other."""
    assert (ROOT / "docs" / "results.schema.json").read_text(encoding="utf-8") == schema()


@pytest.fixture
def sweep():
    values = {"a.b": True, "c.d": 1, "e.f": 0.5, "split": "iid"}
    return Sweep(
        status="incomplete",
        labels=("SIMULATED",),
        study_name="heart",
        purpose="",
        metric="auc",
        axes=tuple(SweepAxis(key=key, values=(value,)) for key, value in values.items()),
        points=(
            SweepPoint(
                name="p",
                folder="points/p",
                values=values,
                study_id="0" * 64,
                status="killed",
                arms={"federated": Interval(mean=0.7, low=0.6, high=0.8)},
            ),
        ),
        seeds=(0, 1),
        options=("--dataset", "heart"),
        command="lepton-fl simulate",
        started="2026-01-01T00:00:00+00:00",
        seconds=1.0,
    )


def test_a_sweep_is_read_as_it_was_written(sweep, tmp_path):
    """A truth stays a truth, a whole number whole."""
    write_results(sweep, tmp_path / "sweep.json")

    found = read_sweep(tmp_path / "sweep.json")

    assert found == sweep
    assert [type(value) for value in found.points[0].values.values()] == [bool, int, float, str]


@pytest.mark.parametrize("content", [b"", b"{}", b'{"format": "lepton-fl/results/1"}'])
def test_what_is_no_sweep_is_refused(tmp_path, content):
    """By the file's name and the format it lacks."""
    path = tmp_path / "sweep.json"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=r"sweep.json: not a file of format lepton-fl/sweep/1"):
        read_sweep(path)


def test_the_published_schema_of_a_sweep_is_the_models():
    """docs/sweep.schema.json is generated too."""
    assert (ROOT / "docs" / "sweep.schema.json").read_text(encoding="utf-8") == sweep_schema()


@pytest.mark.parametrize(("hits", "of"), [(0, 10), (10, 10), (5, 10), (1, 1000)])
def test_wilson_interval_is_scipys(hits, of):
    """Also where nothing, or everything, was hit."""
    expected = binomtest(hits, of).proportion_ci(method="wilson")

    found = wilson(hits, of)

    assert found.mean == hits / of
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_a_share_of_nothing_is_not_defined():
    """Neither 0 nor 1."""
    assert wilson(0, 0).mean is None
