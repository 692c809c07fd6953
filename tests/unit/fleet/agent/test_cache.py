"""Replies on the site's own disk."""

import os
import stat

from lepton_fl.fleet.agent import cache as module
from lepton_fl.fleet.agent.cache import KEPT, RUNS, ReplyCache
from lepton_fl.fleet.protocol.payload import Payload

KEYS = [f"{number:064x}" for number in range(KEPT + 2)]


def test_a_reply_comes_back_as_it_was_given(tmp_path):
    """To another process too; closed to others."""
    given = ReplyCache(tmp_path).put("run", KEYS[0], Payload.of(b"reply"))

    assert ReplyCache(tmp_path).get("run", KEYS[0]) == given
    (kept,) = tmp_path.glob("run/*")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_a_large_reply_stays_in_its_file(tmp_path, monkeypatch):
    """Which takes the place of the one it was written to."""
    monkeypatch.setattr(module, "SMALL", 2)
    cache = ReplyCache(tmp_path)
    whole = Payload.of(b"reply")
    written = cache.path("run", KEYS[0])
    written.write_bytes(b"reply")

    kept = cache.put("run", KEYS[0], Payload(size=5, sha256=whole.sha256, path=written))

    assert kept.path != written
    assert not written.exists()
    assert bytes(kept.open()) == b"reply"
    assert ReplyCache(tmp_path).get("run", KEYS[0]) == kept


def test_the_last_few_of_a_run_are_kept(tmp_path):
    """A round has few phases."""
    cache = ReplyCache(tmp_path)
    for key in KEYS:
        cache.put("run", key, Payload.of(key.encode()))

    assert [cache.get("run", key) is not None for key in KEYS] == [False, False, *[True] * KEPT]


def test_what_was_changed_is_no_reply(tmp_path):
    """Its name says its digest."""
    ReplyCache(tmp_path).put("run", KEYS[0], Payload.of(b"reply"))
    (kept,) = tmp_path.glob("run/*")
    kept.write_bytes(b"other")

    assert ReplyCache(tmp_path).get("run", KEYS[0]) is None


def test_what_a_kill_cut_off_is_gone_at_the_next_start(tmp_path):
    """It was never announced."""
    cut = ReplyCache(tmp_path).path("run", KEYS[0])
    cut.write_bytes(b"half")

    assert ReplyCache(tmp_path).get("run", KEYS[0]) is None
    assert not cut.exists()


def test_old_runs_are_forgotten_but_none_that_goes_on(tmp_path):
    """However old."""
    cache = ReplyCache(tmp_path)
    for number in range(RUNS + 3):
        cache.put(f"run-{number}", KEYS[0], Payload.of(b"reply"))
        os.utime(tmp_path / f"run-{number}", (number, number))

    cache.prune({"run-0"})

    assert sorted(int(home.name[4:]) for home in tmp_path.iterdir()) == [0, *range(3, RUNS + 3)]
    assert cache.get("run-1", KEYS[0]) is None


def test_runs_without_a_reply_are_not_remembered(tmp_path):
    """Their number is the server's to say."""
    cache = ReplyCache(tmp_path)
    for number in range(20):
        assert cache.get(f"{number:032x}", "a" * 64) is None
        cache.prune(set())

    assert len(cache._kept) == 0
