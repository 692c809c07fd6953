"""Privacy that the site owns: accounting, the ledger, and the promise in words. No torch, no flwr."""

from lepton_fl.privacy.accounting import (
    DiscreteGaussian,
    Event,
    Gaussian,
    calibrate,
    epsilon,
)
from lepton_fl.privacy.guarantee import Exposure, Guarantee
from lepton_fl.privacy.lattice import Lattice
from lepton_fl.privacy.ledger import AnyLedger, Charge, Ledger, RehearsalLedger

__all__ = [
    "AnyLedger",
    "Charge",
    "DiscreteGaussian",
    "Event",
    "Exposure",
    "Gaussian",
    "Guarantee",
    "Lattice",
    "Ledger",
    "RehearsalLedger",
    "calibrate",
    "epsilon",
]
