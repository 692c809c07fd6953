"""The vectorised engine: the training of all sites in a round, as one computation.

Nothing else is stacked: each site's policy, ledger, noise and replies are its own, one after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from lepton_fl.messages import Assignment
from lepton_fl.site.site import Simulated, Site, Trainer, Workbench, train_alone
from lepton_fl.study import Study
from lepton_fl.tasks import Arrays
from lepton_fl.training import LocalPlan, LocalUpdate, Noise
from lepton_fl.training.stacked import Part, Stacked, check_memory, train_together

_NUMBER = 8
"""Bytes of an update's number, at most."""


class Stack:
    """Trains the sites of one study: when the first is asked in a round, those to be asked after it too.

    A site fetches its update when its own turn comes, after its policy and its ledger have had their say.
    That of a site which refuses, or is never asked, is forgotten with the round.
    """

    def __init__(self, study: Study, sites: Mapping[str, Site[Simulated]], *, memory: int) -> None:
        """`memory` is in bytes.

        Raises:
            Unstackable: the model can only be trained at one site at a time.
            ConfigError: not even one site's training fits in the memory.
        """
        benches = {name: site.bench(study) for name, site in sites.items()}
        bench = next(iter(benches.values()))
        self._study = study.id
        self._stacked = Stacked(bench.model, bench.task, features=bench.data.train.x_NF.shape[1])
        plan = LocalPlan.of(study, bench.guarantee, coordinates=bench.coordinates)
        self._parts = {
            name: Part.of(name, benches[name].data.train, site.noise.of(study.id), plan)
            for name, site in sites.items()
        }
        # Half of it is for the updates that wait.
        self._memory = memory // 2
        self._held = max(1, self._memory // (_NUMBER * bench.coordinates))
        check_memory(self._stacked, list(self._parts.values()), self._memory)
        self._asked: object = None
        """What the updates are for; anything else begins anew."""
        self._received: Arrays = {}
        self._trained: set[str] = set()
        self._waiting: dict[str, LocalUpdate] = {}

    def trainer(self, site: str) -> Trainer:
        """How this site trains."""
        return partial(self._train, site)

    def _train(
        self,
        site: str,
        assignment: Assignment,
        bench: Workbench,
        received: Arrays,
        plan: LocalPlan,
        noise: Noise,
    ) -> LocalUpdate:
        if assignment.study.id != self._study:
            return train_alone(assignment, bench, received, plan, noise)
        asked = assignment.run, assignment.round, assignment.cohort, plan
        if asked != self._asked or not _same(received, self._received):
            self._asked, self._received = asked, received
            self._trained, self._waiting = set(), {}
        if site not in self._waiting:
            later = [name for name in assignment.cohort if name in self._parts and name > site]
            names = [site, *(name for name in later if name not in self._trained)][: self._held]
            updates = train_together(
                self._stacked,
                received,
                [self._parts[name] for name in names],
                plan,
                assignment.round,
                memory=self._memory,
            )
            self._trained.update(names)
            self._waiting |= zip(names, updates, strict=True)
        return self._waiting.pop(site)


def _same(some: Arrays, others: Arrays) -> bool:
    return some.keys() == others.keys() and all(np.array_equal(a, others[name]) for name, a in some.items())
