"""One simulated run: sites with their policies and ledgers, a server, and the grid between them."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import tomli_w
import torch
from flwr.app import Context, RecordDict
from flwr.serverapp import Grid

from lepton_fl.config import parse
from lepton_fl.data import Table, partition, pool, split
from lepton_fl.errors import ConfigError, DataError
from lepton_fl.federation import Federation, Observer, PublicTable, SecureGrid, server_app
from lepton_fl.files import write_atomic
from lepton_fl.privacy import Guarantee, Ledger, RehearsalLedger
from lepton_fl.results import Engine
from lepton_fl.secagg.errors import Phase
from lepton_fl.simulation.functional import Functional, FunctionalGrid
from lepton_fl.simulation.grid import Drop, InProcessGrid
from lepton_fl.simulation.members import memberships
from lepton_fl.simulation.stacked import Stack
from lepton_fl.site import Policy, Simulated, Site, SiteData, StockFlower, client_app
from lepton_fl.site.approvals import Approvals
from lepton_fl.site.config import files_of
from lepton_fl.site.policy import load_policy
from lepton_fl.site.secure import LSA1
from lepton_fl.study import Study
from lepton_fl.tasks import Arrays, arrays_of, build_model, load_arrays, task_of
from lepton_fl.tasks.metrics import Scored
from lepton_fl.tasks.task import score
from lepton_fl.training import SimulationNoise
from lepton_fl.training.stacked import MEMORY, Unstackable

FIRST_SITE_NODE = 101
"""Node ids of the sites, in order of name."""

log = logging.getLogger(__name__)

R = TypeVar("R", Simulated, StockFlower)
"""Where a rehearsal policy will do: nowhere else but on simulated or public records."""

Splits = Mapping[str, tuple[Table, Table]]
"""Site to (train, test)."""


def split_sites(tables: Mapping[str, Table], study: Study, seed: int) -> dict[str, tuple[Table, Table]]:
    """Each site's table in a training and a held-out part, by the study's rule."""
    return {
        name: split(table, study.evaluation, SimulationNoise(seed, name).key("split"))
        for name, table in sorted(tables.items())
    }


def arrange(tables: Mapping[str, Table], how: str, sites: int | None, seed: int) -> dict[str, Table]:
    """The simulated sites' tables: as they come (`natural`), or put together and cut anew as `how` says."""
    if how == "natural" or sites is None:
        return dict(tables)
    parts = partition(pool(list(tables.values())), how, sites, np.random.default_rng(seed))
    width = len(str(sites))
    return {f"site-{number:0{width}d}": part for number, part in enumerate(parts, start=1)}


def rehearsal_policy(study: Study, data_set: str) -> str:
    """A policy.toml that allows this study and no more, as text; written by the simulator for its sites."""
    privacy = study.privacy
    epsilon, delta = privacy.epsilon or 1.0, privacy.delta or 1e-6
    raw = {
        "data": {"id": data_set},
        "budget": {"epsilon_total": epsilon, "epsilon_per_study": epsilon, "delta_total": delta},
        "require": {
            "secure_aggregation": study.secure_aggregation.enabled,
            "differential_privacy": privacy.noise != "none",
            "min_sites": 1,
            "privacy_units": [privacy.unit],
            "approval": "auto",
        },
        "release": {"metrics": study.evaluation.release, "allow_models": [study.model_name]},
    }
    title = (
        "# Written by the simulator: allows just this study. A real policy is the privacy officer's own.\n"
    )
    return title + tomli_w.dumps(raw)


def open_sites(
    study: Study, splits: Splits, seed: int, folder: Path | None, *, make_policies: bool = True
) -> dict[str, Site[Simulated]]:
    """One `Site` for each table.

    With `folder`, each site has FOLDER/SITE/{policy.toml, ledger.db} there, obeyed and charged; a policy
    that is absent is made, or refused where `make_policies` is false: a folder that somebody named is
    somebody's limits. Without a folder this is a rehearsal: a policy that fits, a ledger that forgets.

    Raises:
        ConfigError: a policy is missing or not understood.
    """
    if folder is None:
        return {
            name: rehearsal_site(
                study,
                name,
                SiteData(train=train, test=test),
                Simulated(noise=SimulationNoise(seed, name), ledger=RehearsalLedger()),
            )
            for name, (train, test) in splits.items()
        }
    sites = {}
    for name, (train, test) in splits.items():
        home = folder / name
        if make_policies:
            home.mkdir(parents=True, exist_ok=True)
        files = files_of(home)
        if make_policies and not files.policy.exists():
            write_atomic(files.policy, rehearsal_policy(study, _data_set(study, name)).encode())
        policy, ledger = load_policy(files.policy), Ledger(files.ledger)
        sites[name] = Site(
            name=name,
            policy=policy,
            policy_file=str(files.policy),
            approvals=Approvals(files.approvals, key=ledger.key),
            load=_loader(SiteData(train=train, test=test)),
            surroundings=Simulated(noise=SimulationNoise(seed, name), ledger=ledger),
        )
    return sites


def rehearsal_site(study: Study, name: str, data: SiteData, surroundings: R) -> Site[R]:
    """A site whose policy allows `study` and no more, and whose records are at hand already."""
    return Site(
        name=name,
        policy=_parse_policy(rehearsal_policy(study, _data_set(study, name))),
        policy_file="rehearsal policy",
        approvals=Approvals(Path(os.devnull), key=None),
        load=_loader(data),
        surroundings=surroundings,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run that can be started, and read whenever it has stopped."""

    federation: Federation
    sites: dict[str, Site[Simulated]]
    grid: Grid
    guarantee: Guarantee
    engine: Engine
    """That trains: `process` too where the model cannot be stacked."""

    def start(self) -> None:
        """Run to the end; `federation` and `sites` hold what there is when it raises."""
        context = Context(run_id=0, node_id=1, node_config={}, state=RecordDict(), run_config={})
        server_app(self.federation)(self.grid, context)

    def close(self) -> None:
        """Close the sites' ledgers."""
        for site in self.sites.values():
            site.ledger.close()


def check_drops(drops: Iterable[Drop], study: Study, splits: Splits) -> None:
    """Refuse drops that could never happen.

    Raises:
        ConfigError: no such site, or no such round.
    """
    rounds, last = study.train.rounds, study.train.charged_rounds
    for drop in drops:
        if drop.site not in splits:
            allowed = f"a site of this run: {', '.join(sorted(splits))}"
            raise ConfigError.at("command line", "--drop", found=drop.site, allowed=allowed)
        if not 1 <= drop.first <= rounds or (drop.last or 0) > last:
            allowed = f"from a round of 1 to {rounds}, to one of at most {last} (spare rounds included)"
            raise ConfigError.at("command line", "--drop", found=str(drop), allowed=allowed)
        if drop.phase is not Phase.ADVERTISE and not study.secure_aggregation.enabled:
            allowed = "a round without a phase: the study has no secure aggregation"
            raise ConfigError.at("command line", "--drop", found=str(drop), allowed=allowed)


def prepare(
    study: Study,
    splits: Splits,
    seed: int,
    *,
    folder: Path | None = None,
    make_policies: bool = True,
    checkpoint: Path | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    public: PublicTable | None = None,
    drops: Iterable[Drop] = (),
    masked: bool = False,
    engine: Engine = "vectorised",
    memory: int = MEMORY,
) -> Run:
    """Everything that one run needs, nothing started.

    `masked`: secure aggregation, where the study has it, is run in full. Else the same integers and the same
    noise are added up in clear: the model is bit by bit the same.

    `engine`: vectorised trains the sites of a round together, in `memory` bytes; process one after another.
    They differ by the rounding of floating point.

    Raises:
        ConfigError: one site's training does not fit in the memory.
        DataError: the sites' tables do not have the same features.
    """
    widths = {train.x_NF.shape[1] for train, _ in splits.values()}
    if len(widths) != 1:
        raise DataError(f"sites: tables of {len(widths)} different widths for one study")
    sites = open_sites(study, splits, seed, folder, make_policies=make_policies)
    # Another seed would hold out other records: those that these rounds have trained on.
    digest = hashlib.sha256("".join(sites[n].bench(study).fingerprint for n in sorted(sites)).encode())
    context = f"seed {seed}, sites {', '.join(sorted(sites))}, data {digest.hexdigest()[:16]}"
    if public is not None:
        context += f", public {public.fingerprint[:16]}"
    nodes = {FIRST_SITE_NODE + i: name for i, name in enumerate(sorted(sites))}
    if resume and checkpoint is not None:
        federation = Federation.resume(
            checkpoint, study=study, sites=nodes, observer=observer, context=context, public=public
        )
    else:
        federation = Federation(
            study=study,
            model=first_model(study, widths.pop(), seed),
            sites=nodes,
            observer=observer,
            checkpoint=checkpoint,
            context=context,
            public=public,
        )
    consortium, members = memberships(nodes)
    how = LSA1 if masked else Functional
    sites = {name: replace(site, aggregation=how(members[name])) for name, site in sites.items()}
    stack = _stack(study, sites, memory) if engine == "vectorised" else None
    if stack is not None:
        sites = {
            name: replace(site, surroundings=replace(site.surroundings, train=stack.trainer(name)))
            for name, site in sites.items()
        }
    inner = InProcessGrid(
        {node: client_app(sites[name]) for node, name in nodes.items()},
        drops={node: [drop for drop in drops if drop.site == name] for node, name in nodes.items()},
        # A machine that is down when a run is resumed does not join it there and then.
        at=federation.started,
    )
    grid: Grid = inner
    if study.secure_aggregation.enabled:
        grid = SecureGrid(inner, lambda: consortium) if masked else FunctionalGrid(inner, consortium)
    return Run(
        federation=federation,
        sites=sites,
        grid=grid,
        guarantee=Guarantee.of(study),
        engine="process" if stack is None else "vectorised",
    )


def _stack(study: Study, sites: Mapping[str, Site[Simulated]], memory: int) -> Stack | None:
    try:
        return Stack(study, sites, memory=memory)
    except Unstackable as error:
        _say(f"model {study.model_name}: {error}; the sites are trained one after another")
        return None


@cache
def _say(text: str) -> None:
    """Once, not for every rehearsal."""
    log.warning("%s", text)


def first_model(study: Study, width: int, seed: int) -> Arrays:
    """The parameters that a simulated run begins with."""
    return arrays_of(build_model(study, width, SimulationNoise(seed, "server").torch("model")))


def write_study(path: Path, study: Study) -> None:
    """Write the frozen study, as it is run."""
    write_atomic(path, tomli_w.dumps(study.model_dump(mode="json", exclude_none=True)).encode())


class Scorer:
    """Scores held-out records with a study's model: the simulator's own eye, which no server has."""

    def __init__(self, study: Study, width: int) -> None:
        self._task = task_of(study)
        self._model = build_model(study, width, torch.Generator())

    def __call__(self, model: Arrays, splits: Splits) -> dict[str, Scored]:
        load_arrays(self._model, model)
        return {
            name: (test.y_N, score(self._model, self._task, test.x_NF)) for name, (_, test) in splits.items()
        }


def mean_metric(values: list[float]) -> float | None:
    """Mean over the sites where the metric is defined."""
    defined = [v for v in values if not np.isnan(v)]
    return float(np.mean(defined)) if defined else None


def _data_set(study: Study, site: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", f"{site}-{study.task.target}")[:64]


def _parse_policy(text: str) -> Policy:
    return parse(Policy, tomllib.loads(text), file="rehearsal policy")


def _loader(data: SiteData) -> Callable[[Study], SiteData]:
    def load(_: Study) -> SiteData:
        return data

    return load
