"""Where a run's randomness comes from."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import torch


class SimulationNoise:
    """Seeded generators for a simulation: reproducible, and therefore no privacy.

    Each (party, purpose, round) has a stream of its own, so a site's draws do not depend on the order in
    which sites are run. torch's Mersenne Twister takes 32 effective bits of seed and its state can be
    recovered from its output: whatever it protects is protected in simulation only, and every output of
    a run that used it says `simulation noise`.
    """

    def __init__(self, seed: int, party: str) -> None:
        self._root = f"lepton-fl/simulation-noise/1|{seed}|{party}"

    @classmethod
    def unseeded(cls, party: str) -> SimulationNoise:
        """Seeded by the operating system: not reproducible, and still simulation noise."""
        return cls(int.from_bytes(os.urandom(16), "little"), party)

    def torch(self, purpose: str, round: int = 0) -> torch.Generator:
        """A torch generator on the CPU."""
        return torch.Generator().manual_seed(self._seed(purpose, round) % 2**63)

    def numpy(self, purpose: str, round: int = 0) -> np.random.Generator:
        """A numpy generator."""
        return np.random.default_rng(self._seed(purpose, round))

    def _seed(self, purpose: str, round: int) -> int:
        name = f"{self._root}|{purpose}|{round}".encode()
        return int.from_bytes(hashlib.sha256(name).digest(), "little")
