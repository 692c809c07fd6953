"""Where a site's models lie: what may be asked for, what is said, and what is settled while training."""

from unittest.mock import Mock

import pytest
import torch

from lepton_fl.config import parse
from lepton_fl.errors import ConfigError
from lepton_fl.fleet.agent import doctor
from lepton_fl.site.config import SiteConfig
from lepton_fl.tasks.task import device_of, score
from lepton_fl.training import bookkeeping
from lepton_fl.training.bookkeeping import tried_on
from lepton_fl.training.device import CPU, choose_device, sent, whole_precision


@pytest.fixture
def with_cuda(monkeypatch):
    """As if torch saw a CUDA device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Example 100")


@pytest.fixture
def without_cuda(monkeypatch):
    """As if torch saw none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def site():
    """A site.toml, read."""

    def make(device):
        raw = {"site": {"id": "north"}, "data": {"source": "a.csv"}, "runtime": {"device": device}}
        return parse(SiteConfig, raw, file="site.toml")

    return make


@pytest.mark.parametrize("asked", ["auto", "cpu", "cuda", "mps"])
def test_site_toml_takes_a_device(site, asked):
    """Refusals that need to look at the machine come later, with a better reason."""
    assert site(asked).runtime.device == asked


def test_site_toml_takes_no_other_device(site):
    """Misspelt is refused, naming the key."""
    with pytest.raises(ConfigError, match=r"runtime\.device"):
        site("gpu")


def test_cuda_where_there_is_none_is_refused(without_cuda):
    """In one line that names file, key, what was found and allowed, and what mends it."""
    with pytest.raises(ConfigError) as refused:
        choose_device("cuda", file="north/site.toml")

    said = refused.value.message
    assert said.startswith("north/site.toml: runtime.device: found 'cuda', allowed: 'auto' or 'cpu' here")
    assert "sees no CUDA device" in said
    assert "\n" not in said
    assert 'set device = "auto" under [runtime] in north/site.toml' in refused.value.fix


@pytest.mark.usefixtures("with_cuda")
def test_cuda_is_for_who_asks_for_it():
    """By name, and no other is given."""
    device = choose_device("cuda", file="site.toml")

    assert device.torch == torch.device("cuda")
    assert device.said.startswith("cuda (Example 100)")


@pytest.mark.usefixtures("with_cuda")
def test_auto_is_the_cpu_and_says_what_lies_idle():
    """Until training was measured on a GPU, a site chooses it."""
    device = choose_device("auto", file="site.toml")

    assert device.torch == CPU
    assert 'a CUDA device lies idle; device = "cuda" under [runtime] in site.toml' in device.said
    assert choose_device("cpu", file="site.toml").said == "cpu"


@pytest.mark.parametrize("seen", ["with_cuda", "without_cuda"])
def test_mps_is_refused_with_the_reason(seen, request):
    """Clipping and sums are float64, which it has not."""
    request.getfixturevalue(seen)

    with pytest.raises(ConfigError, match="mps has no float64"):
        choose_device("mps", file="site.toml")


def test_the_doctor_says_what_the_trial_said(site, tmp_path):
    """Of the device that site.toml names."""
    check = doctor._device(site("cpu"), tmp_path / "site.toml")

    assert (check.verdict, check.found) == ("ok", "cpu; on trial: gradients are the CPU's, rows alike")


@pytest.mark.parametrize(
    ("alike", "says"),
    [
        ([True], "rows alike"),
        ([False, True], "rows alike, matrices padded"),
        ([False, False], "each by itself"),
    ],
)
def test_a_trial_says_how_rows_were_treated(monkeypatch, alike, says):
    """As they are, with zeros around them, or one by one."""
    answers = iter(alike)
    monkeypatch.setattr(bookkeeping._Trial, "rows_alike", lambda *_, **__: next(answers))

    assert says in tried_on(CPU)


def test_a_device_that_fails_is_one_line(monkeypatch):
    """What a driver says on several is cut to its first."""

    def fails(*_, **__):
        raise RuntimeError("no kernel image\nCompile with ...")

    monkeypatch.setattr(bookkeeping.Bookkeeper, "of", fails)

    with pytest.raises(ConfigError) as refused:
        tried_on(CPU)
    assert refused.value.message == "device cpu: no kernel image"


def test_a_trial_draws_nothing_of_torchs_generator():
    """Nobody's later draws depend on whether the doctor was asked."""
    before = torch.get_rng_state()

    tried_on(CPU)

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fails", [False, True])
def test_precision_is_whole_while_training_and_no_longer(monkeypatch, fails):
    """TensorFloat-32 and kernels chosen by time are off within, and as they were afterwards."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def settings():
        return matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic

    before_all = settings()
    matmul.allow_tf32 = True
    try:
        with cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
            before = settings()
            assert before == (True, True, True, False)
            try:
                with whole_precision(torch.device("cuda")):
                    within = settings()
                    int("failure" if fails else "1")
            except ValueError:
                assert fails
            after = settings()
    finally:
        matmul.allow_tf32 = before_all[0]

    assert within == (False, False, False, True)
    assert after == before
    assert settings() == before_all


def test_the_cpus_settings_are_left_alone():
    """There they say nothing."""
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with whole_precision(CPU):
            assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_on_the_cpu_nothing_is_copied():
    """What is sent to where it is, is itself."""
    x = torch.ones(3)

    assert sent(x, CPU) is x


def test_to_a_gpu_it_travels_from_pinned_memory():
    """So that nobody waits for it; no GPU is needed to see what is asked of torch."""
    tensor = Mock()

    there = sent(tensor, torch.device("cuda"))

    assert there is tensor.pin_memory().to.return_value
    tensor.pin_memory().to.assert_called_once_with(torch.device("cuda"), non_blocking=True)


def test_a_model_without_parameters_lies_on_the_cpu():
    """So it can be asked of any."""
    assert device_of(torch.nn.Identity()) == CPU
    assert device_of(torch.nn.Linear(2, 1, device="meta")).type == "meta"


def test_precisions_are_settled_in_training(make_model, make_records, plan, train, monkeypatch):
    """The trial and the steps run within; scores do not ask for it."""
    asked = []

    def settled(device):
        asked.append(device)
        return whole_precision(device)

    monkeypatch.setattr("lepton_fl.training.local.whole_precision", settled)
    model, records = make_model(), make_records([1] * 5)

    train(model, records, plan())

    assert asked == [CPU, CPU]
    assert score(model, bookkeeping.BINARY, records.x_NF).shape == (5,)
