"""Where a model is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lepton_fl.errors import ConfigError

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device, and one sentence that says why it is this one."""

    name: str
    said: str

    @property
    def torch(self) -> torch.device:
        """Where tensors are put."""
        return torch.device(self.name)


def choose_device(asked: str, *, file: str) -> Device:
    """The device for `asked`: auto, cpu or cuda; nobody is given another than they asked for.

    `auto` is the CPU: on a GPU this release's training has not been run yet (docs/accounting.md, "On an
    accelerator"), so that is for a site to choose.

    Raises:
        ConfigError: the device is not there, or cannot keep what training promises.
    """
    cuda = asked in ("auto", "cuda") and torch.cuda.is_available()
    if asked == "cuda":
        if not cuda:
            raise ConfigError.at(
                file,
                "runtime.device",
                found=asked,
                allowed=f"'auto' or 'cpu' here: torch {torch.__version__} sees no CUDA device",
                fix=f'set device = "auto" under [runtime] in {file}, or install a CUDA build of torch and a '
                "driver",
            )
        name = torch.cuda.get_device_name()
        return Device(name="cuda", said=f"cuda ({name}); sampling and noise on the CPU")
    if asked == "mps":
        raise ConfigError.at(
            file,
            "runtime.device",
            found=asked,
            allowed="'auto', 'cpu' or 'cuda': mps has no float64, in which gradients are clipped and summed",
            fix=f'set device = "auto" under [runtime] in {file}',
        )
    if asked == "auto" and cuda:
        idle = f'a CUDA device lies idle; device = "cuda" under [runtime] in {file} trains on it'
        return Device(name="cpu", said=f"cpu ({idle})")
    return Device(name="cpu", said="cpu")


@contextmanager
def whole_precision(device: torch.device) -> Iterator[None]:
    """Within, a CUDA device computes with float32's 24 bits, and by kernels that are not chosen by time.

    TensorFloat-32 has 11 of them. A kernel that is chosen because it was the fastest at the moment may round
    otherwise the next time. Settings are the process's; they are afterwards what they were.
    """
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on `device`; to a CUDA device it travels while others are computed."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
