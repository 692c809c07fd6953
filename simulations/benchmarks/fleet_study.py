"""What the fleet and secure aggregation add to a study's computing: 200 lock-step rounds with 8 agents.

    python simulations/benchmarks/fleet_study.py > simulations/benchmarks/fleet_study.md

The same study, records, seed and first model four times, policies and ledgers on disk each time: without and
with secure aggregation (whose history is on disk too), by the simulator's process engine (every site in one
process, no transport) and over the fleet, where the server, the run and each agent are processes of their
own, under mutual TLS. Engine and fleet must end with the same model, bit for bit. The machine is shared, so
the processors' time is given beside the clock's.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loopback
from loopback import fleet, spread

SITES, ROUNDS = 8, 200
HIDDEN = (114,)
"""Of an MLP of some 5,000 parameters on the heart records' features."""


def study(rounds: int, *, secure: bool) -> tuple[Any, Any]:
    return loopback.heart(
        SITES,
        train__rounds=rounds,
        model__name="mlp",
        model__hidden=list(HIDDEN),
        privacy__delta=1e-3,
        secure_aggregation__enabled=secure,
        secure_aggregation__min_sites=SITES,
    )


def agent(folder: Path, name: str) -> Any:
    from dataclasses import replace

    from lepton_fl.simulation.run import open_sites
    from lepton_fl.site import client_app
    from lepton_fl.site.history import DiskHistory
    from lepton_fl.site.secure import LSA1

    rounds, secure = (folder / "study").read_text().split()
    made, splits = study(int(rounds), secure=secure == "secure")
    site = open_sites(made, {name: splits[name]}, 0, folder / "sites")[name]
    history = DiskHistory(folder / "sites" / name / "rounds.db")
    site = replace(site, aggregation=LSA1(loopback.member(folder, name, history)))
    site.bench(made)  # a deployed agent, too, has its records at hand before the first round
    return client_app(site)


@dataclass(frozen=True, slots=True)
class Took:
    """Of all rounds of one run."""

    seconds: float
    processor: float
    """Seconds of all processes and cores together; of the fleet's from start to end."""
    model: str
    each: tuple[float, ...] = ()
    """Seconds of each round."""


def in_process(rounds: int, *, secure: bool) -> Took:
    """By the process engine."""
    import torch

    from lepton_fl.simulation.run import prepare
    from lepton_fl.tasks import model_hash

    torch.set_num_threads(1)
    made, splits = study(rounds, secure=secure)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        watch = _Rounds()
        run = prepare(
            made,
            splits,
            0,
            folder=home / "sites",
            checkpoint=home / "checkpoint.safetensors",
            observer=watch,
            engine="process",
        )
        before = _processor(resource.RUSAGE_SELF)
        try:
            run.start()
        finally:
            run.close()
        assert run.federation.done == rounds
        return Took(
            watch.seconds, _processor(resource.RUSAGE_SELF) - before, model_hash(run.federation.model)
        )


class _Rounds:
    """An Observer: the sum of the rounds' own times."""

    seconds = 0.0

    def joined(self, *_: object) -> None: ...

    def round_done(self, report: Any, _: object) -> None:
        assert len(report.sites) == SITES
        self.seconds += report.seconds


def over_the_fleet(rounds: int, *, secure: bool) -> Took:
    from lepton_fl.data import Contract
    from lepton_fl.simulation.run import first_model

    made, splits = study(rounds, secure=secure)
    first = first_model(made, Contract.of(made).width, 0)
    before = _processor(resource.RUSAGE_CHILDREN)
    with fleet(list(splits)) as network:
        (network.folder / "study").write_text(f"{rounds} {'secure' if secure else 'plain'}")
        network.start_agents()
        network.wait()
        found, events = network.run(made, first_model=first)
    assert found["done"] == rounds
    assert all(len(event["sites"]) == SITES for event in events)
    seconds = [event["seconds"] for event in events]
    return Took(sum(seconds), _processor(resource.RUSAGE_CHILDREN) - before, found["model"], tuple(seconds))


def _processor(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def report(given: argparse.Namespace) -> None:
    rounds, repetitions = (5, 1) if given.quick else (ROUNDS, given.repetitions)
    took: dict[tuple[bool, bool], list[Took]] = {(s, f): [] for s in (False, True) for f in (False, True)}
    for _ in range(repetitions):
        for secure in (False, True):
            alone, together = in_process(rounds, secure=secure), over_the_fleet(rounds, secure=secure)
            assert alone.model == together.model, "the fleet made another model than the process engine"
            took[secure, False].append(alone)
            took[secure, True].append(together)
    made, _ = study(rounds, secure=True)
    from lepton_fl.cli.planning import parameters

    print(f"# {rounds} lock-step rounds with {SITES} agents, {parameters(made):,} parameters\n")
    print(
        f"An MLP on the bundled heart records, dealt to {SITES} sites, ledgers on disk; {repetitions} "
        f"repetitions, median [min, max]. {loopback.machine('lepton-fl', 'torch', 'flwr', 'grpcio')}.\n"
    )
    print("| what | without secure aggregation | with | aim |\n|---|---|---|---|")
    rows = [
        ("process engine, one core: seconds", False, "seconds", ""),
        ("the rounds over the fleet: seconds", True, "seconds", "30 with"),
        ("process engine: seconds of a processor", False, "processor", ""),
        (
            f"the fleet, its {SITES + 3} processes' start and end included: seconds of a processor",
            True,
            "processor",
            "",
        ),
    ]
    for what, fleets, name, aim in rows:
        cells = [spread([getattr(t, name) for t in took[s, fleets]], ".1f") for s in (False, True)]
        print(f"| {what} | {cells[0]} | {cells[1]} | {aim} |")
    each = [[x for t in took[secure, True] for x in t.each] for secure in (False, True)]
    cells = [f"{statistics.median(e):.3f}, {loopback.percentile(e, 0.99):.3f}" for e in each]
    print(f"| a round over the fleet, median and p99 | {cells[0]} | {cells[1]} | |")
    print(
        f"\nThe fleet shares {os.cpu_count()} cores; a load average above that is other work on the machine. "
        "Engine and fleet made the same models, bit for bit."
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repetitions", type=int, default=3)


if __name__ == "__main__":
    loopback.main(loopback.Roles(report=report, agent=agent), _arguments)
