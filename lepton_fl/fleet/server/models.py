"""Models in use: STATE/models/NAME/VERSION, and NAME/current, which points at one of them."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import tomli_w
from safetensors import SafetensorError
from safetensors.numpy import load

from lepton_fl import __version__
from lepton_fl.errors import ConfigError, PolicyRefused, VerificationFailed
from lepton_fl.files import write_atomic
from lepton_fl.fleet.server.config import ServerFiles
from lepton_fl.fleet.server.link import INSECURE
from lepton_fl.fleet.server.studies import Run, Studies, Submitted
from lepton_fl.tasks.arrays import model_hash
from lepton_fl.tasks.model_file import labels_of

_CURRENT = "current"


def promote(files: ServerFiles, studies: Studies, study: Submitted, text: str) -> tuple[Run, int, Path]:
    """Put a finished run's model into use; `text` names the run, where it is not the study's last.

    Returns the run, the version and its folder.

    Raises:
        ConfigError: no such run has finished, or its model was promoted before.
        PolicyRefused: the noise in it came from a known seed.
        VerificationFailed: the file is not the model that the run has made.
    """
    runs = studies.runs(study.id)
    named = [run for run in runs if len(text) >= 4 and run.id.startswith(text)]
    finished = [run for run in named or runs if run.state == "finished"]
    if not finished:
        states = ", ".join(f"{run.id[:8]} {run.state}" for run in named or runs) or "none was started"
        raise ConfigError(f"study {study.name}: no run of it has finished ({states})")
    run = finished[0]
    content = _verified(files.run(run.id) / "model.safetensors", run)
    home = files.models / study.name
    if run.version is not None:
        raise ConfigError(
            f"run {run.id[:8]}: its model is version {run.version} already ({home / str(run.version)})"
        )
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    version = max(_versions(home), default=0) + 1
    place = home / str(version)
    about = {
        "study": study.id,
        "name": study.name,
        "version": version,
        "run": run.id,
        "model": run.outcome["model"],
        "rounds": run.done,
        "sites": sorted({site for row in studies.rounds(run.id) for site in row.sites}),
        "released": run.outcome.get("released", {}),
        "promoted_at": time.time(),
        "release": __version__,
    }
    # A folder appears whole or not at all.
    draft = home / f".{version}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    raw = study.study().model_dump(mode="json", exclude_none=True)
    write_atomic(draft / "weights.safetensors", content, mode=0o600)
    write_atomic(draft / "study.toml", tomli_w.dumps(raw).encode(), mode=0o600)
    write_atomic(draft / "about.json", json.dumps(about, indent=1).encode(), mode=0o600)
    draft.rename(place)
    _point(home, version)
    studies.promoted(run.id, version)
    return run, version, place


def rollback(files: ServerFiles, name: str) -> tuple[int, Path]:
    """Put the version before the current one back into use.

    Raises:
        ConfigError: there is none.
    """
    home = files.models / name
    known = _versions(home)
    current = int((home / _CURRENT).readlink().name) if (home / _CURRENT).is_symlink() else 0
    earlier = [version for version in known if version < current]
    if not earlier:
        raise ConfigError(
            f"{home}: there is no version before {current}" if current else f"{home}: no model was promoted",
            fix="lepton-fl study promote NAME",
        )
    _point(home, max(earlier))
    return max(earlier), home / str(max(earlier))


def _versions(home: Path) -> list[int]:
    if not home.is_dir():
        return []
    return [int(path.name) for path in home.iterdir() if path.name.isascii() and path.name.isdigit()]


def _point(home: Path, version: int) -> None:
    new = home / f".{_CURRENT}"
    new.unlink(missing_ok=True)
    new.symlink_to(str(version))
    new.replace(home / _CURRENT)
    handle = os.open(home, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _verified(path: Path, run: Run) -> bytes:
    try:
        content = path.read_bytes()
        digest, labels = model_hash(load(content)), labels_of(content)
    except (OSError, SafetensorError, ValueError) as error:
        raise VerificationFailed(f"{path}: cannot be read as a model: {error}") from None
    if digest != run.outcome.get("model"):
        raise VerificationFailed(
            f"{path}: found model {digest[:16]}, the run has made {str(run.outcome.get('model'))[:16]}"
        )
    if labels or run.outcome.get("labels"):
        raise PolicyRefused(f"{path}: is stamped {labels or INSECURE!r}, and cannot be promoted")
    return content
