"""The ServerApp: Flower's shell round the round loop."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from lepton_fl.federation.loop import Federation


def server_app(federation: Federation) -> ServerApp:
    """Flower's ServerApp that runs `federation` over whatever Grid it is given."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, _: Context) -> None:
        federation.run(grid)

    return app
