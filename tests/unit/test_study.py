"""The study: which are refused, and what its id does and does not depend on."""

import hashlib
import json
import re
import tomllib
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import pytest
from pydantic import BaseModel

from lepton_fl.config import parse
from lepton_fl.errors import ConfigError, VerificationFailed
from lepton_fl.study import (
    CANONICAL_PREFIX,
    STRATEGY_KEYS,
    Study,
    check_delta,
    load_study,
    override,
    parse_canonical,
)

VECTOR = Path(__file__).parents[1] / "vectors" / "study.json"

GROUPS = {"min_sites": 15, "group_size": 5}
STOPPING = {"signal": "updates", "patience": 4, "tolerance": 0.25}

# Each field of a study with a change that means something; companions that the change needs beside it.
CHANGES = {
    "study.name": {"study.name": "lung"},
    "study.purpose": {"study.purpose": "triage"},
    "task.kind": None,  # one value so far
    "task.target": {"task.target": "died"},
    "task.positive": {"task.positive": True},
    "task.metric": {"task.metric": "auprc"},
    "task.operating_point.fpr": {"task.operating_point.fpr": 0.02},
    "task.operating_point.alerts_per_day": {
        "task.operating_point.alerts_per_day": 7,
        "task.operating_point.fpr": None,
    },
    "task.operating_point.cost_fn": {"task.operating_point": {"cost_fn": 9.0, "cost_fp": 1.0}},
    "task.operating_point.cost_fp": {"task.operating_point": {"cost_fn": 9.0, "cost_fp": 2.0}},
    "task.prevalence": {"task.prevalence": 0.1},
    "privacy.unit": {"privacy.unit": "patient"},
    "privacy.epsilon": {"privacy.epsilon": 3.1},
    "privacy.delta": {"privacy.delta": 1.1e-5},
    "privacy.clip": {"privacy.clip": 0.5},
    "privacy.noise": {"privacy.noise": "shared"},
    "privacy.max_records_per_unit": {"privacy.unit": "ward", "privacy.max_records_per_unit": 4},
    "privacy.unit_gradient": {"privacy.unit": "ward", "privacy.unit_gradient": "mean"},
    "privacy.max_sites_per_unit": {"privacy.max_sites_per_unit": 2},
    "secure_aggregation.enabled": {"secure_aggregation.enabled": False},
    "secure_aggregation.min_sites": {"secure_aggregation.min_sites": 4},
    "secure_aggregation.colluders": {"secure_aggregation.colluders": 2},
    "secure_aggregation.min_survivors": {"secure_aggregation.min_survivors": 3},
    "secure_aggregation.sessions": {"secure_aggregation.sessions": False},
    "secure_aggregation.group_size": {"secure_aggregation": GROUPS},
    "secure_aggregation.combine": {"secure_aggregation": {**GROUPS, "combine": "median"}},
    "secure_aggregation.trim": {"secure_aggregation": {**GROUPS, "combine": "trimmed-mean", "trim": 1}},
    "secure_aggregation.suite": {"secure_aggregation.suite": "LSA1-PQ"},
    "secure_aggregation.deadline": {"secure_aggregation.deadline": 61.0},
    "train.strategy": {"train.strategy": "fedavg"},
    "train.rounds": {"train.rounds": 21},
    "train.sample_rate": {"train.sample_rate": 0.11},
    "train.expected_batch": {"train.expected_batch": 21.0},
    "train.local_steps": {"train.strategy": "fedavg", "train.local_steps": 2},
    "train.optimizer": {"train.optimizer": "sgd"},
    "train.lr": {"train.lr": 0.2},
    "train.server_lr": {"train.strategy": "fedadam", "train.server_lr": 0.2},
    "train.server_momentum": {"train.strategy": "fedavgm", "train.server_momentum": 0.8},
    "train.beta_1": {"train.strategy": "fedyogi", "train.beta_1": 0.8},
    "train.beta_2": {"train.strategy": "fedyogi", "train.beta_2": 0.8},
    "train.tau": {"train.strategy": "fedadagrad", "train.tau": 0.01},
    "train.proximal_mu": {"train.strategy": "fedprox", "train.proximal_mu": 0.1},
    "train.lr_schedule": {"train.lr_schedule": "cosine"},
    "train.warmup_rounds": {"train.warmup_rounds": 1},
    "train.early_stopping.signal": {"train.early_stopping": {**STOPPING, "signal": "public"}},
    "train.early_stopping.patience": {"train.early_stopping": {**STOPPING, "patience": 3}},
    "train.early_stopping.tolerance": {"train.early_stopping": {**STOPPING, "tolerance": 0.3}},
    "train.early_stopping.min_rounds": {"train.early_stopping": {**STOPPING, "min_rounds": 9}},
    "train.spare_rounds": {"train.spare_rounds": 1},
    "train.deadline": {"train.deadline": 601.0},
    "model.name": {"model.name": "mlp"},
    "model.hidden": {"model.hidden": [32, 32]},
    "model.normalization": {"model.normalization": "layer"},
    "features.scaling": None,  # one value so far
    "features.columns": {"features.columns.age.range": [20, 91]},
    "evaluation.test_fraction": {"evaluation.test_fraction": 0.3},
    "evaluation.split": {"evaluation": {"split": "time", "time_column": "seen", "cutoff": 5}},
    "evaluation.time_column": {"evaluation": {"split": "time", "time_column": "left", "cutoff": 5}},
    "evaluation.cutoff": {"evaluation": {"split": "time", "time_column": "seen", "cutoff": 6}},
    "evaluation.release": {"evaluation.release": "exact"},
    "evaluation.share": {"evaluation": {"release": "dp", "share": 0.2}},
}


@pytest.fixture
def study(make_study):
    return make_study(task={"operating_point": {"fpr": 0.01}})


def fields_of(model, prefix=""):
    for name, field in model.model_fields.items():
        inner = [a for a in (field.annotation, *getattr(field.annotation, "__args__", ())) if is_model(a)]
        if inner:
            yield from fields_of(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def is_model(annotation):
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def digest(data):
    return hashlib.sha256(data).hexdigest()


# --- the id ---


def test_every_field_of_a_study_has_a_change_here():
    """A new field cannot be forgotten below."""
    assert set(fields_of(Study)) == set(CHANGES)


@pytest.mark.parametrize("field", [f for f, changes in CHANGES.items() if changes])
def test_a_changed_field_changes_the_id(study, field):
    """Agents that pin an id pin every field."""
    assert override(study, CHANGES[field]).id != study.id


def test_changes_all_have_ids_of_their_own(study):
    """No two of the changes give the same study."""
    ids = [override(study, changes).id for changes in CHANGES.values() if changes]

    assert len(set(ids)) == len(ids)


def test_a_changed_column_changes_the_id(make_study):
    """Features are part of what was agreed on, down to each key."""
    base = {"type": "float", "range": [0, 9], "transform": "none", "missing": "refuse"}
    variants = [
        {"a": base},
        {"b": base},
        {"a": base, "b": base},
        {"a": {**base, "range": [0, 8]}},
        {"a": {**base, "transform": "log1p"}},
        {"a": {**base, "missing": "flag"}},
        {"a": {**base, "identifier": "allow"}},
        {"a": {"type": "category", "hash": 8}},
        {"a": {"type": "category", "hash": 9}},
        {"a": {"type": "category", "vocabulary": ["x", "y"]}},
        {"a": {"type": "category", "vocabulary": ["y", "x"]}},
        {"a": {"type": "category", "vocabulary": [1]}},
        {"a": {"type": "category", "vocabulary": ["1"]}},
        {"a": {"type": "category", "vocabulary": [True]}},
        {"a": {"type": "category", "vocabulary": "iso18245"}},
    ]

    ids = {make_study(features={"columns": columns}).id for columns in variants}

    assert len(ids) == len(variants)


def test_the_published_vector():
    """Canonical bytes and id of one fixed study, made without lepton_fl: they never change."""
    vector = json.loads(VECTOR.read_text(encoding="ascii"))

    study = parse(Study, tomllib.loads(vector["toml"]), file="vector")

    assert study.canonical.decode() == vector["canonical"]
    assert study.id == vector["id"]


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("epsilon = 3.0", "epsilon = 3"),
        ("epsilon = 3.0", "epsilon = 3.0   # agreed in May"),
        ("epsilon = 3.0\ndelta = 1e-5", "delta = 0.00001\nepsilon = 3.0"),
        ("epsilon = 3.0", 'epsilon = 3.0\nnoise = "local"\nclip = 1'),
        ("range = [0.0, 9.0]", "range = [-0.0, 9]"),
        ('name = "caf\u00e9"', 'name = "cafe\u0301"'),
    ],
)
def test_the_same_meaning_has_the_same_id(tmp_path, written, instead):
    """Order, comments, spelling of numbers, defaults and Unicode forms are how a file was typed."""
    text = (
        '[task]\nkind = "binary"\ntarget = "ill"\n[study]\nname = "s"\n'
        "[privacy]\nepsilon = 3.0\ndelta = 1e-5\n"
        "[train]\nrounds = 5\nsample_rate = 0.1\nlr = 0.1\n"
        '[features.columns.a]\ntype = "float"\nrange = [0.0, 9.0]\n'
    ).replace('target = "ill"', 'target = "caf\u00e9"')
    written, instead = (part.replace("name =", "target =") for part in (written, instead))
    assert written in text
    one, other = tmp_path / "1.toml", tmp_path / "2.toml"
    one.write_text(text, encoding="utf-8")
    other.write_text(text.replace(written, instead), encoding="utf-8")

    assert load_study(one).canonical == load_study(other).canonical


def test_two_columns_that_read_the_same_are_refused(make_study):
    """Else the id would name one of them, and nobody could say which."""
    column = {"type": "float", "range": [0, 1]}

    with pytest.raises(ConfigError, match="read the same"):
        make_study(features={"columns": {"caf\u00e9": column, "cafe\u0301": column}})


# --- canonical bytes from a peer ---


def test_canonical_bytes_give_the_study_back(study):
    """What is sent is what was agreed on."""
    assert parse_canonical(study.canonical, study.id) == study


def test_any_flipped_bit_is_refused(study):
    """The digest is checked before anything is read."""
    data = study.canonical
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8

        with pytest.raises(VerificationFailed, match="do not have the study id"):
            parse_canonical(bytes(flipped), study.id)


@pytest.mark.parametrize("wrong", ["", "0" * 64])
def test_another_id_is_refused(study, wrong):
    """The bytes are fine, and not what the message said they were."""
    with pytest.raises(VerificationFailed, match="do not have the study id"):
        parse_canonical(study.canonical, wrong)


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        (b'"epsilon":3.0', b'"epsilon":3'),
        (b'"epsilon":3.0', b'"epsilon": 3.0'),
        (b'"epsilon":3.0', b'"epsilon":9.0,"epsilon":3.0'),
        (b'"target":"ill"', b'"target":"\\u0069ll"'),
        (b'"purpose":""', b'"purpose":" "'),
        (b',"noise":"local"', b""),
        (b"[20.0,90.0]", b"[2e1,90.0]"),
        (b"}}", b"}}\n"),
    ],
)
def test_other_bytes_of_the_same_study_are_refused(study, written, instead):
    """One study, one id: else a site could be brought to run the same study under two budgets."""
    data = study.canonical.replace(written, instead)
    assert data != study.canonical

    with pytest.raises(VerificationFailed, match="not in canonical form"):
        parse_canonical(data, digest(data))


def test_another_format_is_refused(study):
    """A later format may mean something else by the same keys."""
    data = study.canonical.replace(b"study/1", b"study/2")

    with pytest.raises(ConfigError, match="another format"):
        parse_canonical(data, digest(data))


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b"[" * 100_000,
        b'{"a":' * 900 + b"1" + b"}" * 900,
        b'{"study":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"study":{"name":"\\ud800"}}',
        b'{"study":' + b"9" * 5000 + b"}",
    ],
    ids=lambda junk: repr(junk[:12]),
)
def test_junk_with_its_own_right_digest_is_refused(junk):
    """A peer can hash anything; what it hashed is read with the same distrust."""
    data = CANONICAL_PREFIX + junk

    with pytest.raises(ConfigError):
        parse_canonical(data, digest(data))


# --- which studies there are ---


def test_batch_norm_is_refused_with_its_reason(make_study):
    """The reason, since `layer` looks like a poor substitute until one knows it."""
    with pytest.raises(ConfigError, match="BatchNorm mixes the records of a batch"):
        make_study(model={"normalization": "batch"})


def refused(make_study, **tables):
    with pytest.raises(ConfigError) as caught:
        make_study(**tables)
    return caught.value.message


@pytest.mark.parametrize("lacking", ["epsilon", "delta"])
@pytest.mark.parametrize("noise", ["local", "shared"])
def test_noise_needs_epsilon_and_delta(make_study, noise, lacking):
    """Half a promise is none."""
    said = refused(make_study, privacy={"noise": noise, lacking: None})

    assert "needs both epsilon and delta" in said


@pytest.mark.parametrize("lacking", ["epsilon", "delta"])
def test_without_noise_nothing_may_be_promised(make_study, lacking):
    """An epsilon in the file of a study without noise would be read as a promise."""
    said = refused(make_study, privacy={"noise": "none", lacking: None})

    assert "promises nothing" in said


def test_without_noise_and_promise_is_a_study(make_study):
    """It is the site's policy that refuses it, not the format."""
    assert make_study(privacy={"noise": "none", "epsilon": None, "delta": None}).privacy.noise == "none"


def test_shared_noise_needs_lockstep(make_study):
    """Parts of noise add up within one step only."""
    said = refused(make_study, privacy={"noise": "shared"}, train={"strategy": "fedavg"})

    assert "needs train.strategy = 'lockstep'" in said


def test_shared_noise_needs_secure_aggregation(make_study):
    """Alone, a site's part of the noise protects nothing."""
    said = refused(make_study, privacy={"noise": "shared"}, secure_aggregation={"enabled": False})

    assert "needs secure_aggregation.enabled = true" in said


def test_lockstep_takes_one_step(make_study):
    """Several steps under lockstep would be charged and not taken, or taken and not charged."""
    assert "exactly one step" in refused(make_study, train={"local_steps": 2})


READ = [(strategy, key) for strategy, keys in STRATEGY_KEYS.items() for key in keys]
UNREAD = [
    (strategy, key)
    for strategy in STRATEGY_KEYS
    for key in sorted({key for _, key in READ})
    if (strategy, key) not in READ
]


@pytest.mark.parametrize(("strategy", "key"), UNREAD)
def test_a_key_that_a_strategy_does_not_read_is_refused(make_study, strategy, key):
    """By its name and the strategy's: what is ignored was not agreed on."""
    mu = {"proximal_mu": 0.5} if strategy == "fedprox" else {}

    said = refused(make_study, train={"strategy": strategy, **mu, key: 0.5})

    assert f"train: {key} = 0.5: strategy = '{strategy}' does not read it; allowed for " in said


def test_fedprox_needs_its_mu(make_study):
    """Li et al. tune it for each data set; Flower's default of 0 is fedavg under another name."""
    said = refused(make_study, train={"strategy": "fedprox"})

    assert "train: strategy = 'fedprox' needs proximal_mu" in said


@pytest.mark.parametrize(("strategy", "key"), [pair for pair in READ if pair[1] != "proximal_mu"])
def test_a_strategys_default_spelt_out_is_the_same_study(make_study, strategy, key):
    """It is written into the canonical bytes either way."""
    left_out = make_study(train={"strategy": strategy})
    spelt_out = make_study(train={"strategy": strategy, key: STRATEGY_KEYS[strategy][key]})

    assert getattr(left_out.train, key) is not None
    assert spelt_out.canonical == left_out.canonical


@pytest.mark.parametrize(
    ("strategy", "key", "value"),
    [
        ("fedavgm", "server_lr", 0.0),
        ("fedavgm", "server_lr", 101.0),
        ("fedavgm", "server_momentum", 1.0),
        ("fedadam", "beta_1", -0.1),
        ("fedadam", "beta_2", 1.0),
        ("fedadam", "tau", 0.0),
        ("fedprox", "proximal_mu", 0.0),
        ("fedprox", "proximal_mu", 101.0),
    ],
)
def test_a_constant_out_of_bounds_is_refused(make_study, strategy, key, value):
    """Where the step would have no meaning, or no end."""
    assert f"train.{key}: found {value}" in refused(make_study, train={"strategy": strategy, key: value})


@pytest.mark.parametrize("strategy", [{"strategy": "fedavg"}, {"strategy": "fedprox", "proximal_mu": 1.0}])
@pytest.mark.parametrize("schedule", [{"lr_schedule": "cosine"}, {"warmup_rounds": 1}])
def test_a_schedule_of_no_rate_is_refused(make_study, strategy, schedule):
    """An average takes no step of its own."""
    said = refused(make_study, train={**strategy, **schedule})

    assert f"no rate of its own under strategy = '{strategy['strategy']}'" in said


@pytest.mark.parametrize(
    ("rule", "earliest"),
    [
        ({}, 8),
        ({"min_rounds": 9}, 12),
        ({"min_rounds": 20}, 20),
        ({"signal": "public"}, 5),
        ({"signal": "public", "min_rounds": 9}, 9),
    ],
    ids=str,
)
def test_a_rule_that_cannot_stop_the_run_is_refused(make_study, rule, earliest):
    """The round is named that it would need; one round more, and it is a rule."""
    early = {**STOPPING, **rule}

    said = refused(make_study, train={"rounds": earliest, "early_stopping": early})

    assert f"early_stopping: stops after round {earliest} at the earliest, and there are {earliest}" in said
    assert make_study(train={"rounds": earliest + 1, "early_stopping": early}).train.early_stopping


def test_updates_of_no_length_are_refused_as_a_rule(make_study):
    """None is shorter than nothing."""
    said = refused(make_study, train={"early_stopping": {**STOPPING, "tolerance": 0.0}})

    assert "train.early_stopping: tolerance = 0" in said


def test_a_warm_up_ends_before_the_run(make_study):
    """Else the rate that was agreed on is never reached."""
    said = refused(make_study, train={"warmup_rounds": 20})

    assert "warmup_rounds = 20: must be fewer than the 20 rounds" in said


def test_fewer_survivors_than_sites_are_refused(make_study):
    """A round that may end with fewer than the cohort's least would hide less than promised."""
    said = refused(make_study, secure_aggregation={"min_sites": 4, "min_survivors": 3})

    assert "min_survivors = 3 is below min_sites = 4" in said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"combine": "median"}, "combine = 'median' is of groups: it needs group_size"),
        ({"group_size": 4}, "secure_aggregation.group_size: found 4"),
        ({**GROUPS, "enabled": False}, "group_size = 5 needs enabled = true"),
        (
            {**GROUPS, "min_sites": 4},
            "min_sites = 4 makes 0 groups of group_size = 5, combine = 'mean' needs 1",
        ),
        (
            {**GROUPS, "min_sites": 14, "combine": "median"},
            "makes 2 groups of group_size = 5, combine = 'median' needs 3: allowed from 15 on",
        ),
        ({**GROUPS, "combine": "trimmed-mean"}, "trim and combine = 'trimmed-mean' go together"),
        ({**GROUPS, "trim": 1}, "trim and combine = 'trimmed-mean' go together"),
        (
            {**GROUPS, "combine": "trimmed-mean", "trim": 2},
            "combine = 'trimmed-mean' needs 5: allowed from 25 on",
        ),
        ({**GROUPS, "min_survivors": 6}, "min_survivors = 6: of each group, so 3 to group_size = 5"),
        ({**GROUPS, "min_survivors": 2}, "min_survivors = 2: of each group, so 3 to group_size = 5"),
    ],
)
def test_groups_that_cannot_be_are_refused(make_study, keys, said):
    """Too small, too few for the rule, or a rule without them."""
    assert said in refused(make_study, secure_aggregation=keys)


@pytest.mark.parametrize(
    "tables",
    [
        {"task": {"target": "age"}},
        {"privacy": {"unit": "age"}},
        {"evaluation": {"split": "time", "time_column": "age", "cutoff": 5}},
    ],
    ids=["target", "unit", "time"],
)
def test_the_model_must_not_see_what_it_is_judged_by(make_study, tables):
    """Target, unit and time are read, and are no features."""
    assert "features.columns.age: also the target" in refused(make_study, **tables)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epsilon", 0.0),
        ("epsilon", -1.0),
        ("delta", 0.0),
        ("delta", 1.0),
        ("clip", 0.0),
        ("clip", -1.0),
        ("clip", float("inf")),
        ("epsilon", float("nan")),
    ],
)
def test_a_meaningless_promise_is_refused(make_study, key, value):
    """At its very bound, not only far beyond."""
    assert f"privacy.{key}: found" in refused(make_study, privacy={key: value})


@pytest.mark.parametrize(
    "train",
    [
        {"rounds": 960_000},  # 5 % spare
        {"rounds": 1000, "spare_rounds": 0, "local_steps": 1001, "strategy": "fedavg"},
    ],
    ids=str,
)
def test_a_study_of_endless_steps_is_refused(make_study, train):
    """A site computes what a study costs before it can refuse it."""
    assert "at most 1,000,000 steps in all" in refused(make_study, train=train)


def test_more_spare_rounds_than_rounds_are_refused(make_study):
    """They are for crashes, not for another run."""
    assert "at most as many as rounds" in refused(make_study, train={"spare_rounds": 21})


@pytest.mark.parametrize("rate", [0.0, 1.0000001])
def test_a_rate_that_is_no_probability_is_refused(make_study, rate):
    """1 is allowed: every unit in every step."""
    assert "train.sample_rate: found" in refused(make_study, train={"sample_rate": rate})
    assert make_study(train={"sample_rate": 1}).train.sample_rate == 1.0


def test_a_range_that_is_empty_is_refused(make_study):
    """The first bound is below the second."""
    column = {"type": "float", "range": [5, 5]}

    assert "the first must be below" in refused(make_study, features={"columns": {"a": column}})


def test_log1p_of_minus_one_is_refused(make_study):
    """It would be minus infinity at the bound."""
    column = {"type": "float", "range": [-1, 5], "transform": "log1p"}

    assert "log1p needs a range above -1" in refused(make_study, features={"columns": {"a": column}})


@pytest.mark.parametrize("vocabulary", [[], ["a", "a"], [1, "1"], ["caf\u00e9", "cafe\u0301"]])
def test_a_vocabulary_lists_distinct_codes(make_study, vocabulary):
    """Two codes that a table's text cannot tell apart are one."""
    column = {"type": "category", "vocabulary": vocabulary}

    assert "distinct codes" in refused(make_study, features={"columns": {"a": column}})


@pytest.mark.parametrize("point", [{}, {"fpr": 0.1, "alerts_per_day": 3}, {"cost_fn": 1.0}])
def test_one_operating_point_or_none(make_study, point):
    """Two would contradict each other."""
    assert "task.operating_point" in refused(make_study, task={"operating_point": point})


@pytest.mark.parametrize("lacking", ["split", "time_column", "cutoff"])
def test_a_split_by_time_needs_its_column_and_its_cutoff(make_study, lacking):
    """Two of the three are a mistake, whichever."""
    whole = {"split": "time", "time_column": "seen", "cutoff": 5}

    assert "go together" in refused(make_study, evaluation={**whole, lacking: None})


@pytest.mark.parametrize(
    "cutoff",
    [
        "2026-01-31",
        "2026-01-31T00:00:00Z",
        " 2026-01-31T01:00:00+01:00",
        date(2026, 1, 31),
        datetime(2026, 1, 31, 1, tzinfo=timezone(timedelta(hours=1))),
    ],
    ids=str,
)
def test_one_instant_has_one_id(make_study, cutoff):
    """However it is spelt; without a zone it is UTC, and never the machine's own."""
    study = make_study(evaluation={"split": "time", "time_column": "seen", "cutoff": cutoff})

    assert b'"cutoff":"2026-01-31T00:00:00+00:00"' in study.canonical
    assert study.evaluation.cutoff_number == 1769817600.0
    assert parse_canonical(study.canonical, study.id) == study


@pytest.mark.parametrize("cutoff", ["soon", "", "inf", "1_000", True, float("nan")], ids=repr)
def test_a_cutoff_that_is_no_time_is_refused(make_study, cutoff):
    """Nothing is guessed about which records are held out."""
    tables = {"split": "time", "time_column": "seen", "cutoff": cutoff}

    assert "evaluation.cutoff: found" in refused(make_study, evaluation=tables)


@pytest.mark.parametrize(
    "evaluation", [{"release": "dp"}, {"share": 0.1}, {"release": "exact", "share": 0.1}]
)
def test_a_share_is_of_what_is_noised(make_study, evaluation):
    """Noise needs an epsilon, and nothing else has one."""
    assert "release = 'dp' and share go together" in refused(make_study, evaluation=evaluation)


@pytest.mark.parametrize("evaluation", [{"release": "exact"}, {"release": "dp", "share": 0.1}])
def test_a_release_is_of_a_sum(make_study, evaluation):
    """Without secure aggregation a site's figure leaves by its own policy's word alone."""
    said = refused(make_study, evaluation=evaluation, secure_aggregation={"enabled": False})

    assert f"evaluation.release = '{evaluation['release']}' needs secure_aggregation.enabled = true" in said


def test_a_share_is_of_an_epsilon(make_study):
    """A study without noise has none."""
    said = refused(
        make_study,
        evaluation={"release": "dp", "share": 0.1},
        privacy={"noise": "none", "epsilon": None, "delta": None},
    )

    assert "evaluation.release = 'dp' needs privacy.noise" in said


# --- what follows from a study ---


@pytest.mark.parametrize(("spare", "charged"), [(None, 21), (0, 20), (7, 27)])
def test_noise_covers_spare_rounds(make_study, spare, charged):
    """5 % of the rounds where the study does not say how many."""
    study = make_study(train={"spare_rounds": spare, "strategy": "fedavg", "local_steps": 3})

    assert study.train.charged_rounds == charged
    assert study.charged_steps == 3 * charged


def test_one_round_has_one_spare(make_study):
    """5 % is rounded up: even the shortest run survives one crash."""
    assert make_study(train={"rounds": 1}).train.charged_rounds == 2


@pytest.mark.parametrize(("units", "allowed"), [(99_999, True), (100_000, False), (100_001, False)])
def test_delta_is_below_one_over_the_units(make_study, units, allowed):
    """At delta = 1/units one whole unit may be published."""
    study = make_study(privacy={"delta": 1e-5})
    if allowed:
        check_delta(study, units, "north")
        return

    with pytest.raises(ConfigError, match=r"privacy.delta: found 1e-05, allowed: below 1/.*north"):
        check_delta(study, units, "north")


def test_survivors_are_the_whole_cohort_unless_said(make_study):
    """With `all`, one drop loses the round and nothing else."""
    fixed = make_study(secure_aggregation={"min_survivors": 3})

    assert make_study().survivors(5) == 5
    assert fixed.survivors(5) == 3


def test_of_groups_more_than_half_make_a_round(make_study):
    """And as many as the rule needs: more than twice those that may be poisoned."""
    mean = make_study(secure_aggregation=GROUPS)
    median = make_study(secure_aggregation={**GROUPS, "combine": "median", "min_survivors": 4})

    assert [mean.groups(n) for n in (15, 19, 20, 44)] == [3, 3, 4, 8]
    assert [mean.least_sums(n) for n in (15, 20, 44)] == [2, 3, 5]
    assert [median.least_sums(n) for n in (15, 20, 44)] == [3, 3, 5]
    assert [mean.quorum(15), median.quorum(15)] == [10, 12]
    assert [mean.needed(15), mean.needed(44), median.needed(15)] == [15, 25, 15]


def test_without_groups_a_round_is_one_sum(make_study):
    """And keeps what that sum keeps."""
    study = make_study(secure_aggregation={"min_survivors": 3})

    assert (study.groups(9), study.least_sums(9), study.quorum(9)) == (1, 1, 3)


def test_shared_noise_needs_an_honest_part_in_every_group(make_study):
    """Four colluders of a group of five leave one, five leave none."""
    shared = {"privacy": {"noise": "shared"}}
    said = refused(make_study, **shared, secure_aggregation={**GROUPS, "colluders": 5})

    assert "colluders = 5 of 5 sites leaves no honest part" in said
    assert make_study(**shared, secure_aggregation={**GROUPS, "colluders": 4})


def test_override_checks_anew(study):
    """A swept value passes the same gate as a typed one."""
    with pytest.raises(ConfigError, match=r"study heart: privacy.epsilon: found -1.0"):
        override(study, {"privacy.epsilon": -1.0})


def test_override_of_the_noise_leaves_no_share_of_it(make_study):
    """For a comparison without privacy nothing has to be taken out by hand."""
    study = make_study(evaluation={"release": "dp", "share": 0.2})

    without = override(study, {"privacy.noise": "none"})

    assert (without.evaluation.release, without.evaluation.share) == ("none", None)


def test_override_of_nothing_is_the_same_study(study):
    """No field is lost on the way."""
    assert override(study, {}).id == study.id


def test_override_makes_a_table_that_was_left_out(make_study):
    """A key of an optional table can be set although the file has no such table."""
    changed = override(make_study(), {"task.operating_point.fpr": 0.1})

    assert changed.task.operating_point.fpr == 0.1


def test_override_of_the_strategy_leaves_nothing_of_the_one_before(make_study):
    """What was filled in for it goes; what was chosen stays where the next reads it."""
    adam = make_study(train={"strategy": "fedadam", "local_steps": 5, "server_lr": 0.5})

    averaging = override(adam, {"train.strategy": "fedavg"}).train
    yogi = override(
        make_study(train={"strategy": "fedadam", "server_lr": 0.1}), {"train.strategy": "fedyogi"}
    )

    assert (averaging.server_lr, averaging.beta_1, averaging.tau) == (None, None, None)
    assert override(adam, {"train.strategy": "fedadagrad"}).train.server_lr == 0.5
    assert yogi.train.server_lr == 0.01


def test_override_to_no_noise_promises_nothing(study):
    """As a file that asks for no noise must."""
    privacy = override(study, {"privacy.noise": "none"}).privacy

    assert (privacy.epsilon, privacy.delta) == (None, None)


def test_override_of_a_key_under_a_value_is_refused(study):
    """`study.name` is no table."""
    with pytest.raises(ConfigError, match="'name' is a value, not a table"):
        override(study, {"study.name.first": 1})


def test_override_of_an_unknown_key_is_refused(study):
    """A misspelt sweep would else compare a study with itself."""
    with pytest.raises(ConfigError, match="did you mean 'epsilon'"):
        override(study, {"privacy.epsilom": 1.0})


DOCUMENTED = """
[study]
name = "card-fraud-2026q4"
purpose = "score card payments for fraud"       # free text, shown to the privacy officer
[task]
kind = "binary"; target = "is_fraud"; positive = 1
metric = "auprc"; operating_point = { fpr = 0.01 }
[privacy]
unit = "customer_id"          # "record", or a column; refused where a site lacks it
epsilon = 3.0; delta = 1e-6   # refused where delta >= 1 / units of the smallest site
clip = 0.1
noise = "local"
[secure_aggregation]
enabled = true; min_sites = 4; colluders = 1; min_survivors = "all"
[train]
strategy = "lockstep"
rounds = 200; sample_rate = 0.05; optimizer = "adam"; lr = 0.02
[model]
name = "auto"
[features]
scaling = "bounds"
[features.columns.amount]
type = "float"; range = [0, 50000]; transform = "log1p"
[features.columns.mcc]
type = "category"; vocabulary = "iso18245"
[features.columns.age]
type = "float"; range = [18, 110]; missing = "flag"
"""


def test_the_documented_example_is_a_study():
    """The text of the contract with the user; it writes `;` where TOML wants a new line."""
    raw = tomllib.loads(re.sub(r"; (?=\w+ = )", "\n", DOCUMENTED))

    study = parse(Study, raw, file="study.toml")

    assert study.task.operating_point.fpr == 0.01
    assert sorted(study.features.columns) == ["age", "amount", "mcc"]
