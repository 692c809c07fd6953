"""torch's device "other": ordinary memory and the CPU's arithmetic, kept apart from the CPU's tensors."""

import shutil
import subprocess
import types
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.cpp_extension import include_paths, library_paths

COMPILER = shutil.which("g++") or shutil.which("clang++")
OFFSET = 4
"""What one use of its generator takes."""


def compiled(into: Path) -> Path:
    """Its shared library, made in this folder: half a minute."""
    assert COMPILER is not None
    library, source = into / "other_device.so", Path(__file__).with_suffix(".cpp")
    command = [COMPILER, "-std=c++20", "-O1", "-fPIC", "-shared", "-w", str(source), "-o", str(library)]
    command += [f"-I{folder}" for folder in include_paths()]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    for folder in library_paths():
        command += [f"-L{folder}", f"-Wl,-rpath,{folder}"]
    subprocess.run([*command, "-ltorch_cpu", "-lc10"], check=True, timeout=600)
    return library


@cache
def load(library: Path) -> None:
    """Make torch know it, for the rest of this process; before its first backward pass."""
    torch.utils.rename_privateuse1_backend("other")
    torch.ops.load_library(str(library))
    module = types.ModuleType("torch.other")
    vars(module).update(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        synchronize=lambda _=None: None,
        get_rng_state=_get_rng_state,
        set_rng_state=_set_rng_state,
        manual_seed_all=lambda seed: torch.ops.other_device.set_random_state(seed, 0),
        _is_in_bad_fork=lambda: False,
    )
    torch._register_device_module("other", module)


def counts() -> dict[str, int]:
    """What was asked of it since the last call, and how often."""
    return dict(torch.ops.other_device.counts())


def generator(seed: int, offset: int) -> torch.Generator:
    """The CPU's, as the device's next use draws that stands there."""
    of_use = (seed * 0x9E3779B97F4A7C15 + offset) % 2**64
    return torch.Generator().manual_seed(of_use >> 32)


def _get_rng_state(_: object = None) -> torch.Tensor:
    return torch.from_numpy(np.array(torch.ops.other_device.random_state(), "<i8").view(np.uint8))


def _set_rng_state(state: torch.Tensor, _: object = None) -> None:
    torch.ops.other_device.set_random_state(*state.numpy().view("<i8").tolist())
