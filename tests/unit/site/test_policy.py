"""policy.toml: each rule refuses by itself, says by how much to the site, and how little to the server."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from lepton_fl.config import parse
from lepton_fl.errors import ConfigError, PolicyRefused
from lepton_fl.privacy import Guarantee
from lepton_fl.secagg.identity import IdentityKey
from lepton_fl.secure_rounds import cohort_of
from lepton_fl.simulation.members import memberships
from lepton_fl.site import Policy
from lepton_fl.site.approvals import Approvals, StudySignature
from lepton_fl.site.policy import admit_data, admit_study

FILE = "/srv/clinic/policy.toml"


@pytest.fixture(scope="module")
def site_key():
    """Of the site's ledger."""
    return IdentityKey.generate()


@pytest.fixture
def approvals(tmp_path, site_key):
    return Approvals(tmp_path / "approvals.jsonl", key=site_key.public)


@pytest.fixture
def admit(make_study, make_policy, approvals):
    """Judge a study under a policy, each changed as said, for a cohort of three."""

    def run(study=(), policy=(), *, cohort=3):
        admit_study(
            make_policy(**dict(policy)),
            make_study(**dict(study)),
            cohort=cohort,
            file=FILE,
            approvals=approvals,
        )

    return run


def test_a_study_within_the_policy_is_admitted(admit):
    """Otherwise the refusals below would show nothing."""
    admit()


def test_groups_smaller_than_the_least_cohort_are_refused(admit):
    """Before the cohort is known: a site is hidden in its group alone, however many sites there are."""
    study = {"secure_aggregation": {"enabled": True, "min_sites": 15, "group_size": 5}}
    admit(study, {"require": {"min_sites": 5}}, cohort=None)

    with pytest.raises(PolicyRefused, match=r"sums over groups of 5.* 6 or more .*require\.min_sites"):
        admit(study, {"require": {"min_sites": 6}}, cohort=None)


def test_a_study_against_fewer_colluders_is_refused(admit):
    """Before anybody approves it, not only in the first round; without such sums nothing hangs on them."""
    study = {"secure_aggregation": {"enabled": True, "min_sites": 4, "colluders": 1}}
    admit(study, {"require": {"colluders": 1}}, cohort=None)
    admit({}, {"require": {"colluders": 2}}, cohort=None)

    with pytest.raises(PolicyRefused, match=r"against 1 colluders.* 2 or more .*require\.colluders"):
        admit(study, {"require": {"colluders": 2}}, cohort=None)


@pytest.mark.parametrize(
    ("study", "policy", "found", "allowed", "key"),
    [
        (
            {},
            {"budget": {"epsilon_per_study": 3.5}},
            "epsilon 4 per record",
            "3.5",
            "budget.epsilon_per_study",
        ),
        ({}, {"budget": {"delta_total": 1e-4}}, "delta 0.001", "0.0001", "budget.delta_total"),
        (
            {"privacy": {"noise": "none", "epsilon": None, "delta": None}},
            {},
            "noise 'none'",
            "noise only",
            "require.differential_privacy",
        ),
        (
            {"privacy": {"unit": "patient"}},
            {},
            "privacy unit 'patient'",
            "'record'",
            "require.privacy_units",
        ),
        (
            {},
            {"require": {"secure_aggregation": True}},
            "no secure aggregation",
            "secure aggregation only",
            "require.secure_aggregation",
        ),
        ({}, {"require": {"min_sites": 4}}, "a cohort of 3", "4 or more", "require.min_sites"),
        (
            {"secure_aggregation": {"min_sites": 5}},
            {},
            "a cohort of 3",
            "5 or more",
            "the study's own min_sites",
        ),
        (
            {"model": {"name": "mlp"}},
            {"release": {"allow_models": ["logreg"]}},
            "model 'mlp'",
            "'logreg'",
            "release.allow_models",
        ),
        (
            {},
            {"budget": {"delta_total": 1e-2, "delta_per_study": 1e-4}},
            "delta 0.001",
            "0.0001",
            "budget.delta_per_study",
        ),
        (
            {},
            {"require": {"min_noise_multiplier": 3}},
            "noise multiplier 0.",
            "3 or more",
            "require.min_noise_multiplier",
        ),
        (
            {"privacy": {"noise": "none", "epsilon": None, "delta": None}},
            {"require": {"differential_privacy": False, "min_noise_multiplier": 0.1}},
            "noise multiplier 0,",
            "0.1 or more",
            "require.min_noise_multiplier",
        ),
        (
            {"privacy": {"max_sites_per_unit": 2}},
            {"require": {"max_sites_per_unit": 3}},
            "privacy.max_sites_per_unit 2",
            "3 or more",
            "require.max_sites_per_unit",
        ),
        (
            {},
            {"require": {"approval": "signed-study", "study_key": "00" * 32}},
            "to run without a signature",
            "those signed by its study_key only",
            "require.approval",
        ),
        ({}, {"require": {"approval": "manual"}}, "approval", "approved studies only", "require.approval"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)
def test_a_rule_refuses(admit, study, policy, found, allowed, key):
    """The site reads what was asked, what is allowed, the file and the key; the server the key alone."""
    with pytest.raises(PolicyRefused) as refused:
        admit(study, policy)

    assert found in refused.value.message
    assert f"this site allows {allowed} ({FILE}, {key})" in refused.value.message
    assert refused.value.public == f"the site's policy refuses the study ({key})"


def test_a_cohort_not_yet_formed_is_not_too_small(admit):
    """A `JOIN` is asked before there is one."""
    admit(cohort=None)


def test_a_study_without_noise_runs_where_the_policy_says_so(admit):
    """differential_privacy = false is the site's to write."""
    admit(
        {"privacy": {"noise": "none", "epsilon": None, "delta": None}},
        {"require": {"differential_privacy": False}},
    )


@pytest.mark.parametrize(
    ("key", "strict"),
    [
        ("secure_aggregation", True),
        ("differential_privacy", True),
        ("min_sites", 3),
        ("privacy_units", ("record",)),
        ("approval", "manual"),
    ],
)
def test_an_absent_requirement_is_the_strict_one(key, strict):
    """A policy of data and budget alone forbids more than any longer one."""
    budget = {"epsilon_total": 1.0, "epsilon_per_study": 1.0, "delta_total": 1e-6}

    policy = parse(Policy, {"data": {"id": "d"}, "budget": budget}, file=FILE)

    assert getattr(policy.require, key) == strict
    assert policy.release.metrics == "none"
    assert policy.release.allow_models == ("logreg", "mlp")


@pytest.mark.parametrize("key", ["epsilon_total", "epsilon_per_study", "delta_total"])
def test_a_budget_has_no_default(key):
    """How much may be spent is written, never assumed."""
    budget = {"epsilon_total": 1.0, "epsilon_per_study": 1.0, "delta_total": 1e-6}
    del budget[key]

    with pytest.raises(ConfigError, match=f"budget.{key}: missing"):
        parse(Policy, {"data": {"id": "d"}, "budget": budget}, file=FILE)


def test_a_misspelt_limit_is_refused():
    """It would otherwise be no limit at all."""
    raw = {"data": {"id": "d"}, "budget": {}, "require": {"min_site": 9}}

    with pytest.raises(ConfigError, match="did you mean 'min_sites'"):
        parse(Policy, raw, file=FILE)


def test_the_smallest_sigma_is_of_the_noise_that_was_calibrated(admit, study):
    """To the study's epsilon, over all rounds: at the limit it is admitted, a little above it is not."""
    sigma = Guarantee.of(study).event.noise_multiplier
    admit((), {"require": {"min_noise_multiplier": sigma}})

    with pytest.raises(PolicyRefused, match="min_noise_multiplier"):
        admit((), {"require": {"min_noise_multiplier": sigma + 1e-9}})


def test_a_study_must_account_for_as_many_sites_as_share_a_unit(admit):
    """For more of them is a stronger promise. A policy that does not say how many demands nothing."""
    demanded = {"require": {"max_sites_per_unit": 2}}
    admit({"privacy": {"max_sites_per_unit": 2}}, demanded)
    admit({"privacy": {"max_sites_per_unit": 3}}, demanded)
    admit({"privacy": {"max_sites_per_unit": 1}})

    with pytest.raises(PolicyRefused, match=r"max_sites_per_unit 1, .* 2 or more") as refused:
        admit({"privacy": {"max_sites_per_unit": 1}}, demanded)
    assert refused.value.fix == "privacy.max_sites_per_unit = 2 in the study, or lower the key"


def test_a_delta_of_a_study_does_not_widen_that_of_all(admit):
    """The smaller of the two holds."""
    with pytest.raises(PolicyRefused, match=r"budget\.delta_total"):
        admit((), {"budget": {"delta_total": 1e-4, "delta_per_study": 1e-2}})


def test_an_approved_study_is_admitted(admit, approvals, study, site_key):
    """A person at the site named this very study."""
    approvals.add(study, site_key)

    admit((), {"require": {"approval": "manual"}})


def test_an_approval_is_of_one_study_id(admit, approvals, make_study, site_key):
    """Another learning rate is another study."""
    approvals.add(make_study(train={"lr": 0.2}), site_key)

    with pytest.raises(PolicyRefused, match=r"require\.approval"):
        admit((), {"require": {"approval": "manual"}})


@pytest.mark.parametrize("line", ["", "approved", "[1]", '{"study": 1}', '{"study": "%s', "[" * 100_000])
def test_an_approval_that_cannot_be_read_approves_nothing(admit, approvals, study, line):
    """A cut or foreign line is no approval."""
    approvals.path.write_text(line.replace("%s", study.id))

    with pytest.raises(PolicyRefused, match=r"require\.approval"):
        admit((), {"require": {"approval": "manual"}})


def _unsigned(entry, _):
    return {key: value for key, value in entry.items() if key not in ("key", "signature")}


def _of_another_day(entry, _):
    return {**entry, "at": "2020-01-01T00:00:00+00:00"}


def _of_another_study(entry, other):
    return {**other, "study": entry["study"], "name": entry["name"]}


def _with_no_hex(entry, _):
    return {**entry, "signature": "zz"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_unsigned, "is not signed, as in releases before this one"),
        (_of_another_day, "was changed after it was signed"),
        (_of_another_study, "was changed after it was signed"),
        (_with_no_hex, "was changed after it was signed"),
    ],
)
def test_who_can_write_the_file_cannot_approve(
    admit, approvals, make_study, site_key, study, tmp_path, change, said
):
    """Only the site's key can, for one study; and the site's people are told what to do."""
    kept = []
    for asked in (study, make_study(train={"lr": 0.2})):
        elsewhere = Approvals(tmp_path / f"{asked.id}.jsonl", key=site_key.public)
        elsewhere.add(asked, site_key)
        kept.append(json.loads(elsewhere.path.read_text()))
    approvals.path.write_text(json.dumps(change(*kept)) + "\n")

    with pytest.raises(PolicyRefused, match=said) as refused:
        admit((), {"require": {"approval": "manual"}})
    assert refused.value.fix == "lepton-fl study approve heart -c site.toml"
    assert refused.value.public == "the site's policy refuses the study (require.approval)"


def test_an_approval_by_another_key_is_none(admit, approvals, study):
    """As of another site, or of a ledger that was replaced."""
    approvals.add(study, IdentityKey.generate())

    with pytest.raises(PolicyRefused, match="is not this site's ledger's"):
        admit((), {"require": {"approval": "manual"}})


def test_a_refusal_needs_no_signature(admit, approvals, study, site_key):
    """Nothing can be had by one: also those of releases before count."""
    approvals.add(study, site_key)
    with approvals.path.open("a") as file:
        file.write(json.dumps({"study": study.id, "refused": "no"}) + "\n")

    for approval in ("manual", "auto"):
        with pytest.raises(PolicyRefused, match="was refused here: no"):
            admit((), {"require": {"approval": approval}})


def test_a_refusal_is_taken_back_by_a_signature_alone(admit, approvals, study, site_key):
    """Not by a line that somebody wrote after it, where a policy asks no person."""
    approvals.refuse(study, "no")
    for entry in (
        {},
        {"at": "2026-01-01T00:00:00+00:00", "key": site_key.public.hex(), "signature": "00" * 64},
    ):
        with approvals.path.open("a") as file:
            file.write(json.dumps({"study": study.id, **entry}) + "\n")
    approvals.add(study, IdentityKey.generate())

    for approval in ("manual", "auto"):
        with pytest.raises(PolicyRefused, match="was refused here: no"):
            admit((), {"require": {"approval": approval}})
    approvals.add(study, site_key)
    admit((), {"require": {"approval": "auto"}})


# Studies that a key signs


@pytest.fixture
def signed(admit, approvals, study):
    """Judge a study that came with `data` for a signature, under a policy that trusts `key`."""

    def run(data, key, **require):
        path = approvals.signature_path(study.id)
        path.parent.mkdir(exist_ok=True)
        path.write_text(data)
        admit((), {"require": {"approval": "signed-study", "study_key": key.public.hex(), **require}})

    return run


@pytest.fixture(scope="module")
def operator():
    """Who signs the consortium's studies."""
    return IdentityKey.generate()


def in_hex(key, study_id):
    return StudySignature.sign(key, study_id).to_bytes().hex()


def test_a_signed_study_is_admitted_without_a_person(signed, operator, study):
    """By the one key that the policy names."""
    signed(in_hex(operator, study.id), operator)


def test_a_signature_of_another_study_lets_nothing_in(signed, operator, study, make_study):
    """Another learning rate is another study."""
    with pytest.raises(PolicyRefused, match="does not verify"):
        signed(in_hex(operator, make_study(train={"lr": 0.2}).id), operator)


def test_a_signature_by_another_key_lets_nothing_in(signed, operator, study):
    """Whoever's it is, it is named."""
    other = IdentityKey.generate()

    with pytest.raises(PolicyRefused, match=f"signature of key {other.public.hex()}"):
        signed(in_hex(other, study.id), operator)


@pytest.mark.parametrize("place", [0, 31, 32, 95], ids=["key", "key's end", "signature", "its end"])
def test_a_signature_that_was_changed_lets_nothing_in(signed, operator, study, place):
    """In any byte of the key or of the signature."""
    data = bytearray(bytes.fromhex(in_hex(operator, study.id)))
    data[place] ^= 1

    with pytest.raises(PolicyRefused, match="a signature that does not verify"):
        signed(data.hex(), operator)


@pytest.mark.parametrize("data", ["", "no signature", "00" * 95, "00" * 97])
def test_what_is_no_signature_lets_nothing_in(signed, operator, data):
    """Absence of an answer is a refusal, and so is nonsense."""
    with pytest.raises(PolicyRefused, match="a signature that does not verify"):
        signed(data, operator)


def test_a_key_counts_until_its_last_day(signed, operator, study):
    """By the site's own policy and clock."""
    today = datetime.now(UTC).date()
    data = in_hex(operator, study.id)
    signed(data, operator, study_key_until=today + timedelta(days=1))

    with pytest.raises(PolicyRefused, match=r"counted until .*study_key_until"):
        signed(data, operator, study_key_until=today - timedelta(days=1))


def test_a_persons_approval_is_no_signature(admit, approvals, study, site_key, operator):
    """A policy that asks for the one does not take the other."""
    approvals.add(study, site_key)

    with pytest.raises(PolicyRefused, match="without a signature"):
        admit((), {"require": {"approval": "signed-study", "study_key": operator.public.hex()}})


def test_a_person_refuses_a_signed_study(signed, approvals, operator, study):
    """The site decides."""
    approvals.refuse(study, "not here")

    with pytest.raises(PolicyRefused, match="was refused here: not here"):
        signed(in_hex(operator, study.id), operator)


def test_signed_studies_need_a_key_to_trust(make_policy):
    """One line says which, and how to come by it."""
    with pytest.raises(ConfigError, match=r"require: approval = .signed-study. needs study_key"):
        make_policy(require={"approval": "signed-study"})


@pytest.mark.parametrize(
    ("policy", "found", "allowed"),
    [
        (
            {"require": {"min_rows": 61}},
            "60 training rows",
            "asks 61 (/srv/clinic/policy.toml, require.min_rows)",
        ),
        (
            {"require": {"min_positives": 32}},
            "31 positive training rows",
            "asks 32 (/srv/clinic/policy.toml, require.min_positives)",
        ),
    ],
)
def test_a_table_that_is_too_small_refuses(make_policy, study, policy, found, allowed):
    """The site reads its counts, the limit and the key."""
    with pytest.raises(PolicyRefused) as refused:
        admit_data(make_policy(**policy), study, units=60, rows=60, positives=31, file=FILE)

    assert found in refused.value.message
    assert allowed in refused.value.message
    assert refused.value.public == "PolicyRefused"


def test_delta_of_one_over_the_units_refuses(make_policy, make_study):
    """At delta >= 1/units one unit may be published whole."""
    study = make_study(privacy={"delta": 0.01})

    with pytest.raises(PolicyRefused, match=r"with 100 units here it must be below 0\.01"):
        admit_data(make_policy(), study, units=100, rows=200, positives=9, file=FILE)


def test_delta_below_one_over_the_units_is_admitted(make_policy, make_study):
    """Units count, not rows."""
    study = make_study(privacy={"delta": 0.01})

    admit_data(make_policy(), study, units=99, rows=500, positives=9, file=FILE)


@pytest.mark.parametrize(
    ("secure", "said"),
    [
        ({"min_sites": 2}, "what 2 sites can be protected against"),
        ({"min_sites": 4, "colluders": 2}, "what 4 sites can be protected against"),
        # Of the sizes above the smallest, the threshold of 10 holds out against the fewest.
        ({"min_sites": 9, "colluders": 4}, "what 10 sites can be protected against"),
    ],
    ids=["two sites", "half of four", "four of ten"],
)
def test_a_deployed_agent_refuses_what_the_protocol_cannot_protect(make_study, make_site, secure, said):
    """Before its people are asked."""
    study = make_study(secure_aggregation={"enabled": True, **secure})

    with pytest.raises(ConfigError, match=said):
        make_site(deployed=True).surroundings.admit(study)


def test_two_sites_are_refused_unless_the_policy_says_otherwise(make_policy, make_study):
    """Of a sum of two, each sees the other's part: only for two that mind the server alone."""
    study = make_study(secure_aggregation={"enabled": True, "min_sites": 2, "colluders": 0})
    consortium, _ = memberships({101: "bank", 102: "clinic"})
    cohort = cohort_of(study, ("bank", "clinic"), consortium.roster)

    with pytest.raises(PolicyRefused, match=r"a cohort of 2, this site allows 3"):
        admit_study(make_policy(), study, cohort=2, file=FILE, approvals=None)
    admit_study(make_policy(require={"min_sites": 2}), study, cohort=2, file=FILE, approvals=None)
    assert (cohort.n, cohort.quorum, cohort.hidden_among) == (2, 2, 2)


def test_a_deployed_agent_admits_local_noise(study, make_site):
    """Private against everyone, the server included."""
    make_site(deployed=True).surroundings.admit(study)
