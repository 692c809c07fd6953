"""A sweep as a user runs it: whole simulations side by side, taken up where they were left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lepton_fl.privacy import Ledger
from lepton_fl.results import read_results, read_sweep

SHARED = ("--dataset", "heart", "--compare", "federated", "--out", "run")


def sweep(lepton, study, *more):
    return lepton("simulate", study, *SHARED, *more)


def refused(ended, code, *parts):
    """One plain line, the exit code, and nothing begun."""
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    for part in parts:
        assert part in ended.last


def test_a_sweep_from_values_to_report(lepton, short_study, tmp_path):
    """Each point a whole run with its own ledgers; taken up again it is there already, and can grow."""
    ended = sweep(lepton, short_study, "--sweep", "privacy.epsilon=1,3", "--json")

    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert [(p["name"], p["status"]) for p in found["points"]] == [
        ("privacy.epsilon=1", "completed"),
        ("privacy.epsilon=3", "completed"),
    ]
    assert 0 < found["points"][0]["epsilon"] <= 1 < found["points"][1]["epsilon"] <= 3
    for point in found["points"]:
        home = tmp_path / "run" / point["folder"]
        results = read_results(home / "results.json")
        assert results.study_id == point["study_id"]
        assert results.arms[0].mean.mean == point["arms"]["federated"]["mean"]
        assert (home / "report.html").exists()
        ledger = Ledger(home / "sites" / "cleveland" / "ledger.db")
        assert [row["round"] for row in ledger.history("cleveland-disease")] == [1, 2, 3]
        ledger.close()

    first = tmp_path / "run" / "points" / "privacy.epsilon=1" / "results.json"
    before = first.stat().st_mtime_ns
    again = sweep(lepton, short_study, "--sweep", "privacy.epsilon=1,3,8", "--resume")

    assert again.code == 0, again.err
    assert "3 points, 2 of them done before" in again.err
    assert "privacy.epsilon=8: completed" in again.err
    assert first.stat().st_mtime_ns == before
    assert "SIMULATED" in again.out

    page = tmp_path / "run" / "sweep.html"
    page.unlink()
    assert lepton("report", "run").out.strip() == "run/sweep.html"
    assert page.stat().st_size > 500

    refused(sweep(lepton, short_study, "--sweep", "privacy.epsilon=1,3"), 3, "holds a run already")
    other = ("--sweep", "train.lr=0.1,0.2", "--resume")
    refused(sweep(lepton, short_study, *other), 3, "another sweep", "'privacy.epsilon'", "'train.lr'")
    other = ("--sweep", "privacy.epsilon=1,3", "--seeds", "2", "--resume")
    refused(sweep(lepton, short_study, *other), 3, "another sweep", "--seeds 1", "--seeds 2")
    short_study.write_text(short_study.read_text().replace("lr = 0.03", "lr = 0.04"))
    refused(
        sweep(lepton, short_study, "--sweep", "privacy.epsilon=1,3", "--resume"), 3, "holds a run of study"
    )


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (("privacy.epsilonn=1,3",), 3, ("privacy.epsilonn", "did you mean 'epsilon'?")),
        (("privacy.epsilon=1,-2",), 3, ("privacy.epsilon=-2", "found -2", "greater than 0")),
        (("model.name=logreg,resnet",), 3, ("found 'resnet'", "auto, logreg, mlp")),
        (("study.name=a,b",), 3, ("study.name", "a key that trains")),
        (
            (
                "secure_aggregation.enabled=true",
                "privacy.noise=local,shared",
                "train.strategy=lockstep,fedavg",
            ),
            3,
            ("privacy.noise=shared,train.strategy=fedavg", "needs train.strategy = 'lockstep'"),
        ),
        (("sites=2,4",), 6, ("sites=2", "min_sites asks 3")),
        (("sites=4,half",), 3, ("found 'half'", "whole numbers")),
        (("sites=4,5", "split=iid,label-skew:0"), 3, ("found 'label-skew:0'", "quantity-skew:ALPHA")),
        (("privacy.epsilon=1,1.0",), 3, ("are one point",)),
        (("task.metric=auc,auprc",), 3, ("one metric",)),
        (("privacy.delta=1e-3,0.1",), 3, ("privacy.delta=0.1", "below 1/")),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else "",
)
def test_one_bad_value_refuses_the_sweep_before_it_begins(lepton, short_study, tmp_path, words, code, parts):
    """Naming key, found and allowed; the good points are not run either."""
    options = [word for text in words for word in ("--sweep", text)]

    refused(sweep(lepton, short_study, *options), code, *parts)
    assert not (tmp_path / "run").exists()


def test_a_bad_drop_refuses_the_sweep(lepton, short_study, tmp_path):
    """No such site at any point."""
    refused(
        sweep(lepton, short_study, "--sweep", "train.lr=0.1", "--drop", "hungray@1"), 3, "hungray", "hungary"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [("--policies", "p"), ("--split", "iid")])
def test_what_a_sweep_cannot_take_is_usage(lepton, short_study, more):
    """One set of ledgers for many runs; a cut without a number of sites."""
    assert sweep(lepton, short_study, "--sweep", "train.lr=0.1", *more).code == 2


def test_a_run_is_not_taken_for_a_sweep(lepton, short_study):
    """Its folder is left alone."""
    assert lepton("simulate", short_study, *SHARED).code == 0

    refused(sweep(lepton, short_study, "--sweep", "train.lr=0.1", "--resume"), 3, "holds a run, not a sweep")


def test_points_that_stop_end_with_exit_6(lepton, short_study, tmp_path):
    """As their simulation would have; the sweep says which, and why."""
    short_study.write_text(short_study.read_text().replace("min_sites = 3", "min_sites = 4"))

    ended = sweep(lepton, short_study, "--sweep", "train.lr=0.1", "--drop", "hungary@2")

    refused(ended, 6, "1 of 1 points did not complete", "train.lr=0.1: stopped: Stopped after 1 of 3 rounds.")
    assert read_sweep(tmp_path / "run" / "sweep.json").status == "incomplete"


def test_artificial_sites_are_labelled_from_the_command_line(lepton, short_study, tmp_path):
    """In the terminal and in the results; natural sites are not."""
    cut = ("--sites", "4", "--split", "quantity-skew:0.5")
    label = "artificial sites: one table cut 4 ways (quantity-skew:0.5)"

    ended = lepton("simulate", short_study, *SHARED, *cut)
    natural = lepton("simulate", short_study, *SHARED[:-1], "natural")

    assert ended.code == natural.code == 0, ended.err
    assert label in ended.err
    assert label in ended.out
    assert label in read_results(tmp_path / "run" / "results.json").labels
    assert "artificial" not in natural.err + natural.out


def processes_of(folder: Path) -> list[int]:
    """The processes with the folder in their arguments."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words:
            found.append(int(place.name))
    return found


def until(happened, what):
    """Wait, and fail after two minutes."""
    for _ in range(1200):
        if happened():
            return
        time.sleep(0.1)
    pytest.fail(f"two minutes without {what}")


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_a_killed_point_leaves_the_rest_and_an_interrupt_ends_all(short_study, tmp_path):
    """kill -9 of one: the other completes, exit 1. Taken up and interrupted: partial results, exit 130."""
    out = tmp_path / "run"
    long = out / "points" / "train.rounds=3000"
    # A test runner in the background ignores SIGINT, and its child would inherit that.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from lepton_fl.cli import main; main()"
    )
    words = ("simulate", short_study, *SHARED[:-1], out, "--sweep", "train.rounds=3000,3", "--jobs", "2")

    def start(*more):
        return subprocess.Popen(
            [sys.executable, "-c", program, *map(str, words), *more],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    run = start()
    try:
        until((long / "checkpoint.safetensors").exists, "a round")
        (pid,) = processes_of(long)
        os.kill(pid, signal.SIGKILL)
        _, err = run.communicate(timeout=120)
    finally:
        run.kill()

    assert run.returncode == 1, err
    assert "train.rounds=3000: killed: its process was killed (SIGKILL)" in err.strip().splitlines()[-1]
    assert [p.status for p in read_sweep(out / "sweep.json").points] == ["killed", "completed"]

    run = start("--resume")
    try:
        # Its process first: the log of the run that was killed has rounds too.
        until(lambda: processes_of(long), "the point's process")
        until(lambda: "\nround " in (long / "console.log").read_text(), "a round")
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=120)
    finally:
        run.kill()

    assert run.returncode == 130, err
    assert "interrupted: 1 of 2 points did not complete" in err.strip().splitlines()[-1]
    assert [p.status for p in read_sweep(out / "sweep.json").points] == ["interrupted", "completed"]
    assert read_results(long / "results.json").status == "interrupted"
    assert processes_of(out) == []
