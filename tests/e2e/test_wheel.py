"""The wheel alone is the product: it holds the library only, and runs where the source is not."""

import importlib.util
import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.packaging, pytest.mark.slow]

ROOT = Path(__file__).parents[2]

STUDY = """\
[study]
name = "cancer-wheel"
purpose = "show that the installed wheel runs a simulation"

[task]
kind = "binary"
target = "malignant"
positive = 1
metric = "auc"

[privacy]
unit = "record"
epsilon = 3.0
delta = 1e-4
clip = 1.0
noise = "local"

[secure_aggregation]
enabled = false
min_sites = 3

[train]
strategy = "lockstep"
rounds = 5
sample_rate = 0.2
optimizer = "adam"
lr = 0.1

[model]
name = "logreg"

[features]
scaling = "bounds"

[features.columns.mean_radius]
type = "float"
range = [0, 50]

[features.columns.mean_texture]
type = "float"
range = [0, 60]
"""


def run(*command: str | Path, cwd: Path, env: dict[str, str], timeout: int) -> str:
    """Standard output of a command that must end well; all it said where it does not."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def outside_env() -> dict[str, str]:
    """The environment without what could let the source tree or this environment shine through."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**env, "PYTHONSAFEPATH": "1", "NO_COLOR": "1"}


def install(wheel: Path, python: Path, folder: Path) -> None:
    """Install with uv where it works, which takes seconds where pip takes minutes; or else pip."""
    env = outside_env()
    if importlib.util.find_spec("uv") is not None:
        # uv does not read pip's settings, so it is told those that say where packages come from.
        for pip_name, uv_name in [
            ("PIP_FIND_LINKS", "UV_FIND_LINKS"),
            ("PIP_INDEX_URL", "UV_DEFAULT_INDEX"),
            ("PIP_EXTRA_INDEX_URL", "UV_INDEX"),
            ("PIP_CERT", "SSL_CERT_FILE"),
        ]:
            if pip_name in env:
                env.setdefault(uv_name, env[pip_name])
        uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python)]
        done = subprocess.run(
            [*uv, "--constraints", str(ROOT / "constraints.txt"), str(wheel)],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=900,
        )
        if done.returncode == 0:
            return
    run(
        *(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"),
        *("--constraint", ROOT / "constraints.txt", wheel),
        cwd=folder,
        env=env,
        timeout=1800,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel built from this tree."""
    folder = tmp_path_factory.mktemp("dist")
    # -P, or a folder of this tree called `build` would stand in for the tool.
    command = [sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation"]
    run(*command, "--outdir", folder, cwd=ROOT, env=dict(os.environ), timeout=300)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bin_folder(wheel, tmp_path_factory) -> Path:
    """Where the programs of a fresh environment lie that holds the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / "bin"
    install(wheel, programs / "python", folder)
    return programs


def test_wheel_holds_the_library_only(wheel):
    """No top-level entry but lepton_fl and its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}

    assert {top for top in tops if not top.endswith(".dist-info")} == {"lepton_fl"}
    assert len(tops) == 2


def test_wheel_holds_every_file_of_the_library(wheel):
    """Package data and the typing marker travel with the code."""
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "lepton_fl").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }

    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("lepton_fl/")}

    assert held == expected


def test_installed_package_is_the_one_imported(bin_folder, tmp_path):
    """The fresh environment imports its own copy, not this tree's."""
    where = "import lepton_fl; print(lepton_fl.__file__)"

    printed = run(bin_folder / "python", "-c", where, cwd=tmp_path, env=outside_env(), timeout=60).strip()

    assert Path(printed).resolve().is_relative_to(bin_folder.parent.resolve())


def test_installed_program_shows_help(bin_folder, tmp_path):
    """`lepton-fl --help` names its commands."""
    printed = run(bin_folder / "lepton-fl", "--help", cwd=tmp_path, env=outside_env(), timeout=60)

    assert "simulate" in printed


def test_installed_program_writes_a_template(bin_folder, tmp_path):
    """`lepton-fl init` finds its templates in the wheel."""
    run(
        *(bin_folder / "lepton-fl", "init", "mine", "--template", "diagnosis"),
        cwd=tmp_path,
        env=outside_env(),
        timeout=60,
    )

    assert {path.name for path in (tmp_path / "mine").glob("*.toml")} >= {
        "study.toml",
        "policy.toml",
    }


def test_installed_program_runs_a_simulation(bin_folder, tmp_path):
    """`lepton-fl simulate` runs a whole federation away from the source tree."""
    (tmp_path / "study.toml").write_text(STUDY, encoding="utf-8")

    run(
        *(bin_folder / "lepton-fl", "simulate", "study.toml", "--dataset", "cancer"),
        *("--sites", "3", "--split", "iid", "--out", "run"),
        cwd=tmp_path,
        env=outside_env(),
        timeout=300,
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))

    assert results["status"] == "completed"
    assert results["study_name"] == "cancer-wheel"
    assert len(results["sites"]) == 3
