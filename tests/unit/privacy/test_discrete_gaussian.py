"""The discrete Gaussian: known answers, the proven distance, and what is refused.

Its law, by samples, is in tests/statistical.
"""

import hashlib
import json
import math
import random
import subprocess
import sys
import tracemalloc
from bisect import bisect_right
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from reference import discrete_gaussian as plain

from lepton_fl.privacy import discrete_gaussian

FOLDER = Path(__file__).parents[2] / "vectors"
FILE = FOLDER / "discrete_gaussian.json"
KEY = bytes(range(32))


def test_the_file_is_what_its_generator_writes(tmp_path):
    """Nobody mended a vector by hand."""
    subprocess.run([sys.executable, FOLDER / "make_discrete_gaussian.py", tmp_path / "new.json"], check=True)

    assert (tmp_path / "new.json").read_bytes() == FILE.read_bytes()


@pytest.mark.parametrize("v", json.loads(FILE.read_text()), ids=lambda v: v["name"])
def test_known_answer(v):
    drawn = discrete_gaussian.sample(v["sigma"], v["count"], key=bytes.fromhex(v["key"]))

    assert drawn.dtype == np.int32
    assert drawn[:40].tolist() == v["first"]
    assert hashlib.sha256(drawn.astype("<i8").tobytes()).hexdigest() == v["sha256"]


def law(variances, m):
    """P(x), times 2^(128 levels), from the steps that are really used; x from its smallest on."""
    total, bits = [1], 0
    for variance in reversed(variances):
        steps = discrete_gaussian._table(variance).steps
        mass = [after - before for before, after in pairwise([*steps, 1 << 128])]
        spread = [0] * (m * (len(total) - 1) + len(mass))
        for k, p in enumerate(total):
            for b, q in enumerate(mass):
                spread[m * k + b] += p * q
        total, bits = spread, bits + 128
    return total, bits


@pytest.mark.parametrize(
    ("most", "sigma"),
    [
        ((64, 64), 1.0),
        ((64, 64), 9.7),
        ((8, 64), 8.5),
        ((8, 64), 20.0),
        ((8, 64), 33.3),
        ((8, 16), 16.5),
        ((8, 16), 60.0),
    ],
    ids=str,
)
def test_the_law_is_within_the_stated_distance(monkeypatch, most, sigma):
    """The law of a whole draw, exactly, against the ideal to 2^-300.

    And not idly: only where a third level's error is smoothed by the first is the bound far above.
    """
    monkeypatch.setattr(discrete_gaussian, "_MOST", most)
    m, variances = discrete_gaussian._levels(sigma)
    total, bits = law(variances, m)
    width = len(total) // 2
    ideal = plain.weights(Fraction(sigma) ** 2, width)
    whole = sum(ideal)
    moved = sum(abs(p * whole - (weight << bits)) for p, weight in zip(total, ideal, strict=True))
    found = float(Fraction(moved, whole << bits) / 2)

    assert sum(total) == 1 << bits
    assert found <= discrete_gaussian.distance(sigma)
    assert discrete_gaussian.distance(sigma) < 64 * found or len(variances) == 3


def test_the_distance_is_small_for_every_sigma():
    """5 * 10^7 draws are together within 2^-84."""
    edges = [edge * (1 + nudge) for edge in (2**8, 2**14) for nudge in (0, 1e-15, 1e-3)]
    sigmas = [*np.geomspace(1, 2**24, 500), *edges]

    assert max(map(discrete_gaussian.distance, sigmas)) < 2**-110


@pytest.mark.parametrize("sigma", [1.0, 2.0, 3.3, 256.0, 257.5, 4096.0, 2.0 * 99**2, 2.0 * 50**3, 2.0**24])
def test_the_variances_add_up_exactly(sigma):
    """And m is the largest that leaves the last level at least twice itself."""
    m, variances = discrete_gaussian._levels(sigma)

    assert sum(m ** (2 * j) * variance for j, variance in enumerate(variances)) == Fraction(sigma) ** 2
    assert 2 * m ** len(variances) <= sigma < 2 * (m + 1) ** len(variances)


@pytest.mark.parametrize("variance", [Fraction(1), Fraction(1089, 100), Fraction(256**2)], ids=str)
def test_inversion_looks_at_all_bits(variance):
    """Next to each step, on it, and between; the tails, whose steps share their first 64 bits, among them."""
    table = discrete_gaussian._table(variance)
    rng = random.Random(3)
    near = [step + nudge for step in table.steps for nudge in (-1, 0, 1) if 0 <= step + nudge < 2**128]
    uniform = [*near, *(rng.getrandbits(128) for _ in range(1000)), 2**128 - 1]
    cells = table.cells[[u >> 112 for u in uniform]]
    still_open = cells >= discrete_gaussian._OPEN // 2
    high, low = (np.array([u >> shift & 2**64 - 1 for u in uniform], np.uint64) for shift in (64, 0))
    width = len(table.steps) // 2
    values = cells.astype(np.int64)
    values[still_open] = table.invert(cells[still_open], high[still_open], low[still_open])

    assert still_open[: len(near)].mean() > 0.8
    assert values.tolist() == [bisect_right(table.steps, u) - 1 - width for u in uniform]
    assert max(values) == width
    assert min(values) < -0.98 * width, "below, a step is less than 2^-128 and rounded to nothing"


@pytest.mark.parametrize("variance", [Fraction(1), Fraction(1089, 100), Fraction(256**2)], ids=str)
def test_a_cell_that_is_not_open_has_one_value(variance):
    table = discrete_gaussian._table(variance)
    closed = np.flatnonzero(table.cells < discrete_gaussian._OPEN // 2)
    width = len(table.steps) // 2
    lowest, highest = (
        [bisect_right(table.steps, (int(cell) << 112) + more) - 1 - width for cell in closed]
        for more in (0, 2**112 - 1)
    )

    assert lowest == highest == table.cells[closed].tolist()


@pytest.mark.parametrize("tile", [2, 62, 1 << 12, 1 << 17])
@pytest.mark.parametrize("sigma", [200.0, 2.0**16])
def test_tiles_do_not_show(monkeypatch, sigma, tile):
    whole = discrete_gaussian.sample(sigma, 2001 if tile < 64 else 70_001, key=KEY)
    monkeypatch.setattr(discrete_gaussian, "_TILE", tile)

    assert (discrete_gaussian.sample(sigma, len(whole), key=KEY) == whole).all()


def test_a_smaller_count_is_the_beginning():
    many = discrete_gaussian.sample(5000.0, 80_000, key=KEY)

    assert (discrete_gaussian.sample(5000.0, 65_537, key=KEY) == many[:65_537]).all()
    assert len(discrete_gaussian.sample(5000.0, 0, key=KEY)) == 0


@pytest.mark.parametrize("sigma", [3.0, 5e3, 1e6])
@pytest.mark.parametrize("count", [0, 1, 30_001])
def test_rows_are_what_each_key_draws_by_itself(sigma, count):
    keys = [bytes([k]) * 32 for k in range(5)]
    rows = discrete_gaussian.samples(sigma, count, keys=keys)

    assert rows.shape == (5, count)
    for row, key in zip(rows, keys, strict=True):
        assert (row == discrete_gaussian.sample(sigma, count, key=key)).all()


def test_levels_share_no_bits(monkeypatch):
    """No word of the key's mask is read twice."""
    read = []
    fill = discrete_gaussian.masks.Keystream.fill

    def recorded(stream, out_L, *, start):
        read.append(range(start, start + len(out_L)))
        fill(stream, out_L, start=start)

    monkeypatch.setattr(discrete_gaussian.masks.Keystream, "fill", recorded)
    discrete_gaussian.sample(1e6, 100_000, key=KEY)
    spans = sorted((span for span in read if len(span)), key=lambda span: span.start)

    assert len({span.start >> 66 for span in spans}) == 6
    assert all(before.stop <= after.start for before, after in pairwise(spans))


def test_memory_does_not_grow_with_the_count():
    discrete_gaussian._table.cache_clear()
    tracemalloc.start()
    try:
        drawn = discrete_gaussian.sample(2.0**24, 2_000_000, key=KEY)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak - drawn.nbytes < 4 << 20


@pytest.mark.parametrize(
    "sigma", [0.0, -4.0, math.nextafter(1, 0), math.nextafter(2**24, math.inf), math.inf, math.nan]
)
def test_a_sigma_out_of_range_is_refused(sigma):
    for refused in (discrete_gaussian.distance, lambda sigma: discrete_gaussian.sample(sigma, 1, key=KEY)):
        with pytest.raises(ValueError, match=r"^sigma = \S+: 1 to 16777216$"):
            refused(sigma)


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused(size):
    with pytest.raises(ValueError, match=rf"^a key for noise is 32 bytes, not {size}$"):
        discrete_gaussian.sample(4.0, 0, key=bytes(size))


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match=r"^count = -1: not negative$"):
        discrete_gaussian.sample(4.0, -1, key=KEY)
