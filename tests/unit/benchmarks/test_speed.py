"""The logic of the speed benchmarks themselves, on small numbers and without their peers."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional

import lepton_fl

BENCHMARKS = Path(lepton_fl.__file__).parents[1] / "simulations" / "benchmarks"
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processes in /proc")


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark's module, and leaves none behind: their names are short."""
    # Some of them set it, for processes that are theirs.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    own = {path.stem for path in BENCHMARKS.glob("*.py")}
    for name in (set(sys.modules) - before) & own:
        del sys.modules[name]


# Models


@pytest.mark.parametrize("case", ["linear", "mlp", "resnet", "ft", "gru", "cnn"])
def test_a_models_logit_depends_on_its_own_record_alone(script, case):
    models = script("models")
    model, (x_BF, _) = models.model_of(case), models.records_of(case, 5)
    moved_BF = x_BF.clone()
    moved_BF[1:] += 0.5

    assert model(x_BF).shape == (5,)
    torch.testing.assert_close(model(x_BF)[0], model(moved_BF)[0])
    assert not torch.allclose(model(x_BF)[1:], model(moved_BF)[1:])


def test_the_area_under_the_curve_is_scikit_learns(script):
    draws = np.random.default_rng(1)
    y_N, score_N = draws.integers(0, 2, 200).astype(np.float32), draws.normal(size=200)
    found = script("models").auc(torch.from_numpy(score_N), torch.from_numpy(y_N))

    assert found == pytest.approx(roc_auc_score(y_N, score_N), abs=1e-12)


def test_every_peer_is_given_the_same_federation(script, tmp_path):
    federation = script("federation")
    made = federation.Federation.make(3, model_L=np.zeros(4097, np.float32), noise=0.7)
    made.write(tmp_path / "all.npz")
    read = federation.Federation.read(str(tmp_path / "all.npz"))

    assert read.clients == 3
    assert all(200 <= len(read.records(client)[1]) <= 2000 for client in range(3))
    for name, value in vars(made).items():
        np.testing.assert_array_equal(vars(read)[name], value)


def test_a_federations_model_has_the_given_parameters(script):
    federation = script("federation")
    made = federation.Federation.make(1, model_L=np.zeros(4097, np.float32), noise=0.0)
    flat_L = np.arange(4097, dtype=np.float32)
    model = made.model(flat_L)

    np.testing.assert_array_equal(torch.nn.utils.parameters_to_vector(model.parameters()).detach(), flat_L)


# What is measured, and how


def test_our_step_sums_the_clipped_gradients_of_the_batch(script, tmp_path):
    """Those of a loop over the records, each clipped by itself."""
    models = script("models")
    script("peer_ours").clipped("linear", 8, str(tmp_path / "sum.npz"))
    model, (x_BF, y_B) = models.model_of("linear"), models.records_of("linear", 8)
    clip = models.median_norm(model, x_BF, y_B)
    expected = torch.zeros(31)
    for record in range(8):
        loss = functional.binary_cross_entropy_with_logits(model(x_BF[record, None]), y_B[record, None])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        expected += gradient * min(1.0, clip / float(gradient.norm()))
    found = np.load(tmp_path / "sum.npz", allow_pickle=False)

    np.testing.assert_allclose(
        np.concatenate([found[name].ravel() for name in ("0.weight", "0.bias")]), expected, rtol=1e-5
    )


def test_different_sums_are_told_apart(script):
    difference = script("private_step").difference
    one = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    other = {"b": np.array([[4.0]]), "a": np.array([3.0, 0.5])}

    assert difference(one, one) == 0
    assert difference(other, one) == pytest.approx(0.1)
    with pytest.raises(AssertionError, match="'b'"):
        difference(one, {"a": one["a"]})


def test_ratios_are_of_the_same_turn(script):
    ratios = script("private_step").ratios
    measured = {
        "plain": [{"cpu": 1.0}, {"cpu": 4.0}],
        "slow": [{"cpu": 3.0}, {"cpu": 8.0}],
        "none": [{"error": "RuntimeError: no such layer"}],
    }

    assert ratios(measured, "slow") == [3.0, 2.0]
    assert ratios(measured, "none") is None


def test_a_matrix_product_of_known_size_is_counted(script):
    """Forward 2BF, and backward the same for the weight; the input needs no gradient."""
    assert script("peer_ours").operations("linear", 16)["operations"] == 4 * 16 * 30


def test_a_time_is_for_one_step(script, monkeypatch):
    """Of as many steps as take the time that was asked for."""
    worker, now, calls = script("worker"), [0.0], []

    def steps(count):
        calls.append(count)
        now[0] += 0.01 * count

    clock = SimpleNamespace(process_time=lambda: now[0] / 2, perf_counter=lambda: now[0])
    monkeypatch.setattr(worker, "time", clock)
    found = worker.Timed(steps, 0.5)()

    assert calls[-1] == 50
    assert found == {"cpu": pytest.approx(0.005), "wall": pytest.approx(0.01)}


def test_time_inside_of_another_part_is_not_counted_twice(script, monkeypatch):
    secure_rounds, now = script("secure_rounds"), [0.0]
    monkeypatch.setattr(
        secure_rounds, "time", SimpleNamespace(process_time=lambda: now[0], perf_counter=lambda: 2 * now[0])
    )

    def spend(seconds):
        now[0] += seconds

    parts = SimpleNamespace(spend=spend)

    def whole():
        spend(1.0)
        parts.spend(3.0)
        parts.spend(2.0)

    parts.whole = whole
    watch = secure_rounds.Watch()
    with watch.watching((("inner", parts, "spend"), ("outer", parts, "whole"))):
        parts.whole()

    assert dict(watch.seconds) == {"inner": 5.0, "outer": 1.0}
    assert dict(watch.wall) == {"inner": 10.0, "outer": 2.0}
    assert (parts.spend, parts.whole) == (spend, whole)


def test_what_is_scaled_says_so(script):
    simulate = script("simulate")
    found = simulate.Found(wall=[9.0, 10.0, 11.0], cpu=[5.0, 7.0, 9.0], memory=[1, 2, 3], auc=0.9)

    assert found.steady(found.cpu) == [2.0, 2.0]
    row = simulate.scaled("Flower", found, 1000, 100, ours=4.0)
    assert row == "| Flower, *scaled from 100* | *20* | *10* | *5.0* | | | | |"


# Processes

CHILD = """
import subprocess, sys, time
while time.process_time() < 0.3: pass
inner = subprocess.Popen([sys.executable, "-c", '''
import sys, time
while time.process_time() < 0.3: pass
print("spun", flush=True); sys.stdin.read()
'''], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
inner.stdout.readline(); print("ready", flush=True)
sys.stdin.readline()
inner.communicate(); print("reaped", flush=True)
sys.stdin.read()
"""


def test_the_work_of_a_process_and_its_children_is_counted_also_when_they_have_ended(script):
    peers = script("peers")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CHILD], **pipes) as child:
        child.stdout.readline()
        running = len(peers.tree_of(child.pid)), peers.cpu_of(child.pid), peers.memory_of(child.pid)
        child.stdin.write("end it\n")
        child.stdin.flush()
        child.stdout.readline()
        ended = len(peers.tree_of(child.pid)), peers.cpu_of(child.pid), peers.memory_of(child.pid)
        child.stdin.close()

    assert (running[0], ended[0]) == (2, 1)
    # A child that has ended is known by ticks of a hundredth of a second, user and system.
    assert running[1] >= 0.6
    assert ended[1] >= running[1] - 0.02
    assert running[2] > ended[2] > 1 << 20


def test_a_worker_says_in_one_line_what_it_cannot_and_goes_on():
    program = (
        "import worker\n"
        "def half(of):\n    print('noise')\n    return {'half': of / 2}\n"
        "worker.serve(half=half)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input='{"do": "half", "of": "a"}\n{"do": "half", "of": 3}\n',
        env={"PYTHONPATH": str(BENCHMARKS)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    failed, fine = done.stdout.splitlines()

    assert failed.startswith('{"error": "TypeError: unsupported operand')
    assert fine == '{"half": 1.5}'
    assert done.stderr == "noise\nnoise\n"
