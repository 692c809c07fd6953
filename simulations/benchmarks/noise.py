"""What noise costs: draws a second of the discrete Gaussian, beside normals that are not exact or not secure.

    python simulations/benchmarks/noise.py [RUNS] > simulations/benchmarks/noise.md

Millions of draws a CPU second of one thread, so that neighbours on a shared machine count little; the rows
take turns, median of RUNS (5) and [lowest, highest].
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import math
import platform
import re
import secrets
import statistics
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from lepton_fl.privacy import discrete_gaussian
from lepton_fl.secagg import masks

COUNT = 4_000_000
TILE = 1 << 15
SIGMA = 2.0**16
MEGA = 1_000_000

Below = Callable[[int], int]
"""A uniform whole number below its argument."""


def rejection(sigma: float, below: Below) -> int:
    """One draw, exactly, in whole numbers (Canonne, Kamath and Steinke 2020, algorithm 3)."""
    variance = Fraction(sigma) ** 2
    scale = math.isqrt(math.floor(variance)) + 1
    while True:
        candidate = laplace(scale, below)
        if bernoulli_exp((abs(candidate) - variance / scale) ** 2 / (2 * variance), below):
            return candidate


def laplace(scale: int, below: Below) -> int:
    """P(x) proportional to exp(-|x| / scale); algorithm 2 for a whole scale."""
    while True:
        remainder = below(scale)
        if not bernoulli_exp(Fraction(remainder, scale), below):
            continue
        quotient = 0
        while bernoulli_exp(Fraction(1), below):
            quotient += 1
        size, negative = remainder + scale * quotient, below(2)
        if size or not negative:
            return -size if negative else size


def bernoulli_exp(gamma: Fraction, below: Below) -> bool:
    """True with the probability exp(-gamma); algorithm 1."""
    while gamma > 1:
        if not bernoulli_exp(Fraction(1), below):
            return False
        gamma -= 1
    k = 1
    while below(k * gamma.denominator) < gamma.numerator:
        k += 1
    return k % 2 == 1


def box_muller(count: int, *, key: bytes) -> np.ndarray:
    """Normals in float64 from the same keystream: 53 bits each, and the holes of floating point."""
    pairs_2P = np.empty((2, -(-count // (2 * TILE)) * TILE))
    for at in range(0, pairs_2P.shape[1], TILE):
        words_2T = masks.keystream(key, start=4 * at, count=4 * TILE).view(np.uint64).reshape(2, TILE)
        radius_T, angle_T = ((words_2T >> np.uint64(11)) + 0.5) * 2.0**-53
        radius_T = np.sqrt(-2 * np.log(radius_T))
        angle_T *= 2 * np.pi
        np.multiply(radius_T, np.cos(angle_T), out=pairs_2P[0, at : at + TILE])
        np.multiply(radius_T, np.sin(angle_T), out=pairs_2P[1, at : at + TILE])
    return pairs_2P.reshape(-1)[:count]


def per_second(draw: Callable[[int], object], count: int = COUNT) -> float:
    began = time.process_time()
    draw(count)
    return count / (time.process_time() - began)


def ours(sigma: float) -> Callable[[int], np.ndarray]:
    return lambda count: discrete_gaussian.sample(sigma, count, key=os.urandom(32))


def table_ms(sigma: float) -> float:
    """Milliseconds of the first draw, which makes the tables."""
    discrete_gaussian._table.cache_clear()
    began = time.process_time()
    discrete_gaussian.sample(sigma, 1, key=os.urandom(32))
    return 1000 * (time.process_time() - began)


def processor() -> str:
    """Its name, where Linux tells it."""
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return names[0].strip() if names else platform.machine()


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.set_num_threads(1)
    seeded = np.random.default_rng(1)
    torch_f32, torch_f64 = torch.empty(COUNT), torch.empty(COUNT, dtype=torch.float64)
    rows: dict[str, tuple[str, Callable[[], float]]] = {
        **{
            f"**ours, sigma = 2^{bits}**": (
                f"yes: distance 2^{math.log2(discrete_gaussian.distance(2.0**bits)):.0f}",
                lambda bits=bits: per_second(ours(2.0**bits)),
            )
            for bits in (2, 8, 12, 14, 16, 20, 24)
        },
        "rejection in whole numbers (CKS 2020), plain Python": (
            "yes, exact",
            lambda: per_second(lambda n: [rejection(SIGMA, secrets.randbelow) for _ in range(n)], 4000),
        ),
        "AES-256-CTR and Box-Muller, numpy, float64": (
            "no: holes of floating point",
            lambda: per_second(lambda n: box_muller(n, key=os.urandom(32))),
        ),
        "numpy `standard_normal`, PCG64, float64": (
            "no: its state can be recovered",
            lambda: per_second(seeded.standard_normal),
        ),
        "torch `normal_`, Mersenne Twister, float64": (
            "no: its state can be recovered",
            lambda: per_second(lambda _: torch_f64.normal_()),
        ),
        "torch `normal_`, Mersenne Twister, float32": (
            "no: its state can be recovered",
            lambda: per_second(lambda _: torch_f32.normal_()),
        ),
        "the keystream alone, of one level": (
            "",
            lambda: per_second(lambda n: masks.keystream(os.urandom(32), count=n // 2)),
        ),
    }
    for _, work in rows.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(runs):
        for name, (_, work) in rows.items():
            found[name].append(work() / MEGA)
    made = {bits: statistics.median(table_ms(2.0**bits) for _ in range(runs)) for bits in (4, 16, 24)}
    packages = ", ".join(f"{p} {version(p)}" for p in ("cryptography", "numpy", "torch"))
    middle = {name: statistics.median(values) for name, values in found.items()}
    reference = middle["**ours, sigma = 2^16**"]
    print("# Noise\n")
    print(
        f"Millions of draws a CPU second of one thread, {COUNT:,} a call (the rejection: 4,000); median of "
        f"{runs} after one warm-up, [lowest, highest]. {processor()}, {os.cpu_count()} shared cores, "
        f"Python {platform.python_version()}, {packages}.\n"
    )
    print("| what | fit for privacy | million a second | of ours at 2^16 |\n|---|---|---|---|")
    for name, (fit, _) in rows.items():
        speeds = f"{middle[name]:.3g} [{min(found[name]):.3g}, {max(found[name]):.3g}]"
        print(f"| {name} | {fit} | {speeds} | {middle[name] / reference:.2g} |")
    costs = ", ".join(f"{value:.0f} ms at 2^{bits}" for bits, value in made.items())
    print(f"\nThe first draw of a sigma makes its tables, which are kept: {costs}.")


if __name__ == "__main__":
    main()
