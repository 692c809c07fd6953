"""The whole federation in one process: the same ServerApp, ClientApp, policies and ledgers as deployed."""

from lepton_fl.simulation.grid import InProcessGrid
from lepton_fl.simulation.simulate import Display, Plan, freeze, simulate

__all__ = ["Display", "InProcessGrid", "Plan", "freeze", "simulate"]
