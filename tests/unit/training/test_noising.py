"""Rounding and noise of a round's steps: whose words and numbers they are, and that each is for one step."""

import numpy as np
import pytest
from torch import nn

from lepton_fl.privacy.discrete_gaussian import sample, samples
from lepton_fl.privacy.lattice import Lattice
from lepton_fl.secagg.masks import keystream
from lepton_fl.tasks.arrays import arrays_of
from lepton_fl.tasks.task import BINARY
from lepton_fl.training import local, noising, stacked
from lepton_fl.training.bookkeeping import ClippedSum
from lepton_fl.training.noise import SimulationNoise, UnseededNoise
from lepton_fl.training.noising import Noising
from lepton_fl.training.stacked import Part, Stacked, train_together

SITES = [SimulationNoise(1, name) for name in ("north", "south", "west")]
COORDINATES, STEPS = 37, 5
LATTICE = Lattice.of(
    clip=1.0, noise_multiplier=1.0, coordinates=COORDINATES, cohort=1, shares=1, expected_batch=10.0
)


def sums(steps=STEPS):
    return np.random.default_rng(3).normal(size=(steps, len(SITES), COORDINATES))


def released(noises, sum_SKL, **changes):
    noised = Noising(LATTICE, COORDINATES, noises, 4, **{"steps": len(sum_SKL), **changes})
    return np.array([noised(sum_KL) for sum_KL in sum_SKL])


def rounded(noise, sum_SL):
    """Of one site, in plain arithmetic: step s is rounded by words from 40 s on."""
    key = noise.key("rounding of steps", 4)
    words = [keystream(key, start=40 * s, count=COORDINATES) for s in range(len(sum_SL))]
    exact_SL = sum_SL * LATTICE.scale
    below_SL = np.floor(exact_SL)
    return below_SL + (np.array(words) / 2.0**32 < exact_SL - below_SL)


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 100])
def test_noise_and_rounding_are_those_of_the_keys(monkeypatch, at_once):
    """Integers, exactly: the rounded sum and a share under the key of the block's first step."""
    monkeypatch.setattr(noising, "AHEAD", at_once * COORDINATES + 1)
    sum_SKL = sums()
    found_SKL = released(SITES, sum_SKL) * LATTICE.scale

    for k, noise in enumerate(SITES):
        blocks = [
            sample(
                LATTICE.share,
                min(at_once, STEPS - first) * COORDINATES,
                key=noise.key(f"noise from step {first}", 4),
            )
            for first in range(0, STEPS, at_once)
        ]
        drawn_SL = np.concatenate(blocks).reshape(STEPS, COORDINATES)
        assert np.array_equal(found_SKL[:, k], rounded(noise, sum_SKL[:, k]) + drawn_SL)


def test_a_site_gets_the_same_whoever_is_beside_it():
    """Bit by bit: the two engines differ in nothing else."""
    sum_SKL = sums()
    together_SKL = released(SITES, sum_SKL)

    for k, noise in enumerate(SITES):
        assert np.array_equal(together_SKL[:, [k]], released([noise], sum_SKL[:, [k]]))


def test_no_number_is_for_two_steps_sites_or_rounds(monkeypatch):
    """All noise that was drawn is used, once, in its order."""
    monkeypatch.setattr(noising, "AHEAD", 2 * COORDINATES)
    drawn = []

    def recorded(sigma, count, *, keys):
        drawn.append((keys, samples(sigma, count, keys=keys)))
        return drawn[-1][1]

    monkeypatch.setattr(noising, "samples", recorded)
    noise_SKL = released(SITES, np.zeros((STEPS, len(SITES), COORDINATES))) * LATTICE.scale
    all_keys = [key for keys, _ in drawn for key in keys]
    all_KM = np.concatenate([drawn_KM for _, drawn_KM in drawn], axis=1)

    assert len(set(all_keys)) == len(all_keys) == 3 * len(SITES)
    assert np.array_equal(noise_SKL.swapaxes(0, 1).reshape(len(SITES), -1), all_KM)


def test_a_deployed_site_draws_anew_each_time():
    zeros = np.zeros((2, 1, COORDINATES))
    one, other = (released([UnseededNoise()], zeros) for _ in range(2))

    assert (one != other).mean() > 0.99
    assert (one[0] != one[1]).mean() > 0.99


def test_there_is_no_noise_for_one_step_more():
    """It would be a second release under noise that is used, or under none."""
    noised = Noising(LATTICE, COORDINATES, SITES, 4, steps=1)
    noised(sums()[0])
    with pytest.raises(ValueError, match="noise for 1 steps"):
        noised(sums()[0])


def test_a_round_of_one_step_draws_for_one_step(monkeypatch):
    """Lock-step pays for nothing that it does not use."""
    counts = []

    def recorded(sigma, count, *, keys):
        counts.append(count)
        return samples(sigma, count, keys=keys)

    monkeypatch.setattr(noising, "samples", recorded)
    released(SITES, sums(1))

    assert counts == [COORDINATES]


class OneLogit(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.layer = nn.Linear(features, 1)

    def forward(self, x_BF):
        return self.layer(x_BF).squeeze(-1)


class Broken(Exception):
    pass


@pytest.fixture
def made(monkeypatch):
    """All that noise was drawn by; training breaks in its third step."""
    made = []

    class Recorded(Noising):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    for engine in (local, stacked):
        monkeypatch.setattr(engine, "Noising", Recorded)
    return made


@pytest.mark.parametrize("engine", ["alone", "together"])
@pytest.mark.parametrize("breaks", [False, True])
def test_noise_of_later_steps_is_dropped(monkeypatch, made, make_records, plan, engine, breaks):
    """At the end of the round, on an error too, which may be kept with all that its frames hold."""
    records = make_records([1] * 20)
    model = OneLogit(records.x_NF.shape[1])
    noisy = plan(noise_multiplier=1.0, steps=4)
    stack = Stacked(model, BINARY, features=records.x_NF.shape[1])
    made.clear()
    left = []

    def breaking(call):
        def counted(*args):
            left.extend(len(noised._left) for noised in made)
            if breaks and len(left) == 3:
                raise Broken
            return call(*args)

        return counted

    monkeypatch.setattr(ClippedSum, "__call__", breaking(ClippedSum.__call__))
    monkeypatch.setattr(stacked._Chunk, "_clipped_sums", breaking(stacked._Chunk._clipped_sums))
    noise = SimulationNoise(1, "n")
    try:
        if engine == "alone":
            local.train_locally(model, BINARY, arrays_of(model), records, noisy, noise, 1)
        else:
            train_together(stack, arrays_of(model), [Part.of("n", records, noise, noisy)], noisy, 1)
    except Broken:
        assert breaks

    (noised,) = made
    assert left == ([0, 3, 2] if breaks else [0, 3, 2, 1])
    assert not noised._left
