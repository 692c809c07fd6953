"""A run's model as a file that says what it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lepton_fl.data import Contract
from lepton_fl.errors import ConfigError
from lepton_fl.files import write_atomic
from lepton_fl.study import Study
from lepton_fl.tasks.arrays import Arrays, arrays_of, model_hash
from lepton_fl.tasks.models import build_model


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


def read_model(content: bytes, study: Study, *, file: str) -> Arrays:
    """The model of `study` in a safetensors file, its parameters in the module's own order.

    Raises:
        ConfigError: it cannot be read, or its names, shapes or types are not those of the study's model.
    """
    try:
        found = load(content)
    except SafetensorError as error:
        raise ConfigError(f"{file}: cannot be read as a model: {error}") from None
    model = arrays_of(build_model(study, Contract.of(study).width, torch.Generator()))
    if {n: (a.shape, a.dtype) for n, a in found.items()} != {n: (a.shape, a.dtype) for n, a in model.items()}:
        raise ConfigError(f"{file}: not a model of study {study.study.name}")
    return {name: found[name] for name in model}


def labels_of(data: bytes) -> str:
    """What a model's file is stamped with; empty where nothing.

    Raises:
        ValueError: the bytes do not begin as a model's do.
    """
    size = int.from_bytes(data[:8], "little")
    return str(json.loads(data[8 : 8 + size]).get("__metadata__", {}).get("labels", ""))
