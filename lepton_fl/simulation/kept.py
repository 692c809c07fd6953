"""Scores of the baselines, kept in a folder: runs that differ in what no baseline reads share them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from lepton_fl.files import write_atomic
from lepton_fl.simulation.run import Splits
from lepton_fl.tasks.metrics import Scored

_LABEL = "lepton-fl/kept/3"
"""Counted up where a baseline comes to be fitted in another way: what was kept before is then not found."""


def kept_scores(
    folder: Path | None, arm: str, splits: Splits, seed: int, compute: Callable[[], dict[str, Scored]]
) -> dict[str, Scored]:
    """The scores of `arm`, read from `folder` where the same records were scored before.

    The file is named by a digest of the records, the seed, scikit-learn's version and `_LABEL`. Two processes
    that compute it at the same time write the same bytes.
    """
    if folder is None:
        return compute()
    path = folder / f"{arm}-{_digest(splits, seed)[:32]}.safetensors"
    if path.exists():
        try:
            held = load_file(path)
            return {site: (held[f"{site}/y"], held[f"{site}/score"]) for site in splits}
        except (KeyError, SafetensorError):
            # Not of our making: computed anew, and replaced.
            pass
    scored = compute()
    arrays = {}
    for site, (y_N, score_N) in scored.items():
        arrays[f"{site}/y"] = np.ascontiguousarray(y_N)
        arrays[f"{site}/score"] = np.ascontiguousarray(score_N)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(arrays))
    return scored


def _digest(splits: Splits, seed: int) -> str:
    digest = hashlib.sha256(f"{_LABEL}\nscikit-learn {metadata.version('scikit-learn')}\n{seed}\n".encode())
    for site, parts in sorted(splits.items()):
        for table in parts:
            digest.update(
                f"{site} {table.fingerprint} {table.raw_categorical} {table.raw_NC.shape}\n".encode()
            )
            digest.update(np.ascontiguousarray(table.raw_NC, dtype="<f8").tobytes())
    return digest.hexdigest()
