"""Plug-ins are found once a process."""

from importlib import metadata

import torch

from lepton_fl.tasks import build_model, registry, task_of


def test_many_sites_look_up_the_installed_packages_once(make_study, monkeypatch):
    """For each kind of plug-in: a look opens the metadata of every package."""
    looks = []

    def look(*, group):
        looks.append(group)
        return metadata.entry_points(group=group)

    monkeypatch.setattr(registry, "entry_points", look)
    study = make_study()
    for _ in range(5):
        build_model(study, 3, torch.Generator())
        task_of(study)

    assert sorted(looks) == ["lepton_fl.models", "lepton_fl.tasks"]
