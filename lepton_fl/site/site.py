"""One institution, ready to answer: its policy, ledger and data, and what surrounds its agent."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lepton_fl.data import Table
from lepton_fl.errors import LeptonError, PolicyRefused
from lepton_fl.privacy import Guarantee, Ledger
from lepton_fl.privacy.ledger import Budget
from lepton_fl.site.policy import Approvals, Policy
from lepton_fl.study import Study
from lepton_fl.tasks import Arrays, TaskSpec, arrays_of, build_model, task_of
from lepton_fl.training.noise import SimulationNoise

BENCHES = 4
"""Studies kept ready at once."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """The agent is part of a simulation, where the simulator sees every record anyway.

    Only here may a study ask for what needs secure aggregation: the simulator forms the sum in its place
    and says so in every output.
    """


@dataclass(frozen=True, slots=True)
class Deployed:
    """The agent stands at an institution. What this release cannot protect there is refused."""

    def admit(self, study: Study) -> None:
        """Refuse what only a simulation may do.

        Raises:
            PolicyRefused: the study needs secure aggregation, which this release does not have.
        """
        if study.privacy.noise == "shared" or study.secure_aggregation.enabled:
            raise PolicyRefused(
                f"study {study.study.name} needs secure aggregation, which agents of this release do not "
                "have: an update without it would be seen by the server",
                fix="set secure_aggregation.enabled = false with privacy.noise = 'local', or simulate",
                public="secure aggregation is not available at the site",
            )


Surroundings = Simulated | Deployed


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteData:
    """A site's table, split as the study asks."""

    train: Table
    test: Table


@dataclass(kw_only=True, slots=True)
class Site:
    """What the mods and the ClientApp of one institution share. Nothing in it comes from a server."""

    name: str
    policy: Policy
    policy_file: str
    ledger: Ledger
    approvals: Approvals
    load: Callable[[Study], SiteData]
    """Reads the institution's own table under a study's contract."""
    noise: SimulationNoise
    surroundings: Surroundings
    refusals: deque[LeptonError] = field(default_factory=lambda: deque(maxlen=100))
    """Why this site refused, in full, for its own people; a server gets the public part only."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """One message at a time: model and workbench are shared."""
    _bench: dict[str, Workbench] = field(default_factory=dict)

    @property
    def budget(self) -> Budget:
        """What the ledger enforces here."""
        return self.policy.ledger_budget(self.policy_file)

    def bench(self, study: Study) -> Workbench:
        """Data and model for a study, prepared once."""
        if study.id not in self._bench:
            # A few, so that two studies in turn do not read the table anew with each message.
            while len(self._bench) >= BENCHES:
                self._bench.pop(next(iter(self._bench)))
            self._bench[study.id] = Workbench.prepare(study, self.load(study))
        return self._bench[study.id]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workbench:
    """A study made ready at one site: table, model to load parameters into, calibrated promise."""

    data: SiteData
    task: TaskSpec
    model: torch.nn.Module
    template: Arrays
    """The model's names and shapes; values are irrelevant."""
    guarantee: Guarantee
    fingerprint: str

    @classmethod
    def prepare(cls, study: Study, data: SiteData) -> Workbench:
        """Build the study's model for the table's width and calibrate its noise."""
        width = data.train.x_NF.shape[1]
        model = build_model(study, width, torch.Generator())
        return cls(
            data=data,
            task=task_of(study),
            model=model,
            template=arrays_of(model),
            guarantee=Guarantee.of(study),
            fingerprint=data.train.fingerprint,
        )
