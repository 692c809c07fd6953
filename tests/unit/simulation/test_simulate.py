"""`simulate` charges one run, rehearses the rest, and leaves a whole result however it ends."""

import tomllib
from dataclasses import replace
from importlib import import_module
from importlib.resources import files

import numpy as np
import pytest
from safetensors.numpy import load_file

from lepton_fl.config import parse
from lepton_fl.data import Contract, load_dataset
from lepton_fl.errors import BudgetExhausted, ConfigError, DataError, TooFewSites
from lepton_fl.federation import PublicTable
from lepton_fl.privacy import Ledger
from lepton_fl.results import read_results
from lepton_fl.secagg.errors import Phase, PolicyViolation
from lepton_fl.simulation import Drop, check_plan, freeze, simulate
from lepton_fl.simulation.simulate import Silent
from lepton_fl.study import Study, override
from lepton_fl.tasks import model_hash
from lepton_fl.tasks.metrics import Bootstrap

HOSPITALS = ("cleveland", "hungary", "long-beach", "switzerland")


class Interrupting(Silent):
    """Ctrl-C after a round."""

    def __init__(self, after):
        self.after = after

    def round(self, summary, planned, allowed):
        if summary.round == self.after:
            raise KeyboardInterrupt


def charged(folder, site):
    """The rounds in a site's ledger file."""
    ledger = Ledger(folder / site / "ledger.db")
    rounds = [row["round"] for row in ledger.history(f"{site}-disease")]
    ledger.close()
    return rounds


def test_a_run_from_tables_to_results(heart_plan):
    """What is returned is what is on disk, and the model is the one it names."""
    plan = heart_plan()

    results = simulate(plan)

    assert results == read_results(plan.out / "results.json")
    assert results.status == "completed"
    assert [r.round for r in results.rounds] == [1, 2, 3]
    assert tuple(site.site for site in results.sites) == HOSPITALS
    assert model_hash(load_file(plan.out / "model.safetensors")) == results.model.sha256
    assert {"SIMULATED", "simulation noise", "secure aggregation (LSA1) ran"} == set(results.labels)


def test_a_run_can_be_had_again_from_its_folder(heart_plan, tmp_path):
    """study.toml there is the study that ran, and gives the same model."""
    plan = heart_plan()
    results = simulate(plan)
    raw = tomllib.loads((plan.out / "study.toml").read_text())
    study = parse(Study, raw, file="study.toml")

    again = simulate(heart_plan(study=study, out=tmp_path / "again"))

    assert study.id == results.study_id
    assert again.model.sha256 == results.model.sha256


@pytest.mark.parametrize("how", ["unit", "time"])
def test_a_cutoff_in_time_judges_every_seed_on_the_same_records(heart_plan, monkeypatch, how):
    """Their luck is the same for all seeds, and the intervals are told so."""
    told = []

    def spy(*args, same_records, **more):
        told.append(same_records)
        return Bootstrap(*args, same_records=same_records, **more)

    monkeypatch.setattr(import_module("lepton_fl.simulation.simulate"), "Bootstrap", spy)
    raw = heart_plan().study.model_dump(mode="json", exclude_none=True)
    del raw["features"]["columns"]["age"]
    by = {"time": {"time_column": "age", "cutoff": 55}, "unit": {}}
    study = parse(Study, raw | {"evaluation": {"split": how, **by[how]}}, file="study.toml")
    tables = load_dataset("heart", Contract.of(study))

    results = simulate(heart_plan(study=study, tables=tables, seeds=(0, 1), compare=("federated",)))

    assert told == [how == "time"]
    assert results.arms[0].seeds == 2


def test_the_sites_are_charged(heart_plan):
    """Three of the four rounds that the noise covers, so less than was promised."""
    plan = heart_plan()

    results = simulate(plan)

    for site in results.sites:
        assert charged(plan.out / "sites", site.site) == [1, 2, 3]
        assert 0 < site.epsilon_run == site.epsilon_spent < 4.0 == site.epsilon_allowed


def write_policies(folder, **epsilon):
    """A policy for each hospital: epsilon 4 in all, or as told."""
    for site in ("cleveland", "hungary", "long-beach", "switzerland"):
        allowed = epsilon.get(site, 4.0)
        (folder / site).mkdir(parents=True)
        (folder / site / "policy.toml").write_text(
            f'[data]\nid = "{site}-disease"\n'
            f"[budget]\nepsilon_total = {allowed}\nepsilon_per_study = {allowed}\ndelta_total = 1e-3\n"
            '[require]\nsecure_aggregation = false\napproval = "auto"\n'
        )
    return folder


def test_a_refusal_by_the_protocol_is_the_sites_own_words(heart_plan, tmp_path, monkeypatch):
    """Such errors know a phase and a culprit too; they come through as they are, with the site's name."""

    def refuse(*_, **__):
        raise PolicyViolation("colluders is 1", phase=Phase.ADVERTISE)

    monkeypatch.setattr("lepton_fl.site.mods.admit_study", refuse)

    with pytest.raises(
        PolicyViolation, match=r"site cleveland: advertise: colluders is 1 \(and 3 more"
    ) as refused:
        simulate(heart_plan())

    assert refused.value.phase is Phase.ADVERTISE


def test_a_spent_budget_refuses_the_next_run(heart_plan, tmp_path):
    """With the site's own numbers, file and key, and nothing further is charged."""
    policies = write_policies(tmp_path / "policies")
    spent = simulate(heart_plan(policies=policies)).sites[0].epsilon_spent

    with pytest.raises(BudgetExhausted) as refused:
        simulate(heart_plan(policies=policies, out=tmp_path / "second"))

    assert refused.value.message.startswith("site cleveland: privacy budget of data set cleveland-disease")
    assert f"spent epsilon {spent:.3g}" in refused.value.message
    assert "allowed 4 at delta 0.001" in refused.value.message
    assert str(policies / "cleveland" / "policy.toml") in refused.value.message
    assert "and 3 more sites" in refused.value.message
    assert charged(policies, "cleveland") == [1, 2, 3]
    assert not (tmp_path / "second").exists()


def test_a_site_own_policy_is_obeyed(heart_plan, tmp_path):
    """One hospital allows half of what the study asks, and stays out."""
    policies = write_policies(tmp_path / "policies", hungary=2.0)

    results = simulate(heart_plan(policies=policies))

    status = {site.site: site.status for site in results.sites}
    assert status.pop("hungary") == "the site's policy refuses the study (budget.epsilon_per_study)"
    assert set(status.values()) == {"took part"}
    assert charged(policies, "hungary") == []


def test_rehearsals_charge_nothing(heart_plan):
    """Another seed, both baselines and a point of the curve: the ledgers hold the first run only."""
    plan = heart_plan(compare=("local", "federated", "pooled"), seeds=(0, 1), curve=(1.0,))

    results = simulate(plan)

    assert charged(plan.out / "sites", "cleveland") == [1, 2, 3]
    assert {arm.seeds for arm in results.arms} == {2}
    assert [(point.epsilon, point.noise) for point in results.curve] == [(1.0, "local"), (1.0, "shared")]


def test_an_interrupt_leaves_what_there_is(heart_plan):
    """Two of three rounds, a model, and a word that says so."""
    plan = heart_plan()

    results = simulate(plan, Interrupting(after=2))

    assert results.status == "interrupted"
    assert results == read_results(plan.out / "results.json")
    assert [r.round for r in results.rounds] == [1, 2]
    assert results.verdict.startswith("Stopped after 2 of 3 rounds.")
    assert (plan.out / "model.safetensors").exists()


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_run_is_completed_by_resuming(heart_plan, tmp_path, after):
    """With the model of a run that was not interrupted, and each round charged once."""
    whole = simulate(heart_plan(out=tmp_path / "whole"))
    simulate(heart_plan(), Interrupting(after))

    plan = heart_plan(resume=True)
    results = simulate(plan)

    assert results.status == "completed"
    assert [r.round for r in results.rounds] == [1, 2, 3]
    assert results.model.sha256 == whole.model.sha256
    assert charged(plan.out / "sites", "cleveland") == [1, 2, 3]


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_a_run_of_any_strategy_is_completed_by_resuming(heart_plan, tmp_path, strategy):
    """Private training at the sites included: the model of a run that was not interrupted."""
    changes = {"privacy.noise": "local", "train.strategy": strategy, "train.local_steps": 2}
    if strategy == "fedprox":
        changes["train.proximal_mu"] = 0.1
    study = override(heart_plan().study, changes)
    whole = simulate(heart_plan(study=study, out=tmp_path / "whole"))
    simulate(heart_plan(study=study), Interrupting(after=2))

    results = simulate(heart_plan(study=study, resume=True))

    assert [r.round for r in results.rounds] == [1, 2, 3]
    assert results.model.sha256 == whole.model.sha256


EARLY = {"signal": "updates", "patience": 1, "tolerance": 0.99}


@pytest.fixture
def public_file(tmp_path):
    """Some patients of all four hospitals, declared public by being named."""
    lines = files("lepton_fl.data").joinpath("bundled/heart.csv").read_text().splitlines()
    path = tmp_path / "public.csv"
    path.write_text("\n".join([lines[0], *lines[1::5]]) + "\n")
    return path


def test_a_run_that_stops_early_is_completed_and_costs_less(heart_plan, tmp_path):
    """Rounds that were not run are not charged, and the promise is the one for all of them."""
    whole = override(heart_plan().study, {"train.rounds": 8})
    study = override(whole, {"train.early_stopping": EARLY})
    plan = heart_plan(study=study)

    all_of_it, early = simulate(heart_plan(study=whole, out=tmp_path / "whole")), simulate(plan)

    done = len(early.rounds)
    assert early.status == "completed"
    assert 2 <= done < 8
    assert early.verdict.startswith(f"Stopped early at round {done} of 8: {early.stopped_early}. Federated ")
    assert early.rounds[-1].metric is not None
    assert early.promise == all_of_it.promise
    for stopped, ended in zip(early.sites, all_of_it.sites, strict=True):
        assert charged(plan.out / "sites", stopped.site) == list(range(1, done + 1))
        assert stopped.epsilon_spent < ended.epsilon_spent
    assert all_of_it.stopped_early is None


def test_a_run_that_stopped_early_is_not_resumed(heart_plan):
    """It is completed: the rest of its rounds was not agreed on."""
    study = override(heart_plan().study, {"train.rounds": 8, "train.early_stopping": EARLY})
    simulate(heart_plan(study=study))

    with pytest.raises(ConfigError, match="holds a completed run"):
        simulate(heart_plan(study=study, resume=True))


def test_a_run_stops_on_a_public_table(heart_plan, public_file):
    """Charged run and rehearsal alike; the reason says on what."""
    early = {"signal": "public", "patience": 2, "tolerance": 0.9}
    study = override(heart_plan().study, {"train.rounds": 8, "train.early_stopping": early})

    results = simulate(heart_plan(study=study, public=PublicTable(public_file, study), seeds=(0, 1)))

    assert [r.round for r in results.rounds] == [1, 2, 3]
    assert results.stopped_early.startswith("auc on the public table has not risen by more than 0.9 above ")
    assert results.arms[0].seeds == 2


def test_without_a_public_table_nothing_is_looked_at_instead(heart_plan):
    """Not the held-out records, which the simulator has at hand; and nothing is left behind."""
    early = {"signal": "public", "patience": 1, "tolerance": 0.0}
    plan = heart_plan(study=override(heart_plan().study, {"train.early_stopping": early}))

    with pytest.raises(ConfigError, match="needs a public table"):
        simulate(plan)

    assert not plan.out.exists()


def test_a_sites_own_table_is_not_a_public_one(heart_plan, tmp_path):
    """The run would stop on the records that it is judged by."""
    early = {"signal": "public", "patience": 1, "tolerance": 0.0}
    study = override(heart_plan().study, {"train.early_stopping": early})
    lines = files("lepton_fl.data").joinpath("bundled/heart.csv").read_text().splitlines()
    path = tmp_path / "hungary.csv"
    path.write_text("\n".join(line for line in lines if line.startswith(("hospital", "hungary"))) + "\n")

    with pytest.raises(DataError, match="site hungary: its table is the public one"):
        simulate(heart_plan(study=study, public=PublicTable(path, study)))


def test_nothing_to_resume_is_refused(heart_plan):
    """There is no checkpoint."""
    with pytest.raises(ConfigError, match="holds no checkpoint to resume from"):
        simulate(heart_plan(resume=True))


def test_another_study_is_not_resumed(heart_plan):
    """The checkpoint is of the first."""
    plan = heart_plan()
    simulate(plan, Interrupting(after=1))

    with pytest.raises(ConfigError, match="found a checkpoint of study"):
        simulate(heart_plan(study=override(plan.study, {"train.lr": 0.3}), resume=True))


def test_another_seed_is_not_resumed(heart_plan):
    """It would hold out records that the first rounds have trained on."""
    simulate(heart_plan(), Interrupting(after=1))

    with pytest.raises(
        ConfigError, match=r"found a checkpoint of 'seed 0, sites .*, expected 'seed 1, sites "
    ):
        simulate(heart_plan(seeds=(1,), resume=True))


def test_too_few_sites_are_refused_before_anything_runs(heart_plan):
    """Five are asked for, and there are four."""
    study = override(heart_plan().study, {"secure_aggregation.min_sites": 5})

    with pytest.raises(TooFewSites, match=r"4 sites, secure_aggregation\.min_sites asks 5"):
        simulate(heart_plan(study=study))


def test_a_delta_beyond_the_smallest_site_is_refused(heart_plan):
    """At delta >= 1/units one patient may be published whole."""
    study = override(heart_plan().study, {"privacy.delta": 0.05})

    with pytest.raises(ConfigError, match=r"privacy\.delta: found 0\.05, allowed: below 1/"):
        simulate(heart_plan(study=study))


def test_freeze_fills_in_the_expected_batch(make_study, tables):
    """The rate times the training units of a typical site: .2 * 70 * .75."""
    study = freeze(make_study(train={"expected_batch": None}), tables)

    assert study.train.expected_batch == 10.5


def test_freeze_leaves_a_declared_batch_alone(make_study, tables):
    """It is the study's."""
    study = make_study(train={"expected_batch": 8.0})

    assert freeze(study, tables) is study


def test_no_seed_of_the_command_line_is_too_large(heart_plan, tmp_path):
    """Generators are seeded by digest."""
    results = simulate(heart_plan(seeds=(2**80,), out=tmp_path / "large"))

    assert results.seeds == (2**80,)
    assert np.isfinite(results.arms[0].mean.mean)


def test_a_drop_that_is_survived(heart_plan):
    """Named by site and round, cheaper for the site, and the same in every rehearsal."""
    study = override(heart_plan().study, {"secure_aggregation.min_survivors": 3})
    plan = heart_plan(study=study, drops=(Drop(site="hungary", first=2),), seeds=(0, 1))

    results = simulate(plan)

    assert results.status == "completed"
    assert [r.dropped for r in results.rounds] == [{}, *[{"hungary": "no answer before the deadline"}] * 2]
    spent = {site.site: site.epsilon_run for site in results.sites}
    assert spent["hungary"] < spent["cleveland"] == spent["switzerland"]
    assert "simulated drops: hungary from round 2" in results.labels
    assert results.arms[0].seeds == 2


def test_a_drop_that_stops_the_run(heart_plan):
    """With the quorum gone no round is kept; what was charged stays charged."""
    drops = (Drop(site="hungary", first=2), Drop(site="cleveland", first=2))
    study = override(heart_plan().study, {"secure_aggregation.min_survivors": 3})

    results = simulate(heart_plan(study=study, drops=drops))

    assert results.status == "stopped"
    assert results.verdict.startswith("Stopped after 1 of 3 rounds.")
    gone, lost = "no answer before the deadline", "no sum: advertise: 2 adverts, at least 3 are needed"
    reasons = {"cleveland": gone, "hungary": gone, "long-beach": lost, "switzerland": lost}
    assert [(r.sites, r.dropped) for r in results.rounds[1:]] == [((), reasons)] * 2


@pytest.mark.parametrize("asked", ["full", "functional"])
def test_how_sums_were_formed_is_said(heart_plan, asked):
    """In the labels and in the results, with what it promises a site; the model is the same."""
    plan = heart_plan(secagg=asked)

    results = simulate(plan)

    other = simulate(replace(plan, out=plan.out / "other", secagg={"full": "functional"}.get(asked, "full")))
    label = {
        "full": "secure aggregation (LSA1) ran",
        "functional": "no masks: the simulator formed the sums",
    }[asked]
    assert label in results.labels
    assert results.secure_aggregation.ran == asked
    assert results.secure_aggregation.noise_factor == pytest.approx((4 / 3) ** 0.5)
    assert "hidden among at least min_sites - n_C = 3 honest sites" in results.secure_aggregation.hides
    numbers = results.model.parameters
    assert results.promise.leaves == (
        f"Each round releases {numbers} numbers, only as a sum over at least 4 sites."
    )
    by_who = results.promise.epsilon_against
    alone, together = "the server alone, and every reader of the model", "the server and 1 member together"
    # Who knows a share less sees more noise; what is promised holds with a member that colludes.
    assert by_who[alone] < by_who[together] <= results.promise.epsilon
    assert results.model.sha256 == other.model.sha256


def test_rehearsals_are_said_to_have_no_masks(heart_plan):
    """Only the charged run has the protocol in full."""
    results = simulate(heart_plan(seeds=(0, 1)))

    assert "secure aggregation (LSA1) ran, but for rehearsals" in results.labels


@pytest.mark.parametrize(
    ("sites", "rounds", "sums"), [(4, 5_000, "full"), (4, 5_001, "functional"), (250, 1, "functional")]
)
def test_many_pairs_over_many_rounds_are_functional(heart_plan, tables, sites, rounds, sums):
    """6 pairs in 5,000 rounds are as many as are run in full unasked; 250 sites have 31,125 in each round."""
    study = override(heart_plan().study, {"train.rounds": rounds})
    table = next(iter(tables.values()))

    assert heart_plan(study=study, tables={f"s{i}": table for i in range(sites)}).sums == sums


def test_without_secure_aggregation_there_is_no_way_to_form_sums(heart_plan):
    """An option that would do nothing is refused, and nothing is said of sums."""
    changes = {"privacy.noise": "local", "secure_aggregation.enabled": False}
    study = override(heart_plan().study, changes)

    with pytest.raises(ConfigError, match="--secagg: found 'full', allowed: a study with secure_aggregation"):
        simulate(heart_plan(study=study, secagg="full"))
    results = simulate(heart_plan(study=study))

    assert results.secure_aggregation is None
    assert results.promise.leaves.endswith("which the server sees for each site.")
    assert set(results.labels) == {"SIMULATED", "simulation noise"}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"secure_aggregation.min_sites": 2}, "found 1, allowed: what 2 sites"),
        ({"secure_aggregation.colluders": 2}, "found 2, allowed: what 3 sites"),
    ],
)
def test_a_study_that_cannot_be_protected_is_refused(heart_plan, changes, found):
    """Before anything is charged, and with what to change, although these four sites could be protected."""
    plan = heart_plan(study=override(heart_plan().study, changes))

    with pytest.raises(
        ConfigError, match=f"colluders: {found} .*raise secure_aggregation.min_sites, or lower"
    ):
        simulate(plan)

    assert not plan.out.exists()


def test_a_curve_without_protection_has_local_noise_only(heart_plan):
    """Two sites cannot hide each other from one of them: the points with shared noise are left out."""
    changes = {
        "privacy.noise": "local",
        "secure_aggregation.enabled": False,
        "secure_aggregation.min_sites": 2,
    }
    study = override(heart_plan().study, changes)

    results = simulate(heart_plan(study=study, curve=(1.0,)))

    assert [point.noise for point in results.curve] == ["local"]


def test_a_curve_leaves_out_what_drops_make_impossible(heart_plan):
    """Shared noise needs every site; local noise without secure aggregation does not."""
    changes = {"privacy.noise": "local", "secure_aggregation.enabled": False}
    study = override(heart_plan().study, changes)

    results = simulate(heart_plan(study=study, drops=(Drop(site="hungary", first=1),), curve=(1.0,)))

    assert results.status == "completed"
    assert [(point.epsilon, point.noise) for point in results.curve] == [(1.0, "local")]


def test_an_unknown_drop_is_refused_before_anything_is_charged(heart_plan):
    """Nothing is written."""
    plan = heart_plan(drops=(Drop(site="hungray", first=2),))

    with pytest.raises(ConfigError, match="found 'hungray', allowed: a site of this run: cleveland, hungary"):
        simulate(plan)

    assert not plan.out.exists()


def test_what_an_earlier_part_of_a_run_was_labelled_stays(heart_plan):
    """Its rounds are in the results too."""
    study = override(heart_plan().study, {"secure_aggregation.min_survivors": 3})
    drops = (Drop(site="hungary", first=1, last=1),)
    simulate(heart_plan(study=study, drops=drops), Interrupting(after=2))

    results = simulate(heart_plan(study=study, resume=True))

    assert results.rounds[0].dropped == {"hungary": "no answer before the deadline"}
    assert "simulated drops: hungary from round 1 to 1" in results.labels


def test_artificial_sites_are_called_so(heart_plan):
    """No reader takes them for institutions."""
    assert "artificial sites: one table cut 4 ways (iid)" in simulate(heart_plan(cut="iid")).labels


def test_a_plan_is_checked_without_a_trace(heart_plan):
    """As `simulate` would run it, and nothing is written."""
    plan = heart_plan()

    study = check_plan(plan)

    assert study.train.expected_batch is not None
    assert not plan.out.exists()


def test_every_arm_is_judged_beyond_its_metric(heart_plan):
    """Recall at low rates, all records as one list, curve, operating point and calibration, for each arm."""
    results = simulate(heart_plan(compare=("local", "federated", "pooled")))

    assert [arm.arm for arm in results.arms] == ["local", "linear", "federated", "pooled"]
    records = sum(site.test_records for site in results.sites)
    for arm in results.arms:
        assert [recall.fpr for recall in arm.recall] == [0.001, 0.01, 0.1]
        assert arm.recall[0].mean.mean is None
        assert 0 <= arm.recall[2].mean.mean <= 1
        first = arm.first_seed
        assert (first.seed, first.records) == (0, records)
        assert set(first.at_point) == set(HOSPITALS)
        assert first.at_point["cleveland"].records == results.sites[0].test_records
        assert sum(b.records for b in first.recalibrated.bins) == records


def test_operating_point_is_the_studys(heart_plan):
    """Or, where it names none, 10 % false alarms for AUC; alerts a day cannot be evaluated."""
    study = heart_plan().study
    alerts = override(study, {"task.operating_point": {"alerts_per_day": 20}})

    default = simulate(heart_plan())
    asked = simulate(heart_plan(study=alerts, out=heart_plan().out.with_name("alerts")))

    assert (default.operating_point.fpr, default.operating_point_agreed) == (0.1, False)
    assert (asked.operating_point.alerts_per_day, asked.operating_point_agreed) == (20, True)
    assert default.arms[0].first_seed.at_point
    assert not asked.arms[0].first_seed.at_point


def test_results_tell_whether_the_data_are_the_same(heart_plan, tmp_path):
    """The digest depends on the records, and on nothing else of the run."""
    plan = heart_plan()
    fewer = {name: table.subset(np.arange(len(table)) > 0) for name, table in plan.tables.items()}

    one, same, other = (
        simulate(heart_plan(out=tmp_path / name, **more)).data_sha256
        for name, more in (("a", {}), ("b", {"seeds": (1,)}), ("c", {"tables": fewer}))
    )

    assert one == same != other
