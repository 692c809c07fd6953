"""What a server may send to sites with all of their controls: nothing leaves but in the sum of the round."""

import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord

from lepton_fl.config import parse
from lepton_fl.errors import AlreadyCharged, BadRequest, LeptonError, PolicyRefused
from lepton_fl.messages import (
    ARRAYS,
    CONFIG,
    EVALUATE,
    JOIN,
    METRICS,
    PHASES,
    SECAGG,
    TRAIN,
    WEIGHT,
    refusal_exit_code,
    sits_out,
    to_record,
)
from lepton_fl.secagg.context import Consortium
from lepton_fl.secagg.errors import BadPayload, OtherRoster, Phase, SecaggError
from lepton_fl.secagg.identity import IdentityKey, Member, Roster
from lepton_fl.site import secure as site_secure
from lepton_fl.study import Study
from lepton_fl.training import train_locally

LATER = [Phase.SHARE, Phase.MASK, Phase.CONFIRM, Phase.UNMASK]
VICTIM = 102
OTHER_RUN = "fedcba9876543210" * 2
UNNOISED = {"privacy": {"noise": "none", "epsilon": None, "delta": None}}
"""A study whose rounds no ledger counts: what keeps them apart is the history alone."""
ALLOWED = {"require": {"differential_privacy": False}}
REASONS = re.compile(
    r"(round already charged|message type not allowed|BadRequest|ProtocolError|internal error at the site"
    r"|the site's policy refuses the study \([a-z_.' ]+\)"
    r"|[A-Z][A-Za-z]+ in [a-z]+(, by the server|, by party \d+)?)"
)
"""All that a server may hear of a refusal."""


def changed(study, **tables):
    """A study that is another in these keys."""
    raw = study.model_dump(mode="json", exclude_none=True)
    return parse(Study, {k: {**v, **tables.get(k, {})} for k, v in raw.items()}, file="study.toml")


def is_refused(reply, *, for_good=False):
    assert reply.has_error()
    assert REASONS.fullmatch(reply.error.reason), reply.error.reason
    assert sits_out(reply) is not for_good
    return reply.error.reason


def charged(world, party=VICTIM):
    return [entry["round"] for entry in world.sites[party].ledger.history("records")]


def at(phase, action, party=VICTIM):
    """`between` that does something before the honest message of a phase reaches a site."""

    def between(message, call):
        kind = TRAIN if phase is Phase.ADVERTISE else PHASES[phase]
        if (message.metadata.message_type, message.metadata.dst_node_id) == (kind, party):
            action(message, call)
        return call(message)

    return between


def until(phase):
    """`between` that loses everything from this phase on, another attempt as well."""
    lost = [PHASES[Phase.ADVERTISE], *(PHASES[later] for later in LATER[LATER.index(phase) :])]
    return lambda message, call: None if message.metadata.message_type in lost else call(message)


def requested(world, phase, party=VICTIM):
    """What the server asked a site for in a phase, whether it arrived or not."""
    passed = [p for p in world.wire.tape if (p.kind, p.party) == (PHASES[phase], party)]
    return passed[0].request.content.config_records[SECAGG]["body"]


# Told something else than the others


def one_ulp_away(world):
    model = {name: array.copy() for name, array in world.model.items()}
    first = next(iter(model.values()))
    first.flat[0] = np.nextafter(first.flat[0], np.float32(1))
    return {"model": model}


TOLD = {
    "cohort": lambda world: {"cohort": world.cohort[:3]},
    "model": one_ulp_away,
    "sigma": lambda world: {"study": changed(world.study, privacy={"epsilon": 3.5})},
    "clip": lambda world: {"study": changed(world.study, privacy={"clip": 0.5})},
    "colluders": lambda world: {"study": changed(world.study, secure_aggregation={"colluders": 0})},
    "survivors": lambda world: {"study": changed(world.study, secure_aggregation={"min_survivors": 4})},
    "suite": lambda world: {"study": changed(world.study, secure_aggregation={"suite": "LSA1-PQ"})},
    "round": lambda _: {"number": 2},
    "run": lambda _: {"run": OTHER_RUN},
}


@pytest.mark.parametrize("told", TOLD.values(), ids=TOLD)
def test_one_site_is_told_something_else(world, told):
    """What it then signs is of another context: it is in no sum of the others, they in none of its own."""
    other = world.first(VICTIM, **told(world))

    def between(message, call):
        begins = (message.metadata.message_type, message.metadata.dst_node_id) == (TRAIN, VICTIM)
        return call(other if begins else message)

    replies = world.train(between=between)

    world.is_sum(replies, [party for party in world.parties if party != VICTIM])
    assert not world.released(VICTIM)


def test_another_roster(world):
    """Refused before anything is spent."""
    reply = world.ask(world.first(VICTIM, secagg=world.request(roster=2)))

    assert is_refused(reply) == "OtherRoster in advertise"
    assert charged(world) == []
    assert isinstance(world.errors(VICTIM)[0], OtherRoster)


# Out of order


@pytest.mark.parametrize("phase", PHASES)
def test_an_exchange_before_training(world, phase):
    reply = world.ask(world.later(VICTIM, phase))

    assert is_refused(reply) == f"BadPhase in {phase}"
    assert charged(world) == []


@pytest.mark.parametrize("phase", LATER)
def test_another_phase_than_is_due(world, phase):
    """Refused, and the round goes on."""
    others = [other for other in LATER if other is not phase]
    refused = []

    def ask_others(message, _):
        body = message.content.config_records[SECAGG]["body"]
        refused.extend(is_refused(world.ask(world.later(VICTIM, other, body))) for other in others)

    world.is_sum(world.train(between=at(phase, ask_others)), world.parties)

    assert refused == [f"BadPhase in {other}, by the server" for other in others]


ELSEWHERE = {
    "run": {"run": OTHER_RUN},
    "round": {"number": 2},
    "cohort": {"cohort": ("alpha", "bravo", "charlie")},
    "attempt": {"attempt": 2},
    "kind": {"kind": "evaluate"},
    "study": {"study": {"privacy": {"clip": 0.5}}},
    "study without secure aggregation": {"study": {"secure_aggregation": {"enabled": False}}},
}


@pytest.mark.parametrize("elsewhere", ELSEWHERE.values(), ids=ELSEWHERE)
def test_an_exchange_of_another_round(make_world, elsewhere):
    """Right bytes, but in the name of another round: refused in each phase, and its own round goes on."""
    world = make_world(policy={"require": {"secure_aggregation": False}})
    fields = dict(elsewhere)
    if "study" in fields:
        fields["study"] = changed(world.study, **fields["study"])

    assigned = {k: v for k, v in fields.items() if k not in ("attempt", "kind")}
    request = {k: v for k, v in fields.items() if k in ("attempt", "kind")}
    refused = []

    def between(message, call):
        phase = {kind: phase for phase, kind in PHASES.items()}.get(message.metadata.message_type)
        if phase and message.metadata.dst_node_id == VICTIM:
            secagg = world.request(message.content.config_records[SECAGG]["body"], **request)
            refused.append(is_refused(world.ask(world.later(VICTIM, phase, secagg=secagg, **assigned))))
        return call(message)

    world.is_sum(world.train(between=between), world.parties)

    assert refused == [f"BadPhase in {phase}" for phase in LATER]


@pytest.mark.parametrize("phase", LATER)
def test_an_answered_exchange_again(world, phase):
    """The same request has the same reply, byte for byte; another one is refused, and the round goes on."""
    found = []

    def between(message, call):
        reply = call(message)
        if (message.metadata.message_type, message.metadata.dst_node_id) == (PHASES[phase], VICTIM):
            body = message.content.config_records[SECAGG]["body"]
            again = world.ask(world.later(VICTIM, phase, body))
            assert again.content == reply.content
            other = world.ask(world.later(VICTIM, phase, body[:-1] + bytes([body[-1] ^ 1])))
            found.append(is_refused(other))
        return reply

    world.is_sum(world.train(between=between), world.parties)

    assert found == [f"BadPhase in {phase}, by the server"]


# Twice


@pytest.mark.parametrize("phase", [*LATER, None], ids=str)
@pytest.mark.parametrize("noise", ["local", "none"])
def test_train_again_for_the_same_round(make_world, monkeypatch, phase, noise):
    """Neither trains nor charges, and does not touch the round that is open, nor open a second."""
    world = make_world(**(UNNOISED if noise == "none" else {}), policy=ALLOWED)
    replies = []
    if phase is None:
        world.is_sum(world.train(), world.parties)
        again = lambda: replies.append(world.ask(world.first(VICTIM, **one_ulp_away(world))))
        monkeypatch.setattr("lepton_fl.site.site.train_locally", None)
        again()
    else:

        def ask_again(*_):
            with monkeypatch.context() as patched:
                patched.setattr("lepton_fl.site.site.train_locally", None)
                replies.append(world.ask(world.first(VICTIM, **one_ulp_away(world))))

        world.is_sum(world.train(between=at(phase, ask_again)), world.parties)

    assert is_refused(replies[0]) == "BadPhase in advertise"
    assert charged(world) == ([1] if noise == "local" else [])
    assert world.released(VICTIM)


@pytest.mark.parametrize("phase", LATER)
def test_a_later_round_while_one_is_open(world, phase):
    """The open one is over for this site, for good; it is in the later one, and in each sum at most once."""
    world.train(between=until(phase))
    body = requested(world, phase)
    replies = world.train(number=2)
    late = world.ask(world.later(VICTIM, phase, body))

    world.is_sum(replies, world.parties, number=2)
    assert is_refused(late) == f"BadPhase in {phase}"
    assert not world.released(VICTIM, 1)


def test_more_runs_than_a_site_keeps_open(make_world):
    """The oldest is over; every other is open still. A server cannot fill a site's memory with rounds."""
    world = make_world(policy=ALLOWED, **UNNOISED)
    runs = [f"{number:032x}" for number in range(1, site_secure.MAX_OPEN + 2)]
    for run in runs:
        assert not world.ask(world.first(VICTIM, run=run)).has_error()
    replies = [world.ask(world.later(VICTIM, Phase.ADVERTISE, run=run)) for run in runs]

    assert is_refused(replies[0]) == "BadPhase in advertise"
    assert not any(reply.has_error() for reply in replies[1:])
    assert len(world.sites[VICTIM].aggregation._open) == site_secure.MAX_OPEN


# Attempts


def test_another_attempt_has_fresh_keys_and_the_same_update(world):
    """Asked for again, the same advert; and the first attempt is over."""
    first = world.ask(world.first(VICTIM)).content.config_records[SECAGG]["body"]
    second = world.ask(world.later(VICTIM, Phase.ADVERTISE, attempt=2))
    again = world.ask(world.later(VICTIM, Phase.ADVERTISE, attempt=2))
    share = world.ask(world.later(VICTIM, Phase.SHARE, b"", attempt=1))

    assert second.content == again.content
    assert second.content.config_records[SECAGG]["body"] != first
    assert is_refused(share) == "BadPhase in share"
    assert charged(world) == [1]


@pytest.mark.parametrize("phase", LATER)
def test_a_late_request_for_an_earlier_attempt(make_world, phase):
    """Refused, and the attempt that there is goes on."""
    world = make_world(3)
    refused = []

    def between(message, call):
        kind, party = message.metadata.message_type, message.metadata.dst_node_id
        attempt = message.content.config_records[SECAGG]["attempt"]
        if (kind, party, attempt) == (PHASES[Phase.SHARE], 101, 1):
            # Gone for a moment, and with it the first attempt.
            return None
        if (kind, party, attempt) == (PHASES[phase], VICTIM, 2):
            refused.append(is_refused(world.ask(world.later(VICTIM, Phase.ADVERTISE, attempt=1))))
        return call(message)

    world.is_sum(world.train(between=between), world.parties)

    assert refused == ["BadPhase in advertise"]


def test_attempt_after_the_release(world):
    """There is no second sum of a round."""
    world.is_sum(world.train(), world.parties)

    for attempt in (2, 3, 2**62):
        reply = world.ask(world.later(VICTIM, Phase.ADVERTISE, attempt=attempt))
        assert is_refused(reply) == "BadPhase in advertise"


def test_attempt_after_a_crash(world):
    """What was open is gone with the process; the next round is open to it."""
    world.train(between=until(Phase.MASK))
    world.start(VICTIM)
    reply = world.ask(world.later(VICTIM, Phase.ADVERTISE, attempt=2))

    assert is_refused(reply) == "BadPhase in advertise"
    world.is_sum(world.train(number=2), world.parties, number=2)


def test_a_crash_loses_no_memory_of_a_release(make_world):
    """An unnoised round, which no ledger counts: the history does."""
    world = make_world(policy=ALLOWED, **UNNOISED)
    world.train()
    world.start(VICTIM)

    assert is_refused(world.ask(world.first(VICTIM))) == "BadPhase in advertise"


# Round the protocol


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE, JOIN, *PHASES.values()])
def test_a_study_without_it_under_the_same_run(world, kind):
    """By default policy refuses whatever would leave in clear, in each message, mid-run as well."""
    world.train(between=until(Phase.MASK))
    study = changed(world.study, secure_aggregation={"enabled": False})
    reply = world.ask(world.first(VICTIM, 2, kind=kind, study=study))

    assert (
        is_refused(reply, for_good=True) == "the site's policy refuses the study (require.secure_aggregation)"
    )
    assert charged(world) == [1]


def test_a_study_without_it_where_policy_allows_one(make_world):
    """A round is charged for one study: what is under masks in one does not leave in clear in the other."""
    world = make_world(policy={"require": {"secure_aggregation": False}})
    study = changed(world.study, secure_aggregation={"enabled": False})

    def in_clear(*_):
        reply = world.ask(world.first(VICTIM, study=study))
        assert is_refused(reply) == "round already charged"

    world.is_sum(world.train(between=at(Phase.MASK, in_clear)), world.parties)


def test_shared_noise_without_secure_aggregation_is_no_study(world):
    with pytest.raises(LeptonError, match="needs secure_aggregation"):
        changed(world.study, privacy={"noise": "shared"}, secure_aggregation={"enabled": False})


def test_evaluate_gives_no_figure_in_clear(make_world):
    """Though policy lets exact figures out."""
    world = make_world(policy={"release": {"metrics": "exact"}})
    world.train()
    for message in (world.first(VICTIM, 0, kind=EVALUATE), world.first(VICTIM, 1, kind=EVALUATE)):
        reply = world.ask(message)
        found = {} if reply.has_error() else reply.content.metric_records.get(METRICS, {})
        assert set(found) <= {WEIGHT}


def test_join_opens_no_round(world):
    """Whatever it carries: a name comes back, nothing is charged, and no round is open."""
    reply = world.ask(world.first(VICTIM, kind=JOIN, cohort=()))

    assert dict(reply.content.config_records) == {CONFIG: ConfigRecord({"site": "bravo"})}
    assert not reply.content.array_records
    assert charged(world) == []
    assert is_refused(world.ask(world.later(VICTIM, Phase.SHARE))) == "BadPhase in share"


@pytest.mark.parametrize("kind", ["evaluate", "", "train ", "TRAIN", "x" * 10_000])
def test_train_for_a_sum_of_another_kind(world, kind):
    """Refused before anything is spent."""
    reply = world.ask(world.first(VICTIM, secagg=world.request(kind=kind)))

    assert is_refused(reply, for_good=True) == "BadRequest"
    assert charged(world) == []


@pytest.mark.parametrize("number", [0, 2**62])
def test_train_for_no_round(world, number):
    reply = world.ask(world.first(VICTIM, number))

    assert is_refused(reply, for_good=True) == "BadRequest"
    assert isinstance(world.errors(VICTIM)[0], BadRequest)
    assert charged(world) == []


@pytest.mark.parametrize("cohort", [("bravo",), ("alpha", "bravo")])
def test_a_cohort_of_too_few(world, cohort):
    """A sum of one is the update."""
    reply = world.ask(world.first(VICTIM, cohort=cohort))

    assert is_refused(reply, for_good=True).startswith("the site's policy refuses the study")
    assert charged(world) == []


def test_more_colluders_than_the_study_protects_against(make_world):
    """The site's own policy; before anything is spent."""
    world = make_world(7, policy={"require": {"colluders": 2}})
    reply = world.ask(world.first(VICTIM))

    said = is_refused(reply, for_good=True)
    assert said == "the site's policy refuses the study (require.colluders)"
    assert isinstance(world.errors(VICTIM)[0], PolicyRefused)
    assert charged(world) == []


def test_two_sites_only_where_policies_say_so(make_world):
    """Each sees the other's update; against the server it is a sum like any other."""
    study = {"secure_aggregation": {"min_sites": 2, "min_survivors": 2, "colluders": 0}}
    strict, lax = make_world(2, **study), make_world(2, policy={"require": {"min_sites": 2}}, **study)
    refused = strict.ask(strict.first(VICTIM))

    assert is_refused(refused, for_good=True) == "the site's policy refuses the study (require.min_sites)"
    assert charged(strict) == []
    lax.is_sum(lax.train(), lax.parties)


def test_a_cohort_with_a_name_on_no_roster(world):
    """A member that the server made up."""
    cohort = tuple(sorted([*world.cohort[1:], "zulu"]))
    reply = world.ask(world.first(VICTIM, cohort=cohort))

    assert is_refused(reply, for_good=True) == "PolicyViolation in advertise"
    assert charged(world) == []


def test_a_roster_that_comes_while_a_site_trains(world, monkeypatch):
    """The round goes by the one that it began with; the next one by the new."""
    held = [world.consortium]
    membership = world.members["bravo"]
    world.members["bravo"] = replace(membership, consortium=lambda: held[-1])
    world.start(VICTIM)
    root = IdentityKey.generate()
    roster = world.consortium.roster
    newer = Roster.issue(
        root,
        consortium=roster.consortium,
        version=2,
        members=[Member(m.party, m.name, m.key_digest) for m in roster.members],
        revoked=(),
    )

    trained = []

    def train(*arguments):
        trained.append(arguments)
        # While the second site trains.
        if len(trained) == 2:
            held.append(Consortium(root.public, newer))
        return train_locally(*arguments)

    monkeypatch.setattr("lepton_fl.site.site.train_locally", train)

    world.is_sum(world.train(), world.parties)
    assert is_refused(world.ask(world.first(VICTIM, 2))) == "OtherRoster in advertise"


# Malformed


ILL_TYPED = {
    "attempt": [True, 1.0, "1", 0, -1, [1]],
    "roster": [True, 1.0, "1", 0, -1, [1]],
    "kind": [1, b"train", ["train"]],
    "body": ["", 0, [b""], 1.5],
}


@pytest.mark.parametrize("key", ILL_TYPED)
def test_ill_typed_request(world, key):
    """Of the wrong type or missing, in any message: refused before anything is spent."""
    good = dict(world.request())
    variants = [{**good, key: value} for value in ILL_TYPED[key]]
    for fields in [*variants, {k: v for k, v in good.items() if k != key}]:
        secagg = ConfigRecord(fields)
        asked = [world.first(VICTIM, secagg=secagg)]
        asked += [world.later(VICTIM, phase, secagg=secagg) for phase in PHASES]
        for message in asked:
            assert is_refused(world.ask(message), for_good=True) == "BadRequest"
    assert charged(world) == []


@pytest.mark.parametrize("record", [MetricRecord({"attempt": 1}), to_record({"body": np.zeros(3)})], ids=type)
def test_request_in_another_kind_of_record(world, record):
    message = world.first(VICTIM)
    del message.content[SECAGG]
    message.content[SECAGG] = record

    assert is_refused(world.ask(message), for_good=True) == "BadRequest"
    assert charged(world) == []


def nested(depth):
    element = (0).to_bytes(8, "little") + b"b"
    for _ in range(depth):
        element = len(element).to_bytes(8, "little") + b"l" + element
    return element


SIZE = 1 << 18
HUGE = {
    "empty elements": ((0).to_bytes(8, "little") + b"b") * (SIZE // 9),
    "empty lists": ((0).to_bytes(8, "little") + b"l") * (SIZE // 9),
    "numbers": ((16).to_bytes(8, "little") + b"i" + b"\x01" * 16) * (SIZE // 25),
    "deep": nested(20_000),
    "a length beyond": (1 << 63).to_bytes(8, "little") + b"b",
    "bytes": b"\xff" * SIZE,
}


@pytest.mark.parametrize("phase", LATER)
def test_hostile_body(make_world, phase):
    """Refused in memory that is a small multiple of the message's; the attempt is over for this site."""
    world = make_world(policy=ALLOWED, **UNNOISED)
    for body, run in zip(HUGE.values(), world.runs(), strict=False):
        world.train(between=until(phase), run=run)
        message = world.later(VICTIM, phase, body, run=run)
        tracemalloc.start()
        try:
            reply = world.ask(message)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

        assert is_refused(reply, for_good=True) == f"BadPayload in {phase}, by the server"
        assert isinstance(world.errors(VICTIM)[-1], BadPayload)
        assert peak < 16 * max(len(body), 1 << 16)


def test_body_too_long_is_not_read(world):
    """Nothing of it is parsed, so the round that is open goes on."""
    world.train(between=until(Phase.SHARE))
    body = bytes((16 << 20) + 1)
    reply = world.ask(world.later(VICTIM, Phase.SHARE, body))
    good = world.ask(world.later(VICTIM, Phase.SHARE, requested(world, Phase.SHARE)))

    assert is_refused(reply, for_good=True) == "BadRequest"
    assert not good.has_error()


def test_further_records_change_nothing(world):
    """Arrays, metrics and settings beside an exchange are not read."""

    def between(message, call):
        message.content["more"] = ConfigRecord({"skip": True, "seed": 0, "threshold": 1})
        message.content[METRICS] = MetricRecord({"sigma": 0.0})
        if message.metadata.message_type != TRAIN:
            message.content[ARRAYS] = to_record({"words": np.zeros(2, np.uint32)})
        return call(message)

    world.is_sum(world.train(between=between), world.parties)


# What refusals tell


def script(world):
    """Every refusal of a site in one run of attacks: code and reason, and what else left it, by length."""
    heard = []

    def hear(message):
        reply = world.ask(message)
        if reply.has_error():
            heard.append((reply.error.code, reply.error.reason))
            assert REASONS.fullmatch(reply.error.reason)
        else:
            body = reply.content.config_records[SECAGG]["body"]
            arrays = {
                name: len(a.data) for r in reply.content.array_records.values() for name, a in r.items()
            }
            heard.append((len(body), arrays, set(reply.content)))

    def between(message, call):
        if message.metadata.dst_node_id == VICTIM:
            kind, config = message.metadata.message_type, message.content.config_records[SECAGG]
            phase = {kind: phase for phase, kind in PHASES.items()}.get(kind)
            if phase is not None:
                for body in (b"", config["body"][:-1]):
                    hear(world.later(VICTIM, phase, body, 2))
                hear(world.later(VICTIM, phase, attempt=3, number=2))
                hear(world.first(VICTIM))
        reply = call(message)
        if not reply.has_error():
            heard.append(len(reply.content.config_records[SECAGG]["body"]))
        return reply

    world.train(between=between)
    for phase in LATER:
        world.train(number=2 + LATER.index(phase), between=until(phase))
        hear(world.later(VICTIM, phase, b"nonsense", 2 + LATER.index(phase)))
    return heard


def test_refusals_tell_nothing_of_the_update(make_world, monkeypatch):
    """Sites with other updates, one cut in every coordinate, are told apart by no code, text or length."""
    plain = script(make_world())

    def enormous(*arguments):
        update = train_locally(*arguments)
        return replace(update, delta={name: array * np.float32(1e9) for name, array in update.delta.items()})

    monkeypatch.setattr("lepton_fl.site.site.train_locally", enormous)
    cut = script(make_world())

    assert plain == cut
    assert sum(isinstance(item, tuple) and len(item) == 2 for item in plain) >= 20


@pytest.mark.parametrize("fault", [OSError("disk full"), PolicyRefused("no"), MemoryError()], ids=type)
def test_what_is_not_on_disk_does_not_leave(world, fault):
    """The history cannot be written: no share leaves, then or later."""
    world.train(between=until(Phase.UNMASK))
    world.histories[VICTIM].write = lambda _: (_ for _ in ()).throw(fault)
    body = requested(world, Phase.UNMASK)
    replies = [world.ask(world.later(VICTIM, Phase.UNMASK, body)) for _ in range(2)]
    texts = [reply.error.reason for reply in replies]

    assert all(reply.has_error() for reply in replies)
    assert refusal_exit_code(replies[1]) == AlreadyCharged.exit_code
    assert texts[1] == "BadPhase in unmask, by the server"
    assert "disk" not in texts[0]


def test_errors_hold_no_bytes_of_the_round(world):
    """What a site's own people read of refusals names phases, parties and counts."""
    script(world)

    for error in world.errors(VICTIM):
        assert isinstance(error, LeptonError)
        assert not re.search(r"[0-9a-f]{16}|b'|\[[-0-9. ,]{20}|\d\.\d{4}", str(error)), error
        assert not isinstance(error, SecaggError) or error.phase in list(Phase)
