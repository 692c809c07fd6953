"""The server's side of a run: rounds, strategies, checkpoints, and the loop that ties them to a Grid."""

from lepton_fl.federation.app import server_app
from lepton_fl.federation.grids import SummingGrid
from lepton_fl.federation.loop import Federation, Observer

__all__ = ["Federation", "Observer", "SummingGrid", "server_app"]
