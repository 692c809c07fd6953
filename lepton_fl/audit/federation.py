"""A small simulated federation to audit: four sites, their real controls, and a look at what passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from lepton_fl.audit.subject import BATCH
from lepton_fl.config import parse
from lepton_fl.data import Batch, Contract, Table, load_table
from lepton_fl.errors import VerificationFailed
from lepton_fl.federation.grids import SummingGrid, WrappingGrid
from lepton_fl.messages import Assignment
from lepton_fl.privacy.lattice import Lattice
from lepton_fl.secure_rounds import TRAIN_SUM, context_of, digest_of, shared_lattice
from lepton_fl.simulation.members import memberships
from lepton_fl.simulation.run import Run, prepare
from lepton_fl.site.secure import encoded
from lepton_fl.study import Study
from lepton_fl.tasks import Arrays
from lepton_fl.tasks.arrays import size_of
from lepton_fl.training import Noise

SITES = ("ash", "birch", "cedar", "oak")
_ROWS = 60


class Tap(WrappingGrid):
    """Keeps what was asked and what was answered; changes nothing."""

    def __init__(self, inner: Grid) -> None:
        super().__init__(inner)
        self.passed: list[tuple[list[Message], list[Message]]] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        asked = list(messages)
        replies = list(self.inner.send_and_receive(asked, timeout=timeout))
        self.passed.append((asked, replies))
        return replies


class SummingTap(Tap, SummingGrid):
    """A tap round a grid that sums."""


def small_study(*, noise: Literal["local", "shared"], rounds: int, hidden: int) -> Study:
    """Two features, a network with one hidden layer, lock-step; secure aggregation where noise is shared."""
    return parse(
        Study,
        {
            "study": {"name": "audit"},
            "task": {"kind": "binary", "target": "y"},
            "privacy": {"epsilon": 4.0, "delta": 1e-3, "noise": noise},
            "secure_aggregation": {"enabled": noise == "shared"},
            "train": {
                "strategy": "lockstep",
                "rounds": rounds,
                "sample_rate": 0.25,
                "expected_batch": BATCH,
                "lr": 0.1,
            },
            "model": {"name": "mlp", "hidden": [hidden]},
            "features": {
                "columns": {
                    name: {"type": "float", "range": [-1, 1], "identifier": "allow"} for name in ("a", "b")
                }
            },
        },
        file="study of the audit",
    )


def small_run(study: Study, seed: int, *, folder: Path | None = None) -> Run:
    """A run of `study` by four sites; with `folder` on ledgers and with the protocol, else a rehearsal."""
    tables = {name: _table(study, np.random.default_rng([seed, at])) for at, name in enumerate(SITES)}
    splits = {name: (table, table) for name, table in tables.items()}
    # As a deployed site trains.
    return prepare(study, splits, seed, folder=folder, engine="process")


def tapped(run: Run) -> tuple[Run, Tap]:
    """The run with a look at what its loop asks and is told."""
    tap = (SummingTap if isinstance(run.grid, SummingGrid) else Tap)(run.grid)
    return replace(run, grid=tap), tap


def sum_lattice(study: Study, coordinates: int) -> Lattice:
    """The integers of a sum over the four sites."""
    lattice = shared_lattice(study, len(SITES), coordinates)
    if lattice is None:
        raise VerificationFailed("audit: a study with shared noise has no lattice of its sums")
    return lattice


def sum_words(study: Study, model: Arrays) -> Callable[[NDArray[np.float64], Noise], NDArray[np.float64]]:
    """What makes an update the integers that a site would mask, for a sum over the four sites."""
    assignment = Assignment(study=study, run="0" * 32, round=1, cohort=SITES)
    context = context_of(
        study,
        names=SITES,
        run=assignment.run,
        kind=TRAIN_SUM,
        round=assignment.round,
        roster=memberships(dict(enumerate(SITES, start=101)))[0].roster,
        parameters=size_of(model),
        model=digest_of(model),
    )
    return lambda update_L, noise: encoded(update_L, assignment, context, noise).view(np.int32).astype(float)


def _table(study: Study, rng: np.random.Generator) -> Table:
    a_N, b_N = rng.uniform(-1, 1, (2, _ROWS))
    cells = {"a": a_N, "b": b_N, "y": (a_N + b_N > 0).astype(int)}
    batch = Batch({name: [str(value) for value in column] for name, column in cells.items()})
    return load_table(Contract.of(study), [batch], source="records of the audit")
