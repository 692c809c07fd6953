"""Under stock Flower: public data only, no site's own table, nothing that needs a secret of a round."""

import logging

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from safetensors.numpy import load_file

from lepton_fl.cli.texts import flower_texts
from lepton_fl.data import Contract, load_dataset
from lepton_fl.errors import ConfigError
from lepton_fl.messages import CONFIG, JOIN, Assignment, assignment_config
from lepton_fl.simulation import InProcessGrid
from lepton_fl.simulation.flower import PublicClientApp, public_server_app
from lepton_fl.simulation.run import prepare, split_sites
from lepton_fl.study import load_study
from lepton_fl.tasks import model_hash

HOSPITALS = 4


@pytest.fixture(autouse=True)
def _quiet():
    """The ServerApp writes to the console, as Flower wants it; not here."""
    logger = logging.getLogger("lepton_fl")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def study_file(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(flower_texts(tmp_path)["study.toml"].replace("rounds = 50", "rounds = 2"))
    return path


@pytest.fixture
def config(tmp_path):
    return {"dataset": "heart", "sites": HOSPITALS, "out": str(tmp_path / "runs")}


def context(config, **node):
    return Context(run_id=7, node_id=1, node_config=node, state=RecordDict(), run_config=config)


class Node(ClientApp):
    """What Flower does for each message: a new app, handed the node's context."""

    def __init__(self, config, part, parts=HOSPITALS):
        super().__init__()
        self._context = context(config, **{"partition-id": part, "num-partitions": parts})

    def __call__(self, message, _):
        return PublicClientApp()(message, self._context)


@pytest.fixture
def ask(study_file, config):
    """Ask one node whether it takes part."""

    def run(node):
        assignment = Assignment(study=load_study(study_file), run="0" * 32, round=0, cohort=())
        content = RecordDict({CONFIG: assignment_config(assignment)})
        return node(Message(content, dst_node_id=1, message_type=JOIN), None)

    return run


def run_server(study_file, config, nodes=()):
    grid = InProcessGrid({101 + number: node for number, node in enumerate(nodes)})
    public_server_app(study_file)(grid, context(config))


def test_the_model_is_that_of_a_simulation(tmp_path, study_file, config):
    """The nodes in another order, each app anew for each message: the same bits."""
    study = load_study(study_file)
    run = prepare(study, split_sites(load_dataset("heart", Contract.of(study)), study, 0), 0)
    run.start()
    run.close()

    run_server(study_file, config, [Node(config, part) for part in (2, 0, 3, 1)])

    model = load_file(tmp_path / "runs" / "7" / "model.safetensors")
    assert model_hash(model) == model_hash(run.federation.model)


def test_a_node_takes_part_under_its_partitions_name(ask, config):
    reply = ask(Node(config, 1))

    assert reply.content.config_records[CONFIG]["site"] == "hungary"


def test_a_site_s_own_table_is_refused(ask, config, monkeypatch):
    """Even where the institution names it: the server ships the code that would read it."""
    monkeypatch.setenv("LEPTON_FL_SITE", "/etc/lepton-fl/site.toml")

    reply = ask(Node(config, 1))

    assert reply.error.reason == "stock Flower is for public data sets"


@pytest.mark.parametrize(("part", "parts"), [(4, 4), (-1, 4), (0, 2), ("0", 4), (None, None)], ids=repr)
def test_a_node_that_is_no_part_of_the_data_is_refused(ask, config, caplog, part, parts):
    """Two nodes would otherwise train on the same records, or on a table of another study."""
    reply = ask(Node(config, part, parts))

    assert reply.has_error()
    assert "num-partitions" in caplog.text


@pytest.mark.parametrize("noise", ["local", "shared"])
def test_what_needs_secure_aggregation_is_refused(study_file, config, noise):
    """By the server, before anyone is asked."""
    text = study_file.read_text().replace("enabled = false", "enabled = true")
    study_file.write_text(text.replace('noise = "local"', f'noise = "{noise}"'))

    with pytest.raises(ConfigError, match="does not run under stock Flower"):
        run_server(study_file, config)


def test_what_needs_secure_aggregation_is_refused_by_a_node(study_file, ask, config):
    """Whatever the server did."""
    study_file.write_text(study_file.read_text().replace("enabled = false", "enabled = true"))

    reply = ask(Node(config, 0))

    assert reply.error.reason == "secure aggregation is not available under stock Flower"


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("out", "runs", "absolute"),
        ("dataset", "records.csv", "heart"),
        ("sites", 3, "natural sites"),
        ("split", "by-name", "iid"),
        ("epsilon", 1.0, "unknown key"),
    ],
)
def test_a_wrong_run_config_is_refused(study_file, config, key, value, named):
    """One line that names what is allowed; Flower shows it in the run's log."""
    with pytest.raises(ConfigError, match=named):
        run_server(study_file, {**config, key: value})
