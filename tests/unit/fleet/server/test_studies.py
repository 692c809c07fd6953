"""What server and operator's commands share: who may move a run where."""

import time

import pytest

from lepton_fl.config import parse
from lepton_fl.errors import ConfigError, TooFewSites
from lepton_fl.fleet.server.database import Database
from lepton_fl.fleet.server.studies import Answered, Journal, RoundRow, Studies, ready
from lepton_fl.study import Study

STUDY = {
    "study": {"name": "s"},
    "task": {"kind": "binary", "target": "ill"},
    "privacy": {"epsilon": 4.0, "delta": 1e-3},
    "secure_aggregation": {"enabled": False, "min_sites": 2},
    "train": {"rounds": 3, "sample_rate": 0.2, "lr": 0.5, "expected_batch": 10.0},
    "features": {"columns": {"x": {"type": "float", "range": [-1, 1]}}},
}


def study(**changes):
    return parse(Study, {k: {**v, **changes.get(k, {})} for k, v in STUDY.items()}, file="study.toml")


@pytest.fixture
def database(tmp_path):
    found = Database(tmp_path / "state" / "server.db")
    yield found
    found.close()


@pytest.fixture
def studies(database):
    return Studies(database)


@pytest.fixture
def submitted(studies):
    studies.submit(study())
    return studies.find("s")


@pytest.fixture
def run(studies, submitted):
    return studies.want(submitted)


def row(number, sites=("a", "b"), **dropped):
    return RoundRow(number=number, sites=sites, dropped=dropped, seconds=0.1, at=1.0)


def answer(party, state="approved", study_id="", at=1.0, reason=""):
    return Answered(study=study_id, party=party, site=f"site-{party}", state=state, reason=reason, at=at)


def test_a_study_is_submitted_once(studies):
    assert studies.submit(study())
    assert not studies.submit(study())
    assert [s.study() for s in studies.studies()] == [study()]


def test_a_study_that_is_signed_later_is_the_same_study(studies):
    """The last signature goes with it; one that comes without takes none away."""
    signatures = []
    for signature in (b"", b"first", b"second", b""):
        studies.submit(study(), signature=signature)
        signatures.append(studies.signatures().get(study().id))

    assert signatures == [None, b"first", b"second", b"second"]
    assert len(studies.studies()) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"expected_batch": None}},
        {"secure_aggregation": {"enabled": True, "min_sites": 4, "colluders": 2}},
        {"study": {"purpose": "p" * (1 << 20)}},
    ],
    ids=["no batch size", "too many colluders", "too long"],
)
def test_a_study_that_no_agent_could_train_is_not_submitted(studies, changes):
    with pytest.raises(ConfigError):
        studies.submit(study(**changes))


def test_a_study_is_not_submitted_again_with_another_first_model(studies, submitted):
    with pytest.raises(ConfigError, match="first model"):
        studies.submit(study(), first_model="0" * 64)


def test_a_study_has_one_run_at_a_time(studies, submitted, run):
    with pytest.raises(ConfigError, match="is wanted"):
        studies.want(submitted)


def test_a_finished_study_is_trained_again_only_where_that_is_said(studies, submitted, run):
    """Its sites are charged for it once more."""
    studies.begin(run.id)
    studies.ended(run.id, "finished")

    with pytest.raises(ConfigError, match="charged"):
        studies.want(submitted)
    assert studies.want(submitted, again=True).state == "wanted"


def test_too_few_approving_sites_are_named_with_what_they_say(studies, submitted):
    studies.record(
        answers=[answer(101, "approved", submitted.id), answer(102, "refused", submitted.id, reason="no")]
    )

    with pytest.raises(
        TooFewSites, match="site-101: has approved, and is not connected; site-102: refuses: no"
    ):
        studies.want(submitted, ready=[])


def test_a_run_over_fewer_sites_than_the_study_asks_is_never_begun(studies, submitted):
    """Also with --wait: it would wait for ever."""
    with pytest.raises(TooFewSites, match="may take part: 1, it asks 2"):
        studies.want(submitted, sites=["site-101"])
    assert studies.want(submitted, sites=["site-101", "site-102"]).state == "wanted"


def test_what_a_revoked_site_has_said_counts_no_more(studies, submitted, database):
    studies.record(answers=[answer(party, study_id=submitted.id) for party in (101, 102)])
    database.execute("INSERT INTO members VALUES (101, 'site-101', x'01', x'', 0, 1)", ())

    assert [said.site for said in studies.answers(submitted.id)] == ["site-102"]


def test_a_run_that_has_not_begun_is_stopped_at_once(studies, submitted, run):
    assert studies.stop(submitted).state == "stopped"
    assert not studies.begin(run.id)


def test_a_run_that_has_begun_is_stopped_by_the_server(studies, submitted, run):
    studies.begin(run.id)

    assert studies.stop(submitted).state == "stopping"
    assert [r.id for r in studies.stopping()] == [run.id]


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_what_was_stopped_or_has_failed_is_resumed(studies, submitted, run, state):
    studies.begin(run.id)
    studies.ended(run.id, state, reason="why", exit_code=6)

    resumed = studies.resume(submitted)

    assert (resumed.id, resumed.state, resumed.reason, resumed.exit_code) == (run.id, "wanted", "", None)


@pytest.mark.parametrize("state", ["running", "finished", "wanted"])
def test_nothing_else_is_resumed(studies, submitted, run, state):
    if state != "wanted":
        studies.begin(run.id)
    if state == "finished":
        studies.ended(run.id, "finished")

    with pytest.raises(ConfigError, match=state):
        studies.resume(submitted)


def test_what_ran_when_the_server_ended_goes_on(studies, submitted, run):
    studies.begin(run.id)

    assert [r.state for r in studies.recover()] == ["interrupted"]
    assert studies.begin(run.id)


def test_what_was_stopping_when_the_server_ended_is_stopped(studies, submitted, run):
    studies.begin(run.id)
    studies.stop(submitted)

    assert studies.recover() == []
    assert studies.run(run.id).state == "stopped"


def test_what_the_operator_stops_does_not_go_on_after_a_server_that_leaves(studies, submitted, run):
    """It had not read that yet."""
    studies.begin(run.id)
    studies.stop(submitted)
    studies.ended(run.id, "interrupted", reason="the server was asked to leave")

    assert studies.run(run.id).state == "stopped"
    assert studies.recover() == []


def test_the_last_run_is_the_last_one_also_when_the_clock_was_set_back(studies, submitted, run, monkeypatch):
    """Else a run that goes on could not be stopped, and its study would not be offered."""
    studies.begin(run.id)
    studies.ended(run.id, "finished", exit_code=0)
    monkeypatch.setattr(time, "time", lambda: run.created_at - 86_400)
    later = studies.want(submitted, again=True)

    assert [s.id for s in studies.open()] == [submitted.id]
    assert studies.stop(submitted).id == later.id


def test_a_study_is_offered_until_its_last_run_has_finished(studies, submitted):
    offered = [[s.id for s in studies.open()]]
    run = studies.want(submitted)
    studies.begin(run.id)
    offered.append([s.id for s in studies.open()])
    studies.ended(run.id, "finished")
    offered.append([s.id for s in studies.open()])

    assert offered == [[submitted.id], [submitted.id], []]


def test_a_round_that_is_told_twice_counts_once(studies, run):
    """A lost one does not count as done."""
    journal = Journal(studies)
    for told in (row(1), row(1), row(2, ()), row(3)):
        journal.round(run.id, told)

    assert journal.flush()
    assert not journal.flush()
    assert studies.run(run.id).done == 2
    assert [r.number for r in studies.rounds(run.id)] == [1, 2, 3]
    assert [r.number for r in studies.rounds(run.id, last=2)] == [2, 3]


def test_ready_are_those_that_approve_and_are_connected():
    answers = [answer(101), answer(102), answer(103, "waiting"), answer(104, "refused")]

    assert ready(answers, {101, 103, 104}) == {101: "site-101"}
    assert ready(answers, {101, 102}, sites=["site-102"]) == {102: "site-102"}


def test_a_study_is_found_by_name_id_and_run(studies, submitted, run):
    for text in ("s", submitted.id, submitted.id[:6], run.id[:6]):
        assert studies.find(text).id == submitted.id


def test_a_name_that_two_studies_have_finds_neither(studies, submitted):
    studies.submit(study(train={"rounds": 4}))

    with pytest.raises(ConfigError, match="could be"):
        studies.find("s")
    assert studies.find(submitted.id[:8]).id == submitted.id


def test_another_process_hears_of_what_is_written(database, studies, tmp_path):
    """The server polls this number and nothing else."""
    other = Database(database.path)
    before = database.version()
    Studies(other).submit(study())
    after = database.version()
    other.close()

    assert after != before


def test_who_only_looks_is_no_news(database, studies):
    """The server would look at every site and study again, for each `status --watch`."""
    before = database.version()
    other = Database(database.path)
    Studies(other).studies()
    after = database.version()
    other.close()

    assert after == before
