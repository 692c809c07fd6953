"""Where a model is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lepton_fl.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device, and one sentence that says why it is this one."""

    name: str
    said: str


def choose_device(asked: str, *, file: str) -> Device:
    """The device for `asked`: auto, cpu, cuda or mps.

    Tensors and generators of this release's training are the CPU's, whatever else the machine has.

    Raises:
        ConfigError: a device is asked for that training would not use.
    """
    if asked not in ("auto", "cpu"):
        raise ConfigError.at(
            file,
            "runtime.device",
            found=asked,
            allowed="'auto' or 'cpu': training of this release runs on the CPU",
            fix=f'set device = "auto" under [runtime] in {file}',
        )
    if asked == "auto" and (unused := accelerator()):
        return Device(name="cpu", said=f"cpu ({unused} is there; training of this release does not use it)")
    return Device(name="cpu", said="cpu")


def accelerator() -> str:
    """The accelerator that torch sees: cuda, mps, or an empty text."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else ""
