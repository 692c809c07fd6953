"""What torch.compile, bfloat16, more threads and another malloc would give the private step on a CPU.

    python simulations/benchmarks/compiled.py > simulations/benchmarks/compiled.md

The clipped sum of a batch, without noise, and a step of plain SGD. Compiled is the graph of one block
(forward, backward, norms, clip weights, float64 sums), traced by make_fx and given to inductor: once with an
empty cache folder, once more in a new process from what the first left there. Every case has a process of its
own, and in it ways take turns. Needs a C++ compiler. Blocks are the product's, but for chunks of a block,
which are not unrolled in a graph.

At --case NAME, --batch N, --part NAME: only these.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import loopback
import torch
from models import CASES, median_norm, model_of, records_of
from peer_ours import PlainStep
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.stateless import _reparametrize_module
from worker import Timed

from lepton_fl.tasks import task
from lepton_fl.training import bookkeeping, layers
from lepton_fl.training.bookkeeping import Bookkeeper, ClippedSum
from lepton_fl.training.layers import Factor, Recorder, Tape

BATCHES = (256, 4096)
REPETITIONS = 5
SECONDS = 0.3
"""That a measurement takes, or one sum if that is longer."""
PATIENCE = 600
"""Seconds that one process may take."""
TRIED = 8
"""Rows whose gradients are compared in other places."""
ROWS = (256, 512, 1024, 2048, 4096)
QUICK = "LEPTON_FL_BENCHMARK_QUICK"
"""In the environment of a process that measures only to show that it runs."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

Compiled = Callable[..., Sequence[Tensor]]


class Sum:
    """The clipped sum of a whole batch of single records, as the product takes it."""

    def __init__(self, case: str, batch: int, rows: int | None = None) -> None:
        self.model = model_of(case)
        self.x_BF, self.y_B = records_of(case, batch)
        self.clip = median_norm(self.model, self.x_BF[:64], self.y_B[:64])
        like = self.x_BF, self.y_B
        if rows is None:
            self.book = Bookkeeper.of(self.model, task.BINARY, like=like, expected=batch)
        else:
            self.book = Bookkeeper(self.model, task.BINARY, rows)
        self.index_B, self.weight_B = torch.arange(batch), torch.ones(batch, dtype=torch.float64)

    def once(self) -> Tensor:
        clipped = ClippedSum(self.book, self.clip)
        return clipped(self.x_BF, self.y_B, self.index_B, self.index_B, self.weight_B, len(self.index_B))

    def __call__(self, times: int) -> None:
        for _ in range(times):
            self.once()


class Graph:
    """One block of it as a function of tensors alone: its sum, squared norms, and bounds on them."""

    def __init__(self, of: Sum) -> None:
        self.of, self.rows = of, of.book.rows
        self.parameters = [p.detach() for p in of.model.parameters()]
        names = [name for name, _ in of.model.named_parameters()]
        model = copy.deepcopy(of.model)
        recorder = Recorder(model)

        def block(x_MF: Tensor, y_M: Tensor, weight_M: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
            where, at = {}, 0
            for p in parameters:
                where[id(p)] = slice(at, at + p.numel())
                at += p.numel()
            tape, given = Tape(where, of.book.padded), dict(zip(names, parameters, strict=True))
            with recorder.onto(tape), torch.enable_grad(), _reparametrize_module(model, given):
                factors = tape.factors(task.BINARY.loss(model(x_MF), y_M))
            with torch.no_grad():
                square_M, bound_M = bookkeeping.norms(factors)
                # What is not finite the caller sees by the bounds, and does again in the usual way.
                own_M = weight_M.square()
                clip_M = bookkeeping.clip_weights(square_M * own_M, bound_M * own_M, of.clip)
                parts = [part for factor in factors for part in factor.summed(weight_M * clip_M)]
                return torch.cat([p for _, p in sorted(parts, key=lambda q: q[0].start)]), square_M, bound_M

        self.block = block

    def inputs(self) -> Iterator[list[Tensor]]:
        """Of each block of the batch, gathered anew."""
        for index_C in self.of.index_B.split(self.rows):
            x_MF = self.of.x_BF.new_zeros(self.rows, *self.of.x_BF.shape[1:])
            y_M, weight_M = self.of.y_B.new_zeros(self.rows), torch.zeros(self.rows, dtype=torch.float64)
            x_MF[: len(index_C)], y_M[: len(index_C)] = self.of.x_BF[index_C], self.of.y_B[index_C]
            weight_M[: len(index_C)] = self.of.weight_B[index_C]
            yield [x_MF, y_M, weight_M, *self.parameters]

    def traced(self) -> torch.fx.GraphModule:
        at_once, layers.HELD_AT_ONCE = layers.HELD_AT_ONCE, 1 << 62
        try:
            return make_fx(self.block)(*next(self.inputs()))
        finally:
            layers.HELD_AT_ONCE = at_once

    def sum_by(self, run: Compiled) -> Tensor:
        total_L = torch.zeros(self.of.book.size, dtype=torch.float64)
        with torch.no_grad():
            for given in self.inputs():
                part_L, _, bound_M = run(*given)
                assert bool(torch.isfinite(bound_M).all())
                total_L += part_L
        return total_L

    def rows_alike(self, run: Compiled) -> bool:
        """Whether norms, and the sum of one row alone, are the same bit by bit in other places."""
        draws = torch.Generator().manual_seed(3)
        x_MF = torch.rand(self.rows, self.of.x_BF.shape[1], generator=draws) * 2 - 1
        y_M = torch.randint(0, 2, (self.rows,), generator=draws).float()
        order_M = torch.randperm(self.rows, generator=draws)
        moved = order_M[: self.rows // 2 + 1]
        other_MF, other_M = torch.rand(x_MF.shape, generator=draws), 1 - y_M
        other_MF[moved], other_M[moved] = x_MF[: len(moved)], y_M[: len(moved)]
        for n in range(TRIED):
            here = run(x_MF, y_M, self._alone(n), *self.parameters)
            there = run(other_MF, other_M, self._alone(int(moved[n])), *self.parameters)
            same = (torch.equal(a[: len(moved)], b[moved]) for a, b in zip(here[1:], there[1:], strict=True))
            if not (torch.equal(here[0], there[0]) and all(same)):
                return False
        return True

    def _alone(self, row: int) -> Tensor:
        return (torch.arange(self.rows) == row).double()


def _turns(ways: dict[Any, Callable[[int], object]]) -> dict[Any, list[dict[str, float]]]:
    """Of each way, the measurements, which take turns."""
    repetitions, seconds = (2, 0.01) if os.environ.get(QUICK) else (REPETITIONS, SECONDS)
    timed = {way: Timed(run, seconds) for way, run in ways.items()}
    turns = [{way: timer() for way, timer in timed.items()} for _ in range(repetitions)]
    return {way: [turn[way] for turn in turns] for way in ways}


def _apart(found_L: Tensor, of_L: Tensor) -> float:
    return float((found_L - of_L).norm() / of_L.norm())


def _repeated(once: Callable[[], object]) -> Callable[[int], None]:
    def run(times: int) -> None:
        for _ in range(times):
            once()

    return run


def _cpu() -> float:
    """Of this process and of the compilers that it started."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


class CompiledPlain(PlainStep):
    """A plain step whose model and loss are compiled, the usual way."""

    def __init__(self, case: str, batch: int) -> None:
        super().__init__(case, batch)
        self.model = torch.compile(self.model)


def compiled(case: str, batch: int, *, timed: bool) -> dict[str, Any]:
    """Seconds to compile; and those of a sum, each way, if `timed`."""
    ours = Sum(case, batch)
    graph = Graph(ours)
    eager_L = ours.once()
    cpu, wall = _cpu(), time.perf_counter()
    traced = graph.traced()
    inductor: Compiled = torch._inductor.compile(traced, next(graph.inputs()))
    found_L = graph.sum_by(inductor)
    said: dict[str, Any] = {"cpu": _cpu() - cpu, "wall": time.perf_counter() - wall, "rows": graph.rows}
    said |= {"nodes": len(traced.graph.nodes), "apart": _apart(found_L, eager_L)}
    assert found_L.dtype == torch.float64
    if timed:
        with torch.no_grad():
            said["alike"] = graph.rows_alike(inductor)
        said["ways"] = _turns(
            {
                "plain": PlainStep(case, batch),
                "plain, compiled": CompiledPlain(case, batch),
                "ours": ours,
                "ours, graph": _repeated(lambda: graph.sum_by(traced)),
                "ours, compiled": _repeated(lambda: graph.sum_by(inductor)),
            }
        )
    return said


@contextmanager
def _bfloat16(book: Bookkeeper) -> Iterator[None]:
    """The forward pass in it; factors in float32 again."""
    usual = book.factors

    def factors(x_BF: Tensor, y_B: Tensor) -> list[Factor]:
        with torch.autocast("cpu", torch.bfloat16):
            return usual(x_BF, y_B)

    vars(book)["factors"] = factors
    try:
        yield
    finally:
        del vars(book)["factors"]


def bfloat16(case: str, batch: int) -> dict[str, Any]:
    """A sum with the forward pass in bfloat16."""
    ours = Sum(case, batch)
    exact_L = ours.once()

    def once() -> Tensor:
        with _bfloat16(ours.book):
            return ours.once()

    apart = _apart(once(), exact_L)
    return {"apart": apart, "ways": _turns({"float32": ours, "bfloat16": _repeated(once)})}


def memory(case: str, batch: int, *, kept: bool) -> dict[str, Any]:
    """A sum in blocks of several numbers of rows; and what the kernel does for it."""
    if kept:
        libc = ctypes.CDLL(None)
        for which in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            assert libc.mallopt(which, 1 << 30) == 1
    said = {}
    sums = {rows: Sum(case, batch, rows) for rows in ROWS}
    for rows, measured in _turns({**sums}).items():
        before = resource.getrusage(resource.RUSAGE_SELF)
        sums[rows](10)
        after = resource.getrusage(resource.RUSAGE_SELF)
        faults, system = after.ru_minflt - before.ru_minflt, after.ru_stime - before.ru_stime
        said[str(rows)] = {"measured": measured, "faults": faults / 10, "system": system / 10}
    return {"rows": said, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def threads(case: str, batch: int) -> dict[str, Any]:
    """A sum by one thread and by two, in turn."""

    def by(count: int) -> Callable[[int], None]:
        ours = Sum(case, batch)

        def run(times: int) -> None:
            torch.set_num_threads(count)
            ours(times)

        return run

    return {"ways": _turns({"1": by(1), "2": by(2)})}


def simulated(clients: int) -> dict[str, Any]:
    """A round of the vectorised simulator by one thread and by two, in turn."""
    import peer_ours
    import worker

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "federation.npz")
        peer_ours.write_federation(path, clients, REPETITIONS + 1)
        ways: dict[str, list[dict[str, float]]] = {}
        for count in (1, 2, 1, 2):
            torch.set_num_threads(count)
            at: list[tuple[float, float]] = []
            worker.say = lambda at=at, **_: at.append((time.process_time(), time.perf_counter()))
            peer_ours.simulate(path, REPETITIONS + 1, "vectorised")
            pairs = itertools.pairwise(at)
            ways.setdefault(str(count), []).extend(
                {"cpu": b[0] - a[0], "wall": b[1] - a[1]} for a, b in pairs
            )
    return {"ways": ways}


MEASURED = {f.__name__: f for f in (compiled, bfloat16, memory, threads, simulated)}


# The side that asks


def ask(do: str, cache: str | None = None, **how: Any) -> dict[str, Any] | None:
    """What a process of its own says; None, and a word to stderr, where it cannot or takes too long."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": cache or folder,
            # So that compilers are children of the process, and their time is counted.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        command = [sys.executable, __file__, "--measure", json.dumps({"do": do, **how})]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, timeout=PATIENCE, check=False
            )
        except subprocess.TimeoutExpired:
            print(f"{do}, {how}: not within {PATIENCE} s", file=sys.stderr)
            return None
        if done.returncode:
            print(f"{do}, {how}: {done.stderr.decode().strip().splitlines()[-1]}", file=sys.stderr)
            return None
        said: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
        return said


def _ms(measured: list[dict[str, float]], which: str = "cpu") -> str:
    return f"{1e3 * statistics.median(m[which] for m in measured):.3g}"


def _over(ways: dict[str, list[dict[str, float]]], one: str, other: str, which: str = "cpu") -> str:
    """Of each turn, how many times as long `one` takes: median [min, max]."""
    pairs = zip(ways[one], ways[other], strict=True)
    return loopback.spread([a[which] / b[which] for a, b in pairs], ".2f")


def _table(*columns: str) -> None:
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)


def _row(*cells: object) -> None:
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def report_compiled(case: str, batch: int) -> None:
    with tempfile.TemporaryDirectory() as cache:
        first = ask("compiled", cache, case=case, batch=batch, timed=False)
        written = [p for p in Path(cache).rglob("*") if p.is_file()]
        size = sum(p.stat().st_size for p in written) / 1e6
        again = first and ask("compiled", cache, case=case, batch=batch, timed=True)
    title = CASES[case].title
    if not first or not again:
        _row(title, batch, *["no"] * 13)
        return
    ways = again["ways"]
    _row(
        title,
        batch,
        again["rows"],
        again["nodes"],
        *(_ms(ways[way]) for way in ways),
        _over(ways, "ours", "ours, compiled"),
        _over(ways, "plain", "plain, compiled"),
        f"{first['wall']:.0f} / {first['cpu']:.0f}",
        f"{again['wall']:.1f}",
        f"{len(written)}, {size:.1f} MB",
        "yes" if again["alike"] else "no",
        f"{again['apart']:.0e}",
    )


def report_bfloat16(case: str, batch: int) -> None:
    said = ask("bfloat16", case=case, batch=batch)
    if said is None:
        _row(CASES[case].title, batch, *["no"] * 4)
        return
    ways = said["ways"]
    ratio = _over(ways, "bfloat16", "float32")
    _row(CASES[case].title, batch, _ms(ways["float32"]), _ms(ways["bfloat16"]), ratio, f"{said['apart']:.1e}")


def report_memory(case: str, batch: int) -> None:
    for kept in (False, True):
        said = ask("memory", case=case, batch=batch, kept=kept)
        if said is not None:
            cells = (
                f"{_ms(r['measured'])} ({r['faults']:.0f}, {1e3 * r['system']:.0f})"
                for r in said["rows"].values()
            )
            _row(CASES[case].title, "kept" if kept else "usual", *cells, f"{said['peak']:.0f}")


def report_threads(title: str, batch: object, said: dict[str, Any] | None) -> None:
    if said is not None:
        ways = said["ways"]
        times = (f"{_ms(ways[n])} / {_ms(ways[n], 'wall')}" for n in ("1", "2"))
        _row(title, batch, *times, *(_over(ways, "2", "1", which) for which in ("cpu", "wall")))


def report(chosen: argparse.Namespace) -> None:
    cases = [case for case in CASES if case != "linear"] if chosen.case is None else [chosen.case]
    batches = BATCHES if chosen.batch is None else (chosen.batch,)
    both = [(case, batch) for batch in batches for case in cases]
    parts = ("compiled", "bfloat16", "memory", "threads") if chosen.part is None else (chosen.part,)
    print("# Compiled, in bfloat16, in other blocks, on more threads\n")
    if "compiled" in parts:
        print("## Compiled")
        _table(
            *("model", "batch", "rows", "nodes", "plain, ms", "plain, compiled", "ours", "ours, graph"),
            *("ours, compiled", "ours over compiled", "plain over compiled"),
            *("first compilation, s wall / CPU", "from its cache, s", "files", "rows alike", "apart"),
        )
        for case, batch in both:
            report_compiled(case, batch)
    if "bfloat16" in parts:
        print("\n## A forward pass in bfloat16")
        _table("model", "batch", "float32, ms", "bfloat16", "bfloat16 over float32", "apart")
        for case, batch in both:
            report_bfloat16(case, batch)
    if "memory" in parts:
        print("\n## Rows of a block, and memory that is kept, at 4,096")
        _table("model", "malloc", *(f"{rows} rows" for rows in ROWS), "peak, MB")
        for case in cases[:2]:
            report_memory(case, 4096)
    if "threads" in parts:
        print("\n## Threads")
        _table("what", "batch", "1, ms CPU / wall", "2, ms CPU / wall", "2 over 1, CPU", "wall")
        for case, batch in both:
            report_threads(CASES[case].title, batch, ask("threads", case=case, batch=batch))
        if chosen.case is None:
            report_threads("simulated round, 10 clients", "-", ask("simulated", clients=10))
    print(f"\nMedian [min, max] of {REPETITIONS}. {loopback.machine('lepton-fl', 'torch')}.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short repetitions, to see that it runs")
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--part", choices=("compiled", "bfloat16", "memory", "threads"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.measure is None:
        if chosen.quick:
            os.environ[QUICK] = "1"
        report(chosen)
        return
    torch.set_num_threads(1)
    asked = json.loads(chosen.measure)
    print(json.dumps(MEASURED[asked.pop("do")](**asked)))


if __name__ == "__main__":
    main()
