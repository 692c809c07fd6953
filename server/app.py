"""The Flower ServerApp of this deployment folder, for sites that run the agent of `client/`.

The run config names the study and where its files go: `study = "study.toml"`, `out = "run"`; and, for early
stopping on a public signal, a CSV file of public records: `public = "public.csv"`.
"""

from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from lepton_fl.data import Contract
from lepton_fl.federation import Federation, PublicTable
from lepton_fl.files import write_atomic
from lepton_fl.study import load_study
from lepton_fl.tasks import arrays_of, build_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the study that the run config names over the connected sites."""
    study = load_study(Path(str(context.run_config["study"])))
    out = Path(str(context.run_config.get("out", "run")))
    out.mkdir(parents=True, exist_ok=True)
    model = build_model(study, Contract.of(study).width, torch.Generator())
    write_atomic(out / "study.canonical", study.canonical)
    public = context.run_config.get("public")
    Federation(
        study=study,
        model=arrays_of(model),
        checkpoint=out / "checkpoint.safetensors",
        public=None if public is None else PublicTable(Path(str(public)), study),
    ).run(grid)
