"""`budget plan` and the agent's reservation agree: by the same charges, to the last bit of the budget."""

import math
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fl import secure_rounds
from lepton_fl.cli.budgets import budget_at, plan_run
from lepton_fl.config import parse
from lepton_fl.data import Batch, Contract, load_table
from lepton_fl.errors import PolicyRefused
from lepton_fl.messages import CONFIG, JOIN, Assignment, assignment_config, identify, to_record
from lepton_fl.privacy import Charge, Gaussian, Guarantee, Ledger
from lepton_fl.privacy import epsilon as composed
from lepton_fl.secure_rounds import smallest_sum
from lepton_fl.simulation.members import memberships
from lepton_fl.site import Simulated, Site, SiteData, client_app
from lepton_fl.site.approvals import Approvals
from lepton_fl.site.charges import figures_charge, round_charge
from lepton_fl.site.policy import load_policy
from lepton_fl.site.secure import LSA1
from lepton_fl.study import Study
from lepton_fl.tasks import arrays_of, build_model
from lepton_fl.training import SimulationNoise

RUN = "0123456789abcdef" * 2
LOOSE = 50.0


def make_study(noise, min_sites, release) -> Study:
    return parse(
        Study,
        {
            "study": {"name": "heart"},
            "task": {"kind": "binary", "target": "ill"},
            "privacy": {"epsilon": 4.0, "delta": 1e-3, "noise": noise},
            "secure_aggregation": {"enabled": True, "min_sites": min_sites},
            "train": {"rounds": 3, "sample_rate": 0.2, "lr": 0.1, "expected_batch": 10.0},
            "features": {"columns": {"x": {"type": "float", "range": [-1, 1], "identifier": "allow"}}},
            "evaluation": {"release": release} | ({"share": 0.3} if release == "dp" else {}),
        },
        file="study.toml",
    )


def write_policy(home, *, total, per_study, metrics):
    """17 digits: the very float."""
    (home / "policy.toml").write_text(
        f'data = {{ id = "d" }}\nrelease = {{ metrics = "{metrics}" }}\n'
        f"budget = {{ epsilon_total = {total!r}, epsilon_per_study = {per_study!r}, delta_total = 1e-2 }}\n"
        'require = { approval = "auto" }\n'
    )


def agent_takes(home, study, ledger) -> Site[Simulated] | None:
    """The site in `home`, if its app says yes to a run of the study; the ledger alone may say no."""
    _, members = memberships({101: "bank", 102: "clinic", 103: "ward"})
    x_N = np.linspace(-1, 1, 60)
    cells = {"x": [str(x) for x in x_N], "ill": [str(int(x > 0)) for x in x_N]}
    table = load_table(Contract.of(study), [Batch(cells)], source="records.csv")
    site = Site(
        name="bank",
        policy=load_policy(home / "policy.toml"),
        policy_file=str(home / "policy.toml"),
        approvals=Approvals(home / "approvals.jsonl", key=ledger.key),
        load=lambda _: SiteData(train=table, test=table),
        surroundings=Simulated(noise=SimulationNoise(0, "bank"), ledger=ledger),
        aggregation=LSA1(members["bank"]),
    )
    identify(RUN, 1)
    model = to_record(arrays_of(build_model(study, 1, torch.Generator())))
    config = assignment_config(Assignment(study=study, run=RUN, round=0, cohort=()))
    context = Context(run_id=0, node_id=7, node_config={}, state=RecordDict(), run_config={})
    message = Message(RecordDict({CONFIG: config, "arrays": model}), dst_node_id=7, message_type=JOIN)
    if not client_app(site)(message, context).has_error():
        return site
    assert isinstance(site.refusals[-1], PolicyRefused), site.refusals[-1]
    return None


def spend_all(site, study):
    """Every round that the study may charge, and its figures: none of it is refused."""
    bench = site.bench(study)
    event = bench.round_event(smallest_sum(study))
    for number in range(1, study.train.charged_rounds + 1):
        charge = round_charge(study, event, run=RUN, round=number, fingerprint=bench.fingerprint)
        site.ledger.charge(charge, rounds=study.train.charged_rounds, budget=site.budget)
    figures = figures_charge(site.policy, bench.guarantee, run=RUN, fingerprint=bench.fingerprint)
    if figures is not None:
        site.ledger.charge(figures, rounds=1, budget=site.budget)


def needs(home, study, ledger, limit) -> float:
    """The least budget that covers the run: what its charges compose to, at its delta."""
    guarantee, rounds = Guarantee.of(study), study.train.charged_rounds
    event = secure_rounds.round_event(guarantee, coordinates=2, sites=smallest_sum(study))
    figures = figures_charge(load_policy(home / "policy.toml"), guarantee, run=RUN, fingerprint="")
    run = [event.times(rounds), *([] if figures is None else [figures.event])]
    return composed([*ledger.events("d"), *run], 1e-2 if limit == "total" else study.privacy.delta)


@settings(max_examples=10, deadline=None)
@given(
    noise=st.sampled_from(["local", "shared"]),
    min_sites=st.sampled_from([3, 5]),
    release=st.sampled_from(["none", "dp"]),
    metrics=st.sampled_from(["none", "dp"]),
    before=st.sampled_from([0, 2]),
    limit=st.sampled_from(["total", "per_study"]),
    edge=st.sampled_from([-1e-6, -1e-12, "one float less", 0, 1e-12, 1e-6]),
)
def test_a_study_fits_by_the_plan_if_and_only_if_the_agent_takes_it_on(
    noise, min_sites, release, metrics, before, limit, edge
):
    """At the very edge of the budget too; and what was planned is then charged to its last round."""
    study = make_study(noise, min_sites, release)
    with tempfile.TemporaryDirectory() as folder, closing(Ledger(Path(folder) / "ledger.db")) as ledger:
        home = Path(folder)
        write_policy(home, total=LOOSE, per_study=LOOSE, metrics=metrics)
        loose = budget_at(home).policy.ledger_budget("policy.toml")
        for number in range(1, before + 1):
            event = Gaussian(noise_multiplier=2.0, sampling_rate=0.1, steps=3)
            earlier = Charge(
                # An earlier run of the same study: it counts for either limit.
                study=study.id,
                study_name="heart",
                run="e",
                round=number,
                event=event,
                clip=1.0,
                unit="record",
                delta=1e-3,
                fingerprint="f",
            )
            ledger.charge(earlier, rounds=before, budget=loose)
        needed = needs(home, study, ledger, limit)
        edged = math.nextafter(needed, 0.0) if edge == "one float less" else needed * (1 + edge)
        write_policy(home, **{"total": LOOSE, "per_study": LOOSE, limit: edged}, metrics=metrics)

        plan = plan_run(budget_at(home), study)
        site = agent_takes(home, study, ledger)

        # What one run promises is itself within the limit of a study.
        covered = edged >= (max(needed, study.privacy.epsilon) if limit == "per_study" else needed)
        assert (plan.fits, site is not None) == (covered, covered), plan.reason
        if site is not None:
            spend_all(site, study)
