"""lepton_fl, and plain PyTorch, as they are measured by the speed benchmarks."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import worker
from federation import CLIP, FEWEST, LR, MOST, STEPS, Federation
from models import FEATURES, cifar_cnn, median_norm, model_of, records_of
from numpy.typing import NDArray
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from lepton_fl.config import parse
from lepton_fl.data import Table
from lepton_fl.federation.loop import RoundReport
from lepton_fl.privacy import Guarantee
from lepton_fl.privacy.lattice import Lattice
from lepton_fl.simulation.run import Engine, first_model, prepare
from lepton_fl.study import Study
from lepton_fl.tasks import models, task
from lepton_fl.tasks.arrays import Arrays, arrays_of, flatten, size_of
from lepton_fl.training import LocalPlan, LocalUpdate, SimulationNoise, UnseededNoise, train_locally
from lepton_fl.training.sampling import PoissonSampler
from lepton_fl.training.units import RecordsOfUnits

# A step


def _table(x_NF: NDArray[np.float32], y_N: NDArray[np.float32]) -> Table:
    """Each record a unit; without what only reading, splitting and trees need."""
    rows = len(y_N)
    return Table(
        x_NF=x_NF,
        y_N=y_N,
        unit_N=np.arange(rows),
        units=rows,
        key_U=np.zeros((rows, 16), np.uint8),
        time_N=None,
        raw_NC=np.empty((rows, 0)),
        raw_categorical=(),
        feature_names=(),
    )


class Step:
    """Steps of `train_locally` over one batch: a table of which every step samples all."""

    def __init__(self, case: str, batch: int, noise: float) -> None:
        self.model = model_of(case)
        self.arrays = arrays_of(self.model)
        x_BF, y_B = records_of(case, batch)
        self.table = _table(x_BF.numpy(), y_B.numpy())
        clip = median_norm(self.model, x_BF[:64], y_B[:64])
        self.plan = LocalPlan(
            clip=clip,
            lattice=Lattice.of(
                clip=clip,
                noise_multiplier=noise,
                coordinates=size_of(self.arrays),
                cohort=1,
                shares=1,
                expected_batch=batch,
            )
            if noise
            else None,
            sample_rate=1.0,
            expected_batch=batch,
            steps=1,
            optimizer="sgd",
            lr=1e-3,
        )

    def __call__(self, steps: int) -> LocalUpdate:
        return self.run(replace(self.plan, steps=steps))

    def run(self, plan: LocalPlan) -> LocalUpdate:
        noise = SimulationNoise(0, "benchmark")
        return train_locally(self.model, task.BINARY, self.arrays, self.table, plan, noise, 1)


class PlainStep:
    """Steps of SGD over one batch, without privacy."""

    def __init__(self, case: str, batch: int) -> None:
        self.model = model_of(case)
        self.x_BF, self.y_B = records_of(case, batch)
        self.index_B = torch.arange(batch)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad(set_to_none=True)
            x_BF, y_B = self.x_BF[self.index_B], self.y_B[self.index_B]
            functional.binary_cross_entropy_with_logits(self.model(x_BF), y_B).backward()
            self.optimizer.step()

    def operations(self) -> int:
        """Floating-point operations of the matrix products of a step, forward and backward."""
        with FlopCounterMode(display=False) as counted:
            self(1)
        return int(counted.get_total_flops())


@cache
def _timed(case: str, batch: int, mode: str, noise: float, seconds: float) -> worker.Timed:
    step = PlainStep(case, batch) if mode == "plain" else Step(case, batch, noise)
    return worker.Timed(step, seconds)


def step(case: str, batch: int, mode: str, noise: float, seconds: float) -> dict[str, Any]:
    """CPU and wall seconds of a step, plain or ours."""
    return _timed(case, batch, mode, noise, seconds)()


def clipped(case: str, batch: int, path: str) -> dict[str, Any]:
    """The clipped sum, without noise, written to `path`."""
    ours = Step(case, batch, 0.0)
    update = ours.run(replace(ours.plan, gradient_only=True))
    np.savez(path, **{name: -batch * mean for name, mean in update.delta.items()})
    return {}


def operations(case: str, batch: int) -> dict[str, Any]:
    """Of a plain step."""
    return {"operations": PlainStep(case, batch).operations()}


def gemm(seconds: float) -> dict[str, Any]:
    """Floating-point operations a CPU second of the fastest square product in float32, on one thread."""
    rates = []
    for size in (256, 512, 1024):
        a, b, out = (torch.rand(size, size) for _ in range(3))
        timed = worker.Timed(
            lambda n, a=a, b=b, out=out: [torch.mm(a, b, out=out) for _ in range(n)], seconds
        )
        rates.append(2 * size**3 / timed()["cpu"])
    return {"rate": max(rates)}


def forget() -> dict[str, Any]:
    """Drop what is kept of the cases so far."""
    _timed.cache_clear()
    return {}


# Sampling


class Epoch:
    """Batches of a table by our sampler, as training draws them."""

    def __init__(self, rows: int, features: int, batch: int) -> None:
        self.x_NF, self.y_N = (torch.rand(shape).numpy() for shape in ((rows, features), (rows,)))
        self.records = RecordsOfUnits(np.arange(rows), rows)
        self.rows, self.rate = rows, batch / rows
        self.noise = UnseededNoise()
        self.sampled = self.steps = 0

    def __call__(self, epochs: int) -> None:
        for _ in range(epochs):
            steps = math.ceil(1 / self.rate)
            sampler = PoissonSampler(self.rows, self.rate, self.noise.key("sample"), steps=steps)
            for step in range(steps):
                index_B = self.records.only(sampler.draw(step))
                x_BF, _ = (torch.from_numpy(z.take(index_B, axis=0)) for z in (self.x_NF, self.y_N))
                self.sampled += len(x_BF)
                self.steps += 1


# Simulations


def study(rounds: int, **parts: dict[str, Any]) -> Study:
    """Of the made-up federation, or with other `parts`."""
    raw: dict[str, Any] = {
        "study": {"name": "benchmark"},
        "task": {"kind": "binary", "target": "y"},
        "privacy": {"epsilon": 6.0, "delta": 1e-5, "clip": CLIP, "noise": "local"},
        "secure_aggregation": {"enabled": False},
        "train": {
            "strategy": "fedavg",
            "rounds": rounds,
            "spare_rounds": 0,
            "local_steps": STEPS,
            "sample_rate": 1 / STEPS,
            "expected_batch": (FEWEST + MOST) / 2 / STEPS,
            "optimizer": "sgd",
            "lr": LR,
        },
        "model": {"name": "mlp", "hidden": [64, 32]},
        "features": {"columns": {"x": {"type": "float", "range": [-1, 1]}}},
    }
    return parse(Study, {**raw, **parts}, file="the benchmark's study")


class _Rounds:
    """Says when a round is done."""

    def joined(self, *_: object) -> None: ...

    def round_done(self, report: RoundReport, _: Arrays) -> None:
        assert not report.dropped, report.dropped
        worker.say(round=report.number)


def _run(made: Study, tables: list[Table], engine: Engine) -> Arrays:
    """The model after all rounds, of sites with these records."""
    width = len(str(len(tables)))
    splits = {f"site-{n:0{width}d}": (table, table.subset(np.arange(1))) for n, table in enumerate(tables)}
    run = prepare(made, splits, 0, observer=_Rounds(), engine=engine)
    try:
        run.start()
    finally:
        run.close()
    return run.federation.model


def write_federation(path: str, clients: int, rounds: int) -> dict[str, Any]:
    """The federation of so many clients, for every simulator; the noise is that of our study."""
    made = study(rounds)
    event = Guarantee.of(made).event
    assert event is not None
    Federation.make(
        clients, model_L=flatten(first_model(made, FEATURES, 0)), noise=event.noise_multiplier
    ).write(Path(path))
    return {"noise": event.noise_multiplier}


def simulate(path: str, rounds: int, engine: Engine) -> dict[str, Any]:
    """The federation of the file, with our sites' policies and ledgers, which forget."""
    federation = Federation.read(path)
    tables = [
        _table(*(part.numpy() for part in federation.records(client))) for client in range(federation.clients)
    ]
    model = _run(study(rounds), tables, engine)
    return {"auc": federation.auc(federation.model(flatten(model)))}


def cifar(images: int, cohort: int, batch: int, rounds: int, *, private: bool) -> dict[str, Any]:
    """An epoch of SGD at each of a cohort, as pfl-research has it, or private besides."""
    task._BUILTIN["image"] = task.TaskSpec(
        title="ten classes",
        loss=lambda logit_BC, y_B: functional.cross_entropy(logit_BC, y_B.long(), reduction="sum"),
        score=lambda logit_BC: logit_BC.softmax(1)[:, 0],
    )
    models._BUILTIN["cifar"] = models.ModelSpec(title="pfl's CNN", build=lambda *_: cifar_cnn())
    draws = np.random.default_rng(2)
    tables = [
        _table(
            draws.uniform(-1, 1, size=(images, 3072)).astype(np.float32),
            draws.integers(0, 10, size=images).astype(np.float32),
        )
        for _ in range(cohort)
    ]
    steps = images // batch
    made = study(
        rounds,
        task={"kind": "image", "target": "y"},
        privacy={"epsilon": 6.0, "delta": 1e-5} if private else {"noise": "none"},
        train={
            "strategy": "fedavg",
            "rounds": rounds,
            "local_steps": steps,
            "sample_rate": 1 / steps,
            "expected_batch": batch,
            "optimizer": "sgd",
            "lr": 0.1,
        },
        model={"name": "cifar"},
    )
    _run(made, tables, "vectorised")
    return {}


if __name__ == "__main__":
    worker.serve(
        step=step,
        clipped=clipped,
        operations=operations,
        gemm=gemm,
        forget=forget,
        sampling=worker.sampling(Epoch),
        write_federation=write_federation,
        simulate=simulate,
        cifar=cifar,
    )
