"""`python -m lepton_fl.cli.demo_agent SITE_TOML SEED`: the agent of a demonstration, without any privacy.

Its noise and its held-out records come from SEED, so that a simulation can be held against it. It is no
command, trains on nothing but bundled public records, and says to the server what it is: only a server with
`insecure_demo = true` lets it in, and what it has had a part in is never promoted.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from lepton_fl.cli.children import end_with_parent
from lepton_fl.cli.terminal import say
from lepton_fl.data import Contract, batches, dealt, load_table, split
from lepton_fl.errors import ConfigError, LeptonError
from lepton_fl.fleet.agent.process import Started, start
from lepton_fl.privacy import Ledger
from lepton_fl.site import Simulated, Site, SiteData
from lepton_fl.site.approvals import Approvals
from lepton_fl.site.config import SiteConfig, files_of, load_site_config
from lepton_fl.site.policy import load_policy
from lepton_fl.site.secure import LSA1, Membership
from lepton_fl.study import Study
from lepton_fl.training import SimulationNoise

DATA_SET = "heart"


def run(site_toml: Path, seed: int) -> None:
    """As `lepton-fl client start`, with seeded noise.

    Raises:
        LeptonError: as there; and the site's records are not those of the bundled data set.
    """

    def opened(path: Path, membership: Membership) -> Site[Simulated]:
        config, files = load_site_config(path), files_of(path)
        torch.set_num_threads(config.runtime.threads)
        noise, policy = SimulationNoise(seed, config.site.id), load_policy(files.policy)
        ledger = Ledger(files.ledger)
        return Site(
            name=config.site.id,
            policy=policy,
            policy_file=str(files.policy),
            approvals=Approvals(files.approvals, key=ledger.key),
            load=_loader(config, path.parent, noise.key("split")),
            aggregation=LSA1(membership),
            surroundings=Simulated(noise=noise, ledger=ledger),
        )

    def show(started: Started) -> None:
        say(f"DEMONSTRATION: noise of {started.site.name} comes from seed {seed}, which is no privacy")

    start(site_toml, show=show, opened=opened, insecure_seed=True)


def _loader(config: SiteConfig, home: Path, key: bytes) -> Callable[[Study], SiteData]:
    def load(study: Study) -> SiteData:
        contract, path = Contract.of(study), home / (config.data.source or "")
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        known = {(*names, *row) for _, names, part in dealt(DATA_SET, None) for row in part}
        if not all((*header, *row) in known for row in rows):
            raise ConfigError(
                f"{path}: holds what is not in the public data set {DATA_SET}; a known seed protects nobody",
                public="the site's records are not public",
            )
        table = load_table(contract, batches(header, rows, contract, source=str(path)), source=str(path))
        train, test = split(table, study.evaluation, key)
        return SiteData(train=train, test=test)

    return load


if __name__ == "__main__":
    end_with_parent()
    try:
        run(Path(sys.argv[1]), int(sys.argv[2]))
    except LeptonError as error:
        say(f"lepton-fl: {error}")
        sys.exit(error.exit_code)
