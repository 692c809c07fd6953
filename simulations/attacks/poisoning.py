"""Poisoned members against the ways to combine groups of sites: held-out AUC, as Markdown tables.

    python simulations/attacks/poisoning.py > poisoning.md

Heart disease (the data come with the package), all four hospitals' records dealt over equal sites, which are
artificial and alike. Logistic regression in lock-step, as in `lepton-fl quickstart heart` but for the number
of rounds. The sums are the integers of secure aggregation without its masks, so an attacker has what it would
have there: it changes its own words, and the server checks the sum's range and no more.

L = coordinates of an update.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import torch
from flwr.app import Message
from numpy.typing import NDArray

from lepton_fl.cli.texts import study_text
from lepton_fl.config import parse
from lepton_fl.data import Contract, Table, load_dataset, partition, pool
from lepton_fl.federation import Federation
from lepton_fl.privacy import Guarantee
from lepton_fl.secagg.masks import Words
from lepton_fl.simulation import InProcessGrid
from lepton_fl.simulation.functional import Functional, FunctionalGrid
from lepton_fl.simulation.members import memberships
from lepton_fl.simulation.run import FIRST_SITE_NODE, Run, Scorer, first_model, open_sites, split_sites
from lepton_fl.simulation.simulate import freeze
from lepton_fl.site import client_app
from lepton_fl.site.secure import Membership, Ticket
from lepton_fl.study import Study, override
from lepton_fl.tasks.metrics import Bootstrap, Scored

SEEDS = 5
"""Each deals the records, holds some out, samples and draws noise anew."""
ROUNDS = 30
GROUP = 5
ONE_SUM, NOBODY = "one sum", "nobody"
RULES: dict[str, dict[str, object]] = {
    ONE_SUM: {},
    "mean": {"combine": "mean"},
    "median": {"combine": "median"},
    "geometric median": {"combine": "geometric-median"},
    "trimmed mean": {"combine": "trimmed-mean", "trim": 1},
}
"""What becomes of the updates: one sum over all, or groups of `GROUP` and a rule."""
OF_THREE = tuple(RULES)[:-1]
"""Of three groups the trimmed mean is the median."""
NOISES: dict[str, dict[str, object]] = {
    "no privacy": {"privacy.noise": "none"},
    "epsilon 4, shared noise": {"privacy.noise": "shared"},
    "epsilon 4, local noise": {"privacy.noise": "local"},
}
Forge = Callable[[NDArray[np.int64], int, int], NDArray[np.int64]]
"""An attacker's integers [L], of its honest ones, their largest magnitude and the sites in the sum."""


def times(factor: int) -> Forge:
    """The honest update, so many times."""
    return lambda honest_L, half, n: np.clip(factor * honest_L, -half, half)  # noqa: ARG005 - a Forge


def as_far_as_can_be(honest_L: NDArray[np.int64], half: int, n: int) -> NDArray[np.int64]:
    """Against the honest update with all that the range check of the sum lets through.

    Short of it by twice what one honest site may add: a sum that is out of range is lost.
    """
    return -np.sign(honest_L) * (n - 2) * half


ATTACKS: dict[str, Forge | None] = {
    NOBODY: None,
    "label flip": times(1),
    "sign flip": times(-1),
    "sign flip, 10 times": times(-10),
    "up to the range check": as_far_as_can_be,
}
FEW = (NOBODY, "label flip", "sign flip, 10 times")
OPEN, *PRIVATE = NOISES
TABLES: dict[tuple[int, int], dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    (15, 1): {OPEN: (tuple(ATTACKS), OF_THREE), **dict.fromkeys(PRIVATE, (FEW, OF_THREE))},
    (15, 2): {OPEN: (FEW[-1:], OF_THREE)},
    (25, 2): {OPEN: ((NOBODY, *FEW[-1:]), tuple(RULES))},
}
"""Sites, and how many of them attack: under which noise, how, against which rules."""

Case = tuple[tuple[int, int], str, str, str]
"""Federation, noise, attack, rule."""


class Poisoner(Functional):
    """A member that lets something else than its update into the sum."""

    def __init__(self, membership: Membership, forge: Forge) -> None:
        super().__init__(membership)
        self._forge = forge

    def enter(self, ticket: Ticket, words: Words) -> Message:
        context = ticket.context
        honest_L = words.view(np.int32).astype(np.int64)
        forged_L = self._forge(honest_L, context.quantiser.half, context.cohort.n)
        return super().enter(ticket, forged_L.astype(np.int32).view(np.uint32))


@cache
def records() -> Table:
    """All hospitals' records."""
    return pool(list(load_dataset("heart", Contract.of(shipped())).values()))


@cache
def shipped() -> Study:
    """The study of `lepton-fl quickstart heart`."""
    return parse(Study, tomllib.loads(study_text("heart", epsilon=4.0)), file="heart.study.toml")


def agreed(sites: int, noise: str, rule: str) -> Study:
    """The study with groups, where the rule has any."""
    groups = {} if rule == ONE_SUM else {"group_size": GROUP, **RULES[rule]}
    secure = {"enabled": True, "min_sites": sites, **groups}
    changes = {f"secure_aggregation.{key}": value for key, value in secure.items()}
    changes |= {"train.rounds": ROUNDS, "train.expected_batch": None}
    return override(shipped(), {**NOISES[noise], **changes})


def scored(case: Case, seed: int) -> Mapping[str, Scored]:
    """The held-out records of all sites, scored by the model of one run."""
    torch.set_num_threads(1)
    (count, poisoned), noise, attack, rule = case
    parts = partition(records(), "iid", count, np.random.default_rng(seed))
    tables = {f"site-{number:02d}": part for number, part in enumerate(parts, start=1)}
    study = freeze(agreed(count, noise, rule), tables)
    splits = split_sites(tables, study, seed)
    forge = ATTACKS[attack]
    attackers = sorted(splits)[:poisoned] if forge is not None else []
    trained_on = {
        name: (flipped(train) if name in attackers and attack == "label flip" else train, test)
        for name, (train, test) in splits.items()
    }
    nodes = {FIRST_SITE_NODE + i: name for i, name in enumerate(sorted(splits))}
    consortium, members = memberships(nodes)
    sites = {
        name: replace(
            site,
            aggregation=Poisoner(members[name], forge)
            if forge is not None and name in attackers
            else Functional(members[name]),
        )
        for name, site in open_sites(study, trained_on, seed, None).items()
    }
    width = records().x_NF.shape[1]
    run = Run(
        federation=Federation(study=study, model=first_model(study, width, seed), sites=nodes),
        sites=sites,
        grid=FunctionalGrid(
            InProcessGrid({node: client_app(sites[name]) for node, name in nodes.items()}), consortium
        ),
        guarantee=Guarantee.of(study),
        engine="process",
    )
    try:
        run.start()
    finally:
        run.close()
    if run.federation.done < study.train.rounds:
        raise RuntimeError(f"{case}, seed {seed}: {run.federation.done} rounds of {study.train.rounds}")
    return Scorer(study, width)(run.federation.model, splits)


def flipped(table: Table) -> Table:
    """The table of a site that calls every healthy patient ill and every ill one healthy."""
    return replace(table, y_N=1 - table.y_N)


def table_of(
    federation: tuple[int, int], noise: str, found: Mapping[Case, list[Mapping[str, Scored]]]
) -> str:
    """One federation under one noise: a line for each attack, a column for each rule."""
    (sites, poisoned), (attacks, rules) = federation, TABLES[federation][noise]
    lines = [
        f"**{sites} sites in {sites // GROUP} groups, {poisoned} of them poisoned; {noise}**",
        "",
        f"| what the poisoned do | {' | '.join(rules)} |",
        f"|---|{'---|' * len(rules)}",
    ]
    for attack in attacks:
        # All arms of a seed share its records: drawn together, they can be compared.
        arms = {rule: found[federation, noise, attack, rule] for rule in rules}
        bootstrap = Bootstrap("auc", arms, seed=0)
        cells = [bootstrap.judge(rule)[2] for rule in rules]
        shown = [f"{cell.mean:.3f} [{cell.low:.3f}, {cell.high:.3f}]" for cell in cells]
        lines.append(f"| {attack} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    # Before the processes part, so that each has it.
    records()
    tables = [(federation, noise) for federation, noises in TABLES.items() for noise in noises]
    cases: list[Case] = [(*table, *rest) for table in tables for rest in product(*TABLES[table[0]][table[1]])]
    jobs = list(product(cases, range(SEEDS)))
    found: dict[Case, list[Mapping[str, Scored]]] = {case: [] for case in cases}
    with ProcessPoolExecutor() as workers:
        results = workers.map(scored, *zip(*jobs, strict=True))
        for number, ((case, _), result) in enumerate(zip(jobs, results, strict=True), start=1):
            found[case].append(result)
            print(f"\r{number} of {len(jobs)} runs", end="", file=sys.stderr)
    print(file=sys.stderr)
    print("\n\n".join(table_of(federation, noise, found) for federation, noise in tables))


if __name__ == "__main__":
    main()
