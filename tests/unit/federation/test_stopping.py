"""A run stops by its study's own rule, on public records or on the updates themselves, and nowhere else."""

import numpy as np
import pytest
import torch

from lepton_fl.errors import ConfigError, DataError
from lepton_fl.federation import Federation, PublicTable
from lepton_fl.federation.stopping import OnPublicTable, OnUpdates, stopping_of
from lepton_fl.messages import read_assignment, update_reply
from lepton_fl.study import EarlyStopping
from lepton_fl.tasks import arrays_of, build_model, model_hash


def logit(study, weight):
    """Logistic regression on x: above 0 it ranks the public records rightly, below 0 backwards."""
    model = arrays_of(build_model(study, 1, torch.Generator()))
    return {n: np.full_like(a, weight if a.ndim == 2 else 0.0) for n, a in model.items()}


@pytest.fixture
def rule():
    """A rule, keys changed."""
    usual = {"signal": "updates", "patience": 2, "tolerance": 0.5}
    return lambda **changes: EarlyStopping(**{**usual, **changes})


@pytest.fixture
def stopping_study(make_study):
    """Ten rounds, and a rule."""

    def make(signal="updates", **changes):
        early = {"signal": signal, "patience": 2, "tolerance": 0.5, **changes}
        columns = {"x": {"type": "float", "range": [-1, 1], "identifier": "allow"}}
        return make_study(
            train={"rounds": 10, "lr": 1.0, "early_stopping": early},
            features={"columns": columns},
            model={"name": "logreg"},
        )

    return make


@pytest.fixture
def public_file(tmp_path):
    """Twenty public records, in which x says who is ill."""
    path = tmp_path / "public.csv"
    rows = [f"{(n - 9.5) / 10},{int(n > 9)}" for n in range(20)]
    path.write_text("\n".join(["x,ill", *rows]) + "\n")
    return path


def of_length(*lengths):
    """A round's mean update for each length."""
    return [{"w": np.array([[n, 0.0]]), "b": np.zeros(1)} for n in lengths]


def looks(stopping, rounds):
    """What the rule says after each round, to the first at which it stops."""
    said = []
    for done, mean in enumerate(rounds, start=1):
        said.append(stopping.look(done, mean, {}))
        if said[-1]:
            break
    return said


# --- on the updates ---


@pytest.mark.parametrize(
    ("lengths", "stops"),
    [
        ([4, 4, 4, 4, 4, 4], None),
        ([4, 4, 1, 1, 9, 9], 4),
        ([4, 4, 3, 3, 1, 1], 6),
        ([4, 4, 2, 2, 2, 2], None),  # half is not less than half
        ([1, 1, 8, 8, 3, 3], 6),  # beside the largest, not the first
        ([4, 4, 5, -5, 4, 4], 4),  # to and fro is no progress
        ([0, 0, 0, 0, 0, 0], None),
    ],
    ids=str,
)
def test_a_run_stops_when_its_updates_point_nowhere(rule, lengths, stops):
    """Below half of the longest mean of two rounds so far, at the end of the next two."""
    said = looks(OnUpdates(rule()), of_length(*lengths))

    assert (len(said) if said[-1] else None) == stops


def test_the_reason_names_the_figures(rule):
    """As a reader of the report will find them."""
    said = looks(OnUpdates(rule()), of_length(4, 4, 1, 1))

    assert said[-1] == (
        "the mean update of the last 2 rounds has 0.25 of the largest norm so far, less than 0.5"
    )


def test_no_run_stops_before_its_min_rounds(rule):
    """The rule looks on all the same."""
    said = looks(OnUpdates(rule(min_rounds=6)), of_length(4, 4, 1, 1, 1, 1))

    assert len(said) == 6


def test_averaging_noise_alone_stops_nothing(rule):
    """500 numbers of pure noise, 300 rounds: all blocks are as long, though single updates are longer."""
    rng = np.random.default_rng(0)
    rounds = ({"w": rng.normal(size=500)} for _ in range(300))

    assert not any(looks(OnUpdates(rule(patience=10, tolerance=0.8)), rounds))


def test_progress_under_noise_is_seen_to_end(rule):
    """Updates three times as long as their noise, until round 60, and then noise alone."""
    rng = np.random.default_rng(0)
    direction = rng.normal(size=500)
    rounds = ({"w": 3.0 * direction * (n < 60) + rng.normal(size=500)} for n in range(300))

    said = looks(OnUpdates(rule(patience=10, tolerance=0.2)), rounds)

    assert len(said) == 70


# --- on a public table ---


@pytest.fixture
def on_public(stopping_study, public_file):
    """The rule on the public table; what to say to it is the weight of x."""

    def make(**changes):
        study = stopping_study("public", **{"tolerance": 0.0, **changes})
        stopping = stopping_of(study, PublicTable(public_file, study))

        return lambda done, weight: stopping.look(done, {}, logit(study, weight))

    return make


def test_a_run_stops_when_the_public_metric_no_longer_rises(on_public):
    """The best in round 2, patience for two more."""
    look = on_public()

    said = [look(done, weight) for done, weight in enumerate([-1.0, 1.0, 1.0, -1.0], start=1)]

    assert said[:3] == ["", "", ""]
    assert said[3] == ("auc on the public table has not risen by more than 0 above 1.0000 for 2 rounds")


def test_a_rise_within_the_tolerance_does_not_count(on_public):
    """From one half to one is half."""
    look = on_public(tolerance=0.6)

    assert [bool(look(done, weight)) for done, weight in [(1, 0.0), (2, 1.0), (3, 1.0)]] == [
        False,
        False,
        True,
    ]


def test_a_public_table_of_one_class_is_refused(stopping_study, tmp_path):
    """Its metric is not defined, and would never rise."""
    path = tmp_path / "public.csv"
    path.write_text("x,ill\n0.5,1\n0.6,1\n")

    with pytest.raises(DataError, match="2 of 2 records are positive: auc needs both classes"):
        PublicTable(path, stopping_study("public"))


def test_a_public_signal_needs_a_public_table(make_federation, make_grid, stopping_study):
    """Nothing is taken in its place, and no site is asked before."""
    asked = []
    grid = make_grid(a=asked.append)

    with pytest.raises(ConfigError, match="signal = 'public' needs a public table"):
        make_federation(study=stopping_study("public")).run(grid)

    assert asked == []


@pytest.mark.parametrize("early", [True, False])
def test_a_public_table_for_nothing_is_refused(make_study, stopping_study, public_file, early):
    """Whoever names one believes that it is looked at."""
    study = stopping_study("updates") if early else make_study()

    with pytest.raises(
        ConfigError, match=r"a public table is given, and train\.early_stopping does not read"
    ):
        stopping_of(study, PublicTable(public_file, stopping_study("public")))


# --- in the loop ---


def shrinking(message):
    """Updates of length 8, 4, 2, ... by round."""
    length = 2.0 ** (4 - read_assignment(message).round)
    return update_reply(message, {"w": np.array([[length, 0.0]], np.float32), "b": np.zeros(1, np.float32)})


@pytest.fixture
def grid(make_grid):
    return make_grid(a=shrinking, b=shrinking, c=shrinking)


def test_a_stopped_run_is_over(make_federation, grid, stopping_study, seen):
    """After four of ten rounds: no site is asked again, and the model is that of round four."""
    federation = make_federation(study=stopping_study())

    federation.run(grid)

    assert (federation.done, federation.started) == (4, 4)
    assert federation.stopped_early.startswith("the mean update of the last 2 rounds has 0.25")
    assert [report.number for report in seen.rounds] == [1, 2, 3, 4]
    np.testing.assert_array_equal(federation.model["w"], [[15.0, 0.0]])


def test_a_rule_that_holds_in_the_last_round_stops_nothing(make_federation, make_grid, make_study):
    """All rounds were run."""

    def short_at_last(message):
        length = 1.0 if read_assignment(message).round == 5 else 8.0
        return update_reply(message, {n: a.astype(np.float32) for n, a in of_length(length)[0].items()})

    early = {"signal": "updates", "patience": 1, "tolerance": 0.5}
    federation = make_federation(study=make_study(train={"rounds": 5, "early_stopping": early}))

    federation.run(make_grid(**dict.fromkeys("abc", short_at_last)))

    assert (federation.done, federation.stopped_early) == (5, "")


@pytest.mark.parametrize("stopped", [1, 2, 3, 4])
def test_a_resumed_run_stops_where_an_unbroken_one_does(
    make_federation, grid, stopping_study, killed_after, tmp_path, stopped
):
    """In the middle of a block, between two, and where the rule had stopped it already."""
    study, path = stopping_study(), tmp_path / "checkpoint"
    whole = make_federation(study=study, observer=None)
    whole.run(grid)

    with pytest.raises(KeyboardInterrupt):
        make_federation(study=study, observer=killed_after(stopped), checkpoint=path).run(grid)
    resumed = Federation.resume(path, study=study)
    resumed.run(grid)

    assert (resumed.done, resumed.stopped_early) == (4, whole.stopped_early)
    assert model_hash(resumed.model) == model_hash(whole.model)


def test_the_public_rule_is_restored(stopping_study, public_file):
    """Best and round of the best."""
    study = stopping_study("public", tolerance=0.0)
    table = PublicTable(public_file, study)
    one, other = (OnPublicTable(study.train.early_stopping, study, table) for _ in range(2))
    good = logit(study, 1.0)
    one.look(1, {}, good)

    other.restore(one.state())

    assert [other.look(2, {}, good), bool(other.look(3, {}, good))] == ["", True]


def test_lost_rounds_do_not_count(make_federation, grid, altered, stopping_study):
    """Nothing was aggregated in them."""
    calls = []

    def lose_the_second(replies):
        calls.append(replies)
        return [] if len(calls) == 3 else replies

    federation = make_federation(study=stopping_study())

    federation.run(altered(grid, lose_the_second))

    assert (federation.done, federation.started) == (4, 5)
