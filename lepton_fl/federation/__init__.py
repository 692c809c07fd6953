"""The server's side of a run: rounds, strategies, checkpoints, and the loop that ties them to a Grid."""

from lepton_fl.federation.app import server_app
from lepton_fl.federation.grids import SummingGrid
from lepton_fl.federation.loop import Deadlines, Federation, Observer, RoundReport
from lepton_fl.federation.secure import SecureGrid
from lepton_fl.federation.stopping import PublicTable, stopping_of

__all__ = [
    "Deadlines",
    "Federation",
    "Observer",
    "PublicTable",
    "RoundReport",
    "SecureGrid",
    "SummingGrid",
    "server_app",
    "stopping_of",
]
