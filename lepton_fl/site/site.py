"""One institution, ready to answer: its policy, ledger and data, and what surrounds its agent."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Protocol, TypeVar

import torch

from lepton_fl.data import Table
from lepton_fl.errors import ConfigError, LeptonError
from lepton_fl.messages import Assignment
from lepton_fl.privacy import AnyLedger, Guarantee, Ledger, RehearsalLedger
from lepton_fl.privacy.accounting import DiscreteGaussian
from lepton_fl.privacy.ledger import Budget
from lepton_fl.secagg.context import Floor
from lepton_fl.secure_rounds import TRAIN_SUM, check_protectable, group_with, round_event, smallest_sum
from lepton_fl.site.approvals import Approvals
from lepton_fl.site.policy import Policy
from lepton_fl.site.secure import LSA1, Aggregation, NoAggregation
from lepton_fl.study import Study
from lepton_fl.tasks import Arrays, TaskSpec, arrays_of, build_model, task_of
from lepton_fl.tasks.arrays import size_of
from lepton_fl.training.device import CPU
from lepton_fl.training.local import LocalPlan, LocalUpdate, train_locally
from lepton_fl.training.noise import Noise, SimulationNoise, UnseededNoise

BENCHES = 4
"""Studies kept ready at once."""


class Trainer(Protocol):
    """How a site trains in one round; what it costs was charged before."""

    def __call__(
        self,
        assignment: Assignment,
        bench: Workbench,
        received: Arrays,
        plan: LocalPlan,
        noise: Noise,
    ) -> LocalUpdate: ...


def train_alone(
    assignment: Assignment, bench: Workbench, received: Arrays, plan: LocalPlan, noise: Noise
) -> LocalUpdate:
    """By itself, on its own table."""
    return train_locally(bench.model, bench.task, received, bench.data.train, plan, noise, assignment.round)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """The agent is part of a simulation, where the simulator sees every record anyway.

    Only here may sums of secure aggregation be formed without its masks, by the simulator, which says so in
    every output.
    """

    noise: SimulationNoise
    ledger: AnyLedger
    train: Trainer = train_alone
    """Only here another may be given, which trains many sites together."""

    def admit(self, study: Study) -> None:
        """Nothing is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StockFlower:
    """The agent runs under Flower's own engine, whose server ships the code that it runs.

    That code could leave out every control of a site, so nothing is promised: the site has public records
    and nothing else, and its ledger forgets with each message.
    """

    noise: SimulationNoise
    ledger: RehearsalLedger
    train: ClassVar[Trainer] = staticmethod(train_alone)

    @staticmethod
    def admit(study: Study) -> None:
        """Refuse what only our own transports can protect.

        Raises:
            ConfigError: the study asks for shared noise or secure aggregation.
        """
        if study.privacy.noise == "shared" or study.secure_aggregation.enabled:
            raise ConfigError(
                f"study {study.study.name} needs secure aggregation, which does not run under stock Flower: "
                "its server ships the sites' code, and a new process for each message keeps no secret",
                fix="lepton-fl simulate --engine process, or secure_aggregation.enabled = false with "
                "privacy.noise = 'local'",
                public="secure aggregation is not available under stock Flower",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """The agent stands at an institution. What this release cannot protect there is refused.

    A seed known to anyone is no privacy, and a ledger that forgets is no budget: neither can be given here.
    Nor can a way to train: what leaves is of this site's records alone.
    """

    noise: UnseededNoise
    ledger: Ledger
    train: ClassVar[Trainer] = staticmethod(train_alone)

    def __post_init__(self) -> None:
        # For callers that no type checker has read.
        asked = ((self.noise, UnseededNoise), (self.ledger, Ledger))
        if not all(isinstance(given, kind) for given, kind in asked):
            raise TypeError("a deployed site draws unseeded noise and keeps its ledger on disk")

    def admit(self, study: Study) -> None:
        """Refuse a study that names more colluders than its cohorts can hold out against."""
        check_protectable(study)


Surroundings = Simulated | StockFlower | Deployed
S_co = TypeVar("S_co", bound=Surroundings, covariant=True)
"""What surrounds a site: what holds only in a simulation asks for `Site[Simulated]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteData:
    """A site's table, split as the study asks."""

    train: Table
    test: Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Site(Generic[S_co]):
    """What the mods and the ClientApp of one institution share. Nothing in it comes from a server.

    Frozen: a type checker lets anything be assigned through `Site[Surroundings]`, a forgetting ledger too.
    """

    name: str
    policy: Policy
    policy_file: str
    approvals: Approvals
    load: Callable[[Study], SiteData]
    """Reads the institution's own table under a study's contract."""
    surroundings: S_co
    device: torch.device = CPU
    """Where its models lie: they are trained and judged there."""
    aggregation: Aggregation = field(default_factory=NoAggregation)
    """How what it computes leaves it, under secure aggregation."""
    refusals: deque[LeptonError] = field(default_factory=lambda: deque(maxlen=100))
    """Why this site refused, in full, for its own people; a server gets the public part only."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """One message at a time: model and workbench are shared."""
    _bench: dict[str, Workbench] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # For callers that no type checker has read: a deployed site's updates leave masked, or not at all.
        deployed = isinstance(self.surroundings, Deployed)
        if deployed and type(self.aggregation) not in (LSA1, NoAggregation):
            raise TypeError("a deployed site has the protocol, or no secure aggregation")

    @property
    def ledger(self) -> AnyLedger:
        """Where the site's spending is recorded."""
        return self.surroundings.ledger

    @property
    def noise(self) -> Noise:
        """Where the site's draws come from."""
        return self.surroundings.noise

    @property
    def floor(self) -> Floor:
        """What it insists on in a secure round, whatever a study asks."""
        return Floor(min_sites=self.policy.require.min_sites, colluders=self.policy.require.colluders)

    @property
    def budget(self) -> Budget:
        """What the ledger enforces here."""
        return self.policy.ledger_budget(self.policy_file)

    def summed_with(self, assignment: Assignment) -> int:
        """Sites in the sum that this one's update is for; before they are known, the fewest there may be."""
        if not assignment.cohort:
            return smallest_sum(assignment.study)
        return len(group_with(self.name, assignment.study, TRAIN_SUM, assignment.cohort, assignment.round))

    def bench(self, study: Study) -> Workbench:
        """Data and model for a study, prepared once."""
        if study.id not in self._bench:
            # A few, so that two studies in turn do not read the table anew with each message.
            while len(self._bench) >= BENCHES:
                self._bench.pop(next(iter(self._bench)))
            self._bench[study.id] = Workbench.prepare(study, self.load(study), self.device)
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
    _events: dict[int, DiscreteGaussian | None] = field(default_factory=dict)

    @property
    def coordinates(self) -> int:
        """Parameters of the model."""
        return size_of(self.template)

    def round_event(self, sites: int) -> DiscreteGaussian | None:
        """What one round costs, in a sum over so many sites; errors as in `secure_rounds.round_event`."""
        if sites not in self._events:
            self._events[sites] = round_event(self.guarantee, coordinates=self.coordinates, sites=sites)
        return self._events[sites]

    @classmethod
    def prepare(cls, study: Study, data: SiteData, device: torch.device) -> Workbench:
        """Build the study's model for the table's width on this device and calibrate its noise."""
        width = data.train.x_NF.shape[1]
        model = build_model(study, width, torch.Generator()).to(device)
        return cls(
            data=data,
            task=task_of(study),
            model=model,
            template=arrays_of(model),
            guarantee=Guarantee.of(study),
            fingerprint=data.train.fingerprint,
        )
