"""A model's parameters as plain arrays by name: what travels, what is hashed, what is stored."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

from lepton_fl.errors import ProtocolError

Arrays = dict[str, np.ndarray]
"""Parameter name to float array, in the module's own order."""

MAX_MAGNITUDE = 1e6
"""Of a coordinate, of a model or an update, that another party is believed; beyond it arithmetic could be
made to overflow."""

TILE = 1 << 17
"""Numbers that are worked on at a time: 1 MiB in float64, so that no temporary is as large as a model."""


def tiles(size: int, tile: int = TILE) -> Iterator[slice]:
    """Slices of at most `tile` that together are `size` numbers."""
    return (slice(start, start + tile) for start in range(0, size, tile))


def prefixed(**groups: Arrays) -> Arrays:
    """Several groups of arrays as one, `GROUP/NAME` each."""
    return {f"{group}/{name}": array for group, arrays in groups.items() for name, array in arrays.items()}


def group_of(arrays: Arrays, group: str) -> Arrays:
    """One of the groups that `prefixed` put together."""
    start = f"{group}/"
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def size_of(arrays: Mapping[str, np.ndarray]) -> int:
    """Numbers in all of them."""
    return sum(array.size for array in arrays.values())


def flatten(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """All arrays one after another, in their order: [L]."""
    return np.concatenate([np.ravel(array) for array in arrays.values()])


def unflatten(vector_L: np.ndarray, template: Mapping[str, np.ndarray]) -> Arrays:
    """The inverse of `flatten`, for arrays shaped as `template`: views of the vector."""
    arrays, at = {}, 0
    for name, like in template.items():
        arrays[name] = vector_L[at : at + like.size].reshape(like.shape)
        at += like.size
    return arrays


def arrays_of(model: nn.Module) -> Arrays:
    """A copy of the parameters, float32."""
    return {name: p.detach().cpu().numpy().copy() for name, p in model.named_parameters()}


def load_arrays(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Overwrite the parameters.

    Raises:
        ProtocolError: names, shapes or finiteness are not as the model's.
    """
    parameters = dict(model.named_parameters())
    check_like(arrays, {name: p.detach().cpu().numpy() for name, p in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(arrays[name], dtype=np.float32)))


def check_like(
    arrays: Mapping[str, np.ndarray], template: Mapping[str, np.ndarray], *, limit: float = np.inf
) -> None:
    """Refuse arrays whose names, shapes or kind differ from `template`, not finite, or beyond `limit`.

    Raises:
        ProtocolError: naming the first difference; never a value.
    """
    if list(arrays) != list(template):
        missing, extra = sorted(set(template) - set(arrays)), sorted(set(arrays) - set(template))
        raise ProtocolError(f"arrays: names differ from the model's: missing {missing}, extra {extra}")
    for name, expected in template.items():
        found = arrays[name]
        if found.shape != expected.shape:
            raise ProtocolError(f"arrays: {name} has shape {found.shape}, model has {expected.shape}")
        if found.dtype.kind != "f":
            raise ProtocolError(f"arrays: {name} has type {found.dtype}, model has {expected.dtype}")
        largest = _largest(found, expected.dtype)
        if not math.isfinite(largest):
            raise ProtocolError(f"arrays: {name} holds values that are not finite")
        if largest > limit:
            raise ProtocolError(f"arrays: {name} holds values beyond {limit:g}")


def _largest(array: np.ndarray, dtype: np.dtype) -> float:
    """Largest magnitude as a number of type `dtype`: what is finite in float64 may be infinite there."""
    flat = array.reshape(-1)
    if 0 < flat.size <= TILE and array.dtype == dtype:
        # Many arrays are small, and then it is the calls that cost. NaN comes out of both.
        return max(float(flat.max()), -float(flat.min()))
    largest = 0.0
    for tile in tiles(flat.size):
        with np.errstate(over="ignore"):
            found = float(np.abs(flat[tile].astype(dtype, copy=False)).max())
        # Not `max`, for which no NaN is larger.
        if not math.isfinite(found):
            return found
        largest = max(largest, found)
    return largest


def model_hash(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over name, type, shape and little-endian bytes of every tensor, in order of name."""
    digest = hashlib.sha256(b"lepton-fl/model/1\n")
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        shape = ",".join(str(n) for n in array.shape)
        digest.update(f"{len(name)}:{name}|{little.dtype.str}|{shape}|{little.nbytes}\n".encode())
        digest.update(little.tobytes())
    return digest.hexdigest()
