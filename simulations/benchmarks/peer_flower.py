"""Flower's Ray simulation as a peer of the speed benchmarks. Runs in the peer's environment.

Each client is a ClientApp whose epoch is Opacus's; FedAvg of equal weights.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import worker
from federation import Federation
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peer_opacus import private_epoch

# It logs each step of each round.
logging.getLogger("flwr").setLevel(logging.WARNING)


@cache
def _federation(path: str) -> Federation:
    """Once in each of Ray's processes."""
    return Federation.read(path)


def train(message: Message, context: Context) -> Message:
    """A client's round."""
    torch.set_num_threads(1)
    federation = _federation(str(message.content["config"]["path"]))
    model = federation.model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    private_epoch(model, *federation.records(int(context.node_config["partition-id"])), federation.noise)
    # The mean of all, as the other simulators have it.
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


def client_app() -> ClientApp:
    """What Ray's processes run."""
    app = ClientApp()
    app.train()(train)
    return app


def simulate(path: str, rounds: int) -> dict[str, Any]:
    """The federation of the file, each client with Opacus."""
    federation = Federation.read(path)
    model, server = federation.model(), ServerApp()

    def done(number: int, _: ArrayRecord) -> None:
        # It is also asked before the first.
        if number:
            worker.say(round=number)

    @server.main()
    def main(grid: Grid, _: Context) -> None:
        clients = federation.clients
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        found = strategy.start(
            grid,
            ArrayRecord(model.state_dict()),
            num_rounds=rounds,
            train_config=ConfigRecord({"path": path}),
            evaluate_fn=done,
            timeout=7200,
        )
        model.load_state_dict(found.arrays.to_torch_state_dict())

    run_simulation(
        server,
        client_app(),
        num_supernodes=federation.clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    return {"auc": federation.auc(model)}


if __name__ == "__main__":
    # Under its own name, by which Ray's processes find it.
    import peer_flower

    worker.serve(simulate=peer_flower.simulate)
