"""Evaluation under secure aggregation, end to end: one sum of all held-out records' scores, or none."""

import numpy as np
import pytest

from lepton_fl import secure_rounds
from lepton_fl.federation import secure
from lepton_fl.federation.grids import WrappingGrid
from lepton_fl.messages import EVALUATE, PHASES
from lepton_fl.privacy import Guarantee, epsilon
from lepton_fl.secagg.errors import Phase, PolicyViolation
from lepton_fl.simulation.run import Scorer, prepare, rehearsal_policy
from lepton_fl.site import mods
from lepton_fl.tasks import model_hash
from lepton_fl.tasks.metrics import FPRS, figures
from tests.unit.simulation.conftest import make_table

EXACT = {"release": "exact"}
NOISY = {"release": "dp", "share": 0.5}
NOTE = "scores of held-out records by label, in a sum over the sites"
FIRST = 101


@pytest.fixture
def splits(study):
    """Enough records for noise, and few enough for the study's delta."""
    tables = {name: make_table(study, rows) for name, rows in zip("abcd", (600, 700, 800, 900), strict=True)}
    return {name: (table, table) for name, table in tables.items()}


@pytest.fixture
def make(make_study):
    return lambda evaluation, **more: make_study(
        evaluation=evaluation,
        privacy={"epsilon": 3.0, "noise": "shared"},
        secure_aggregation={"min_survivors": 3, **more.pop("secure_aggregation", {})},
        train={"lr": 0.5},
        **more,
    )


@pytest.fixture
def start(splits, tmp_path):
    """Run to the end and close, in a folder (the protocol) or in none (its sums only)."""
    ran = []

    def go(study, *, protocol=True, policies=None, grid=lambda inner: inner, **more):
        folder = tmp_path / "sites" if protocol else None
        for name, metrics in (policies or {}).items():
            text = rehearsal_policy(study, f"{name}-ill")
            (folder / name).mkdir(parents=True)
            release = f'metrics = "{study.evaluation.release}"'
            assert release in text
            (folder / name / "policy.toml").write_text(text.replace(release, f'metrics = "{metrics}"'))
        run = prepare(study, splits, 0, folder=folder, masked=True, **more)
        run.grid.inner = grid(run.grid.inner)
        ran.append(run)
        run.start()
        return run

    yield go
    for run in ran:
        run.close()


class Altered(WrappingGrid):
    """Passes each message of these types on by a function, which may give None for no reply."""

    def __init__(self, inner, kinds, change):
        super().__init__(inner)
        self.kinds, self.change = kinds, change

    def send_and_receive(self, messages, *, timeout=None):
        for message in messages:
            replies = list(self.inner.send_and_receive([message], timeout=timeout))
            if message.metadata.message_type in self.kinds:
                replies = [found for reply in replies if (found := self.change(message, reply)) is not None]
            yield from replies


def all_records(study, splits, model):
    """What the sites' records say of the model, with nothing between."""
    scored = Scorer(study, 2)(model, splits).values()
    y_N, score_N = (np.concatenate(column) for column in zip(*scored, strict=True))
    return figures(study.task.metric, y_N, score_N)


def silent(node):
    """Loses what this site says of the histogram."""

    def change(message, reply):
        ours = message.content.config_records["secagg"]["kind"] == "evaluate"
        return None if ours and message.metadata.dst_node_id == node else reply

    return change


def charged(site):
    return [entry["round"] for entry in site.ledger.history(site.budget.data_set)]


def notes(run):
    return [
        site.ledger.released(site.budget.data_set, run=run.federation.run_id) for site in run.sites.values()
    ]


def released(site):
    """Whether the site has let its part of the one sum of histograms go."""
    history = site.aggregation._membership.history._last
    return any(kind == "evaluate" and attempt.released for (_, kind, _), attempt in history.items())


@pytest.mark.parametrize("metric", ["auc", "auprc"])
def test_exact_figures_are_those_of_all_records(make, start, splits, metric):
    """Within the bounds that the bins leave, which are close; and every ledger says so."""
    study = make(EXACT, task={"metric": metric})

    run = start(study)

    found = run.federation.pooled
    exact_M = all_records(study, splits, run.federation.model)
    figures_M = [found.metric, *(found.recall[f"{fpr:g}"] for fpr in FPRS)]
    assert (found.release, found.sites, found.epsilon) == ("exact", 4, None)
    for figure, exact in zip(figures_M, exact_M, strict=True):
        assert (figure.value is None) == np.isnan(exact)
        assert figure.value is None or figure.low - 1e-9 <= exact <= figure.high + 1e-9
    assert found.metric.high - found.metric.low < 0.005
    assert notes(run) == [(NOTE,)] * 4
    assert run.federation.released == {}


def test_one_policy_is_enough_for_no_exact_figure(make, start):
    """It refuses to advertise; then nobody's histogram is opened, and the model is what it was."""
    study = make(EXACT)

    run = start(study, policies={"c": "dp"})

    assert run.federation.pooled is None
    assert run.federation.done == study.train.rounds
    assert "release.metrics" in run.sites["c"].refusals[-1].message
    assert notes(run)[2] == ()
    assert not any(map(released, run.sites.values()))


@pytest.mark.parametrize("phase", [Phase.SHARE, Phase.MASK])
def test_one_that_is_gone_is_enough_for_no_exact_figure(make, start, phase):
    """Though a round of training would go on without it."""
    run = start(make(EXACT), grid=lambda inner: Altered(inner, {PHASES[phase]}, silent(FIRST + 1)))

    assert run.federation.pooled is None
    assert run.federation.done == 3
    assert not any(map(released, run.sites.values()))


def test_one_that_is_gone_after_its_part_is_in_the_whole(make, start):
    """Its masked histogram is there, and the others confirm that it is."""
    kinds = {PHASES[Phase.CONFIRM], PHASES[Phase.UNMASK]}

    run = start(make(EXACT), grid=lambda inner: Altered(inner, kinds, silent(FIRST + 1)))

    assert run.federation.pooled.sites == 4


def test_noisy_figures_are_near_those_of_all_records(make, start, splits):
    """Within the range that is told with them."""
    study = make(NOISY)

    run = start(study)

    found = run.federation.pooled
    assert (found.release, found.sites, found.epsilon) == ("dp", 4, 1.5)
    assert found.metric.low <= all_records(study, splits, run.federation.model)[0] <= found.metric.high
    assert notes(run) == [()] * 4


def test_training_and_metrics_are_within_one_epsilon(make, start):
    """The study's: at every site, after all of its rounds and the histogram."""
    study = make(NOISY)
    guarantee = Guarantee.of(study)

    run = start(study)

    delta = study.privacy.delta
    for site in run.sites.values():
        assert charged(site) == [1, 2, 3, study.evaluation_round]
        assert site.ledger.spent(site.budget.data_set, delta) <= 3.0
    assert epsilon([guarantee.event, guarantee.metrics], delta) <= 3.0
    assert guarantee.event.noise_multiplier > Guarantee.of(make({})).event.noise_multiplier


def test_a_policy_that_releases_nothing_adds_no_record(make, start, splits):
    """Its site is in the sum, with zeros and its noise, and pays nothing."""
    study = make(NOISY)

    run = start(study, policies={"d": "none"})

    found = run.federation.pooled
    others = {name: split for name, split in splits.items() if name != "d"}
    assert found.sites == 4
    assert found.metric.low <= all_records(study, others, run.federation.model)[0] <= found.metric.high
    assert study.evaluation_round not in charged(run.sites["d"])
    assert [study.evaluation_round in charged(run.sites[name]) for name in "abc"] == [True] * 3


@pytest.mark.parametrize("evaluation", [EXACT, NOISY])
def test_the_rehearsal_opens_what_the_protocol_opens(make, start, evaluation):
    """Bit by bit."""
    study = make(evaluation)

    full, functional = start(study), start(study, protocol=False)

    assert model_hash(full.federation.model) == model_hash(functional.federation.model)
    assert full.federation.pooled == functional.federation.pooled


def test_a_study_that_releases_nothing_asks_nobody(make, start):
    """No message to evaluate is sent."""
    seen = []
    run = start(make({}), grid=lambda inner: Altered(inner, {EVALUATE}, lambda m, r: seen.append(m)))

    assert seen == []
    assert run.federation.pooled is None


def test_counts_that_are_no_counts_are_found(make, start, monkeypatch):
    """A site uploads random words: no figure, and a run that ends as it should."""

    def scrambled(counts_2B, assignment, *rest):
        words_L = encoded(counts_2B, assignment, *rest)
        words_L[:] = np.random.default_rng(0).integers(0, 1 << 32, len(words_L), np.uint32)
        return words_L

    encoded = mods.encoded_counts
    monkeypatch.setattr(mods, "encoded_counts", scrambled)

    run = start(make(EXACT))

    assert run.federation.pooled is None
    assert run.federation.done == 3


def test_a_sum_that_cannot_be_costs_no_model(make, start, monkeypatch):
    """There is no room for the noise, say, or the cohort has become too small to protect."""

    def refuse(study, sites):
        raise PolicyViolation("no room", phase=Phase.ADVERTISE)

    monkeypatch.setattr(secure_rounds, "count_quantiser", refuse)

    run = start(make(NOISY))

    assert (run.federation.done, run.federation.pooled, run.federation.stopped) == (3, None, False)
    assert [charged(site) for site in run.sites.values()] == [[1, 2, 3]] * 4


def test_a_server_that_dies_in_mid_evaluation_locks_nothing(make, start, tmp_path, monkeypatch):
    """The resumed run has its model, and no figure: the one sum has begun, and is not begun again."""
    study, checkpoint = make(NOISY), tmp_path / "checkpoint"
    result = secure.ServerRound.result
    dying = {"now": True}

    def die(self, **more):
        if self.context.kind == "evaluate" and dying.pop("now", None):
            raise KeyboardInterrupt
        return result(self, **more)

    monkeypatch.setattr(secure.ServerRound, "result", die)
    with pytest.raises(KeyboardInterrupt):
        start(study, checkpoint=checkpoint)

    run = start(study, checkpoint=checkpoint, resume=True)

    assert run.federation.done == 3
    assert not run.federation.stopped
    assert run.federation.pooled is None
    assert [charged(site) for site in run.sites.values()] == [[1, 2, 3, study.evaluation_round]] * 4
