"""A run over the four hospitals of the heart-disease data, with one of everything.

Switzerland's held-out records are of one class, Long Beach loses by joining, Cleveland gains nothing
for certain, Hungary gains and released a metric without noise, three rounds lost a site and one was lost.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lepton_fl.results import Results, read_results


@pytest.fixture
def hospitals() -> Results:
    return read_results(Path(__file__).with_name("hospitals.json"))


@pytest.fixture
def old(hospitals: Results) -> Results:
    """The same run as a results file from before `linear`, `own_best`, paired gains and all scores."""
    raw = json.loads(hospitals.model_dump_json())
    raw["arms"] = [arm for arm in raw["arms"] if arm["arm"] != "linear"]
    for site in raw["sites"]:
        del site["own_best"], site["gain"]
    for arm in raw["arms"]:
        del arm["all_records"], arm["recall"], arm["first_seed"]
    del raw["gain"], raw["operating_point"], raw["operating_point_agreed"], raw["data_sha256"]
    return Results.model_validate_json(json.dumps(raw))


@pytest.fixture
def hostile(hospitals: Results) -> Results:
    """Study, site and every other free text try to be a script."""
    evil = "<script>alert(1)</script>"
    text = hospitals.model_dump_json().replace("long-beach", evil)
    return Results.model_validate_json(text).model_copy(
        update={
            "study_name": evil,
            "purpose": evil,
            "verdict": evil,
            "labels": (evil,),
            "run_id": evil,
            "command": evil,
            "hardware": evil,
            "versions": {evil: evil},
        }
    )
