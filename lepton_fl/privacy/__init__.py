"""Privacy that the site owns: accounting, the ledger, and the promise in words. No torch, no flwr."""

from typing import TYPE_CHECKING, Any

from lepton_fl.privacy.accounting import (
    DiscreteGaussian,
    Event,
    Gaussian,
    calibrate,
    epsilon,
)
from lepton_fl.privacy.ledger import AnyLedger, Charge, Ledger, RehearsalLedger

if TYPE_CHECKING:
    from lepton_fl.privacy.guarantee import Exposure, Guarantee
    from lepton_fl.privacy.lattice import Lattice

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


def __getattr__(name: str) -> Any:
    # On demand: a server's own process reads ledgers, and has no arrays.
    if name in ("Exposure", "Guarantee"):
        from lepton_fl.privacy import guarantee

        return getattr(guarantee, name)
    if name == "Lattice":
        from lepton_fl.privacy.lattice import Lattice

        return Lattice
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
