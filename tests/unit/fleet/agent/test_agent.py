"""An agent before a server that keeps the protocol, and before one that does not."""

import asyncio
import contextlib
import errno
import json
import shutil
import threading
from types import SimpleNamespace

import grpc.aio
import pytest

from lepton_fl import __version__
from lepton_fl.errors import ConnectionFailed, IdentityRefused, ProtocolError, VerificationFailed
from lepton_fl.fleet.agent import exchanges
from lepton_fl.fleet.agent.agent import Agent
from lepton_fl.fleet.agent.peer import check_clock, check_release
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.messages import EVALUATE, JOIN, SITS_OUT
from lepton_fl.privacy.ledger import Head, Receipt, Statement
from lepton_fl.secagg.identity import IdentityKey
from lepton_fl.site import client_app

NOW = 1_800_000_000.0


# Answering


def test_an_agent_joins_and_trains(play, ask, charged):
    """It answers what it is asked, and its ledger was charged first."""
    answers = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        for number, (kind, round) in enumerate([(JOIN, 0), ("train", 1)]):
            request, _ = ask(kind, round=round, exchange=bytes([number]) * 16)
            await server.say(assign=request)
            answers.append(await server.hear("result"))
            await server.say(ack=pb.Ack(exchange=request.exchange))

    play(scene)

    assert [answer.error_code for answer in answers] == [0, 0]
    assert charged() == [1]


def test_hello_says_who_it_is(play):
    """What the server needs to let it in."""
    heard = []

    async def scene(puppet, agent):
        heard.append(await (await puppet.next()).welcome())

    play(scene, device="cpu", insecure_seed=True)

    (hello,) = heard
    assert (hello.site, hello.device, hello.insecure_seed, len(hello.instance)) == ("clinic", "cpu", True, 16)


def test_a_killed_agent_gives_the_same_bytes_again(play, ask, charged):
    """The reply is on disk before it is announced; a second training would be a second release."""
    request, _ = ask()
    answers = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome(still=[request.exchange])
        await server.say(assign=request)
        answers.append(await server.hear("result"))

    play(scene)
    play(scene)

    assert answers[0].error_code == 0
    assert answers[0] == answers[1]
    assert charged() == [1]


def test_a_reply_that_was_kept_does_not_leave_once_people_refuse(play, ask, charged, site, study):
    """It is paid for; but a refusal is of everything."""
    request, _ = ask()
    answers = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome(still=[request.exchange])
        await server.say(assign=request)
        answers.append(await server.hear("result"))

    play(scene)
    site.approvals.refuse(study, "no longer")
    play(scene)

    assert [answer.error_code for answer in answers] == [0, SITS_OUT]
    assert charged() == [1]


def test_a_reply_is_kept_for_one_study(play, ask, charged):
    """The study that an assignment names is what a refusal goes by, so another name finds no reply."""
    request, _ = ask()
    other = pb.Assign()
    other.CopyFrom(request)
    other.study_id = "0" * 64
    answers = []

    def scene(asked):
        async def play_it(puppet, agent):
            server = await puppet.next()
            await server.welcome(still=[asked.exchange])
            await server.say(assign=asked)
            answers.append(await server.hear("result"))

        return play_it

    play(scene(request))
    play(scene(other))

    assert answers[0].error_code == 0
    assert answers[1].error_code != 0
    assert charged() == [1]


def test_who_asks_again_while_the_first_is_worked_on_gets_the_same_bytes(play, ask, charged, site):
    """As a server that was killed and is back: the reply is not there yet, and is not lost."""
    first, _ = ask(exchange=b"1" * 16)
    again, _ = ask(exchange=b"2" * 16)
    answers = {}

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        with site.lock:
            await server.say(assign=first)
            await server.say(assign=again)
            await server.until(lambda: agent.status()["open"] == 2)
        for _ in range(2):
            said = await server.hear("result")
            answers[said.exchange] = (said.error_code, said.sha256)

    play(scene)

    assert answers[first.exchange] == answers[again.exchange]
    assert answers[first.exchange][0] == 0
    assert charged() == [1]


def test_whether_a_site_takes_part_is_asked_of_its_people_each_time(play, ask, study, site):
    """A yes of yesterday is no answer: they have refused since."""
    answers = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        for exchange in (b"1" * 16, b"2" * 16):
            request, _ = ask(JOIN, round=0, exchange=exchange)
            await server.say(assign=request)
            answers.append(await server.hear("result"))
            await server.say(ack=pb.Ack(exchange=exchange))
            site.approvals.refuse(study, "not before the audit")

    play(scene)

    assert [answer.error_code for answer in answers] == [0, 1004]


def test_a_site_that_lost_its_reply_sits_the_round_out(play, ask, charged, home):
    """It was charged, and a round is released once."""
    request, _ = ask()
    answers = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(assign=request)
        answers.append(await server.hear("result"))

    play(scene)
    shutil.rmtree(home / "state" / "replies")
    play(scene)

    assert [answer.error_code for answer in answers] == [0, SITS_OUT]
    assert charged() == [1]


def test_a_torn_reply_is_no_reply(play, ask, home):
    """What a power cut has left is not what was announced."""
    request, _ = ask()
    answers = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(assign=request)
        answers.append(await server.hear("result"))

    play(scene)
    (reply,) = (home / "state" / "replies").glob("*/*.reply")
    reply.write_bytes(reply.read_bytes()[:-1])
    play(scene)

    assert answers[1].error_code == SITS_OUT


@pytest.mark.parametrize("change", [{"round": 2}, {"run": "f" * 32}, {"study_id": "0" * 64}])
def test_a_message_must_be_what_was_assigned(play, ask, charged, change):
    """The server's word about a request and the request itself are one."""
    request, _ = ask(**change) if "round" not in change else (ask()[0], None)
    if "round" in change:
        request.round = 2
    answers = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(assign=request)
        answers.append(await server.hear("result"))

    play(scene)

    assert answers[0].error_code == 1005
    assert charged() == []


def test_what_nobody_waits_for_is_not_worked_on(play, ask, charged):
    """A charge for an answer that comes too late would buy nothing."""
    request, _ = ask(deadline_s=-1.0)
    answers = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(assign=request)
        answers.append(await server.hear("result"))

    play(scene)

    assert answers[0].error_code == SITS_OUT
    assert charged() == []


# Transfers


def test_a_request_goes_on_where_it_was_cut(play, ask, pieces):
    """After a reconnection the agent names the bytes that it has."""
    request, payload = ask(padding=100_000)
    parts = pieces(request.exchange, payload)
    offsets = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(assign=request)
        offsets.append((await server.hear("accept")).offset)
        for part in parts[:2]:
            await server.say(chunk=part)
        job = agent._exchanges._jobs[request.exchange]
        await server.until(lambda: job.incoming.received >= 200_000)
        server.over.set()

        server = await puppet.next()
        await server.welcome(still=[request.exchange])
        await server.say(assign=request)
        offsets.append((await server.hear("accept")).offset)
        for part in parts[2:]:
            await server.say(chunk=part)
        offsets.append((await server.hear("result")).error_code)

    play(scene)

    assert offsets == [0, 200_000, 0]


def test_a_reply_is_sent_from_where_the_server_asks(play, ask, home, monkeypatch):
    """Also to a server that has the first part of it."""
    request, _ = ask(JOIN, round=0)
    monkeypatch.setattr("lepton_fl.fleet.protocol.records.SMALL", 10)
    monkeypatch.setattr("lepton_fl.fleet.agent.cache.SMALL", 10)
    got = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(assign=request)
        got.append(await server.hear("result"))
        await server.say(proceed=pb.Proceed(exchange=request.exchange, offset=7))
        got.append(await server.hear("chunk"))

    play(scene)

    (kept,) = (home / "state" / "replies").glob("*/*.reply")
    assert got[0].inline == b""
    assert (got[1].offset, got[1].data) == (7, kept.read_bytes()[7:])


def test_a_request_with_a_wrong_digest_is_asked_for_again_and_then_no_more(play, ask, pieces, home):
    """A server that never keeps its word is left."""
    request, payload = ask(padding=100_000)
    request.sha256 = b"0" * 32
    asked = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(assign=request)
        for _ in range(3):
            asked.append((await server.hear("accept")).offset)
            for part in pieces(request.exchange, payload):
                await server.say(chunk=part)
        server = await puppet.next()
        await server.welcome()

    play(scene)

    assert asked == [0, 0, 0]
    assert list((home / "state" / "spool").iterdir()) == []


def test_an_exchange_that_is_over_leaves_no_file(play, ask, home):
    """Cancelled in the middle of its request."""
    request, _ = ask(padding=100_000)
    there = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(assign=request)
        await server.hear("accept")
        there.append(len(list((home / "state" / "spool").iterdir())))
        await server.say(cancel=pb.Cancel(exchange=request.exchange))
        again, _ = ask(JOIN, round=0, exchange=b"f" * 16)
        await server.say(assign=again)
        await server.hear("result")
        there.append(len(list((home / "state" / "spool").iterdir())))

    play(scene)

    assert there == [1, 0]


def test_no_request_fills_the_disk(play, ask, monkeypatch):
    """The ledger and the replies need the rest of it."""
    monkeypatch.setattr(exchanges, "DISK_RESERVE", 1 << 62)
    request, _ = ask(padding=100_000)
    answers = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(assign=request)
        answers.append(await server.hear("result"))

    play(scene)

    assert (answers[0].error_code, answers[0].error_reason) == (SITS_OUT, "no room at the site")


# A server that breaks the protocol

BREACHES = {
    "short exchange": {"exchange": b"e"},
    "short digest": {"sha256": b"0"},
    "run that is a path": {"run": "../" + "0" * 29},
    "too large": {"size": 1 << 60},
    "empty": {"size": 0, "inline": b""},
    "long type": {"type": "t" * 100},
    "no study": {"study_id": ""},
    "endless round": {"round": 1 << 60},
    "no deadline": {"deadline_s": float("nan")},
    "other bytes": {"inline": b"other"},
}


@pytest.mark.parametrize("change", BREACHES.values(), ids=BREACHES.keys())
def test_a_malformed_request_ends_the_connection_not_the_agent(play, ask, charged, change):
    """And nothing is worked on."""
    request, _ = ask()
    for name, value in change.items():
        setattr(request, name, value)

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(assign=request)
        await server.ended_by_agent()
        await (await puppet.next()).welcome()

    assert play(scene) is None
    assert charged() == []


async def _out_of_order(server, request):
    await server.say(assign=request)
    await server.hear("accept")
    await server.say(chunk=pb.Chunk(exchange=request.exchange, offset=5, data=b"x"))


async def _too_many(server, request):
    for number in range(exchanges.MAX_OPEN + 1):
        request.exchange = number.to_bytes(16, "little")
        await server.say(assign=request)


async def _garbage(server, request):
    await server.send_raw(b"\xff\xff\xff\xff")


async def _silence(server, request):
    """Three heartbeats of it."""


async def _welcome_again(server, request):
    await server.say(welcome=pb.Welcome(release="0.1.0"))


async def _leaving(server, request):
    await server.say(goodbye=pb.Goodbye(code=pb.Goodbye.LEAVING, reason="restarting"))


async def _endless_offers(server, request):
    for number in range(300):
        await server.say(offer=pb.Offer(canonical=b"x", study_id=f"{number}"))


@pytest.mark.parametrize(
    "breach", [_out_of_order, _too_many, _garbage, _silence, _welcome_again, _leaving, _endless_offers]
)
def test_an_agent_comes_back_after_any_breach(play, ask, breach):
    """For ever: a server may be mended."""
    request, _ = ask(padding=100_000)

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome(heartbeat=0.1)
        # The agent may be gone before the last word.
        with contextlib.suppress(grpc.aio.BaseError, grpc.aio.UsageError, asyncio.CancelledError):
            await breach(server, request)
        await server.ended_by_agent()
        await (await puppet.next()).welcome()

    assert play(scene) is None


async def _too_many_withdrawn(server, request):
    """Each leaves its bytes with the worker, which is at something else."""
    for number in range(exchanges.MAX_OPEN + 1):
        request.exchange = number.to_bytes(16, "little")
        await server.say(assign=request)
        await server.say(cancel=pb.Cancel(exchange=request.exchange))


def test_what_is_withdrawn_does_not_pile_up_behind_the_work(play, ask, site):
    """A server that asks and takes back, as long as a training lasts, costs the site no more memory."""
    request, _ = ask()

    async def scene(puppet, agent):
        server = await puppet.next()
        # So that it is no silence that ends it.
        await server.welcome(heartbeat=60.0)
        with site.lock:
            with contextlib.suppress(grpc.aio.BaseError, grpc.aio.UsageError, asyncio.CancelledError):
                await _too_many_withdrawn(server, request)
            await server.ended_by_agent()
        await (await puppet.next()).welcome()

    assert play(scene) is None


def test_a_policy_that_is_gone_before_the_first_look_is_missed(play, site, home):
    """No policy, no work; also where it went while the agent started."""
    (home / "policy.toml").unlink()

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.until(lambda: agent.status()["barred"])

    assert play(scene) is None


def test_a_heartbeat_that_is_no_number_stops_nothing(play, ask):
    """The silence of such a server is noticed as any other's."""

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome(heartbeat=float("nan"))
        await server.ended_by_agent()
        await (await puppet.next()).welcome()

    assert play(scene) is None


def test_a_first_word_other_than_welcome_is_a_breach(play, ask):
    """Nothing is done for a server that has not said what it is."""
    request, _ = ask()

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.say(assign=request)
        await server.ended_by_agent()
        await (await puppet.next()).welcome()

    assert play(scene) is None


def test_words_of_a_later_release_are_passed_over(play, ask):
    """An unknown kind is no breach: protobuf keeps it apart."""
    request, _ = ask(JOIN, round=0)
    answers = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.send_raw(bytes([0xAA, 0x06, 0x02, 0x08, 0x01]))  # Field 101, a message.
        await server.say(assign=request)
        answers.append(await server.hear("result"))

    play(scene)

    assert answers[0].error_code == 0


def test_an_agent_says_something_within_the_heartbeat_it_was_told(play):
    """Not within the one it had before it was told."""

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome(heartbeat=0.2)
        await server.hear("heartbeat")
        await server.hear("heartbeat")

    assert play(scene) is None


@pytest.mark.parametrize(("told", "kept"), [(float("nan"), 0.1), (float("inf"), 300.0), (-1.0, 0.1)])
def test_a_heartbeat_that_is_no_time_is_none_to_go_by(play, told, kept):
    """With one that is no number the agent would never sleep, nor find the server silent."""
    found = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome(heartbeat=told)
        await server.hear("heartbeat")
        found.append(agent._heartbeat)

    play(scene)

    assert found == [kept]


@pytest.mark.parametrize("code", [pb.Goodbye.REFUSED, pb.Goodbye.REPLACED])
def test_a_server_that_refuses_the_site_ends_the_agent(play, code):
    """Trying again would not help; its people are to look."""

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.say(goodbye=pb.Goodbye(code=code, reason="revoked\x1b[2J"))
        await server.ended_by_agent()

    ended = play(scene, stops=False)

    assert isinstance(ended, IdentityRefused)
    assert "revoked[2J" in ended.message


def test_a_server_of_another_release_ends_the_agent(play):
    """One line says which to install."""

    async def scene(puppet, agent):
        await (await puppet.next()).welcome(release="0.999.3")

    ended = play(scene, stops=False)

    assert isinstance(ended, ProtocolError)
    assert ended.fix == "pip install 'lepton-fl==0.999.*'"


@pytest.mark.parametrize(("theirs", "ours"), [("0.1.9", "0.1.0"), ("2.0.0", "2.7.1"), ("0.1.0rc1", "0.1.0")])
def test_releases_of_one_series_understand_one_another(monkeypatch, theirs, ours):
    """The same major release; before 1.0 the same minor one."""
    monkeypatch.setattr("lepton_fl.fleet.agent.peer.__version__", ours)

    check_release(theirs)


@pytest.mark.parametrize(
    ("theirs", "ours"), [("0.2.0", "0.1.0"), ("1.0.0", "2.0.0"), ("", "0.1.0"), ("1", "1.0")]
)
def test_others_do_not(monkeypatch, theirs, ours):
    """Refused, with both named."""
    monkeypatch.setattr("lepton_fl.fleet.agent.peer.__version__", ours)

    with pytest.raises(ProtocolError, match=ours):
        check_release(theirs)


@pytest.mark.parametrize("server", [NOW - 2 * 86_400, NOW + 2 * 86_400, float("nan"), 1e300])
def test_a_clock_days_off_is_told_with_both_times(server):
    """It is one of the two, and only people can say which."""
    with pytest.raises(IdentityRefused, match="2027-01-15 08:00 UTC"):
        check_clock(server, NOW)


def test_a_clock_seconds_off_is_measured():
    """And is no reason to refuse."""
    assert check_clock(NOW + 30, NOW) == 30


def test_an_agent_gives_up_only_if_told_to(play):
    """The last reason is named."""

    async def scene(puppet, agent):
        await puppet.stop()

    ended = play(scene, stops=False, give_up_after=0.2)

    assert isinstance(ended, ConnectionFailed)
    assert "nothing listens there" in ended.message


# Pause and stop


def test_a_paused_site_sits_out_and_gives_what_it_gave(play, ask, charged):
    """Until it is told to go on, also after a restart; bytes that left before may leave again."""
    first, _ = ask(exchange=b"1" * 16)
    second, _ = ask(round=2, exchange=b"2" * 16)
    answers = []

    async def before(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(assign=first)
        answers.append(await server.hear("result"))
        agent.pause()

    async def after(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        for request in (first, second):
            await server.say(assign=request)
            answers.append(await server.hear("result"))
        agent.resume()
        await server.say(cancel=pb.Cancel(exchange=second.exchange))
        await server.say(assign=second)
        answers.append(await server.hear("result"))

    play(before)
    play(after)

    assert [answer.error_code for answer in answers] == [0, 0, SITS_OUT, 0]
    assert answers[0] == answers[1]
    assert charged() == [1, 2]


def test_a_site_that_stops_hands_over_its_work_first(play, ask, monkeypatch):
    """Then it says goodbye, and takes nothing new meanwhile."""
    monkeypatch.setattr("lepton_fl.fleet.agent.agent._STOP_S", 30.0)
    request, _ = ask()
    heard = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(assign=request)
        await server.hear("result")
        agent.stop()
        other, _ = ask(round=2, exchange=b"2" * 16)
        await server.say(assign=other)
        heard.append(await server.hear("result"))
        for done in (request, other):
            await server.say(ack=pb.Ack(exchange=done.exchange))
        heard.append(await server.hear("goodbye"))

    assert play(scene) is None
    assert (heard[0].error_code, heard[0].error_reason) == (SITS_OUT, "the site's agent is stopping")
    assert heard[1].code == pb.Goodbye.LEAVING


def test_status_tells_what_there_is(play, ask):
    """Counts and states; JSON, for the local socket."""
    request, _ = ask()
    seen = []

    async def scene(puppet, agent):
        seen.append(agent.status())
        server = await puppet.next()
        await server.welcome()
        await server.say(assign=request)
        await server.hear("result")
        seen.append(agent.status())

    play(scene)

    before, after = json.loads(json.dumps(seen))
    assert (before["connected"], after["connected"]) == (False, True)
    assert (after["answered"], after["open"], after["state"]) == (1, 1, "idle")


# Renewal


class Renewing:
    """A member whose certificate is due once."""

    roster_version = 7
    identity = SimpleNamespace(site="clinic", identity_key=IdentityKey.generate())

    def __init__(self, *failures) -> None:
        self.failures = list(failures)
        self.tried = 0
        self.done = False
        self.rosters = []

    def renewal_due(self) -> bool:
        return not self.done

    async def renew(self, channel) -> None:
        self.tried += 1
        if self.failures:
            raise self.failures.pop()
        self.done = True

    def take_roster(self, signed: bytes) -> None:
        self.rosters.append(signed)


def test_a_certificate_is_renewed_and_used_at_an_idle_moment(play, ask):
    """Not before the server has its answer."""
    member, request = Renewing(), ask()[0]
    heard = []

    async def scene(puppet, agent):
        server = await puppet.next()
        heard.append((await server.welcome()).roster_version)
        await server.say(assign=request)
        await server.hear("result")
        await server.until(lambda: member.done)
        await server.say(ack=pb.Ack(exchange=request.exchange))
        await server.ended_by_agent()
        await (await puppet.next()).welcome()

    assert play(scene, member=member) is None
    assert (member.tried, heard) == (1, [7])


def test_a_renewal_that_fails_is_tried_again(play, monkeypatch):
    """The certificate is good for a third of its life yet."""
    monkeypatch.setattr("lepton_fl.fleet.agent.agent._RENEWAL_S", 0.01)
    member = Renewing(ConnectionFailed("busy"))

    async def scene(puppet, agent):
        await (await puppet.next()).welcome()
        await (await puppet.next()).welcome()

    assert play(scene, member=member) is None
    assert member.tried == 2


def test_a_renewal_that_is_refused_ends_the_agent(play):
    """The site is no member any more."""

    async def scene(puppet, agent):
        await (await puppet.next()).welcome()

    ended = play(scene, stops=False, member=Renewing(IdentityRefused("revoked")))

    assert isinstance(ended, IdentityRefused)


def test_a_roster_is_handed_to_the_member(play):
    """It is the one that checks it."""
    member = Renewing()
    member.done = True

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(roster=pb.Roster(signed=b"signed"))
        await server.until(lambda: member.rosters)

    play(scene, member=member)

    assert member.rosters == [b"signed"]


def test_a_roster_is_taken_in_turn_with_what_is_asked(play, ask, charged):
    """What the server asked by the one before is answered by that one; what comes after, by the new one."""
    member, seen = Renewing(), []
    member.done = True
    member.take_roster = lambda _: seen.append(charged())

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(assign=ask(exchange=b"1" * 16)[0])
        await server.say(roster=pb.Roster(signed=b"signed"))
        await server.say(assign=ask(round=2, exchange=b"2" * 16)[0])
        await server.hear("result")
        await server.hear("result")

    play(scene, member=member)

    assert seen == [[1]]
    assert charged() == [1, 2]


def test_a_server_that_sends_rosters_without_end_is_left(play, ask, monkeypatch):
    """They wait for the site's worker, as requests do."""
    monkeypatch.setattr("lepton_fl.fleet.agent.exchanges.MAX_OPEN", 3)
    member, free = Renewing(), threading.Event()
    member.done = True
    member.take_roster = lambda _: free.wait(30)

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        for _ in range(4):
            await server.say(roster=pb.Roster(signed=b"signed"))
        await server.ended_by_agent()
        free.set()

    assert play(scene, member=member) is None


def test_a_roster_that_finds_no_room_does_not_cut_the_site_off(play, ask, monkeypatch):
    """It is sent at each connection: the site could take part in nothing."""
    member, request = Renewing(), ask()[0]
    member.done = True
    answers = []

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(member, "take_roster", full)

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(roster=pb.Roster(signed=b"signed"))
        await server.say(assign=request)
        answers.append(await server.hear("result"))

    play(scene, member=member)

    assert answers[0].error_code == 0


# Evaluation, and what else a server may ask


def test_an_unknown_type_of_message_is_refused(play, ask):
    """By the app's own controls."""
    request, _ = ask(kind="query.rows")
    answers = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(assign=request)
        answers.append(await server.hear("result"))

    play(scene)

    assert (answers[0].error_code, answers[0].error_reason) == (1004, "message type not allowed")


def test_evaluation_is_answered(play, ask):
    """Nothing of it leaves under this policy."""
    request, _ = ask(EVALUATE)
    answers = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(assign=request)
        answers.append(await server.hear("result"))

    play(scene)

    assert answers[0].error_code == 0


def test_left_files_are_gone_at_the_next_start(home, site):
    """Requests of before the kill; replies stay."""
    spool = home / "state" / "spool"
    spool.mkdir(parents=True)
    (spool / "left.in").write_bytes(b"x")

    Agent(client_app(site), lambda: None, home / "state")

    assert list(spool.iterdir()) == []


# --- the ledger under witness ---


def states(connection_said):
    return Statement.read(connection_said.statement)


def test_what_leaves_late_is_stated_in_order(play, ask, site, study):
    """A reply that was not acknowledged before the connection was cut, and one that was made meanwhile."""

    async def scene(puppet, agent):
        connection = await puppet.next()
        hello = await connection.welcome()
        await connection.say(assign=ask(exchange=b"1" * 16)[0])
        first = await connection.hear("result")
        connection.over.set()
        connection = await puppet.next()
        again = await connection.welcome(still=[b"1" * 16])
        await connection.say(assign=ask(exchange=b"2" * 16, round=2)[0])
        second = await connection.hear("result")
        await connection.say(assign=ask(exchange=b"1" * 16)[0])
        late = await connection.hear("result")

        heads = [states(said).head.counter for said in (hello, first, again, second, late)]
        assert heads == sorted(heads)
        assert [states(said).round for said in (hello, first, again, second, late)] == [0, 1, 0, 2, 1]
        assert first.sha256 == late.sha256
        assert states(late).entry == states(first).entry
        for exchange in (b"1" * 16, b"2" * 16):
            await connection.say(ack=pb.Ack(exchange=exchange))

    assert play(scene) is None


def test_what_is_countersigned_goes_to_the_connection_that_asked(play, monkeypatch):
    """One message for each that asked; what was asked over a connection that is gone is not sent unasked."""
    begun, go_on = threading.Event(), threading.Event()

    def countersigned(_, signed):
        begun.set()
        assert go_on.wait(30)
        return list(signed)

    monkeypatch.setattr("lepton_fl.fleet.agent.ledger.StatedLedger.witness", countersigned)

    async def scene(puppet, agent):
        connection = await puppet.next()
        await connection.welcome()
        await connection.say(statements=pb.Statements(signed=[b"before"]))
        await connection.until(begun.is_set)
        connection.over.set()
        connection = await puppet.next()
        await connection.welcome()
        for told in (b"first", b"second"):
            await connection.say(statements=pb.Statements(signed=[told]))
        await connection.until(lambda: len(agent._unread) == 2)
        go_on.set()
        given = [list((await connection.hear("receipts")).signed) for _ in range(2)]
        assert given == [[b"first"], [b"second"]]

    assert play(scene) is None


def test_what_is_asked_after_a_receipt_that_shows_more_is_not_charged(play, ask, site):
    """They come one after another; the agent ends, with what its people must do."""
    key, data_set = IdentityKey.generate(), site.budget.data_set
    head = Head(99, bytes(32))
    told = Statement.issue(site.ledger._key, site="clinic", data_set=data_set, head=head)
    receipt = Receipt.issue(key, witness="the server", statement=told)

    async def scene(puppet, agent):
        connection = await puppet.next()
        await connection.hear("hello")
        await connection.say(
            welcome=pb.Welcome(
                protocol=1, release=__version__, heartbeat_s=5.0, party=101, witness=key.public
            )
        )
        await connection.say(receipts=pb.Receipts(signed=[receipt.signed]))
        await connection.say(assign=ask()[0])
        await connection.ended_by_agent()

    ended = play(scene, stops=False)

    assert isinstance(ended, VerificationFailed)
    assert "the server has seen entry 99" in ended.message
    assert "lepton-fl budget recover" in ended.fix
    assert site.ledger.history(data_set) == []


def test_ledgers_that_are_told_of_without_end_do_not_keep_the_site_from_its_work(play, ask, monkeypatch):
    """Each turn of the worker ends, however quickly a server says more."""
    read = []

    async def scene(puppet, agent):
        def countersigned(_, signed):
            read.append(len(read))
            if len(read) < 200:
                # As if the server had just said so again.
                agent._unread.append((pb.ToAgent(statements=pb.Statements(signed=signed)), b"", None))
            return []

        monkeypatch.setattr("lepton_fl.fleet.agent.ledger.StatedLedger.witness", countersigned)
        connection = await puppet.next()
        await connection.welcome()
        await connection.say(statements=pb.Statements(signed=[b"told"]))
        await connection.say(assign=ask()[0])
        await connection.hear("result")
        assert 0 < len(read) < 200

    assert play(scene) is None
