"""What runs is Flower's own: its ServerApp, its ClientApps, its messages, and none of its calls home."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid, ServerApp
from safetensors.numpy import load_file

from lepton_fl.data import Contract
from lepton_fl.federation import Federation, server_app
from lepton_fl.federation.grids import WrappingGrid
from lepton_fl.messages import identify
from lepton_fl.simulation import InProcessGrid
from lepton_fl.site import client_app, open_site
from lepton_fl.study import load_study
from lepton_fl.tasks import arrays_of, build_model

STUDY = """\
[study]
name = "wards"
[task]
kind = "binary"
target = "ill"
[privacy]
epsilon = 4.0
delta = 1e-3
[secure_aggregation]
enabled = false
[train]
rounds = 2
sample_rate = 0.2
expected_batch = 10.0
lr = 0.1
[features.columns.x]
type = "float"
range = [-1, 1]
"""
POLICY = """\
[data]
id = "records"
[budget]
epsilon_total = 4.0
epsilon_per_study = 4.0
delta_total = 1e-3
[require]
secure_aggregation = false
approval = "auto"
"""
SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
WATCH = """\
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "flwr":
            print(*(os.environ.get(name) for name in {names}))
sys.meta_path.insert(0, Watch())
import {module}
print("flwr" in sys.modules)
"""


@pytest.fixture
def client_apps(tmp_path):
    """An agent's app three times, each at its own institution."""
    identify("0" * 32, 1)
    apps = {}
    for node, name in enumerate(("clinic", "practice", "ward"), start=101):
        home = tmp_path / name
        home.mkdir()
        (home / "site.toml").write_text(f'[site]\nid = "{name}"\n[data]\nsource = "records.csv"\n')
        (home / "policy.toml").write_text(POLICY)
        values = np.random.default_rng(node).uniform(-1, 1, 120)
        rows = "".join(f"{value:.6f},{int(value > 0)}\n" for value in values)
        (home / "records.csv").write_text("x,ill\n" + rows)
        apps[node] = client_app(open_site(home / "site.toml"))
    yield apps
    for app in apps.values():
        app.site.ledger.close()


class Agent(ClientApp):
    """A deployed site's app as its server knows it: across a network, with no site to be seen."""

    def __init__(self, app):
        super().__init__()
        self._app = app

    def __call__(self, message, context):
        return self._app(message, context)


@pytest.fixture
def grid(client_apps):
    return InProcessGrid({node: Agent(app) for node, app in client_apps.items()})


class Wire(WrappingGrid):
    """Every reply becomes Flower's protocol buffer and a message again."""

    def send_and_receive(self, messages, *, timeout=None):
        for reply in self.inner.send_and_receive(messages, timeout=timeout):
            yield message_from_proto(message_to_proto(reply))


@pytest.fixture
def served(tmp_path):
    """The server's app, and where its checkpoint goes."""
    (tmp_path / "study.toml").write_text(STUDY)
    study, checkpoint = load_study(tmp_path / "study.toml"), tmp_path / "checkpoint.safetensors"
    model = arrays_of(build_model(study, Contract.of(study).width, torch.Generator()))
    return server_app(Federation(study=study, model=model, checkpoint=checkpoint)), checkpoint


def test_server_and_client_are_flowers_apps(client_apps, grid, served):
    """Not something that looks like them."""
    assert isinstance(served[0], ServerApp)
    assert all(isinstance(app, ClientApp) for app in client_apps.values())
    assert isinstance(grid, Grid)


def test_the_apps_train_a_model(client_apps, grid, served):
    """One server's over three of sites, every reply through Flower's own serialisation."""
    app, checkpoint = served
    context = Context(run_id=0, node_id=1, node_config={}, state=RecordDict(), run_config={})

    app(Wire(grid), context)

    arrays = load_file(checkpoint)
    rounds = [len(app.site.ledger.history("records")) for app in client_apps.values()]
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert any(np.abs(array).max() > 0 for name, array in arrays.items() if name.startswith("model/"))
    assert rounds == [2, 2, 2]


def test_an_app_of_ours_answers_a_message_of_flowers(client_apps):
    """Called as a SuperNode calls it; what it does not know it refuses in a reply."""
    context = Context(run_id=0, node_id=101, node_config={}, state=RecordDict(), run_config={})

    reply = client_apps[101](Message(RecordDict(), dst_node_id=101, message_type="query.rows"), context)

    assert isinstance(reply, Message)
    assert reply.has_error()


@pytest.mark.parametrize("module", ["lepton_fl.messages", "lepton_fl.federation", "lepton_fl.site.app"])
def test_flower_is_told_not_to_call_out_before_it_is_imported(module):
    """It reads its settings at import."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
    code = WATCH.format(names=tuple(SETTINGS), module=module)

    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)

    assert done.stdout.split("\n")[:2] == [" ".join(SETTINGS.values()), "True"], done.stderr


def test_importing_the_package_does_not_import_flower():
    """`lepton_fl` alone sets the variables; nothing is read yet."""
    code = "import sys, lepton_fl; print('flwr' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)

    assert done.stdout == "False\n"


def test_what_the_institution_set_itself_is_kept():
    """A default, not an order: who wants Flower's telemetry has said so."""
    code = "import os, lepton_fl; print(os.environ['FLWR_TELEMETRY_ENABLED'])"
    env = {**os.environ, "FLWR_TELEMETRY_ENABLED": "1"}

    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)

    assert done.stdout == "1\n"
