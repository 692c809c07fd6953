"""Training at one site: DP-SGD, its steps taken by Opacus. The only package that imports opacus."""

from lepton_fl.training.local import LocalPlan, LocalUpdate, train_locally
from lepton_fl.training.noise import Noise, SimulationNoise, UnseededNoise

__all__ = [
    "LocalPlan",
    "LocalUpdate",
    "Noise",
    "SimulationNoise",
    "UnseededNoise",
    "train_locally",
]
