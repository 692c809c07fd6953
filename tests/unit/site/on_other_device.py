"""A round of a whole agent whose models lie on another device; run by tests/device/test_other_device.py."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import other_device
import torch

from lepton_fl.messages import EVALUATE, METRICS, from_record
from lepton_fl.tasks import arrays_of, build_model

other_device.load(Path(os.environ["OTHER_DEVICE"]))


def test_a_site_answers_what_it_answers_on_the_cpu(make_site, study, ask):
    """Policy, ledger, training and evaluation: replies are alike, and the model lies where the site says."""
    exact = {"release": {"metrics": "exact"}}
    here, there = make_site(in_memory=True, **exact), make_site(in_memory=True, **exact)
    there = replace(there, device=torch.device("other", 0))
    other_device.counts()
    start = arrays_of(build_model(study, 1, torch.Generator()))
    model = {name: array + 0.5 for name, array in start.items()}

    updates = [from_record(ask(site).content.array_records["arrays"]) for site in (here, there)]
    scores = [ask(site, EVALUATE, model=model).content.metric_records[METRICS] for site in (here, there)]

    assert any(array.any() for array in updates[0].values())
    for name, array in updates[0].items():
        np.testing.assert_array_equal(array, updates[1][name])
    assert dict(scores[0]) == dict(scores[1])
    assert {p.device.type for p in there.bench(study).model.parameters()} == {"other"}
    assert other_device.counts()["copies from the CPU"] > 0
    charges = [[{**row, "at": ""} for row in site.ledger.history("clinic-records")] for site in (here, there)]
    assert charges[0] == charges[1]
