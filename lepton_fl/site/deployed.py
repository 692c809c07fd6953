"""A site as its institution configured it: site.toml, policy.toml, the ledger and its own table."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from lepton_fl.data import Contract, load_table, split
from lepton_fl.errors import ConfigError
from lepton_fl.files import write_atomic
from lepton_fl.privacy import Ledger
from lepton_fl.site.approvals import Approvals
from lepton_fl.site.config import SiteConfig, files_of, load_site_config
from lepton_fl.site.policy import load_policy
from lepton_fl.site.secure import LSA1, Membership, NoAggregation
from lepton_fl.site.site import Deployed, Site, SiteData
from lepton_fl.study import Study
from lepton_fl.training.device import choose_device
from lepton_fl.training.noise import UnseededNoise


def open_site(path: Path, membership: Membership | None = None) -> Site[Deployed]:
    """The site that `site.toml` at `path` describes, with its policy read and its ledger open.

    In secure rounds it is who `membership` says, whose history must be on disk; without one it refuses them.

    Raises:
        ConfigError: site.toml or policy.toml is missing or not understood, the device that it names is not
            there, or the ledger cannot be opened. A site without all of them refuses everything.
    """
    config = load_site_config(path)
    torch.set_num_threads(config.runtime.threads)
    device = choose_device(config.runtime.device, file=str(path)).torch
    files = files_of(path)
    load = _loader(config, path.parent, _split_key(files.split_key))
    policy = load_policy(files.policy)
    # Last: whatever is refused before leaves nothing open.
    ledger = Ledger(files.ledger)
    return Site(
        name=config.site.id,
        policy=policy,
        policy_file=str(files.policy),
        approvals=Approvals(files.approvals, key=ledger.key),
        load=load,
        device=device,
        aggregation=NoAggregation() if membership is None else LSA1(membership),
        surroundings=Deployed(noise=UnseededNoise(), ledger=ledger),
    )


def _loader(config: SiteConfig, home: Path, key: bytes) -> Callable[[Study], SiteData]:
    def load(study: Study) -> SiteData:
        contract = Contract.of(study)
        table = load_table(
            contract,
            config.open_batches(contract, home),
            source=str(config.data.at(home)),
            raw=False,  # Only a simulation's baselines read the numbers as they came.
            room=config.room(home),
        )
        train, test = split(table, study.evaluation, key)
        return SiteData(train=train, test=test)

    return load


def _split_key(path: Path) -> bytes:
    """The site's own key that says which units are held out, made where there is none.

    One for all studies and for good: a unit must not be held out in one run and trained on in the next, or
    the held-out part would judge what it has taught. Where a record is its own unit it is known by the
    columns that a study reads, so a study of other columns draws it anew.

    Raises:
        ConfigError: it cannot be read or made, or is not 32 bytes.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_atomic(path, os.urandom(32), mode=0o600)
        key = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: the site's split key cannot be used: {error.strerror}") from None
    if len(key) != 32:
        raise ConfigError(f"{path}: found {len(key)} bytes, the site's split key has 32")
    return key
