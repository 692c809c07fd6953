"""`lepton-fl simulate --engine ray`: the same run on Flower's own engine, for comparison."""

from __future__ import annotations

from pathlib import Path

import typer

from lepton_fl.cli.running import read_tables
from lepton_fl.cli.terminal import make_writable, write_new
from lepton_fl.cli.texts import flower_texts
from lepton_fl.privacy import Guarantee
from lepton_fl.simulation.ray import require_ray, run_on_ray
from lepton_fl.site import StockFlower
from lepton_fl.study import load_study


def simulate_on_ray(
    study_file: Path, out: Path, *, dataset: str, how: str, sites: int | None, seed: int
) -> None:
    """Run a study on Ray; leaves model and checkpoint in `out`, and the Flower app in OUT/flower.

    Raises:
        ConfigError: the study needs what stock Flower cannot protect, or Ray is not installed.
    """
    study = load_study(study_file)
    StockFlower.admit(study)
    require_ray()
    tables = read_tables(study, dataset_name=dataset, data=None, sites=sites, how=how, seed=seed)
    app = out / "flower"
    texts = flower_texts(
        app,
        study=study_file.read_text(encoding="utf-8"),
        dataset=dataset,
        split=how,
        sites=len(tables),
        seed=seed,
    )
    write_new(make_writable(out) / "flower", texts)
    made = run_on_ray(app.resolve(), len(tables))
    for file in made.iterdir():
        file.replace(out / file.name)
    made.rmdir()
    labels = ", ".join(Guarantee.of(study).simulation_labels)
    typer.echo(f"model {out / 'model.safetensors'} ({labels}, stock Flower: no site control)")
