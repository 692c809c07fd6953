"""The commented files that `init` and `quickstart` write."""

from __future__ import annotations

import json
import re
import shlex
from importlib.resources import files
from pathlib import Path

from lepton_fl.data import dataset

STUDIES = {"diagnosis": "heart", "fraud": "fraud", "credit": "credit", "ulb": "ulb"}
"""Template name to study file."""
_STOCK = re.compile(r'noise = "shared" *#.*\n\n\[secure_aggregation\](.|\n)*?\n(?=\n\[)')
_IN_CLEAR = """noise = "local"                 # each site adds all of it

[secure_aggregation]            # not under stock Flower: its server sees each site's (private) update
enabled = false
min_sites = 3
"""
_COLUMNS_FROM = ("heart", "cancer", "credit", "ulb")
"""Studies on public data: their columns come with the data."""


def study_text(name: str, *, epsilon: float) -> str:
    """study.toml of a template or public data set."""
    text = _read(f"{name}.study.toml").replace("{epsilon}", repr(epsilon))
    return text + dataset(name).columns_toml if name in _COLUMNS_FROM else text


def site_text(site: str = "site-1") -> str:
    """site.toml of an institution."""
    return _read("site.toml").replace("{site}", site)


def server_text(folder: Path) -> str:
    """server.toml, of a consortium that is called as its folder."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")[:64]
    return _read("server.toml").replace("{name}", name or "consortium")


def policy_text(
    *,
    data_id: str,
    epsilon_total: float,
    epsilon_per_study: float,
    delta_total: float,
    privacy_unit: str,
    min_rows: int,
    min_positives: int,
    approval: str,
) -> str:
    """policy.toml with the given limits."""
    fields = {
        "data_id": data_id,
        "epsilon_total": repr(epsilon_total),
        "epsilon_per_study": repr(epsilon_per_study),
        "delta_total": repr(delta_total),
        "privacy_unit": privacy_unit,
        "min_rows": str(min_rows),
        "min_positives": str(min_positives),
        "approval": approval,
    }
    text = _read("policy.toml")
    for name, value in fields.items():
        text = text.replace("{" + name + "}", value)
    return text


def flower_texts(
    folder: Path,
    *,
    study: str | None = None,
    dataset: str = "heart",
    split: str = "natural",
    sites: int = 4,
    seed: int = 0,
) -> dict[str, str]:
    """The files of a Flower app in `folder`, by name: a study on public data, under stock Flower."""
    home = folder.resolve()
    fields = {
        "dataset": json.dumps(dataset),
        "split": json.dumps(split),
        "sites": str(sites),
        "seed": str(seed),
        "out": json.dumps(str(home / "runs")),
    }
    project = _read("flower.pyproject.toml")
    for name, value in fields.items():
        project = project.replace("{" + name + "}", value)
    return {
        "pyproject.toml": project,
        "flower_app.py": _read("flower.app.txt"),
        "study.toml": _STOCK.sub(_IN_CLEAR, study_text("heart", epsilon=3.0)) if study is None else study,
        "flower.env": _read("flower.env").replace("{home}", shlex.quote(str(home / ".flwr"))),
        ".flwr/config.toml": _read("flower.config.toml"),
    }


def _read(name: str) -> str:
    return (files("lepton_fl.cli") / "templates" / name).read_text(encoding="utf-8")
