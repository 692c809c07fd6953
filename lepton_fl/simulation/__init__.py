"""The whole federation in one process: the same ServerApp, ClientApp, policies and ledgers as deployed."""

from lepton_fl.simulation.grid import Drop, InProcessGrid
from lepton_fl.simulation.simulate import Display, Plan, check_plan, freeze, simulate

__all__ = ["Display", "Drop", "InProcessGrid", "Plan", "check_plan", "freeze", "simulate"]
