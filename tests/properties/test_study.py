"""Laws of the study's canonical bytes."""

import json
from functools import partial

from hypothesis import assume, given
from hypothesis import strategies as st

from lepton_fl.config import parse
from lepton_fl.errors import ConfigError
from lepton_fl.study import CANONICAL_PREFIX, STRATEGY_KEYS, Study, parse_canonical

study_of = partial(parse, Study, file="study.toml")

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
REAL = partial(st.floats, allow_nan=False, allow_infinity=False)
FRACTION = REAL(min_value=0, max_value=1, exclude_min=True, exclude_max=True)
EPSILON = REAL(min_value=0, max_value=100, exclude_min=True)
DELTA = REAL(min_value=1e-10, max_value=0.1)
CLIP = REAL(min_value=1e-4, max_value=1e4)
RATE = REAL(min_value=1e-6, max_value=1)
BATCH = REAL(min_value=0.01, max_value=1e9)
RANGE = st.tuples(REAL(), REAL()).map(sorted).filter(lambda r: r[0] < r[1]).map(list)
TIME = st.one_of(
    REAL(), REAL().map(str), st.dates(), st.datetimes(timezones=st.timezones()), st.dates().map(str)
)
SOURCE = st.one_of(
    st.integers(2, 65_536).map(lambda n: {"hash": n}),
    st.lists(st.one_of(TEXT, st.integers(-9, 9), st.booleans()), min_size=1, max_size=4, unique_by=str).map(
        lambda codes: {"vocabulary": codes}
    ),
)
CONSTANTS = {
    "server_lr": REAL(min_value=0.01, max_value=100),
    "server_momentum": REAL(min_value=0, max_value=0.99),
    "beta_1": REAL(min_value=0, max_value=0.99),
    "beta_2": REAL(min_value=0, max_value=0.99),
    "tau": REAL(min_value=1e-10, max_value=1),
    "proximal_mu": REAL(min_value=1e-3, max_value=100),
}
SCHEDULE = {
    "lr_schedule": st.sampled_from(["constant", "cosine", "linear"]),
    "warmup_rounds": st.integers(0, 8),
}
STRATEGY = st.sampled_from(sorted(STRATEGY_KEYS)).flatmap(
    lambda name: st.fixed_dictionaries(
        {
            "strategy": st.just(name),
            **{key: CONSTANTS[key] for key, usual in STRATEGY_KEYS[name].items() if usual is None},
        },
        optional={
            **{key: CONSTANTS[key] for key, usual in STRATEGY_KEYS[name].items() if usual is not None},
            **(SCHEDULE if name == "lockstep" or "server_lr" in STRATEGY_KEYS[name] else {}),
        },
    )
)
STOPPING = st.fixed_dictionaries(
    {
        "signal": st.sampled_from(["public", "updates"]),
        "patience": st.integers(1, 4),
        "tolerance": REAL(min_value=1e-3, max_value=0.99),
    },
    optional={"min_rounds": st.integers(1, 4)},
)
COLUMN = st.one_of(
    st.fixed_dictionaries(
        {"type": st.just("float"), "range": RANGE},
        optional={"missing": st.sampled_from(["refuse", "flag"])},
    ),
    SOURCE.map(lambda source: {"type": "category", **source}),
)
STUDY = st.fixed_dictionaries(
    {
        "study": st.fixed_dictionaries({"name": st.just("s")}, optional={"purpose": TEXT}),
        "task": st.fixed_dictionaries(
            {"kind": st.just("binary"), "target": TEXT},
            optional={
                "positive": st.one_of(TEXT, st.integers(), st.booleans()),
                "prevalence": FRACTION,
                "operating_point": FRACTION.map(lambda f: {"fpr": f}),
            },
        ),
        "privacy": st.fixed_dictionaries(
            {"epsilon": EPSILON, "delta": DELTA}, optional={"clip": CLIP, "unit": TEXT}
        ),
        "train": st.tuples(
            st.fixed_dictionaries(
                {"rounds": st.integers(9, 900_000), "sample_rate": RATE, "lr": EPSILON},
                optional={
                    "expected_batch": BATCH,
                    "spare_rounds": st.integers(0, 9),
                    "early_stopping": STOPPING,
                },
            ),
            STRATEGY,
        ).map(lambda parts: {**parts[0], **parts[1]}),
        "features": st.dictionaries(TEXT, COLUMN, min_size=1, max_size=4).map(lambda c: {"columns": c}),
    },
    optional={
        "model": st.lists(st.integers(1, 64), max_size=3).map(lambda widths: {"hidden": widths}),
        "evaluation": st.fixed_dictionaries({"split": st.just("time"), "time_column": TEXT, "cutoff": TIME}),
    },
)


def valid(raw):
    """The study, where the parts drawn one by one make one together."""
    try:
        return study_of(raw)
    except ConfigError:
        assume(False)


def reordered(value, data):
    """The same tables with their keys in another order, at every depth."""
    if not isinstance(value, dict):
        return value
    keys = data.draw(st.permutations(list(value)))
    return {key: reordered(value[key], data) for key in keys}


@given(STUDY)
def test_canonical_bytes_survive_parsing(raw):
    """Canonical, parsed, canonical again: the same bytes, the same id, an equal study."""
    study = valid(raw)

    again = parse_canonical(study.canonical, study.id)

    assert again == study
    assert again.canonical == study.canonical


@given(STUDY, st.data())
def test_the_order_of_keys_never_matters(raw, data):
    """A file's keys may stand in any order."""
    study = valid(raw)

    assert study_of(reordered(raw, data)).canonical == study.canonical


@given(STUDY)
def test_defaults_spelt_out_do_not_matter(raw):
    """A file that says everything is the same study as one that leaves the defaults out."""
    study = valid(raw)

    assert study_of(study.model_dump(mode="json")).id == study.id


@given(STUDY)
def test_canonical_bytes_are_sorted_compact_json(raw):
    """Anyone can make them from the study's values with a JSON library."""
    body = valid(raw).canonical.removeprefix(CANONICAL_PREFIX).decode()

    assert body == json.dumps(json.loads(body), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
