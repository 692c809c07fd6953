"""Do the books agree with what left? Rounds charged are rounds released, whatever a server asks again.

A run over real controls and ledgers on disk; what passes between sites and server is watched, and the server
asks every round a second time.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from flwr.app import Message

from lepton_fl.audit.federation import Tap, small_run, small_study, tapped
from lepton_fl.audit.finding import Finding
from lepton_fl.federation.grids import WrappingGrid
from lepton_fl.messages import ARRAYS, EVALUATE, JOIN, from_record, read_assignment, to_record
from lepton_fl.privacy.accounting import Gaussian, epsilon
from lepton_fl.simulation.run import Run

_CHECK = "ledger"
_ROUNDS = 3

JOINING_AND_JUDGING = (JOIN, EVALUATE)
"""Messages that belong to no charge."""

Left = dict[tuple[str, int], set[str]]
"""Digests of the arrays that left, by site and round."""


def check_ledger(seed: int, *, full: bool) -> Iterator[Finding]:
    """Of sites that noise their own updates, then of sites that mask them."""
    rounds = 5 * _ROUNDS if full else _ROUNDS
    yield from _of("local", seed, rounds)
    yield from _of("shared", seed, rounds)


def _of(noise: Literal["local", "shared"], seed: int, rounds: int) -> Iterator[Finding]:
    study = small_study(noise=noise, rounds=rounds, hidden=4)
    with tempfile.TemporaryDirectory() as folder:
        run = small_run(study, seed, folder=Path(folder))
        try:
            names = dict(run.federation.sites or {})
            watched, tap = _watched(run)
            watched.start()
            left = _left(tap, names)
            _ask_again(tap)
            yield _booked(run, noise, left)
            yield _once(noise, left, _left(tap, names))
            yield _cost(run, noise, left)
        finally:
            run.close()


def _watched(run: Run) -> tuple[Run, Tap]:
    """The run with a look at what passes right at the sites, inside of any grid that sums."""
    grid = run.grid
    if isinstance(grid, WrappingGrid):
        tap = Tap(grid.inner)
        grid.inner = tap
        return run, tap
    return tapped(run)


def _ask_again(tap: Tap) -> None:
    """Each message of each round once more, the model moved, as a server might that wants a second draw."""
    for asked, _ in list(tap.passed):
        if asked[0].metadata.message_type in JOINING_AND_JUDGING:
            continue
        for content in {id(message.content): message.content for message in asked}.values():
            if ARRAYS in content.array_records:
                model = from_record(content.array_records[ARRAYS])
                content[ARRAYS] = to_record({name: array + np.float32(1) for name, array in model.items()})
        tap.send_and_receive(asked)


def _left(tap: Tap, names: dict[int, str]) -> Left:
    left: Left = {}
    for asked, replies in tap.passed:
        number = read_assignment(asked[0]).round
        for reply in replies:
            if not reply.has_error() and ARRAYS in reply.content.array_records:
                key = names[reply.metadata.src_node_id], number
                left.setdefault(key, set()).add(_digest(reply))
    return left


def _digest(reply: Message) -> str:
    whole = hashlib.sha256()
    for array in reply.content.array_records[ARRAYS].values():
        whole.update(array.data)
    return whole.hexdigest()


def _booked(run: Run, noise: str, left: Left) -> Finding:
    """Each release in the ledger of its site, and nothing else."""
    charged = Counter(
        (name, int(str(entry["round"])))
        for name, site in run.sites.items()
        for entry in site.ledger.history(site.policy.data.id)
    )
    free = len(left.keys() - charged.keys())
    wasted = len(charged.keys() - left.keys())
    double = sum(count > 1 for count in charged.values())
    what = f"rounds charged are rounds released, {noise} noise"
    statistic = (
        f"{len(left)} releases, {free} of them not charged, {wasted} charges without a release, "
        f"{double} charged twice, allowed 0 each"
    )
    power = "any round that is not in the ledger"
    if not left:
        return Finding(check=_CHECK, what=what, verdict="inconclusive", statistic=statistic, power=power)
    return Finding.of(_CHECK, what, passed=free == wasted == double == 0, statistic=statistic, power=power)


def _once(noise: str, left: Left, after: Left) -> Finding:
    second = sum(len(digests) > 1 for digests in after.values()) + len(after.keys() - left.keys())
    return Finding.of(
        _CHECK,
        f"a round that is asked again releases nothing new, {noise} noise",
        passed=second == 0,
        statistic=f"{second} of {len(after)} rounds left in two versions, allowed 0",
        power="any second draw for one charge",
    )


def _cost(run: Run, noise: str, left: Left) -> Finding:
    """The ledger's epsilon is at least that of the rounds that left, as accounting has them."""
    study = run.federation.study
    delta = study.privacy.delta or 0.0
    least = math.inf
    for name, site in run.sites.items():
        event = site.bench(study).round_event(len(run.sites))
        rounds = sum(site_name == name for site_name, _ in left)
        if event is None or not rounds:
            continue
        stated = epsilon(
            [
                Gaussian(
                    noise_multiplier=event.noise_multiplier,
                    sampling_rate=event.sampling_rate,
                    steps=event.steps * rounds,
                    sites_per_unit=event.sites_per_unit,
                )
            ],
            delta,
        )
        least = min(least, site.ledger.spent(site.policy.data.id, delta) / stated)
    return Finding.of(
        _CHECK,
        f"the ledger's epsilon covers what left, {noise} noise",
        passed=1 - 1e-9 <= least < math.inf,
        statistic=f"at least {least:.6f} of what accounting says, allowed 1",
        power="an event of too much noise, too low a rate or too few steps",
    )
