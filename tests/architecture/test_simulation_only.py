"""What holds only in a simulation is marked by type: its misuse does not pass the type checker."""

import ast
import importlib.util
import textwrap
from pathlib import Path

import pytest

from lepton_fl.privacy import Ledger, RehearsalLedger
from lepton_fl.simulation import InProcessGrid
from lepton_fl.site import Deployed, Site, client_app
from lepton_fl.training import SimulationNoise, UnseededNoise

ROOT = Path(__file__).parents[2]
GIVEN = """
    from pathlib import Path

    from lepton_fl.privacy import Ledger, RehearsalLedger
    from lepton_fl.simulation import InProcessGrid
    from lepton_fl.simulation.run import Run
    from lepton_fl.site import Deployed, Simulated, Site, StockFlower, client_app, open_site
    from lepton_fl.training import SimulationNoise, UnseededNoise

    def use(
        deployed: Site[Deployed],
        simulated: Site[Simulated],
        stock: Site[StockFlower],
        ledger: Ledger,
        run: Run,
    ) -> None:
"""
MISUSES = {
    "a deployed site in the in-process grid": "InProcessGrid({101: client_app(deployed)})",
    "a stock Flower site in the in-process grid": "InProcessGrid({101: client_app(stock)})",
    "a deployed site in a simulated run": "run.sites['clinic'] = deployed",
    "a rehearsal ledger at a deployed site": "Deployed(noise=UnseededNoise(), ledger=RehearsalLedger())",
    "seeded noise at a deployed site": "Deployed(noise=SimulationNoise(0, 'clinic'), ledger=ledger)",
    "a lasting ledger under stock Flower": "StockFlower(noise=SimulationNoise(0, 'clinic'), ledger=ledger)",
    "other surroundings for a deployed site": (
        "anywhere: Site[Deployed | Simulated] = deployed; anywhere.surroundings = simulated.surroundings"
    ),
    "a rehearsal policy for a deployed site": "deployed.policy = simulated.policy",
    "a site's own table in a simulation": "s: Site[Simulated] = open_site(Path('site.toml'))",
    "a site's own table under stock Flower": "s: Site[StockFlower] = open_site(Path('site.toml'))",
}
USE = """
        InProcessGrid({101: client_app(simulated)})
        run.sites["clinic"] = simulated
        Deployed(noise=UnseededNoise(), ledger=ledger)
        Simulated(noise=SimulationNoise(0, "clinic"), ledger=RehearsalLedger())
        s: Site[Deployed] = open_site(Path("site.toml"))
        print(s.ledger, s.noise)
"""


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """mypy's errors for each snippet, all in one go: it reads the library once."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed: pip install -e '.[dev]'")
    from mypy import api

    folder = tmp_path_factory.mktemp("snippets")
    snippets = {name: f"        {code}\n" for name, code in MISUSES.items()} | {"use": USE}
    files = {}
    for number, (name, code) in enumerate(snippets.items()):
        files[name] = folder / f"snippet_{number}.py"
        files[name].write_text(textwrap.dedent(GIVEN.rstrip() + "\n" + code.strip("\n") + "\n"))
    # The cache of the project's own check: cold, mypy reads torch for a minute.
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYPYPATH", str(ROOT))
        out, err, _ = api.run([*options, *map(str, files.values())])
    assert not err, err
    return {
        name: [line for line in out.splitlines() if file.name in line and ": error:" in line]
        for name, file in files.items()
    }


@pytest.mark.parametrize("misuse", MISUSES)
def test_the_type_checker_rejects(judged, misuse):
    """One error, and it is about the types."""
    (error,) = judged[misuse]

    assert error.endswith(("[arg-type]", "[assignment]", "[dict-item]", "[misc]")), error


def test_the_type_checker_accepts_each_in_its_place(judged):
    """What it rejects above it does not reject for another reason."""
    assert judged["use"] == []


@pytest.mark.parametrize(
    ("noise", "ledger"),
    [(SimulationNoise(0, "clinic"), Ledger), (UnseededNoise(), lambda _: RehearsalLedger())],
    ids=["seeded noise", "rehearsal ledger"],
)
def test_a_deployed_site_is_not_made_of_parts_of_a_simulation(tmp_path, noise, ledger):
    """Refused also where nobody ran a type checker."""
    given = ledger(tmp_path / "ledger.db")

    with pytest.raises(TypeError, match="deployed site"):
        Deployed(noise=noise, ledger=given)

    given.close()


def test_a_ledger_is_a_file_whatever_it_is_called(tmp_path, monkeypatch):
    """SQLite's name for a database that forgets is a name like any other."""
    monkeypatch.chdir(tmp_path)
    Ledger(Path(":memory:")).close()

    assert (tmp_path / ":memory:").stat().st_size > 0


def test_the_in_process_grid_takes_no_deployed_site(tmp_path):
    """The same: between a deployed site and its server there is a network."""
    ledger = Ledger(tmp_path / "ledger.db")
    site = Site(
        name="clinic",
        policy=None,
        policy_file="policy.toml",
        approvals=None,
        load=None,
        surroundings=Deployed(noise=UnseededNoise(), ledger=ledger),
    )

    with pytest.raises(TypeError, match="in-process grid"):
        InProcessGrid({101: client_app(site)})

    ledger.close()


@pytest.mark.parametrize("folder", ["lepton_fl/site", "lepton_fl/federation", "lepton_fl/fleet"])
def test_what_is_deployed_never_imports_the_simulation(folder):
    """Not even inside a function."""
    found = {
        (path.name, name)
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in _imported(node)
        if name.startswith("lepton_fl.simulation")
    }

    assert found == set()


def _imported(node):
    """The modules, and what may be modules, that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []
