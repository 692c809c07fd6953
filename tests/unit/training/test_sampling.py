"""Poisson sampling from a stream: the law that amplification is claimed for."""

import tracemalloc
from bisect import bisect_right
from itertools import accumulate, pairwise

import numpy as np
import pytest
from scipy import stats

from lepton_fl.secagg.masks import keystream
from lepton_fl.training import sampling
from lepton_fl.training.sampling import PoissonSampler

KEY = bytes(range(32))
TIED = 1 / 256 + 2**-40
RATES = [1e-5, 2**-8, TIED, 0.0032, 0.05, 0.2, 1 / 3, 0.5, 0.97, 1 - 2**-53]
STATES = sorted(range(256), key=int.bit_count)


def test_the_rate_is_exact_or_below():
    """Of 64 bits: what is claimed is what is drawn at."""
    for rate in (1e-6, 0.1, 1 / 3, 0.999999999, 1.0):
        found = PoissonSampler(1, rate, KEY).rate
        assert rate - 2.0**-64 <= found <= rate


# --- the law, exactly ---


def steps_of(rate):
    """P(a state before this one), in units of 2^-512: of independent units, in plain integers."""
    t = int(rate * 2**64)
    weights = [t ** state.bit_count() * (2**64 - t) ** (8 - state.bit_count()) for state in STATES]
    return list(accumulate(weights, initial=0))


@pytest.mark.parametrize("rate", RATES)
def test_units_of_a_group_are_independent_exactly(rate):
    """P(in) is the rate, P(both in) its square, for each unit and pair: in whole numbers."""
    t, table = int(rate * 2**64), sampling._table(int(rate * 2**64))
    weights = [after - before for before, after in pairwise([*table.steps, 2**512])]
    states = table.states.tolist()

    assert sorted(states) == list(range(256))
    for i in range(8):
        assert sum(w for w, s in zip(weights, states, strict=True) if s >> i & 1) == t * 2**448
        for j in range(i):
            both = sum(w for w, s in zip(weights, states, strict=True) if s >> i & s >> j & 1)
            assert both == t * t * 2**384


@pytest.mark.parametrize("rate", RATES)
def test_a_cell_that_is_not_open_has_one_state(rate):
    """The first 16 bits decide only where the other 496 could not."""
    table, steps = sampling._table(int(rate * 2**64)), steps_of(rate)
    closed = np.flatnonzero(table.cells >= 0)
    lowest, highest = (
        [STATES[bisect_right(steps, (int(cell) << 496) + more) - 1] for cell in closed]
        for more in (0, 2**496 - 1)
    )

    assert lowest == highest == table.cells[closed].tolist()
    assert len(closed) >= 2**16 - 255
    assert 0 not in table.cells[: table.none] + 1
    assert not table.cells[: table.none].any()


@pytest.mark.parametrize("rate", RATES)
def test_an_open_cell_is_decided_by_all_bits(rate):
    """Next to each step and on it, where 64 bits tie; the last bit of 512 counts."""
    table, steps = sampling._table(int(rate * 2**64)), steps_of(rate)
    near = [step + nudge for step in steps for nudge in (-1, 0, 1) if 0 <= step + nudge < 2**512]
    near = [u for u in near if table.cells[u >> 496] < 0]
    first_O = np.array([u >> 496 for u in near], np.uint16)
    words = [[u >> shift & 2**64 - 1 for shift in range(448, -1, -64)] for u in near]
    # What stands where the first 16 bits would is not looked at.
    further_O8 = np.array(words, np.uint64).reshape(-1, 8)
    further_O8[:, 0] ^= np.uint64(0xABCD << 48)

    assert rate == 0.5 or len(near) > 500
    assert table.invert(first_O, further_O8).tolist() == [STATES[bisect_right(steps, u) - 1] for u in near]


# --- the stream ---


def plainly(units, rate, step):
    """The scheme once more, unit by unit, from the words of the key's stream."""
    steps, groups = steps_of(rate), -(-units // 16) * 2
    first = keystream(KEY, start=step * groups // 2, count=groups // 2).astype("<u4").tobytes()
    drawn, left_open = [], 0
    for group in range(groups):
        high = int.from_bytes(first[2 * group : 2 * group + 2], "little")
        state = STATES[bisect_right(steps, high << 496) - 1]
        if state != STATES[bisect_right(steps, (high + 1 << 496) - 1) - 1]:
            start = 2**66 + 16 * (groups * step + left_open)
            more = keystream(KEY, start=start, count=16).astype("<u4").tobytes()
            low, *rest = (int.from_bytes(more[at : at + 8], "little") for at in range(0, 64, 8))
            bits = high << 48 | low & 2**48 - 1
            for word in rest:
                bits = bits << 64 | word
            state = STATES[bisect_right(steps, bits) - 1]
            left_open += 1
        drawn += [8 * group + i for i in range(8) if state >> i & 1]
    return [unit for unit in drawn if unit < units], left_open


@pytest.mark.parametrize("units", [1, 10, 203, 4000])
@pytest.mark.parametrize("rate", RATES)
def test_it_is_the_scheme_in_plain_integers(rate, units):
    sampler = PoissonSampler(units, rate, KEY, steps=9)
    left_open = 0
    for step in range(3):
        expected, count = plainly(units, rate, step)
        left_open += count

        assert sampler.draw(step).tolist() == expected
    assert left_open > 0 or units < 4000 or rate not in (0.05, 0.2, 1 / 3, 0.97)


@pytest.mark.parametrize("rate", [0.003, 0.3])
@pytest.mark.parametrize("ahead", [1, 5_000, 1 << 30])
def test_a_step_is_the_same_whatever_is_drawn_with_it(monkeypatch, rate, ahead):
    """How many steps at once, in which order, said to be how many: the step and the key decide."""
    steps = [PoissonSampler(1003, rate, KEY).draw(step).tolist() for step in range(40)]
    monkeypatch.setattr(sampling, "AHEAD", ahead)
    sampler = PoissonSampler(1003, rate, KEY, steps=17)

    for step in [*range(39, -1, -1), 3, 17, 3]:
        assert sampler.draw(step).tolist() == steps[step]
    assert len({tuple(step) for step in steps}) == 40
    assert steps[0] != PoissonSampler(1003, rate, KEY[::-1]).draw(0).tolist()


def test_no_bits_are_read_twice(monkeypatch):
    """Of steps and of groups, first bits and further ones."""
    read = []
    fill = sampling.Keystream.fill

    def recorded(stream, out_L, *, start):
        read.append(range(start, start + len(out_L)))
        fill(stream, out_L, start=start)

    monkeypatch.setattr(sampling.Keystream, "fill", recorded)
    monkeypatch.setattr(sampling, "AHEAD", 20_000)
    sampler = PoissonSampler(5000, 0.1, KEY, steps=30)
    for step in range(30):
        sampler.draw(step)
    spans = sorted((span for span in read if len(span)), key=lambda span: span.start)

    assert len({span.start >> 66 for span in spans}) == 2
    assert all(before.stop <= after.start for before, after in pairwise(spans))


@pytest.mark.parametrize("nudge", [-1, 0, 1])
def test_the_last_of_all_bits_decides_a_unit(monkeypatch, nudge):
    """A stream that stands on the step between nobody and the first unit, or one beside it."""
    edge = steps_of(TIED)[1] + nudge

    def fill(_, out_L, *, start):
        out_L[:] = 0
        if start < 2**66:
            out_L[0] = edge >> 496
        else:
            words = [edge >> shift & 2**64 - 1 for shift in range(448, -1, -64)]
            out_L[:16] = np.array(words, "<u8").view("<u4")

    monkeypatch.setattr(sampling.Keystream, "fill", fill)

    assert PoissonSampler(16, TIED, KEY).draw(0).tolist() == ([] if nudge < 0 else [0])


# --- the law, as drawn ---


@pytest.mark.parametrize("rate", [0.02, 0.5, 0.97])
def test_units_come_independently_at_the_rate(rate):
    """Two-sided, over 400,000 draws: the rate, and the law of the batch's size."""
    units, steps = 2000, 200
    sampler = PoissonSampler(units, rate, KEY, steps=steps)
    sizes = np.array([len(sampler.draw(step)) for step in range(steps)])

    variance = units * rate * (1 - rate)
    assert sizes.mean() == pytest.approx(units * rate, abs=4 * np.sqrt(variance / steps))
    assert sizes.var() == pytest.approx(variance, rel=4 * np.sqrt(2 / steps))
    assert sizes.mean() != pytest.approx(units * rate * 1.1, abs=4 * np.sqrt(variance / steps))


def taken(units, rate, steps):
    sampler = PoissonSampler(units, rate, KEY, steps=steps)
    taken_TU = np.zeros((steps, units))
    for step in range(steps):
        taken_TU[step, sampler.draw(step)] = 1
    return taken_TU


@pytest.mark.parametrize("rate", [TIED, 0.1, 0.6])
def test_every_unit_and_every_pair_comes_as_often(rate):
    """Chi-square of the units' counts; correlations of all pairs of units, steps apart or not."""
    units, steps = 40, 20_000
    taken_TU = taken(units, rate, steps)
    chi_square = np.sum((taken_TU.sum(0) - steps * rate) ** 2) / (steps * rate * (1 - rate))
    z_TU = (taken_TU - rate) / np.sqrt(rate * (1 - rate))
    together_UU = z_TU.T @ z_TU / np.sqrt(steps)
    later_UU = z_TU[1:].T @ z_TU[:-1] / np.sqrt(steps - 1)
    scores = np.concatenate([together_UU[np.triu_indices(units, 1)], later_UU.ravel()])

    assert 1e-4 < stats.chi2.sf(chi_square, units) < 1 - 1e-4
    assert 1e-4 < stats.chi2.sf(np.sum(scores**2), len(scores)) < 1 - 1e-4


@pytest.mark.parametrize("units", [0, 1, 10])
def test_the_extremes(units):
    """All, nearly all, nearly nobody, nobody; of hardly any units, in thousands of steps."""
    everybody = np.arange(units)
    for rate, of_all in [(1.0, everybody), (1 - 2**-53, everybody), (1e-12, []), (2**-64, []), (0.0, [])]:
        sampler = PoissonSampler(units, rate, KEY, steps=3000)
        assert all(np.array_equal(sampler.draw(step), of_all) for step in range(3000))
        assert sampler.draw(0).dtype == np.int64


@pytest.mark.parametrize(("units", "rate"), [(10, 0.1), (1000, 0.001), (20_000, 0.5), (100_000, 0.9)])
def test_memory_is_bounded_however_many_steps(units, rate):
    sampling._table(int(rate * 2**64))
    sampler = PoissonSampler(units, rate, KEY, steps=1_000_000)
    tracemalloc.start()
    try:
        sampler.draw(0)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert held < sampling.AHEAD + 8 * units
    assert peak < 4 << 20


def test_a_large_table_is_drawn_at_once():
    """Ten million units."""
    drawn = PoissonSampler(10_000_000, 1e-4, KEY, steps=5).draw(4)

    assert len(drawn) == pytest.approx(1000, abs=150)
    assert 0 <= drawn[0] < drawn[-1] < 10_000_000
    assert (np.diff(drawn) > 0).all()
