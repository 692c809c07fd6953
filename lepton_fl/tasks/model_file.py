"""A run's model as a file that says what it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.numpy import save

from lepton_fl.files import write_atomic
from lepton_fl.study import Study
from lepton_fl.tasks.arrays import Arrays, model_hash


def write_model(path: Path, study: Study, arrays: Arrays, labels: Sequence[str]) -> str:
    """Write a run's model as safetensors, its header saying what it is; returns its SHA-256."""
    digest = model_hash(arrays)
    about = {
        "study": study.id,
        "model": study.model_name,
        "sha256": digest,
        "labels": "; ".join(labels),
    }
    write_atomic(path, save(arrays, metadata=about))
    return digest
