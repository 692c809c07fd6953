"""What a site says to the studies that a server proposes."""

import os
import stat

import pytest

from lepton_fl.config import parse
from lepton_fl.errors import ConfigError, PolicyRefused, VerificationFailed
from lepton_fl.fleet.agent import offers as module
from lepton_fl.fleet.agent.offers import approving_key, offers_of
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.limits import MAX_STUDY
from lepton_fl.secagg.identity import IdentityKey
from lepton_fl.site.approvals import Approvals, StudySignature
from lepton_fl.study import Study


@pytest.fixture
def manual(home):
    """The clinic's policy waits for a person."""
    policy = home / "policy.toml"
    policy.write_text(policy.read_text().replace('"auto"', '"manual"'))
    return home


@pytest.fixture
def key(manual):
    """What the clinic's approvals are signed with: its ledger's key, which is begun for it."""
    return approving_key(manual / "site.toml")


@pytest.fixture
def offers(manual, key):
    return offers_of(manual / "site.toml")


@pytest.fixture
def another(study):
    """The study with another name, or other tables."""

    def make(name="other", **tables) -> Study:
        raw = {**study.model_dump(exclude_unset=True), "study": {"name": name}, **tables}
        return parse(Study, raw, file="study.toml")

    return make


def taken(offers, study):
    return offers.take(study.canonical, study.id, current=())


# On disk


def test_an_offer_is_kept_closed_to_others(offers, study, manual):
    """And is the study that its id names."""
    assert taken(offers, study) == study

    kept = manual / "state" / "studies" / f"{study.id}.canonical"
    assert kept.read_bytes() == study.canonical
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert [offered.study for offered in offers.list()] == [study]


def test_bytes_of_another_id_are_no_offer(offers, study):
    """Nothing is kept of them."""
    with pytest.raises(PolicyRefused):
        offers.take(study.canonical + b" ", study.id, current=())

    assert offers.list() == []


def test_an_offer_is_bounded(offers, study):
    """Before it is parsed."""
    with pytest.raises(PolicyRefused, match="too long"):
        offers.take(b"x" * (MAX_STUDY + 1), study.id, current=())


def test_the_oldest_that_is_offered_no_longer_makes_room(offers, another, monkeypatch):
    """Those that are offered now stay."""
    monkeypatch.setattr(module, "MAX_OFFERS", 2)
    first, second, third = (another(f"s{number}") for number in range(3))
    for age, study in enumerate((first, second)):
        taken(offers, study)
        path = offers._path(study.id)
        os.utime(path, (age, age))

    offers.take(third.canonical, third.id, current={first.id})

    assert {offered.study.study.name for offered in offers.list()} == {"s0", "s2"}


def test_no_more_are_kept_than_that(offers, another, monkeypatch):
    """A server that offers without end fills no disk."""
    monkeypatch.setattr(module, "MAX_OFFERS", 1)
    first, second = another("s0"), another("s1")
    taken(offers, first)

    with pytest.raises(PolicyRefused, match="no more are kept"):
        offers.take(second.canonical, second.id, current={first.id})


def test_a_file_that_was_changed_is_passed_over(offers, study):
    """Its name is its digest."""
    taken(offers, study)
    path = offers._path(study.id)
    path.write_bytes(path.read_bytes() + b" ")

    assert offers.list() == []


@pytest.mark.parametrize("text", ["heart", "id"])
def test_a_study_is_found_by_name_and_by_id(offers, study, text):
    """As people write it."""
    taken(offers, study)

    assert offers.find(study.id[:8] if text == "id" else text) == study


def test_two_studies_of_one_name_are_both_named(offers, study, another):
    """Nobody approves the wrong one."""
    same = another("heart", train={**study.train.model_dump(exclude_unset=True), "rounds": 2})
    taken(offers, study)
    taken(offers, same)

    with pytest.raises(ConfigError) as refused:
        offers.find("heart")

    assert study.id[:12] in refused.value.message
    assert same.id[:12] in refused.value.message


def test_a_study_that_was_never_offered_is_not_found(offers):
    """One line says so, and how to be offered one."""
    with pytest.raises(ConfigError, match="not among those offered"):
        offers.find("heart")


# Judgement


def test_a_study_waits_for_a_person_who_may_change_their_mind(offers, study, key):
    """The last word counts."""
    states = [offers.judge(study).state]
    for say in (lambda s: offers.approve(s, key), lambda s: offers.refuse(s, "not \n now")) * 2:
        say(study)
        states.append(offers.judge(study).state)

    assert states == ["waiting", "approved", "refused", "approved", "refused"]


def test_an_approval_that_does_not_count_is_waited_for_anew(offers, study, manual):
    """As releases before wrote it, unsigned: the site's people read why."""
    (manual / "state" / "approvals.jsonl").write_text(f'{{"study": "{study.id}", "name": "heart"}}\n')

    judged = offers.judge(study)

    assert judged.state == "waiting"
    assert judged.reason.endswith("approvals.jsonl is not signed, as in releases before this one")


def test_a_ledger_that_is_gone_is_not_begun_anew_by_an_approval(manual, study):
    """What it spent would be forgotten."""
    replies = manual / "state" / "replies" / "run"
    replies.mkdir(parents=True)
    (replies / "reply").touch()

    with pytest.raises(ConfigError, match=r"ledger\.db: is gone"):
        approving_key(manual / "site.toml")


# Signed studies


@pytest.fixture
def operator():
    return IdentityKey.generate()


@pytest.fixture
def signed_only(home, operator):
    """The clinic's policy lets in what the operator has signed."""
    policy = home / "policy.toml"
    asked = f'"signed-study"\nstudy_key = "{operator.public.hex()}"'
    policy.write_text(policy.read_text().replace('"auto"', asked))
    return home


def test_a_study_that_comes_signed_needs_no_person(signed_only, operator, study):
    """Not before its signature has come."""
    offers = offers_of(signed_only / "site.toml")
    taken(offers, study)
    states = [offers.judge(study).state]
    signature = StudySignature.sign(operator, study.id).to_bytes()
    offers.take(study.canonical, study.id, current=(), signature=signature)
    states.append(offers.judge(study).state)

    assert states == ["refused", "approved"]


def test_a_signature_that_is_none_is_not_kept(signed_only, operator, study, another):
    """Nor the study that came with it."""
    offers = offers_of(signed_only / "site.toml")
    wrong = StudySignature.sign(operator, another().id).to_bytes()

    with pytest.raises(VerificationFailed, match="not its signer's"):
        offers.take(study.canonical, study.id, current=(), signature=wrong)
    assert offers.list() == []


def test_signatures_make_room_with_their_studies(signed_only, operator, another, monkeypatch):
    """No file is left of a study that is kept no longer."""
    monkeypatch.setattr(module, "MAX_OFFERS", 1)
    offers = offers_of(signed_only / "site.toml")
    for study in (another("s0"), another("s1")):
        signature = StudySignature.sign(operator, study.id).to_bytes()
        offers.take(study.canonical, study.id, current=(), signature=signature)

    kept = {path.name for path in (signed_only / "state" / "studies").iterdir()}
    assert kept == {f"{study.id}.canonical", f"{study.id}.sig"}


def test_a_persons_reason_is_told(offers, study):
    """On one line; it is meant for the operator."""
    offers.refuse(study, "not \n now")

    assert offers.judge(study).public == "refused by the site's people: not now"


def test_a_person_refuses_what_the_policy_would_let_in(home, study):
    """approval = auto leaves them their word."""
    offers = offers_of(home / "site.toml")
    before = offers.judge(study).state

    offers.refuse(study, "no")

    assert (before, offers.judge(study).state) == ("approved", "refused")


def test_a_policy_refuses_without_its_numbers(offers, another):
    """Its own people read them; an operator does not."""
    study = another(privacy={"epsilon": 9.0, "delta": 1e-3})

    judged = offers.judge(study)

    assert judged.state == "refused"
    assert "9" in judged.reason
    assert judged.public == "the site's policy refuses the study (budget.epsilon_per_study)"


def test_what_the_policy_forbids_cannot_be_approved(offers, another, key):
    """Nor is it written down as if it were."""
    study = another(privacy={"epsilon": 9.0, "delta": 1e-3})

    with pytest.raises(PolicyRefused):
        offers.approve(study, key)

    assert not offers._approvals.has(study.id)


def test_a_study_that_cannot_be_protected_is_refused(offers, another):
    """Before anybody is asked: 3 sites do not hold out against 2 that collude with the server."""
    secure = {"enabled": True, "min_sites": 3}

    assert offers.judge(another(secure_aggregation={**secure, "colluders": 1})).state != "refused"
    assert offers.judge(another(secure_aggregation={**secure, "colluders": 2})).state == "refused"


def test_no_policy_refuses(offers, study, manual):
    """Absence is a refusal."""
    (manual / "policy.toml").unlink()

    assert offers.judge(study).state == "refused"


def test_approvals_are_closed_to_others(tmp_path, study, key):
    """From their first line."""
    approvals = Approvals(tmp_path / "approvals.jsonl", key=key.public)
    approvals.add(study, key)

    assert stat.S_IMODE(approvals.path.stat().st_mode) == 0o600


def test_a_line_that_was_cut_off_does_not_swallow_the_next(tmp_path, study, key):
    """A refusal holds, whatever a full disk has left before it."""
    approvals = Approvals(tmp_path / "approvals.jsonl", key=key.public)
    approvals.add(study, key)
    with approvals.path.open("ab") as file:
        file.write(b'{"study": "')
    approvals.refuse(study, "not before the audit")

    assert approvals.refusal(study.id) == "not before the audit"


# On the stream


def offer(study):
    return pb.Offer(canonical=study.canonical, study_id=study.id)


def test_an_agent_answers_and_answers_again_when_its_people_have_spoken(manual, key, play, study):
    """Without a restart; the policy may change too."""
    offers = offers_of(manual / "site.toml")
    answers = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(offer=offer(study))
        answers.append(await server.hear("answer"))
        offers.approve(study, key)
        answers.append(await server.hear("answer"))
        offers.refuse(study, "no")
        answers.append(await server.hear("answer"))
        offers.approve(study, key)
        answers.append(await server.hear("answer"))
        policy = manual / "policy.toml"
        policy.write_text(policy.read_text().replace("epsilon_per_study = 5.0", "epsilon_per_study = 1.0"))
        answers.append(await server.hear("answer"))

    play(scene)

    said = pb.Answer
    expected = [said.WAITING, said.APPROVED, said.REFUSED, said.APPROVED, said.REFUSED]
    assert [answer.state for answer in answers] == expected
    assert {answer.study_id for answer in answers} == {study.id}


def test_an_agent_answers_once_however_often_it_is_offered(play, study, home):
    """What is known is no news."""
    heard = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        for _ in range(3):
            await server.say(offer=offer(study))
        heard.append((await server.hear("answer")).state)
        heard.append(await server.heard("answer"))

    play(scene)

    assert heard == [pb.Answer.APPROVED, False]


def test_an_agent_answers_again_when_a_study_has_been_signed(signed_only, operator, play, study):
    """The same study, offered anew with its signature."""
    answers = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(offer=offer(study))
        answers.append(await server.hear("answer"))
        signed = offer(study)
        signed.signature = StudySignature.sign(operator, study.id).to_bytes()
        await server.say(offer=signed)
        answers.append(await server.hear("answer"))

    play(scene)

    assert [answer.state for answer in answers] == [pb.Answer.REFUSED, pb.Answer.APPROVED]
    assert answers[0].reason == "the site's policy refuses the study (require.approval)"


def test_an_approved_study_is_made_ready(play, study, site):
    """Its table is read before its first round."""

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(offer=offer(study))
        await server.until(lambda: study.id in site._bench)

    assert play(scene) is None


def test_a_study_that_cannot_be_understood_is_refused(play):
    """And the connection goes on."""
    answers = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(offer=pb.Offer(canonical=b"no study", study_id="0" * 64))
        answers.append(await server.hear("answer"))

    play(scene)

    assert (answers[0].state, answers[0].reason) == (pb.Answer.REFUSED, "not a study")


def test_a_broken_policy_stops_all_work(play, ask, home, charged):
    """It fails closed, and goes on once the file is whole."""
    request, _ = ask()
    policy = (home / "policy.toml").read_text()
    answers = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        (home / "policy.toml").write_text("[broken")
        await server.until(lambda: agent.status()["barred"])
        await server.say(assign=request)
        answers.append(await server.hear("result"))
        await server.say(ack=pb.Ack(exchange=request.exchange))
        (home / "policy.toml").write_text(policy)
        await server.until(lambda: not agent.status()["barred"])
        await server.say(assign=request)
        answers.append(await server.hear("result"))

    play(scene)

    assert answers[0].error_reason == "the site's policy cannot be read"
    assert answers[1].error_code == 0
    assert charged() == [1]


def test_words_that_are_no_text_are_told_without_what_cannot_be_sent(play, study, site):
    """As a terminal of another encoding writes them; else the site could not connect any more."""
    answers = []

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        await server.say(offer=offer(study))
        answers.append(await server.hear("answer"))
        site.approvals.refuse(study, "zur\udcfcck")
        answers.append(await server.hear("answer"))

    play(scene)

    assert [answer.state for answer in answers] == [pb.Answer.APPROVED, pb.Answer.REFUSED]
    assert answers[1].reason.endswith("zurck")


def test_an_agent_that_cannot_look_after_its_peoples_files_ends(play, home, monkeypatch):
    """It would go on by a policy that may have been changed."""

    def broken(_):
        raise RecursionError("x")

    async def scene(puppet, agent):
        server = await puppet.next()
        await server.welcome()
        monkeypatch.setattr("lepton_fl.fleet.agent.agent.load_policy", broken)
        (home / "policy.toml").touch()
        await server.ended_by_agent()

    assert isinstance(play(scene, stops=False), RecursionError)
