"""What a private step costs: ours and Opacus's beside plain SGD, for five models and two batches.

    python simulations/benchmarks/private_step.py > simulations/benchmarks/private_step.md

The same batch again and again, of exactly so many records, on one thread; the parameters move with each step.
Plain is PyTorch's own SGD. Every way takes turns with every other in each repetition, and ratios are of one
turn, so that a machine that is busy for a while slows both. Opacus runs in an environment of its own
(peers.py). Clipped sums are compared first: a step that computes something else is not faster.

At --case NAME and --batch N: only these.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import loopback
import numpy as np
from children import Child
from models import CASES
from peers import PINS, workers

BATCHES = (256, 4096)
REPETITIONS = 5
SECONDS = 0.3
"""That a measurement takes, or one step if that is longer."""
AGREEMENT = 1e-5
"""Of two clipped sums, relative, beyond which they are not the same."""
OURS = {"ours": ("ours", "ours", 0.0), "ours, secure noise": ("ours", "ours", 1.0)}
OPACUS = {
    **{mode: ("opacus", mode, 0.0) for mode in ("hooks", "functorch", "ew", "ghost")},
    "hooks, torch's noise": ("opacus", "hooks", 1.0),
}
WAYS = {"plain": ("ours", "plain", 0.0), **OURS, **OPACUS}
"""Peer, mode and noise multiplier."""
TIME_OF = ("cpu", "wall")

Times = dict[str, list[dict[str, Any]]]
"""By way, a measurement for each repetition; or what went wrong, once."""


def times(found: dict[str, Child], case: str, batch: int, *, repetitions: int, seconds: float) -> Times:
    """Each way's seconds a step, the ways in turn."""
    measured: Times = {way: [] for way in WAYS if WAYS[way][0] in found}
    for _ in range(repetitions):
        for way, so_far in measured.items():
            if so_far and "error" in so_far[-1]:
                continue
            peer, mode, noise = WAYS[way]
            so_far.append(
                found[peer].ask(do="step", case=case, batch=batch, mode=mode, noise=noise, seconds=seconds)
            )
    for worker in found.values():
        worker.ask(do="forget")
    return measured


def ratios(measured: Times, way: str) -> list[float] | None:
    """CPU time over plain's, of each turn; None where the way cannot."""
    if "error" in measured[way][0]:
        return None
    pairs = zip(measured[way], measured["plain"], strict=True)
    return [one["cpu"] / plain["cpu"] for one, plain in pairs]


def difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Of two clipped sums: the length of their difference over that of the second."""
    assert sorted(one) == sorted(other), (sorted(one), sorted(other))
    a_L, b_L = (np.concatenate([sums[name].ravel() for name in sorted(one)]) for sums in (one, other))
    return float(np.linalg.norm(a_L - b_L) / np.linalg.norm(b_L))


def agreement(found: dict[str, Child], case: str, batch: int) -> dict[str, float | None]:
    """How far Opacus's clipped sum is from ours, relative, by mode; None where either has none."""

    def clipped(peer: str, **more: str) -> dict[str, np.ndarray] | None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "sum.npz"
            said = found[peer].ask(do="clipped", case=case, batch=batch, path=str(path), **more)
            if "error" in said:
                print(f"{case}, {batch}, {more or peer}: {said['error']}", file=sys.stderr)
                return None
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}

    ours = clipped("ours")
    apart: dict[str, float | None] = {}
    for mode in ("hooks", "functorch", "ew", "ghost"):
        theirs = clipped("opacus", mode=mode)
        apart[mode] = None if ours is None or theirs is None else difference(ours, theirs)
    return apart


def cell(values: list[float] | None, form: str) -> str:
    """The median, or that there is none."""
    return "no" if values is None else f"{statistics.median(values):{form}}"


def widest(measured: Times) -> float:
    """The largest (max - min) / median of a way's ratios."""
    found = [r for way in measured if (r := ratios(measured, way)) is not None]
    return max((max(r) - min(r)) / statistics.median(r) for r in found)


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """What is measured."""
    for batch in BATCHES if arguments.batch is None else (arguments.batch,):
        for case in CASES if arguments.case is None else (arguments.case,):
            if case != "linear" or arguments.case == "linear":
                yield case, batch


def report(arguments: argparse.Namespace) -> None:
    repetitions, seconds = (2, 0.01) if arguments.quick else (REPETITIONS, arguments.seconds)
    names = ("ours",) if arguments.without_peers else ("ours", "opacus")
    lines: dict[str, list[str]] = {"ratio": [], "ms": [], "limit": [], "apart": []}
    refused: dict[str, set[str]] = {}
    spread = 0.0
    with workers(*names) as found:
        ways = [way for way in WAYS if WAYS[way][0] in found]
        rate = max(found["ours"].ask(do="gemm", seconds=seconds)["rate"] for _ in range(3))
        for case, batch in cases(arguments):
            print(f"{case}, batch {batch}", file=sys.stderr)
            title = f"{CASES[case].title} | {batch}"
            apart = agreement(found, case, batch) if "opacus" in found else {}
            measured = times(found, case, batch, repetitions=repetitions, seconds=seconds)
            spread = max(spread, widest(measured))
            for way in ways:
                if ratios(measured, way) is None:
                    refused.setdefault(f"{way}: {measured[way][0]['error']}", set()).add(case)
            over = [cell(ratios(measured, way), ".2f") for way in ways]
            lines["ratio"].append(f"| {title} | {' | '.join(over[1:])} |")
            ms = [
                " / ".join(cell([1e3 * m[which] for m in measured[way]], ".3g") for which in TIME_OF)
                if ratios(measured, way) is not None
                else "no"
                for way in ways
            ]
            lines["ms"].append(f"| {title} | {' | '.join(ms)} |")
            operations = found["ours"].ask(do="operations", case=case, batch=batch)["operations"]
            least = operations / rate
            shares = [
                cell([100 * least / m["cpu"] for m in measured[way]], ".0f") + " %"
                if ratios(measured, way) is not None
                else "no"
                for way in ways[: 1 + len(OURS)]
            ]
            lines["limit"].append(
                f"| {title} | {operations / 1e6:,.0f} | {1e3 * least:.3g} | {' | '.join(shares)} |"
            )
            if apart:
                cells = ["no" if a is None else f"{a:.0e}" for a in apart.values()]
                lines["apart"].append(f"| {title} | {' | '.join(cells)} |")
                wrong = {mode: a for mode, a in apart.items() if a is not None and a > AGREEMENT}
                assert not wrong or arguments.keep_going, (case, batch, wrong)
    print("# A private step\n")
    print(
        f"CPU time, median of {repetitions}, one thread; the same batch of exactly so many records, gathered "
        f"from a table; clip at the median norm. {loopback.machine('lepton-fl', 'torch')}; the peer: "
        f"{', '.join(PINS['opacus'])}. Largest (max - min) / median of a ratio: {100 * spread:.0f} %.\n"
    )
    over = " | ".join(ways[1:])
    rule = "|---" * (len(ways) + 1) + "|"
    print(f"## Over plain SGD\n\n| model | batch | {over} |\n{rule}")
    print("\n".join(lines["ratio"]))
    print(
        '\n"Secure noise" is the discrete Gaussian of docs/accounting.md from AES-256-CTR; "torch\'s noise" '
        "is of a Mersenne Twister, which protects nobody. The other columns are without noise.\n"
    )
    print(f"## Milliseconds a step, CPU / wall\n\n| model | batch | plain | {over} |\n{rule}---|")
    print("\n".join(lines["ms"]))
    print("\n## The limit\n")
    print(
        f"The operations are those of the matrix products and convolutions of a plain step, forward and "
        f"backward; the fastest square product reaches {rate / 1e9:.0f} GFLOP/s in float32 on this thread.\n"
    )
    columns = " | ".join(f"{way} reaches" for way in ways[: 1 + len(OURS)])
    print(f"| model | batch | million operations | least, ms | {columns} |\n|---|---|---|---|---|---|---|")
    print("\n".join(lines["limit"]))
    if lines["apart"]:
        print(
            "\n## Equal results\n\nRelative difference between ours and Opacus's clipped sum, by its mode.\n"
        )
        print("| model | batch | hooks | functorch | ew | ghost |\n|---|---|---|---|---|---|")
        print("\n".join(lines["apart"]))
    if refused:
        print('\n"no":\n')
        for said, which in sorted(refused.items()):
            print(f"- {', '.join(sorted(which))}; {said}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short repetitions, to see that it runs")
    parser.add_argument("--without-peers", action="store_true", help="ours and plain alone")
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that a measurement takes")
    parser.add_argument("--keep-going", action="store_true", help="also where results are not the same")
    report(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
