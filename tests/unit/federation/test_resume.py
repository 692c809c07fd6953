"""A run that was killed goes on with the next number and with the optimizer as it stood."""

import pytest

from lepton_fl.errors import ConfigError
from lepton_fl.federation import Federation
from lepton_fl.federation.checkpoint import Checkpoint
from lepton_fl.messages import from_record, read_assignment, update_reply
from lepton_fl.tasks.arrays import model_hash


@pytest.fixture
def numbers():
    """Round numbers that a site was asked for, over all of its server's lives."""
    return []


@pytest.fixture
def grid(make_grid, numbers):
    """Sites that pull the model towards one; the first keeps the round numbers."""

    def pull(message):
        model = from_record(message.content.array_records["arrays"])
        return update_reply(message, {name: (1 - array) / 4 for name, array in model.items()})

    def keep(message):
        numbers.append(read_assignment(message).round)
        return pull(message)

    return make_grid(a=keep, b=pull, c=pull)


@pytest.fixture
def adam(make_study):
    return make_study(train={"optimizer": "adam", "spare_rounds": 2})


@pytest.mark.parametrize("save", range(2, 7))
def test_a_round_number_is_never_used_twice(
    make_federation, grid, adam, numbers, tmp_path, monkeypatch, save
):
    """Killed instead of the n-th write of the checkpoint: before a round goes out, or after it is in."""
    path = tmp_path / "checkpoint"
    write, writes = Checkpoint.write, []

    def killed(self, to):
        writes.append(to)
        if len(writes) == save:
            raise KeyboardInterrupt
        write(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            make_federation(study=adam, checkpoint=path).run(grid)

    resumed = Federation.resume(path, study=adam)
    resumed.run(grid)

    assert resumed.done == 3
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) == 3 + (save % 2 == 0)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_number_that_went_out_is_gone(make_federation, grid, altered, adam, numbers, tmp_path, number):
    """Killed while the sites' replies are on their way."""
    path = tmp_path / "checkpoint"

    def kill(replies):
        if numbers and numbers[-1] == number:
            raise KeyboardInterrupt
        return replies

    with pytest.raises(KeyboardInterrupt):
        make_federation(study=adam, checkpoint=path).run(altered(grid, kill))
    Federation.resume(path, study=adam).run(grid)

    assert numbers == [1, 2, 3, 4]


@pytest.mark.parametrize("stopped", [1, 2])
@pytest.mark.parametrize(
    "name", ["lockstep", "fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"]
)
def test_a_resumed_run_ends_where_an_unbroken_one_does(
    make_federation, make_study, grid, seen, killed_after, tmp_path, name, stopped
):
    """Killed between two rounds: the state of every strategy included, the same bits."""
    more = {"fedprox": {"proximal_mu": 0.1}, "fedavg": {}}.get(name, {"lr_schedule": "cosine"})
    study = make_study(train={"strategy": name, "optimizer": "adam", **more})
    whole = make_federation(study=study, observer=None)
    whole.run(grid)

    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        make_federation(study=study, observer=killed_after(stopped), checkpoint=path).run(grid)
    resumed = Federation.resume(path, study=study, observer=seen)
    resumed.run(grid)

    assert [r.number for r in seen.rounds] == list(range(stopped + 1, 4))
    assert model_hash(resumed.model) == model_hash(whole.model)


def test_a_round_lost_in_between_is_no_step_of_the_optimizer(
    make_federation, make_study, grid, altered, numbers
):
    """Bias correction and schedule go by the aggregations so far, not by the round's number."""
    study = make_study(train={"strategy": "fedadam", "spare_rounds": 1, "lr_schedule": "linear"})
    whole, holed = (make_federation(study=study, observer=None) for _ in range(2))
    whole.run(grid)
    del numbers[:]

    holed.run(altered(grid, lambda replies: [] if numbers[-1:] == [2] else replies))

    assert numbers == [1, 2, 3, 4]
    assert model_hash(holed.model) == model_hash(whole.model)


def test_a_resumed_run_is_the_same_run(make_federation, grid, adam, tmp_path):
    """Its charges belong together at every site."""
    path = tmp_path / "checkpoint"
    first = make_federation(study=adam, checkpoint=path, run_id="f" * 32)
    first.run(grid)

    assert Federation.resume(path, study=adam).run_id == "f" * 32


def test_a_checkpoint_of_another_study_is_not_gone_on_with(make_federation, grid, adam, study, tmp_path):
    """Its rounds were noised for another promise."""
    path = tmp_path / "checkpoint"
    make_federation(study=adam, checkpoint=path).run(grid)

    with pytest.raises(ConfigError, match="found a checkpoint of study"):
        Federation.resume(path, study=study)
