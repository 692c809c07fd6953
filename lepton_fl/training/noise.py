"""Where a run's randomness comes from."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod

import torch


class Noise(ABC):
    """The generators that one party draws from, one for each (study, purpose, round).

    torch's Mersenne Twister takes 32 effective bits of seed and its state can be recovered from its output:
    whatever it protects is protected in simulation only, and every output of a run that used it says
    `simulation noise`. That goes for both kinds below.
    """

    def torch(self, purpose: str, round: int = 0) -> torch.Generator:
        """A torch generator on the CPU."""
        return torch.Generator().manual_seed(self._seed(purpose, round) % 2**63)

    @abstractmethod
    def of(self, study_id: str) -> Noise:
        """The streams of one study."""

    @abstractmethod
    def _seed(self, purpose: str, round: int) -> int:
        """256 bits."""


class SimulationNoise(Noise):
    """Seeded generators for a simulation: reproducible, and therefore no privacy.

    Each (party, study, purpose, round) has a stream of its own: a site's draws do not depend on the order
    in which sites are run, and no two studies share noise, which their difference would cancel. The same
    study run again under the same seed releases the same again.
    """

    def __init__(self, seed: int, party: str, study_id: str = "") -> None:
        self._seed_of_all = seed
        self._party = party
        self._study_id = study_id

    def of(self, study_id: str) -> SimulationNoise:
        return SimulationNoise(self._seed_of_all, self._party, study_id)

    def key(self, purpose: str) -> bytes:
        """32 bytes, for a keyed hash."""
        return self._seed(purpose, 0).to_bytes(32, "little")

    def _seed(self, purpose: str, round: int) -> int:
        parts = ("lepton-fl/simulation-noise/1", self._seed_of_all, self._party, self._study_id, purpose)
        name = "|".join(map(str, (*parts, round))).encode()
        return int.from_bytes(hashlib.sha256(name).digest(), "little")


class UnseededNoise(Noise):
    """Seeded by the operating system, anew for each stream: the only kind for a deployed site."""

    def of(self, study_id: str) -> UnseededNoise:  # noqa: ARG002 - no two streams are alike anyway
        return self

    def _seed(self, purpose: str, round: int) -> int:  # noqa: ARG002 - the same
        return int.from_bytes(os.urandom(32), "little")
