"""A clinic with sixty records, its policy, and a server's messages to it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict

from lepton_fl.config import parse
from lepton_fl.data import Batch, Contract, Table, load_table
from lepton_fl.messages import CONFIG, SECAGG, TRAIN, Assignment, assignment_config, identify, to_record
from lepton_fl.privacy import Ledger, RehearsalLedger
from lepton_fl.site import Deployed, Policy, Simulated, Site, SiteData, client_app
from lepton_fl.site.approvals import Approvals
from lepton_fl.study import Study
from lepton_fl.tasks import arrays_of, build_model
from lepton_fl.training import SimulationNoise, UnseededNoise

RUN = "0123456789abcdef" * 2
COHORT = ("bank", "clinic", "ward")
STUDY: dict[str, Any] = {
    "study": {"name": "heart"},
    "task": {"kind": "binary", "target": "ill"},
    "privacy": {"epsilon": 4.0, "delta": 1e-3},
    "secure_aggregation": {"enabled": False},
    "train": {"rounds": 3, "sample_rate": 0.2, "lr": 0.1, "expected_batch": 10.0},
    "features": {"columns": {"x": {"type": "float", "range": [-1, 1], "identifier": "allow"}}},
}
POLICY: dict[str, Any] = {
    "data": {"id": "clinic-records"},
    "budget": {"epsilon_total": 5.0, "epsilon_per_study": 5.0, "delta_total": 1e-2},
    "require": {"secure_aggregation": False, "approval": "auto"},
}


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {key: {**base.get(key, {}), **changes.get(key, {})} for key in [*base, *changes]}


@pytest.fixture(autouse=True)
def _known_to_flower() -> None:
    identify(RUN, 1)


@pytest.fixture
def make_study() -> Callable[..., Study]:
    """The study with keys of these tables changed."""
    return lambda **changes: parse(Study, _merged(STUDY, changes), file="study.toml")


@pytest.fixture
def study(make_study: Callable[..., Study]) -> Study:
    return make_study()


@pytest.fixture
def make_policy() -> Callable[..., Policy]:
    """The policy with keys of these tables changed."""
    return lambda **changes: parse(Policy, _merged(POLICY, changes), file="policy.toml")


@pytest.fixture
def table(study: Study) -> Table:
    x_N = np.random.default_rng(0).uniform(-1, 1, 60)
    cells = {"x": [str(x) for x in x_N], "ill": [str(int(x > 0)) for x in x_N]}
    return load_table(Contract.of(study), [Batch(cells)], source="records.csv")


@pytest.fixture
def make_site(tmp_path, make_policy, table):
    """The clinic, its ledger on disk; `read` lists what it loaded."""
    ledgers = []

    def make(*, deployed=False, in_memory=False, read=None, **policy):
        read = [] if read is None else read
        ledgers.append(RehearsalLedger() if in_memory else Ledger(tmp_path / "ledger.db"))

        def load(study: Study) -> SiteData:
            read.append(study.id)
            return SiteData(train=table, test=table)

        return Site(
            name="clinic",
            policy=make_policy(**policy),
            policy_file="policy.toml",
            approvals=Approvals(tmp_path / "approvals.jsonl", key=ledgers[-1].key),
            load=load,
            surroundings=Deployed(noise=UnseededNoise(), ledger=ledgers[-1])
            if deployed
            else Simulated(noise=SimulationNoise(0, "clinic"), ledger=ledgers[-1]),
        )

    yield make
    for ledger in ledgers:
        ledger.close()


@pytest.fixture
def site(make_site) -> Site:
    return make_site()


@pytest.fixture
def ask(study) -> Callable[..., Message]:
    """Send the site's app one message, and hand back its reply."""

    def run(
        site,
        kind=TRAIN,
        *,
        study=study,
        round=1,
        cohort=("bank", "clinic", "ward"),
        extra=(),
        model=None,
        secure=None,
    ):
        assignment = Assignment(study=study, run=RUN, round=round, cohort=cohort)
        config = assignment_config(assignment)
        config.update(dict(extra))
        model = arrays_of(build_model(study, 1, torch.Generator())) if model is None else model
        content = RecordDict({CONFIG: config, "arrays": to_record(model)})
        if secure is not None:
            content[SECAGG] = secure.record()
        context = Context(run_id=0, node_id=7, node_config={}, state=RecordDict(), run_config={})
        app = client_app(site) if isinstance(site, Site) else site
        return app(Message(content, dst_node_id=7, message_type=kind), context)

    return run


@pytest.fixture
def charged() -> Callable[[Site], list[int]]:
    """The rounds in a site's ledger."""
    return lambda site: [entry["round"] for entry in site.ledger.history(site.budget.data_set)]


@pytest.fixture
def released_by() -> Callable[[Site], tuple[str, ...]]:
    """What left a site without noise, by its ledger."""
    return lambda site: site.ledger.released(site.budget.data_set, run=RUN)
