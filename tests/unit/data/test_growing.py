"""Arrays beyond their room lie in files that have no name, and hold the same."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from lepton_fl.data import Batch, Room, load_table
from lepton_fl.data.growing import Growing
from lepton_fl.errors import ConfigError, DataError


@pytest.fixture
def blocks():
    """Rows of three arrays, in batches; one of them has no columns."""
    rng = np.random.default_rng(1)
    return [
        {
            "x": rng.random((rows, 3)).astype(np.float32),
            "y": rng.random(rows),
            "none": np.empty((rows, 0)),
        }
        for rows in (5, 0, 1, 7)
    ]


def grown(blocks, room):
    with Growing(room) as growing:
        for block in blocks:
            growing.add(**block)
        return growing.arrays()


@pytest.mark.parametrize("memory", [0, 40, 150, 10**6])
def test_what_is_added_comes_back(blocks, tmp_path, memory):
    """In order and bit for bit, however little fits in memory."""
    found = grown(blocks, Room(memory=memory, folder=tmp_path))

    for name in ("x", "y", "none"):
        np.testing.assert_array_equal(found[name], np.concatenate([block[name] for block in blocks]))
        assert found[name].dtype == blocks[0][name].dtype


def test_nothing_is_left_in_the_folder(blocks, tmp_path):
    """Not even while the arrays are in use: a crash leaves no records."""
    found = grown(blocks, Room(memory=0, folder=tmp_path))

    assert list(tmp_path.iterdir()) == []
    assert len(found["x"]) == 13


def test_the_files_are_the_owners_only(blocks, tmp_path):
    """Whoever could read them would read records."""
    with Growing(Room(memory=0, folder=tmp_path)) as growing:
        growing.add(**blocks[0])
        modes = [os.fstat(file.fileno()).st_mode & 0o777 for file in growing._files.values()]

    assert set(modes) == {0o600}


def test_torch_takes_mapped_arrays(blocks, tmp_path):
    """Without a warning, which torch gives of arrays that it could not write to."""
    found = grown(blocks, Room(memory=0, folder=tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = torch.from_numpy(found["x"])[torch.tensor([12, 0])]

    assert rows.shape == (2, 3)
    assert type(found["x"]) is np.ndarray


def test_a_folder_that_is_not_there_is_refused(blocks, tmp_path):
    """With the key that names another."""
    with pytest.raises(ConfigError, match=r"No such file.*\[runtime\] scratch"):
        grown(blocks, Room(memory=0, folder=tmp_path / "none"))


def test_a_refused_table_closes_its_files(contract, tmp_path):
    """What was written of it is gone at once."""
    batch = Batch({"age": ["x"], "cp": ["1"], "chol": ["90"], "ill": ["1"]})
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(DataError):
        load_table(contract, [batch], source="test", room=Room(memory=0, folder=tmp_path))

    assert len(list(Path("/proc/self/fd").iterdir())) == before
