"""Where a party's randomness comes from: a key for each thing that is drawn."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from lepton_fl.errors import ConfigError
from lepton_fl.secagg.masks import keystream
from lepton_fl.training.device import CPU

_WORDS = 624
_STATE = slice(24, 24 + _WORDS * 8)
"""Where torch keeps the words of its generator on the CPU, each of 32 bits, in 64."""
_PHILOX = 16
"""Bytes of the state of CUDA's: Philox's key, and where in its stream it stands."""
_OFFSETS = 2**62 - 4
"""Where it may stand: at multiples of 4, and far from the end."""


class Noise(ABC):
    """Keys of one party's draws, one for each (study, purpose, round).

    What is drawn under a key (who is sampled, how a sum is rounded, the noise on it) comes from its
    AES-256-CTR stream, and is as secret as the key is.
    """

    @abstractmethod
    def key(self, purpose: str, round: int = 0) -> bytes:
        """32 bytes, for one use."""

    @abstractmethod
    def of(self, study_id: str) -> Noise:
        """The keys of one study."""


class SimulationNoise(Noise):
    """Keys from a seed, for a simulation: reproducible, and therefore no privacy.

    Each (party, study, purpose, round) has a key of its own: a site's draws do not depend on the order
    in which sites are run, and no two studies share noise, which their difference would cancel. The same
    study run again under the same seed releases the same again.
    """

    def __init__(self, seed: int, party: str, study_id: str = "") -> None:
        self._seed = seed
        self._party = party
        self._study_id = study_id

    def of(self, study_id: str) -> SimulationNoise:
        return SimulationNoise(self._seed, self._party, study_id)

    def key(self, purpose: str, round: int = 0) -> bytes:
        parts = ("lepton-fl/simulation-noise/1", self._seed, self._party, self._study_id, purpose, round)
        return hashlib.sha256("|".join(map(str, parts)).encode()).digest()

    def torch(self, purpose: str) -> torch.Generator:
        """A torch generator on the CPU, for what protects nobody: a model's first parameters."""
        seed = int.from_bytes(self.key(purpose), "little")
        return torch.Generator().manual_seed(seed % 2**63)


class UnseededNoise(Noise):
    """Keys from the operating system, anew each time: the only kind for a deployed site."""

    def of(self, study_id: str) -> UnseededNoise:  # noqa: ARG002 - no two keys are alike anyway
        return self

    def key(self, purpose: str, round: int = 0) -> bytes:  # noqa: ARG002 - the same
        return os.urandom(32)


@contextmanager
def drawing(key: bytes, device: torch.device = CPU) -> Iterator[None]:
    """Within, what a model draws by itself (dropout) is of torch's generators in a state of the key's stream.

    No process seeds these generators, and then everybody knows what they draw. Units must have masks that are
    independent of how many others there are, so the state is secret, and all of it: a seed would be 32 bits.
    The CPU's generator and that of `device` get words of their own.

    Raises:
        ConfigError: it drew on a device of which nothing is known here of how a state is laid out.
    """
    words = keystream(key, start=0, count=_WORDS + _PHILOX // 4)
    state = torch.Generator().manual_seed(0).get_state()
    state[_STATE] = torch.from_numpy(words[:_WORDS].astype(np.int64).view(np.uint8))
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            yield
        return
    module = torch.get_device_module(device)
    with torch.random.fork_rng(devices=[device.index], device_type=device.type):
        torch.set_rng_state(state)
        before = module.get_rng_state(device)
        if before.numel() == _PHILOX:
            own = words[_WORDS:].astype("<u4").view("<u8") & np.array([2**64 - 1, _OFFSETS], "<u8")
            module.set_rng_state(torch.from_numpy(own.view(np.uint8)), device)
            yield
            return
        yield
        if not torch.equal(module.get_rng_state(device), before):
            raise ConfigError(
                f"model: draws on {device.type}, whose generator has a state of {before.numel()} bytes; "
                f"{_PHILOX} are known here, and what it drew is no secret",
                fix='set device = "cpu" under [runtime] in site.toml',
            )
