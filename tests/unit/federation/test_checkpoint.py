"""A checkpoint is whole and as written, or refused."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lepton_fl.errors import ConfigError, VerificationFailed
from lepton_fl.federation.checkpoint import Checkpoint
from lepton_fl.tasks.arrays import model_hash

ID = "5" * 64


@pytest.fixture
def checkpoint():
    return Checkpoint(
        study_id=ID,
        context="seed 0",
        run="0" * 32,
        started=7,
        done=6,
        model={"w": np.array([[1.5, -2.0]], np.float32), "b": np.array([0.25], np.float32)},
        strategy={"steps": np.asarray(6), "first/w": np.array([[0.125, 0.5]])},
    )


@pytest.fixture
def path(tmp_path, checkpoint):
    """A file that holds it."""
    checkpoint.write(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def flip(path, place, bit=0):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_a_checkpoint_survives_the_disk(path, checkpoint):
    """Numbers, order of names, and every bit of model and strategy."""
    found = Checkpoint.read(path, study_id=ID, context="seed 0")

    assert (found.run, found.started, found.done) == ("0" * 32, 7, 6)
    assert list(found.model) == ["w", "b"]
    assert model_hash(found.model) == model_hash(checkpoint.model)
    assert model_hash(found.strategy) == model_hash(checkpoint.strategy)


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace"])
def test_a_crash_while_writing_leaves_the_old_one(path, checkpoint, monkeypatch, where):
    """Before the new bytes are on disk, or before they have the name."""

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, crash)
        with pytest.raises(KeyboardInterrupt):
            replace(checkpoint, started=8).write(path)

    assert Checkpoint.read(path, study_id=ID, context="seed 0").started == 7


def test_the_bytes_are_on_disk_before_they_have_the_name(tmp_path, checkpoint, monkeypatch):
    """The other order leaves an empty file after a power cut."""
    calls = []
    sync, rename = os.fsync, Path.replace
    monkeypatch.setattr("os.fsync", lambda handle: (calls.append("sync"), sync(handle)))
    monkeypatch.setattr("pathlib.Path.replace", lambda a, b: (calls.append("name"), rename(a, b)))

    checkpoint.write(tmp_path / "checkpoint")

    assert calls[:2] == ["sync", "name"]


def test_nothing_is_left_beside_it(path):
    """No temporary file survives a write."""
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint"]


def test_another_studys_checkpoint_is_refused(path):
    """Its model is of another promise."""
    with pytest.raises(ConfigError, match="found a checkpoint of study 555555555555, expected 666666666666"):
        Checkpoint.read(path, study_id="6" * 64, context="seed 0")


def test_a_checkpoint_of_another_context_is_refused(path):
    """Another seed holds out other records, which these rounds have trained on."""
    with pytest.raises(ConfigError, match="found a checkpoint of 'seed 0', expected 'seed 1'"):
        Checkpoint.read(path, study_id=ID, context="seed 1")


def test_a_missing_checkpoint_is_refused(tmp_path):
    """Which file, in one line."""
    with pytest.raises(ConfigError, match="cannot be read"):
        Checkpoint.read(tmp_path / "none", study_id=ID, context="seed 0")


@pytest.mark.parametrize("part", [b'"started":"7"', b'"done":"6"', b'"run":"0000'])
def test_a_changed_number_is_refused(path, part):
    """A round number that is too low would be used twice."""
    flip(path, path.read_bytes().index(part) + len(part) - 2)

    with pytest.raises(VerificationFailed):
        Checkpoint.read(path, study_id=ID, context="seed 0")


@pytest.mark.parametrize(
    "value", [np.float32(1.5), np.float64(0.125), np.int64(6)], ids=["w", "first", "steps"]
)
def test_a_changed_array_is_refused(path, value):
    """The optimizer's as well as the model's."""
    flip(path, path.read_bytes().rindex(value.tobytes()))

    with pytest.raises(VerificationFailed):
        Checkpoint.read(path, study_id=ID, context="seed 0")


def test_no_flipped_bit_passes(path):
    """One in each byte of the file."""
    whole = path.read_bytes()
    passed = []
    for place in range(len(whole)):
        flip(path, place, place % 8)
        try:
            Checkpoint.read(path, study_id=ID, context="seed 0")
            passed.append(place)
        except (ConfigError, VerificationFailed):
            pass
        path.write_bytes(whole)

    assert passed == []


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_cut_file_is_refused(path, length):
    """However much of it is left."""
    path.write_bytes(path.read_bytes()[:length])

    with pytest.raises(VerificationFailed):
        Checkpoint.read(path, study_id=ID, context="seed 0")
