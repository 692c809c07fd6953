"""`lepton-fl simulate --engine ray`: the same run on Flower's own engine, for comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from lepton_fl.cli.running import Request
from lepton_fl.cli.terminal import make_writable, write_new
from lepton_fl.cli.texts import flower_texts
from lepton_fl.errors import ConfigError
from lepton_fl.privacy import Guarantee
from lepton_fl.simulation.ray import require_ray, run_on_ray
from lepton_fl.site import StockFlower


def simulate_on_ray(request: Request, study_file: Path, out: Path, *, others: Mapping[str, object]) -> None:
    """Run a study on Ray; leaves model and checkpoint in `out`, and the Flower app in OUT/flower.

    `others` are the flags that are no part of a request.

    Raises:
        ConfigError: a flag was given that this engine does not have, the study needs what stock Flower cannot
            protect, or Ray is not installed.
    """
    flags = {
        "--data": request.data,
        "--policies": request.policies,
        "--curve": request.curve,
        "--seeds": len(request.seeds) > 1,
        "--drop": request.drops,
        "--public": request.public,
        "--baselines": request.baselines,
        "--secagg": request.secagg,
        **others,
    }
    if given := [flag for flag, value in flags.items() if value]:
        raise ConfigError(
            f"engine ray: runs one study once on public data, and has no {given[0]}",
            fix="--engine process, or --dataset NAME alone",
        )
    study = request.study
    StockFlower.admit(study)
    require_ray()
    tables = request.tables()
    app = out / "flower"
    texts = flower_texts(
        app,
        study=study_file.read_text(encoding="utf-8"),
        dataset=request.dataset or "",
        split=request.how,
        sites=len(tables),
        seed=request.seeds[0],
    )
    write_new(make_writable(out) / "flower", texts)
    made = run_on_ray(app.resolve(), len(tables))
    for file in made.iterdir():
        file.replace(out / file.name)
    made.rmdir()
    labels = ", ".join(Guarantee.of(study).simulation_labels)
    typer.echo(f"model {out / 'model.safetensors'} ({labels}, stock Flower: no site control)")
