"""Where a run stands, in one file that is always whole: model, strategy state, round.

Two numbers of rounds: `started` is written before a round's messages go out, `model` after it was
aggregated. A run that is resumed begins after `started`, since a site charges a round number once.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load, save

from lepton_fl.errors import ConfigError, VerificationFailed
from lepton_fl.files import write_atomic
from lepton_fl.tasks.arrays import Arrays, group_of, model_hash, prefixed

_FORMAT = "lepton-fl/checkpoint/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state between two rounds of one run."""

    study_id: str
    context: str
    """What else must be the same for the run to go on."""
    run: str
    started: int
    """Highest round number ever sent out."""
    done: int
    """Rounds aggregated."""
    model: Arrays
    strategy: Arrays
    stopping: Arrays = field(default_factory=dict)
    """State of the early-stopping rule; empty where there is none."""
    stopped_early: str = ""
    """Why the run is over before its last round; empty where it is not."""

    def write(self, path: Path) -> None:
        """Replace the file at `path`; a crash leaves the old one or this one."""
        about = {
            "format": _FORMAT,
            "study": self.study_id,
            "context": self.context,
            "run": self.run,
            "started": str(self.started),
            "done": str(self.done),
            "stopped_early": self.stopped_early,
            "names": json.dumps(list(self.model)),
        }
        tensors = prefixed(model=self.model, strategy=self.strategy, stopping=self.stopping)
        write_atomic(path, save(tensors, metadata={**about, "sha256": _digest(about, tensors)}))

    @classmethod
    def read(cls, path: Path, *, study_id: str, context: str = "") -> Checkpoint:
        """The checkpoint at `path`.

        Raises:
            ConfigError: it cannot be read, or is of another study or context.
            VerificationFailed: it is not whole, or not as it was written, round numbers included.
        """
        try:
            data = path.read_bytes()
            tensors, about = load(data), _metadata(data)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except (SafetensorError, ValueError):
            raise VerificationFailed(f"{path}: not a whole checkpoint") from None
        if about.get("format") != _FORMAT:
            raise ConfigError(f"{path}: not a checkpoint of format {_FORMAT}")
        if about.pop("sha256", None) != _digest(about, tensors):
            raise VerificationFailed(f"{path}: the checkpoint does not have the digest it was written with")
        if about["study"] != study_id:
            raise ConfigError(
                f"{path}: found a checkpoint of study {about['study'][:12]}, expected {study_id[:12]}",
                fix="name another folder with --out, or leave --resume out",
            )
        if about["context"] != context:
            raise ConfigError(f"{path}: found a checkpoint of {about['context']!r}, expected {context!r}")
        return cls(
            study_id=study_id,
            context=context,
            run=about["run"],
            started=int(about["started"]),
            done=int(about["done"]),
            model={name: tensors[f"model/{name}"] for name in json.loads(about["names"])},
            strategy=group_of(tensors, "strategy"),
            stopping=group_of(tensors, "stopping"),
            stopped_early=about.get("stopped_early", ""),
        )


def _digest(about: dict[str, str], tensors: Arrays) -> str:
    """Over all that a checkpoint holds: a wrong round number or moment does as much harm as a wrong model."""
    text = json.dumps({**about, "tensors": model_hash(tensors)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _metadata(data: bytes) -> dict[str, str]:
    """The safetensors header's metadata: an 8-byte little-endian length, then JSON."""
    size = int.from_bytes(data[:8], "little")
    found = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    return {str(k): str(v) for k, v in found.items()}
