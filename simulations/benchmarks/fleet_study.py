"""What the fleet adds to a study's computing: 200 lock-step rounds of the MLP with 8 agents.

    python simulations/benchmarks/fleet_study.py > simulations/benchmarks/fleet_study.md

The same study, records, seed and first model twice, policies and ledgers on disk both times: by the
simulator's process engine (every site in one process, no transport), whose time is the computing; and over
the fleet, where the server, the run and each agent are processes of their own, under mutual TLS. Both must
end with the same model, bit for bit. The engine uses one core and the fleet all there are, so what the fleet
adds is also given against the computing shared out evenly over the cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import loopback
from loopback import fleet, spread

SITES, ROUNDS = 8, 200


def study(rounds: int) -> tuple[Any, Any]:
    return loopback.heart(
        SITES,
        train__rounds=rounds,
        model__name="mlp",
        privacy__delta=1e-3,
        secure_aggregation__min_sites=SITES,
    )


def agent(folder: Path, name: str) -> Any:
    from lepton_fl.simulation.run import open_sites
    from lepton_fl.site import client_app

    made, splits = study(int((folder / "rounds").read_text()))
    site = open_sites(made, {name: splits[name]}, 0, folder / "sites")[name]
    site.bench(made)  # a deployed agent, too, has its records at hand before the first round
    return client_app(site)


def in_process(rounds: int) -> tuple[float, str]:
    """Seconds of the rounds by the process engine, and the model's hash."""
    import torch

    from lepton_fl.simulation.run import prepare
    from lepton_fl.tasks import model_hash

    torch.set_num_threads(1)
    made, splits = study(rounds)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        watch = _Rounds()
        run = prepare(
            made, splits, 0, folder=home / "sites", checkpoint=home / "checkpoint.safetensors", observer=watch
        )
        try:
            run.start()
        finally:
            run.close()
        assert run.federation.done == rounds
        return watch.seconds, model_hash(run.federation.model)


class _Rounds:
    """An Observer: the sum of the rounds' own times."""

    seconds = 0.0

    def joined(self, *_: object) -> None: ...

    def round_done(self, report: Any, _: object) -> None:
        assert len(report.sites) == SITES
        self.seconds += report.seconds


def over_the_fleet(rounds: int) -> tuple[float, float, str, list[float]]:
    """Seconds of the rounds, and of the whole run; the model's hash; each round's seconds."""
    from lepton_fl.data import Contract
    from lepton_fl.simulation.run import first_model

    made, splits = study(rounds)
    first = first_model(made, Contract.of(made).width, 0)
    with fleet(list(splits)) as network:
        (network.folder / "rounds").write_text(str(rounds))
        network.start_agents()
        network.wait()
        before = time.perf_counter()
        found, events = network.run(made, first_model=first)
        whole = time.perf_counter() - before
    assert found["done"] == rounds
    assert all(len(event["sites"]) == SITES for event in events)
    seconds = [event["seconds"] for event in events]
    return sum(seconds), whole, found["model"], seconds


def report(given: argparse.Namespace) -> None:
    rounds, repetitions = (5, 1) if given.quick else (ROUNDS, given.repetitions)
    computing, fleets, wholes, each = [], [], [], []
    for _ in range(repetitions):
        alone, model = in_process(rounds)
        together, whole, other, seconds = over_the_fleet(rounds)
        assert model == other, "the fleet made another model than the process engine"
        computing.append(alone)
        fleets.append(together)
        wholes.append(whole)
        each += seconds
    cores = os.cpu_count() or 1
    beyond = [together - alone for together, alone in zip(fleets, computing, strict=True)]
    shared = [together - alone / cores for together, alone in zip(fleets, computing, strict=True)]
    print(f"# {rounds} lock-step rounds with {SITES} agents\n")
    print(
        f"MLP-32 on the bundled heart records, dealt to {SITES} sites; {repetitions} repetitions, median "
        f"[min, max]. {loopback.machine('lepton-fl', 'torch', 'flwr', 'grpcio')}.\n"
    )
    print("| what | seconds | aim |\n|---|---|---|")
    print(f"| the computing: process engine, one core | {spread(computing, '.1f')} | |")
    print(f"| the rounds over the fleet | {spread(fleets, '.1f')} | |")
    print(f"| beyond the computing on one core | {spread(beyond, '.1f')} | at most 20 |")
    print(f"| beyond the computing on {cores} cores | {spread(shared, '.1f')} | at most 20 |")
    print(
        "| the whole run over the fleet, its process's start and the judging included | "
        f"{spread(wholes, '.1f')} | |"
    )
    print(
        f"| a round over the fleet, median and p99 | {statistics.median(each):.3f}, "
        f"{loopback.percentile(each, 0.99):.3f} | |"
    )
    print("\nBoth made the same model, bit for bit.")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repetitions", type=int, default=3)


if __name__ == "__main__":
    loopback.main(loopback.Roles(report=report, agent=agent), _arguments)
