"""The same ServerApp and ClientApp under stock Flower: its SuperLink and SuperNodes, or its Ray engine.

For public data sets only, named by the run config: Flower's server ships the code that the nodes run, so it
could leave out every control of a site, and nothing is promised. What needs secure aggregation is refused.

Flower starts a new process for each message. So nothing is kept between two: a node finds its records and
its policy anew, and its ledger forgets.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from pydantic import Field

from lepton_fl.config import Strict, parse
from lepton_fl.data import Contract, Table, load_dataset
from lepton_fl.errors import ConfigError, LeptonError, TooFewSites
from lepton_fl.federation import Federation
from lepton_fl.federation.loop import RoundReport
from lepton_fl.messages import error_reply, read_assignment
from lepton_fl.privacy import Guarantee, RehearsalLedger
from lepton_fl.simulation.run import (
    Scorer,
    arrange,
    first_model,
    mean_metric,
    rehearsal_site,
    split_sites,
    write_study,
)
from lepton_fl.simulation.simulate import check, freeze
from lepton_fl.site import Site, SiteData, StockFlower, client_app
from lepton_fl.study import Study, load_study, parse_canonical
from lepton_fl.tasks import Arrays
from lepton_fl.tasks.metrics import evaluate
from lepton_fl.tasks.model_file import write_model
from lepton_fl.training import SimulationNoise

log = logging.getLogger(__name__)

NO_CONTROL = "stock Flower: no site control"
"""Label of every model that was made here."""
_FILE = "run config"
_POLL = 1.0


class RunConfig(Strict):
    """`[tool.flwr.app.config]`: whose records, and where the result goes."""

    dataset: str
    """A public data set; one that is fetched must be in the cache of every node."""
    split: str = "natural"
    """natural, or how one table is cut, as `partition` takes it."""
    sites: Annotated[int, Field(ge=1, le=10_000)]
    """How many nodes take part: the natural sites, or into how many the records are cut."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the noise as well: simulation noise."""
    out: str
    """Folder for the runs, each in OUT/RUN_ID; absolute, since Flower chooses where its processes run."""


class PublicClientApp(ClientApp):
    """Flower's ClientApp for the part of a public data set that the node config names by `partition-id`."""

    def __call__(self, message: Message, context: Context) -> Message:
        try:
            if "LEPTON_FL_SITE" in os.environ:
                raise ConfigError(
                    "LEPTON_FL_SITE is set: a site's own table is never opened under stock Flower, whose "
                    "server ships the code",
                    fix="unset LEPTON_FL_SITE; stock Flower is for public data sets",
                    public="stock Flower is for public data sets",
                )
            study = read_assignment(message).study
            config = _read(context)
            app = client_app(_site(config, _partition(config, context), study.canonical, study.id))
        except LeptonError as error:
            # One line for whoever runs the node; the server hears the public part.
            log.warning("refused: %s", error)
            return error_reply(message, error)
        return app(message, context)


def public_server_app(study_file: Path) -> ServerApp:
    """Flower's ServerApp for the study in `study_file`; leaves study, model and checkpoint in OUT/RUN_ID.

    Raises, when it is run:
        ConfigError: the run config is not understood, or the study needs secure aggregation.
        TooFewSites: fewer nodes than sites within the study's deadline, or too few that stay.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        _log_to_console()
        torch.set_num_threads(1)
        study, config = load_study(study_file), _read(context)
        StockFlower.admit(study)
        tables = _tables(study, config)
        study = freeze(study, tables)
        splits = split_sites(tables, study, config.seed)
        check(study, splits)
        _wait_for(grid, len(splits), study.train.deadline)
        out = Path(config.out) / str(context.run_id)
        out.mkdir(parents=True, exist_ok=True)
        write_study(out / "study.toml", study)
        width = Contract.of(study).width
        federation = Federation(
            study=study,
            model=first_model(study, width, config.seed),
            observer=_Progress(study.train.rounds),
            checkpoint=out / "checkpoint.safetensors",
            context=f"{NO_CONTROL}, seed {config.seed}",
        )
        federation.run(grid)
        labels = (*Guarantee.of(study).simulation_labels, NO_CONTROL)
        digest = write_model(out / "model.safetensors", study, federation.model, labels)
        scored = Scorer(study, width)(federation.model, splits)
        mean = mean_metric([evaluate(study.task.metric, *site) for site in scored.values()])
        log.info("%s %.3f, mean of the sites' held-out records", study.task.metric, mean or float("nan"))
        log.info("model %s, sha256 %s", out / "model.safetensors", digest)

    return app


class _Progress:
    """Says how a run goes on, for `flwr run --stream` and `flwr log`."""

    def __init__(self, planned: int) -> None:
        self._planned = planned

    def joined(self, cohort: tuple[str, ...], refused: Mapping[str, str]) -> None:
        log.info("sites: %s; refused: %s", ", ".join(cohort), dict(refused) or "none")

    def round_done(self, report: RoundReport, model: Arrays) -> None:  # noqa: ARG002 - an Observer's form
        said = ", ".join(report.sites) or f"lost: {dict(report.dropped)}"
        if report.returned:
            said += f"; late, or back: {', '.join(report.returned)}"
        log.info("round %d of %d, %.1f s: %s", report.number, self._planned, report.seconds, said)


@lru_cache(maxsize=16)
def _site(config: RunConfig, partition: int, canonical: bytes, study_id: str) -> Site[StockFlower]:
    """One part's site. Flower's Ray engine keeps its processes, and would otherwise prepare it each time."""
    torch.set_num_threads(1)
    study = parse_canonical(canonical, study_id)
    splits = split_sites(_tables(study, config), study, config.seed)
    name = sorted(splits)[partition]
    train, test = splits[name]
    here = StockFlower(noise=SimulationNoise(config.seed, name), ledger=RehearsalLedger())
    return rehearsal_site(study, name, SiteData(train=train, test=test), here)


def _read(context: Context) -> RunConfig:
    config = parse(RunConfig, dict(context.run_config), file=_FILE)
    if not Path(config.out).is_absolute():
        raise ConfigError.at(_FILE, "out", found=config.out, allowed="an absolute path")
    return config


def _partition(config: RunConfig, context: Context) -> int:
    """Which of the sites this node is, from Flower's node config."""
    number, parts = (context.node_config.get(key) for key in ("partition-id", "num-partitions"))
    if not isinstance(number, int) or parts != config.sites or not 0 <= number < config.sites:
        raise ConfigError.at(
            "node config",
            "partition-id of num-partitions",
            found=f"{number} of {parts}",
            allowed=f"0 to {config.sites - 1} of {config.sites}, as the run config's sites",
            fix=f"flower-supernode --node-config 'partition-id=0 num-partitions={config.sites}', or "
            f"flwr run --federation-config num-supernodes={config.sites}",
        )
    return number


def _tables(study: Study, config: RunConfig) -> dict[str, Table]:
    tables = load_dataset(config.dataset, Contract.of(study))
    if config.split == "natural" and len(tables) != config.sites:
        raise ConfigError.at(
            _FILE,
            "sites",
            found=config.sites,
            allowed=f"{len(tables)}, the natural sites of {config.dataset}",
        )
    return arrange(tables, config.split, config.sites, config.seed)


def _wait_for(grid: Grid, sites: int, deadline: float) -> None:
    """Wait until a node for each site is there: a run that began with fewer would give another model."""
    until = time.monotonic() + deadline
    while (found := len(list(grid.get_node_ids()))) < sites:
        if time.monotonic() > until:
            raise TooFewSites(f"{found} nodes are connected, the run config asks {sites}")
        time.sleep(_POLL)


def _log_to_console() -> None:
    """Flower keeps what its apps write to the console."""
    logger = logging.getLogger("lepton_fl")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.propagate = False
    logger.setLevel(logging.INFO)
