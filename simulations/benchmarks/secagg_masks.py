"""What masking costs: k masks made and added to L words, beside OpenSSL's own speed and Flower's SecAgg+.

    python simulations/benchmarks/secagg_masks.py [RUNS] > simulations/benchmarks/secagg_masks.md

Megabytes of mask a CPU second of one thread, so that neighbours on a shared machine count little; the
three take turns, median of RUNS (5) and [lowest, highest].
"""

from __future__ import annotations

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition, parameters_mod
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from lepton_fl.secagg import masks
from lepton_fl.secagg.fixedpoint import Quantiser

SIZES = [(1, 1_000_000), (9, 5_000), (9, 1_000_000), (99, 1_000_000), (9, 50_000_000)]
MEGA = 1_000_000


def ours(k: int, size: int) -> float:
    """Bytes of mask a CPU second."""
    vector_L = np.ones(size, np.uint32)  # not zeros, whose pages would be fetched while we time
    keys = [(1 if i % 2 else -1, os.urandom(32)) for i in range(k)]
    repeats = max(1, 2_000_000 // (k * size))
    began = time.process_time()
    for _ in range(repeats):
        masks.apply(vector_L, keys)
    return 4 * k * size * repeats / (time.process_time() - began)


def stream_alone() -> float:
    """The same keystream, into one tile and not added: what remains to be gained."""
    zeros, out = bytes(4 * masks.TILE), bytearray(4 * masks.TILE)
    stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
    began = time.process_time()
    for _ in range(1000):
        stream.update_into(zeros, out)
    return 4 * masks.TILE * 1000 / (time.process_time() - began)


def flower() -> float:
    """Two masks of a million parameters as Flower's client adds them, counted at our 4 bytes a parameter."""
    vector = [np.ones(1_000_000, np.int64)]
    began = time.process_time()
    for _ in range(2):
        mask = pseudo_rand_gen(os.urandom(32), 1 << 32, [(1_000_000,)])
        vector = parameters_mod(parameters_addition(vector, mask), 1 << 32)
    return 2 * 4 * MEGA / (time.process_time() - began)


def openssl() -> float:
    """`openssl speed` at 16 KiB, the best that it prints; it counts CPU time itself."""
    program = shutil.which("openssl")
    if program is None:
        raise SystemExit("the program openssl is missing: install it")
    said = subprocess.run(
        [program, "speed", "-seconds", "1", "-bytes", "16384", "-evp", "aes-256-ctr"],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(re.findall(r"([\d.]+)k\s*$", said.stdout)[0]) * 1000


def encoding() -> float:
    """Coordinates that are clipped and rounded, a CPU second."""
    update_L = np.linspace(-1.1, 1.1, 1_000_000, dtype=np.float32)
    quantiser = Quantiser(clip=1.0, bits=24, max_n=100)
    began = time.process_time()
    quantiser.encode(update_L, weight=1, rounding_key=os.urandom(32))
    return len(update_L) / (time.process_time() - began)


def memory_of_fifty_million() -> float:
    """Megabytes that the process grows by while it masks 5e7 words with 9 keys."""
    vector_L = np.ones(50_000_000, np.uint32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    masks.apply(vector_L, [(1, os.urandom(32)) for _ in range(9)])
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / MEGA


def processor() -> str:
    """Its name, where Linux tells it."""
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return names[0].strip() if names else platform.machine()


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    # First, before anything else has made the process large.
    grown = memory_of_fifty_million()
    rows: dict[str, Callable[[], float]] = {
        "`openssl speed -evp aes-256-ctr`, 16 KiB": openssl,
        "AES-256-CTR through `cryptography`, not added": stream_alone,
        **{
            f"`masks.apply`, k = {k}, L = {size:,}": lambda k=k, size=size: ours(k, size) for k, size in SIZES
        },
        "Flower's SecAgg+, L = 1,000,000": flower,
        "`Quantiser.encode`, million coordinates a second": encoding,
    }
    for work in rows.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(runs):
        for name, work in rows.items():
            found[name].append(work() / MEGA)
    packages = ", ".join(f"{p} {version(p)}" for p in ("cryptography", "numpy", "flwr"))
    best = statistics.median(found["`openssl speed -evp aes-256-ctr`, 16 KiB"])
    print("# Masks\n")
    print(
        f"MB of mask a CPU second of one thread, made and added in place; median of {runs} after one "
        f"warm-up, [lowest, highest]. {processor()}, {os.cpu_count()} shared cores, Python "
        f"{platform.python_version()}, {packages}.\n"
    )
    print("| what | MB/s | of openssl |\n|---|---|---|")
    for name, values in found.items():
        middle, low, high = statistics.median(values), min(values), max(values)
        share = "" if "encode" in name else f"{middle / best:.0%}"
        print(f"| {name} | {middle:,.0f} [{low:,.0f}, {high:,.0f}] | {share} |")
    print(f"\nMemory while 50,000,000 words get 9 masks: {grown:.1f} MB beyond the vector.")


if __name__ == "__main__":
    main()
