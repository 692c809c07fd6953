"""`study submit --first-model`: two writes, and what a command that ends between them leaves."""

import pytest
import torch
from safetensors.numpy import load_file, save_file

from lepton_fl.cli.server import open_desk
from lepton_fl.cli.study import study_submit
from lepton_fl.data import Contract
from lepton_fl.fleet.server.studies import Studies
from lepton_fl.study import load_study
from lepton_fl.tasks import arrays_of, build_model, model_hash

STUDY = """
study.name = "s"
task = {kind = "binary", target = "ill"}
privacy = {epsilon = 4.0, delta = 1e-3, noise = "local"}
secure_aggregation = {enabled = false, min_sites = 2}
train = {rounds = 3, sample_rate = 0.2, lr = 0.5, expected_batch = 10.0}
features.columns.x = {type = "float", range = [-1, 1]}
"""


def test_a_submission_that_was_cut_off_leaves_no_model_to_the_next(tmp_path, monkeypatch):
    """The study names one model and a run finds that one, whatever was begun before."""
    config, file = tmp_path / "server.toml", tmp_path / "study.toml"
    config.write_text('[server]\nname = "test"\n')
    file.write_text(STUDY)
    study = load_study(file)
    models = {}
    for name, value in (("first", 1.0), ("second", 2.0)):
        arrays = arrays_of(build_model(study, Contract.of(study).width, torch.Generator()))
        models[name] = {key: array * 0 + array.dtype.type(value) for key, array in arrays.items()}
        save_file(models[name], tmp_path / name)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Studies, "submit", killed)
        with pytest.raises(KeyboardInterrupt):
            study_submit(file, config, tmp_path / "first")
    study_submit(file, config, tmp_path / "second")

    with open_desk(config) as desk:
        digest = desk.studies.find(study.study.name).first_model
        assert digest == model_hash(models["second"])
        assert model_hash(load_file(desk.files.first_model(digest))) == digest
