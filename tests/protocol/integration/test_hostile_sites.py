"""What sites may send to a server's grid: the culprit is named and put out, the others have their sum."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.metadata import Metadata

from lepton_fl.messages import (
    ARRAYS,
    CONFIG,
    MEMBERS,
    METRICS,
    PHASES,
    SECAGG,
    SITS_OUT,
    TRAIN,
    WEIGHT,
    to_record,
)
from lepton_fl.secagg import shamir
from lepton_fl.secagg import site as site_module
from lepton_fl.secagg.context import Consortium
from lepton_fl.secagg.errors import Phase
from lepton_fl.secagg.identity import IdentityKey, Member, Roster
from lepton_fl.secagg.keys import Suite
from lepton_fl.secagg.messages import Survivors

CHEATER = 104
HONEST = [101, 102, 103]
IN_THE_SUM = (Phase.CONFIRM, Phase.UNMASK)
UNNOISED = {"privacy": {"noise": "none", "epsilon": None, "delta": None}}
ALLOWED = {"require": {"differential_privacy": False}}


def kind_of(phase):
    return TRAIN if phase is Phase.ADVERTISE else PHASES[phase]


def cheat(phase, change, *, cheater=CHEATER, attempts=(1,)):
    """`between` that changes one site's reply in one phase."""

    def between(message, call):
        reply = call(message)
        found = message.metadata.message_type, message.metadata.dst_node_id
        if (
            found == (kind_of(phase), cheater)
            and message.content.config_records[SECAGG]["attempt"] in attempts
        ):
            return change(message, reply)
        return reply

    return between


def replied(message, **records):
    return Message(RecordDict(records), reply_to=message)


def is_put_out(world, replies, phase, *, number=1, **run):
    """That the cheater is out for good and nobody else, and that there is a sum."""
    survivors = world.parties if phase in IN_THE_SUM else [p for p in world.parties if p != CHEATER]
    world.is_sum(replies, survivors, number, **run)
    current = world.judge(replies, number)
    assert current.left == {world.names[CHEATER]}
    assert current.dropped[world.names[CHEATER]].isprintable()
    assert current.missed == set()
    assert current.included == {world.names[p] for p in survivors}
    return current.dropped[world.names[CHEATER]]


def is_lost(world, replies, *, left=(), missed=(), number=1):
    """That there is no sum, these sites are out or late, and all others are asked again."""
    assert world.sum_of(replies) is None
    current = world.judge(replies, number)
    assert current.left == {world.names[p] for p in left}
    silent = set(current._waiting)
    assert silent == set(missed)
    assert current.missed == set()


# Replies that are none


def with_words(reply, **arrays):
    content = {SECAGG: reply.content.config_records[SECAGG]}
    return {**content, ARRAYS: to_record(arrays)}


def words_of(reply):
    data = reply.content.array_records[ARRAYS]["words"].data
    return np.frombuffer(data[-8:], "<u4")


def raw(reply, change):
    """The array's bytes changed, header and all."""
    array = reply.content.array_records[ARRAYS]["words"]
    other = Array(array.dtype, array.shape, array.stype, change(array.data))
    return {**with_words(reply), ARRAYS: ArrayRecord({"words": other})}


UPLOADS = {
    "int32": lambda r: with_words(r, words=words_of(r).astype(np.int32)),
    "float32": lambda r: with_words(r, words=words_of(r).astype(np.float32)),
    "uint64": lambda r: with_words(r, words=words_of(r).astype(np.uint64)),
    "bool": lambda r: with_words(r, words=words_of(r).astype(bool)),
    "big-endian": lambda r: with_words(r, words=words_of(r).astype(">u4")),
    "complex": lambda r: with_words(r, words=words_of(r).astype(complex)),
    "text": lambda r: with_words(r, words=words_of(r).astype("U9")),
    "longer": lambda r: with_words(r, words=np.append(words_of(r), words_of(r))),
    "shorter": lambda r: with_words(r, words=words_of(r)[:1]),
    "empty": lambda r: with_words(r, words=words_of(r)[:0]),
    "two-dimensional": lambda r: with_words(r, words=words_of(r)[None]),
    "no dimension": lambda r: with_words(r, words=words_of(r)[0]),
    "another name": lambda r: with_words(r, update=words_of(r)),
    "two arrays": lambda r: with_words(r, words=words_of(r), more=words_of(r)),
    "no array": with_words,
    "no record of arrays": lambda r: {SECAGG: r.content.config_records[SECAGG]},
    "other words": lambda r: with_words(r, words=words_of(r) + np.uint32(1)),
    "cut short": lambda r: raw(r, lambda data: data[:-1]),
    "by rows of columns": lambda r: raw(
        r, lambda d: d.replace(b"'fortran_order': False", b"'fortran_order': True ")
    ),
    "a pickle": lambda r: raw(r, lambda data: data.replace(b"'<u4'", b"'|O' ")),
    "an enormous shape": lambda r: raw(r, lambda data: data.replace(b"(2,)", b"(9,)")),
    "no header": lambda _: raw(_, lambda data: data[128:]),
    "claims of members": lambda r: {
        **with_words(r, words=words_of(r)),
        CONFIG: ConfigRecord({MEMBERS: [101, 102, 103, 104]}),
    },
    "a metric": lambda r: {**with_words(r, words=words_of(r)), METRICS: MetricRecord({WEIGHT: 1e12})},
    "an update in clear": lambda r: {
        ARRAYS: to_record({"w": np.zeros(2, np.float32)}),
        METRICS: MetricRecord({WEIGHT: 1.0}),
    },
}


@pytest.mark.parametrize("upload", UPLOADS.values(), ids=UPLOADS)
def test_upload_that_is_none(world, upload):
    replies = world.train(between=cheat(Phase.MASK, lambda m, r: replied(m, **upload(r))))

    is_put_out(world, replies, Phase.MASK)


def body_of(reply):
    return reply.content.config_records[SECAGG]["body"]


BODIES = {
    "empty": lambda _: b"",
    "cut short": lambda r: body_of(r)[:-1],
    "longer": lambda r: body_of(r) + b"\0",
    "one bit": lambda r: body_of(r)[:-1] + bytes([body_of(r)[-1] ^ 1]),
    "too long to be read": lambda _: bytes((16 << 20) + 1),
    "text": lambda _: "advert",
    "numbers": lambda _: [1, 2],
}


@pytest.mark.parametrize("phase", PHASES)
def test_malformed_reply(make_world, phase):
    world = make_world(policy=ALLOWED, **UNNOISED)

    for body, run in zip(BODIES.values(), world.runs(), strict=False):

        def change(message, reply, body=body):
            content = dict(reply.content.array_records)
            return replied(message, **content, **{SECAGG: ConfigRecord({"body": body(reply)})})

        is_put_out(world, world.train(between=cheat(phase, change), run=run), phase, run=run)


@pytest.mark.parametrize("phase", PHASES)
def test_reply_without_its_record(make_world, phase):
    world = make_world(policy=ALLOWED, **UNNOISED)
    contents = [{}, {SECAGG: ConfigRecord({})}, {SECAGG: to_record({})}]

    for content, run in zip(contents, world.runs(), strict=False):
        between = cheat(phase, lambda m, _, content=content: replied(m, **content))
        is_put_out(world, world.train(between=between, run=run), phase, run=run)


@pytest.mark.parametrize("phase", PHASES)
def test_anothers_reply_as_its_own(world, phase):
    """Replayed adverts and keys, shares, vectors, confirmations: signed by somebody else."""
    heard = {}

    def between(message, call):
        reply = call(message)
        kind, party = message.metadata.message_type, message.metadata.dst_node_id
        if kind == kind_of(phase):
            if party == CHEATER:
                return Message(heard[101].content, reply_to=message)
            heard[party] = reply
        return reply

    is_put_out(world, world.train(between=between), phase)


@pytest.mark.parametrize("phase", PHASES)
def test_reply_of_an_earlier_round(make_world, phase):
    """The cheater's own, rightly signed then."""
    world = make_world(secure_aggregation={"sessions": False})
    heard = []
    world.train(between=cheat(phase, lambda _, reply: heard.append(reply) or reply))
    replies = world.train(2, between=cheat(phase, lambda m, _: Message(heard[0].content, reply_to=m)))

    is_put_out(world, replies, phase, number=2)


@pytest.mark.parametrize("phase", PHASES)
def test_reply_of_another_phase(world, phase):
    """What it said a phase before, or would say a phase later."""
    heard = {}

    def between(message, call):
        reply = call(message)
        kind, party = message.metadata.message_type, message.metadata.dst_node_id
        if party == CHEATER:
            heard[kind] = reply
            if kind == kind_of(phase):
                other = next(iter(heard.values())) if phase is not Phase.ADVERTISE else None
                content = other.content if other else RecordDict({SECAGG: ConfigRecord({"body": b"shares"})})
                return Message(content, reply_to=message)
        return reply

    is_put_out(world, world.train(between=between), phase)


# In another's name


def as_from(reply, **changed):
    """A reply whose metadata a site made up."""
    found = reply.metadata
    fields = {
        "run_id": found.run_id,
        "message_id": "",
        "src_node_id": found.src_node_id,
        "dst_node_id": found.dst_node_id,
        "reply_to_message_id": found.reply_to_message_id,
        "group_id": found.group_id,
        "created_at": found.created_at,
        "ttl": found.ttl,
        "message_type": found.message_type,
    }
    return Message(content=reply.content, metadata=Metadata(**{**fields, **changed}))


@pytest.mark.parametrize("phase", PHASES)
def test_reply_that_nobody_asked_for(make_world, phase):
    """Left aside, as if the site had said nothing."""
    world = make_world(policy=ALLOWED, **UNNOISED)
    metadata = [{"src_node_id": 9001}, {"src_node_id": 1}, {"run_id": 7}, {"message_type": "train.other"}]

    for changed, run in zip(metadata, world.runs(), strict=False):
        between = cheat(phase, lambda _, reply, changed=changed: [as_from(reply, **changed)])
        replies = world.train(between=between, run=run)
        world.is_sum(replies, world.parties if phase in IN_THE_SUM else HONEST, run=run)
        assert world.judge(replies).left == set()


@pytest.mark.parametrize("phase", PHASES)
def test_a_second_reply_counts_for_nothing(world, phase):
    """The first that came is the reply, whatever else comes."""

    def twice(message, reply):
        return [reply, reply, replied(message)]

    world.is_sum(world.train(between=cheat(phase, twice)), world.parties)


# Errors


CODES = [0, 1, -5, 2**31, 999, 1000, 1007, 1051]


@pytest.mark.parametrize("phase", PHASES)
def test_errors_with_odd_codes(make_world, phase):
    """Of any code and text: the site is out of the round, or was in the sum already; nobody else is out."""
    world = make_world(policy=ALLOWED, **UNNOISED)
    for code, run in zip(CODES, world.runs(), strict=False):
        reason = "\x1b[2J\n" + "x" * 10_000
        between = cheat(
            phase, lambda m, _, code=code, reason=reason: Message(Error(code, reason), reply_to=m)
        )
        replies = world.train(between=between, run=run)
        survivors = world.parties if phase in IN_THE_SUM else HONEST
        members, _ = world.sum_of(replies)
        current = world.judge(replies)

        assert members == tuple(survivors)
        assert current.left | current.missed <= {world.names[CHEATER]}
        assert all(text.isprintable() and len(text) <= 200 for text in current.dropped.values())


@pytest.mark.parametrize("phase", PHASES)
def test_saying_that_it_sits_out(world, phase):
    """Later than in the first exchange it may be for another's fault; then it does not count as silence."""
    replies = world.train(
        between=cheat(phase, lambda m, _: Message(Error(SITS_OUT, "no"), reply_to=m), attempts=(1, 2))
    )

    current = world.judge(replies)

    world.is_sum(replies, world.parties if phase in IN_THE_SUM else HONEST)
    assert current.left == set()
    assert current.missed == ({world.names[CHEATER]} if phase is Phase.ADVERTISE else set())


def test_one_that_sits_out_where_nobody_may_counts_alone(make_world):
    """The round is lost for it, each time: it is put off, and those who did their part are not."""
    everybody = {"secure_aggregation": {"min_survivors": 4}}
    world = make_world(**everybody)
    sits_out = cheat(Phase.ADVERTISE, lambda m, _: Message(Error(SITS_OUT, "no"), reply_to=m))

    current = world.judge(world.train(between=sits_out))

    assert set(current.dropped) == set(world.names.values())
    assert (current.missed, current.left) == ({world.names[CHEATER]}, set())


# Silence


@pytest.mark.parametrize("phase", PHASES)
def test_silent_in_one_phase(world, phase):
    """One of four may be; and it is asked in the next round."""
    replies = world.train(between=cheat(phase, lambda *_: None))

    world.is_sum(replies, world.parties if phase in IN_THE_SUM else HONEST)
    assert world.judge(replies).left == set()


@pytest.mark.parametrize("phase", list(PHASES)[:4])
def test_silent_for_a_moment_where_nobody_may_be(make_world, phase):
    """Of three sites: another attempt at the same round, of the same updates, nothing charged again."""
    world = make_world(3)
    replies = world.train(between=cheat(phase, lambda *_: None, cheater=102))

    if phase is Phase.ADVERTISE:
        # It may not have trained: there is nothing to ask it for.
        is_lost(world, replies, missed=[102])
    else:
        world.is_sum(replies, world.parties)
    assert all(len(site.ledger.history("records")) == 1 for site in world.sites.values())


def test_silent_at_the_end_where_nobody_may_be(make_world):
    """Some have released: there is no other attempt, and no sum."""
    world = make_world(3)
    replies = world.train(between=cheat(Phase.UNMASK, lambda *_: None, cheater=102))

    is_lost(world, replies, missed=[102])


@pytest.mark.parametrize("phase", list(PHASES)[:4])
def test_cheating_where_nobody_may_be_missing(make_world, phase):
    """The culprit is out; the others, who did their part, are asked again."""
    world = make_world(3)
    replies = world.train(between=cheat(phase, lambda m, _: replied(m), cheater=102))

    is_lost(world, replies, left=[102])


# Cheating with one's own signature


def inside(world, party, number=1):
    """A site's open round, from the inside: what a cheater may change before it signs."""
    return world.sites[party].aggregation._open[
        world.first(101).content.config_records[CONFIG]["run"], "train"
    ]


def before(phase, act, party=CHEATER):
    def between(message, call):
        if (message.metadata.message_type, message.metadata.dst_node_id) == (kind_of(phase), party):
            act()
        return call(message)

    return between


def test_wrong_shares(world):
    """Signed, but not those that were dealt: found by their commitments, and the rest make the sum."""

    def spoil():
        shares = inside(world, CHEATER).attempt._shares
        for dealer in shares:
            shares[dealer] = bytes(64)

    replies = world.train(between=before(Phase.UNMASK, spoil))

    assert is_put_out(world, replies, Phase.UNMASK) == f"BadShare in unmask, by party {CHEATER}"


def test_confirmation_of_other_survivors(world):
    """It says that one of the others dropped out."""
    others = Survivors((101, 102, CHEATER)).encode(Suite.LSA1)

    def between(message, call):
        if (message.metadata.message_type, message.metadata.dst_node_id) == (PHASES[Phase.CONFIRM], CHEATER):
            reply = call(world.later(CHEATER, Phase.CONFIRM, others))
            return Message(reply.content, reply_to=message)
        return call(message)

    replies = world.train(between=between)

    assert is_put_out(world, replies, Phase.CONFIRM) == f"BadSignature in confirm, by party {CHEATER}"


@pytest.mark.parametrize("last_word", [None, SITS_OUT], ids=["silent", "sits out"])
def test_shares_that_rebuild_nothing_and_then_gone(world, monkeypatch, last_word):
    """Its shares are of other secrets than it committed to, and then it drops out, so that they are needed.

    It is out for what is shown by its signature, whatever it said last.
    """

    def between(message, call):
        kind, party = message.metadata.message_type, message.metadata.dst_node_id
        if party != CHEATER:
            return call(message)
        if kind == PHASES[Phase.SHARE]:
            with monkeypatch.context() as patched:
                patched.setattr(
                    site_module.shamir, "deal", lambda s, deal=shamir.deal, **how: deal(bytes(len(s)), **how)
                )
                return call(message)
        if kind == PHASES[Phase.MASK]:
            return None if last_word is None else Message(Error(last_word, "not now"), reply_to=message)
        return call(message)

    replies = world.train(between=between)

    is_lost(world, replies, left=[CHEATER])


def test_offers_that_nobody_can_open(make_world, monkeypatch):
    """In LSA1-PQ only receivers can tell. They name the sender and sit the round out: none is put out."""
    world = make_world(secure_aggregation={"suite": "LSA1-PQ"})
    offer = site_module.MaskKey.offer

    def useless(self, *arguments):
        found = offer(self, *arguments)
        return found[:-1] + bytes([found[-1] ^ 1])

    def between(message, call):
        if (message.metadata.message_type, message.metadata.dst_node_id) == (PHASES[Phase.SHARE], 101):
            with monkeypatch.context() as patched:
                patched.setattr(site_module.MaskKey, "offer", useless)
                return call(message)
        return call(message)

    replies = world.train(between=between)
    current = world.judge(replies)

    assert world.sum_of(replies) is None
    assert current.left == current.missed == set()
    assert {current.dropped[world.names[p]] for p in (102, 103, 104)} == {"BadPayload in mask, by party 101"}


def test_accused_dealer_is_logged(world, caplog):
    """One of the two cheats: both are named, and neither is put out."""

    def spoil():
        inside(world, CHEATER).attempt._channel_key = site_module.ChannelKey(bytes(32), Suite.LSA1)

    replies = world.train(between=before(Phase.MASK, spoil))

    assert world.judge(replies).left == set()
    assert f"parties ({CHEATER},) found their shares of party 101's secrets bad" in caplog.text


def test_an_update_that_is_none(world):
    """Uniform words, signed: the sum is out of range, and whose fault it is nobody knows."""

    def spoil():
        words = inside(world, CHEATER).attempt._update._words
        words[:] = np.uint32(1) << 31

    replies = world.train(between=before(Phase.MASK, spoil))

    is_lost(world, replies)


def test_low_order_key(world, monkeypatch):
    """Its owner alone is out; found by the server before it reaches another site."""

    class LowOrder(site_module.ChannelKey):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.public = bytes(32)

    def between(message, call):
        if (message.metadata.message_type, message.metadata.dst_node_id) == (TRAIN, CHEATER):
            with monkeypatch.context() as patched:
                patched.setattr(site_module, "ChannelKey", LowOrder)
                return call(message)
        return call(message)

    is_put_out(world, world.train(between=between), Phase.ADVERTISE)


# Members that are none


def test_a_site_that_is_no_member_any_more(world):
    """Nothing is sent or charged; it is out, and the others are asked again."""
    root, roster = IdentityKey.generate(), world.consortium.roster
    members = [Member(m.party, m.name, m.key_digest) for m in roster.members if m.party != CHEATER]
    newer = Roster.issue(root, consortium=roster.consortium, version=2, members=members, revoked=())
    world.consortium = Consortium(root.public, newer)
    replies = world.train()

    is_lost(world, replies, left=[CHEATER])
    assert not world.wire.tape
    assert not any(site.ledger.history("records") for site in world.sites.values())


# Anything


def test_any_change_of_any_reply(make_world):
    """Bytes flipped, cut and repeated anywhere: a sum of the honest, or a lost round; never an exception."""
    world = make_world(policy=ALLOWED, **UNNOISED)
    rng = np.random.default_rng(5)
    sums = 0
    for number, run in zip(range(30), world.runs(), strict=False):
        phase = list(PHASES)[number % 5]

        def change(message, reply):
            body = bytearray(body_of(reply))
            for _ in range(int(rng.integers(1, 4))):
                at = int(rng.integers(len(body)))
                match int(rng.integers(3)):
                    case 0:
                        body[at] ^= 1 << int(rng.integers(8))
                    case 1:
                        del body[at : at + int(rng.integers(1, 40))]
                    case _:
                        body[at:at] = body[at : at + int(rng.integers(1, 40))]
            content = dict(reply.content.array_records)
            return replied(message, **content, **{SECAGG: ConfigRecord({"body": bytes(body)})})

        replies = world.train(between=cheat(phase, change), run=run)
        current = world.judge(replies)
        members, mean = world.sum_of(replies)
        sums += 1
        for name, array in world.expected(1, members, run).items():
            np.testing.assert_array_equal(mean[name], array)
        assert current.left | current.missed <= {world.names[CHEATER]}
        assert set(HONEST) <= set(members)

    assert sums == 30
