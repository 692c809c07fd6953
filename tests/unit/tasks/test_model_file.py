"""A file of a model is one of the study's own model, or is refused in one line."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from lepton_fl.data import Contract
from lepton_fl.errors import ConfigError
from lepton_fl.tasks import arrays_of, build_model
from lepton_fl.tasks.model_file import labels_of, read_model, write_model


@pytest.fixture
def study(make_study):
    return make_study()


@pytest.fixture
def model(study):
    return arrays_of(build_model(study, Contract.of(study).width, torch.Generator()))


def test_a_model_is_read_as_it_was_written(tmp_path, study, model):
    """Labels and all."""
    path = tmp_path / "model.safetensors"
    write_model(path, study, model, ["a label"])

    found = read_model(path.read_bytes(), study, file="model")

    assert list(found) == list(model)
    assert all(np.array_equal(found[name], model[name]) for name in model)
    assert labels_of(path.read_bytes()) == "a label"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content[:-1], "cannot be read as a model"),
        (lambda content: b"", "cannot be read as a model"),
        (lambda content: save({"other": np.zeros(3, np.float32)}), "not a model of study"),
        (
            lambda content: save({n: a.astype(np.float64) for n, a in load(content).items()}),
            "not a model of study",
        ),
        (
            lambda content: save({n: np.concatenate([a, a]) for n, a in load(content).items()}),
            "not a model of study",
        ),
    ],
)
def test_what_is_no_model_of_the_study_is_refused(study, model, change, said):
    """Cut off, of other names, of another type, of other shapes."""
    with pytest.raises(ConfigError, match=f"first.safetensors: {said}"):
        read_model(change(save(model)), study, file="first.safetensors")
