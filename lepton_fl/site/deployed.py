"""A site as its institution configured it: site.toml, policy.toml, the ledger and its own table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from lepton_fl.data import Contract, load_table, read_csv, split
from lepton_fl.privacy import Ledger
from lepton_fl.site.config import SiteConfig, load_site_config
from lepton_fl.site.policy import Approvals, load_policy
from lepton_fl.site.site import Deployed, Site, SiteData
from lepton_fl.study import Study
from lepton_fl.training.noise import SimulationNoise

SPLIT_SEED = 0
"""Of the held-out part. Not a secret, and fixed: a record must not be held out in one run and trained on
in the next, or the held-out part would judge what it has taught."""


def open_site(path: Path) -> Site:
    """The site that `site.toml` at `path` describes, with its policy read and its ledger open.

    Noise still comes from torch's generator, seeded by the operating system: simulation noise, which is
    why this release is not for real records.

    Raises:
        ConfigError: site.toml or policy.toml is missing or not understood, or the ledger cannot be opened.
            A site without all three refuses everything.
    """
    config = load_site_config(path)
    home = path.parent
    policy_file, state = home / config.site.policy, home / config.site.state
    return Site(
        name=config.site.id,
        policy=load_policy(policy_file),
        policy_file=str(policy_file),
        ledger=Ledger(state / "ledger.db"),
        approvals=Approvals(state / "approvals.jsonl"),
        load=_loader(config, home),
        noise=SimulationNoise.unseeded(config.site.id),
        surroundings=Deployed(),
    )


def _loader(config: SiteConfig, home: Path) -> Callable[[Study], SiteData]:
    def load(study: Study) -> SiteData:
        contract, source = Contract.of(study), home / config.data.source
        batches = read_csv(source, contract, columns=config.data.columns, delimiter=config.data.delimiter)
        table = load_table(contract, batches, source=str(source))
        train, test = split(table, study.evaluation, np.random.default_rng(SPLIT_SEED))
        return SiteData(train=train, test=test)

    return load
