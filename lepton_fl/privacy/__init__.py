"""Privacy that the site owns: accounting, the ledger, and the promise in words. No torch, no flwr."""

from lepton_fl.privacy.accounting import Gaussian, calibrate, epsilon, epsilon_by_step
from lepton_fl.privacy.guarantee import Guarantee
from lepton_fl.privacy.ledger import Charge, Ledger

__all__ = [
    "Charge",
    "Gaussian",
    "Guarantee",
    "Ledger",
    "calibrate",
    "epsilon",
    "epsilon_by_step",
]
