"""A file is the old one or the whole new one, and a lock has one holder."""

import os
import stat

import pytest

from lepton_fl.files import lock, write_atomic


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    """A full disk, or a crash before the file has its name."""
    path = tmp_path / "f.json"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(broken, fail)

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_bytes_are_on_disk_before_they_have_the_name(tmp_path, monkeypatch):
    """The other order could leave an empty file under the right name after a power cut."""
    path, at_fsync = tmp_path / "f.json", []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (at_fsync.append(path.exists()), real(handle)))

    write_atomic(path, b"new")

    # The file while it has no name yet, then its folder.
    assert at_fsync == [False, True]
    assert path.read_bytes() == b"new"


def test_a_secret_is_never_readable_by_others(tmp_path):
    """The mode holds from the first byte, whatever the old file's was."""
    path = tmp_path / "key"
    path.write_bytes(b"old")
    path.chmod(0o644)

    write_atomic(path, b"new", mode=0o600)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_secret_is_not_written_through_what_others_have_laid_out(tmp_path):
    """In a folder that is theirs too, under the name that is written first."""
    path, theirs = tmp_path / "key", tmp_path / "theirs"
    (tmp_path / f".key.{os.getpid()}.tmp").symlink_to(theirs)

    write_atomic(path, b"new", mode=0o600)

    assert not theirs.exists()
    assert not path.is_symlink()
    assert path.read_bytes() == b"new"


def test_a_lock_has_one_holder_until_that_lets_go(tmp_path):
    """Whoever comes second gets nothing, also where it has waited."""
    path = tmp_path / "lock"
    first = lock(path)

    assert first is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert lock(path) is None
    assert lock(path, patience=0.1) is None

    os.close(first)
    again = lock(path)
    assert again is not None
    os.close(again)
