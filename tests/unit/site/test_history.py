"""What a site remembers of its secure rounds outlives the process, and is refused where it was touched."""

import sqlite3
from dataclasses import replace

import pytest

from lepton_fl.errors import ConfigError, LeptonError, VerificationFailed
from lepton_fl.secagg.context import Attempt
from lepton_fl.site import history as module
from lepton_fl.site.config import SiteFiles
from lepton_fl.site.history import DiskHistory, check_history, open_history

RUN, OTHER = b"r" * 16, b"o" * 16
FIRST = Attempt(run=RUN, kind="train", round=5, cohort=b"c" * 32, number=1, released=False)


@pytest.fixture
def files(tmp_path):
    return SiteFiles(name="clinic", policy=tmp_path / "policy.toml", state=tmp_path)


@pytest.fixture
def opened(files):
    """Open it, as often as a test likes."""
    held = []

    def run():
        held.append(open_history(files))
        return held[-1]

    yield run
    for history in held:
        history.close()


def change(path, sql):
    """What somebody else does to the file."""
    with sqlite3.connect(path) as db:
        db.execute(sql)
    db.close()


def test_what_was_written_is_there_in_another_process(opened, files):
    """The last one of a round in place of those before; in a file of mode 0600."""
    opened().write(FIRST)
    opened().write(replace(FIRST, number=2))
    opened().write(replace(FIRST, number=2, released=True))

    assert opened().read(RUN, "train", 5) == replace(FIRST, number=2, released=True)
    assert files.history.stat().st_mode & 0o777 == 0o600


def test_a_round_is_known_by_its_run_and_kind(opened):
    """Others are new."""
    history = opened()
    history.write(FIRST)

    assert history.read(OTHER, "train", 5) is None
    assert history.read(RUN, "evaluate", 5) is None
    assert history.read(RUN, "train", 6) is None


def test_a_round_before_the_last_is_released(opened):
    """Rounds only count upwards: that they are not written down any more opens none of them again."""
    history = opened()
    for number in range(1, 200):
        history.write(replace(FIRST, round=number))

    assert history.read(RUN, "train", 199) == replace(FIRST, round=199)
    assert all(history.read(RUN, "train", number).released for number in range(1, 199))


def test_it_does_not_grow_with_the_rounds(opened, files):
    """One row a run and kind."""
    history = opened()
    for number in range(1, 50):
        history.write(replace(FIRST, round=number))
        history.write(replace(FIRST, round=number, released=True))

    with sqlite3.connect(files.history) as db:
        assert db.execute("SELECT count(*) FROM attempts").fetchone() == (1,)
    db.close()


def test_there_is_an_end_to_the_runs_that_are_remembered(opened, monkeypatch):
    """None is forgotten for another; those that are known go on."""
    monkeypatch.setattr(module, "MAX_RUNS", 2)
    history = opened()
    history.write(FIRST)
    history.write(replace(FIRST, run=OTHER))

    with pytest.raises(LeptonError, match="remembers 2 runs, and no more"):
        history.write(replace(FIRST, run=b"n" * 16))
    with pytest.raises(LeptonError, match="remembers 2 runs, and no more"):
        opened().write(replace(FIRST, run=b"n" * 16))
    history.write(replace(FIRST, round=6))
    assert history.read(RUN, "train", 6) is not None


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE attempts SET released = 0",
        "UPDATE attempts SET round = 4",
        "UPDATE attempts SET number = 0",
        "UPDATE attempts SET cohort = zeroblob(32)",
        "UPDATE attempts SET digest = zeroblob(32)",
    ],
)
def test_a_row_that_was_changed_is_refused(opened, files, sql):
    """SQLite itself finds few flips of a bit."""
    opened().write(replace(FIRST, released=True))
    change(files.history, sql)

    with pytest.raises(VerificationFailed, match=r"rounds\.db: what it says of run"):
        opened().read(RUN, "train", 5)


def test_a_site_whose_memory_is_gone_refuses(opened, files):
    """With a new one, an update could be added up a second time."""
    opened().close()
    files.ledger.touch()
    check_history(files)
    files.history.unlink()

    with pytest.raises(ConfigError, match=r"rounds\.db: is gone, and this site has a ledger") as refused:
        opened()
    assert "bring rounds.db back from the backup" in refused.value.fix


def test_an_empty_file_is_a_person_s_word_that_it_begins_anew(opened, files):
    """As docs/fleet.md says, once none of the site's runs is to go on."""
    files.ledger.touch()
    files.history.touch()

    assert opened().read(RUN, "train", 5) is None


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + bytes(4096)])
def test_a_file_that_cannot_be_read_is_refused(opened, files, content):
    """With one line that says what to do."""
    files.history.write_bytes(content)

    with pytest.raises(ConfigError, match=r"rounds\.db: the site's memory of rounds cannot be used"):
        opened()


def test_a_later_format_is_not_guessed_at(opened, files):
    """What it means is not known here."""
    opened().close()
    change(files.history, "PRAGMA user_version = 2")

    with pytest.raises(ConfigError, match="format 2, this release reads 1"):
        opened()


def test_what_cannot_be_written_is_said_and_may_pass(files):
    """A full disk, say. A site that cannot remember a round is not in it."""
    history = DiskHistory(files.history)
    history.close()

    with pytest.raises(LeptonError, match="cannot be used") as refused:
        history.write(FIRST)
    assert refused.value.exit_code == LeptonError.exit_code
    assert refused.value.public == "the site cannot remember the round"
