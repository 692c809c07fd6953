"""Rounds that resume one another, by sites with all of their controls; and what makes one ordinary."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from lepton_fl.errors import BadRequest
from lepton_fl.messages import ARRAYS, PHASES, SECAGG, TRAIN, SecureRequest, error_reply
from lepton_fl.secagg.context import Consortium
from lepton_fl.secagg.errors import Phase
from lepton_fl.secagg.identity import IdentityKey, Roster
from lepton_fl.secure_rounds import TRAIN_SUM

SESSION = (Phase.MASK, Phase.CONFIRM, Phase.UNMASK)
SHARE = PHASES[Phase.SHARE]


def resumed(world):
    """Whether the last round was one of a session and nothing else, and the tape is clean for the next."""
    kinds = {passed.kind for passed in world.wire.tape}
    world.wire.tape.clear()
    return kinds == {TRAIN, *(PHASES[phase] for phase in SESSION)}


def ordinary(world):
    """Whether it had an ordinary attempt, and how many messages asked for a further one."""
    counted = Counter(passed.kind for passed in world.wire.tape)
    world.wire.tape.clear()
    assert counted[SHARE]
    return counted[PHASES[Phase.ADVERTISE]]


@pytest.fixture
def warm(make_world):
    """A world with a session from round 1."""

    def make(n=4, **fields):
        world = make_world(n, **fields)
        world.is_sum(world.train(1), world.parties)
        assert ordinary(world) == 0
        return world

    return make


def lost(party, phase):
    """Between server and sites: this party's reply in a phase does not arrive, the first time."""
    gone = []

    def between(message, call):
        reply = call(message)
        kind = TRAIN if phase is Phase.ADVERTISE else PHASES[phase]
        if message.metadata.dst_node_id == party and message.metadata.message_type == kind and not gone:
            gone.append(party)
            return None
        return reply

    return between


def changed(party, phase, body):
    """Between them: another body of this party's reply in a phase, the first time."""
    done = []

    def between(message, call):
        reply = call(message)
        kind = TRAIN if phase is Phase.ADVERTISE else PHASES[phase]
        if message.metadata.dst_node_id != party or message.metadata.message_type != kind or done:
            return reply
        done.append(party)
        content = RecordDict(dict(reply.content))
        content[SECAGG] = ConfigRecord({"body": body(reply.content.config_records[SECAGG]["body"])})
        return Message(content, reply_to=message)

    return between


@pytest.mark.parametrize("suite", ["LSA1", "LSA1-PQ"])
def test_rounds_after_the_first_resume_it(warm, suite):
    world = warm(secure_aggregation={"suite": suite})
    for number in range(2, 6):
        world.is_sum(world.train(number), world.parties, number)
        assert resumed(world)


@pytest.mark.parametrize(
    "secure",
    [{"sessions": False}, {"group_size": 5, "min_sites": 5, "min_survivors": 4}],
    ids=["off", "groups"],
)
def test_fresh_keys_in_each_round_where_the_study_says_so(warm, secure):
    """Groups are drawn anew, so that there is nothing to resume."""
    world = warm(5, secure_aggregation=secure)
    world.is_sum(world.train(2), world.parties, 2)

    assert ordinary(world) == 0
    for site in world.sites.values():
        assert all(found.session is None for found in site.aggregation._open.values())


@pytest.mark.parametrize("phase", [Phase.ADVERTISE, *SESSION])
def test_silence_in_a_session(warm, phase):
    """As in an ordinary round; and who was silent is in the next one, with the same session."""
    world = warm()
    counted = world.parties if phase in (Phase.CONFIRM, Phase.UNMASK) else world.parties[1:]
    world.is_sum(world.train(2, between=lost(101, phase)), counted, 2)
    assert resumed(world)
    world.is_sum(world.train(3), world.parties, 3)

    assert resumed(world)


def test_a_site_that_was_restarted(warm):
    """It has no session: it says so by an ordinary advert, and nobody is put out or trains twice."""
    world = warm()
    world.start(102)
    trained = {party: len(site.refusals) for party, site in world.sites.items()}
    world.is_sum(world.train(2), world.parties, 2)

    assert ordinary(world) == 4
    assert {party: len(site.refusals) for party, site in world.sites.items()} == trained
    world.is_sum(world.train(3), world.parties, 3)
    assert resumed(world)


def test_a_site_that_was_away(make_world):
    """It is no member of the session: the round with it is ordinary, at once."""
    world = make_world()
    world.is_sum(world.train(1, between=lost(104, Phase.ADVERTISE)), world.parties[:3])
    ordinary(world)
    world.is_sum(world.train(2), world.parties, 2)
    assert ordinary(world) == 0
    world.is_sum(world.train(3), world.parties, 3)

    assert resumed(world)


def test_a_smaller_cohort_resumes(warm):
    world = warm(5, secure_aggregation={"min_survivors": 3})
    names = tuple(world.names[party] for party in world.parties[:4])
    world.is_sum(world.train(2, parties=world.parties[:4], cohort=names), world.parties[:4], 2)

    assert resumed(world)


def test_another_roster(warm):
    """With the same members: their certificates are looked at again."""
    world = warm()
    root = IdentityKey.generate()
    before = world.consortium.roster
    roster = Roster.issue(
        root, consortium=before.consortium, version=before.version + 1, members=before.members, revoked=()
    )
    world.consortium = Consortium(world.consortium.root_key, roster)
    for party in world.parties:
        world.sites[party].aggregation._membership = replace(
            world.sites[party].aggregation._membership, consortium=lambda: world.consortium
        )
    world.is_sum(world.train(2), world.parties, 2)

    assert ordinary(world) == 0


@pytest.mark.parametrize("party", [101, 104])
def test_a_box_that_does_not_open(warm, party):
    """By a cheat or on the way: given up before anything is open, the round has its sum all the same."""
    world = warm()
    replies = world.train(2, between=changed(party, Phase.ADVERTISE, lambda b: b[:-200] + b"\0" + b[-199:]))

    world.is_sum(replies, world.parties, 2)
    assert ordinary(world) == 4
    world.is_sum(world.train(3), world.parties, 3)
    assert resumed(world)


@pytest.mark.parametrize("phase", [Phase.MASK, Phase.CONFIRM])
def test_a_refusal_before_the_end(warm, phase):
    """Of a site that has no reason to, either: an ordinary attempt follows, and the sum has its update."""
    world = warm()
    done = []

    def between(message, call):
        if (
            message.metadata.dst_node_id == 103
            and message.metadata.message_type == PHASES[phase]
            and not done
        ):
            done.append(message)
            return error_reply(message, None)
        return call(message)

    world.is_sum(world.train(2, between=between), world.parties, 2)
    assert ordinary(world) == 4


def test_a_refusal_to_the_last(warm):
    """Of the shares: the others are enough, the refusal is handed on, and the next round is ordinary."""
    world = warm()

    def between(message, call):
        if message.metadata.dst_node_id == 103 and message.metadata.message_type == PHASES[Phase.UNMASK]:
            return error_reply(message, None)
        return call(message)

    replies = world.train(2, between=between)
    world.is_sum(replies, world.parties, 2)
    assert [reply.metadata.src_node_id for reply in replies if reply.has_error()] == [103]
    assert resumed(world)
    world.train(3)
    assert ordinary(world) == 0


def test_losses_are_rarer_each_time(warm):
    """Who spoils every session attempt is met by ever more ordinary rounds between them."""
    world = warm(privacy={"epsilon": 4.0}, train={"rounds": 40})
    attempts = []
    for number in range(2, 13):
        broken = changed(101, Phase.ADVERTISE, lambda b: b[:-200] + bytes([b[-200] ^ 1]) + b[-199:])

        def between(message, call, number=number, broken=broken):
            begins = message.metadata.message_type == TRAIN and message.metadata.dst_node_id == 101
            if begins and message.content.config_records[SECAGG]["session"]:
                attempts.append(number)
                return broken(message, call)
            return call(message)

        world.is_sum(world.train(number, between=between), world.parties, number)

    gaps = [later - earlier for earlier, later in itertools.pairwise(attempts)]
    assert len(gaps) > 2
    assert gaps == sorted(set(gaps))


def test_too_few_in_the_session_and_back_for_another_attempt(make_world):
    """Two of four are silent once: the ordinary attempt has all of them."""
    world = make_world()
    world.train(1)
    ordinary(world)
    gone = []

    def between(message, call):
        reply = call(message)
        party = message.metadata.dst_node_id
        if message.metadata.message_type == PHASES[Phase.MASK] and party in (101, 102) and party not in gone:
            gone.append(party)
            return None
        return reply

    world.is_sum(world.train(2, between=between), world.parties, 2)
    assert ordinary(world) == 4


# A server that is not honest


def test_a_session_of_the_servers_own(warm):
    """An id that the site does not have: an ordinary advert, and its own session is over."""
    world = warm()
    record = SecureRequest(kind=TRAIN_SUM, attempt=1, roster=1, session=bytes(32), step=0).record()
    reply = world.ask(world.first(101, 2, secagg=record))

    assert b"session advert" not in reply.content.config_records[SECAGG]["body"]
    assert world.sites[101].aggregation._open[next(iter(world.sites[101].aggregation._open))].session is None


@pytest.mark.parametrize("step", [0, 1])
def test_a_step_a_second_time(warm, step):
    """After steps 0 and 1: each is over, whatever the round."""
    world = warm()
    world.train(2)
    world.train(3)
    session = next(iter(world.grid._sessions.values()))._kept
    record = SecureRequest(kind=TRAIN_SUM, attempt=1, roster=1, session=session.id, step=step).record()
    reply = world.ask(world.first(101, 4, secagg=record))

    assert b"session advert" not in reply.content.config_records[SECAGG]["body"]


def test_an_answered_round_moves_no_session(warm):
    """The request that began a round, again: refused by the site's memory, and the session goes on."""
    world = warm()
    world.train(2)
    last = next(passed.request for passed in world.wire.tape if passed.kind == TRAIN)
    reply = world.apps[101](last, world.state[101])
    assert reply.has_error()
    world.wire.tape.clear()
    world.is_sum(world.train(3), world.parties, 3)

    assert resumed(world)


@pytest.mark.parametrize(
    "fields",
    [
        {"session": bytes(31)},
        {"session": bytes(33)},
        {"session": b"", "step": 1},
        {"session": bytes(32), "step": -1},
        {"session": "0" * 32},
        {"step": 0.0},
        {"step": True},
        {"session": None},
    ],
    ids=str,
)
def test_ill_typed_proposal(warm, fields):
    world = warm()
    record = ConfigRecord(
        {
            **SecureRequest(kind=TRAIN_SUM, attempt=1, roster=1).record(),
            **{name: value for name, value in fields.items() if value is not None},
        }
    )
    for name, value in fields.items():
        if value is None:
            del record[name]
    reply = world.ask(world.first(101, 2, secagg=record))

    assert reply.has_error()
    assert isinstance(world.errors(101)[-1], BadRequest)


def test_a_session_in_a_later_exchange(warm):
    world = warm()
    world.ask(world.first(101, 2))
    record = SecureRequest(kind=TRAIN_SUM, attempt=1, roster=1, session=bytes(32), body=b"").record()
    assert world.ask(world.later(101, Phase.SHARE, number=2, secagg=record)).has_error()

    assert isinstance(world.errors(101)[-1], BadRequest)


def test_nothing_but_masked_words_leaves_as_an_array(warm):
    """In a session too."""
    world = warm()
    world.train(2)

    for passed in world.wire.tape:
        arrays = {ARRAYS} if passed.kind == PHASES[Phase.MASK] else set()
        assert set(passed.reply.content) == {SECAGG} | arrays
        assert set(passed.reply.content.config_records[SECAGG]) == {"body"}
