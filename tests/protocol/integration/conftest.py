"""Sites with all of their controls, a server's grid, and between them whoever a test puts there."""

import gc
import itertools
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from lepton_fl.config import parse
from lepton_fl.data import Batch, Contract, load_table
from lepton_fl.federation import SecureGrid
from lepton_fl.federation.grids import OwnGrid
from lepton_fl.federation.rounds import Round
from lepton_fl.messages import (
    ARRAYS,
    CONFIG,
    PHASES,
    SECAGG,
    TRAIN,
    Assignment,
    SecureRequest,
    assignment_config,
    from_record,
    identify,
    to_record,
)
from lepton_fl.privacy import Ledger
from lepton_fl.secagg.context import Forgetful
from lepton_fl.secagg.errors import Phase
from lepton_fl.secure_rounds import TRAIN_SUM
from lepton_fl.simulation.members import memberships
from lepton_fl.site import Deployed, Policy, Site, SiteData, client_app
from lepton_fl.site.approvals import Approvals
from lepton_fl.site.secure import LSA1
from lepton_fl.study import Study
from lepton_fl.tasks import arrays_of, build_model
from lepton_fl.tasks.arrays import unflatten
from lepton_fl.training import UnseededNoise

RUN = "0123456789abcdef" * 2
STUDY: dict[str, Any] = {
    "study": {"name": "heart"},
    "task": {"kind": "binary", "target": "ill"},
    "privacy": {"epsilon": 4.0, "delta": 1e-3},
    "secure_aggregation": {"enabled": True, "min_survivors": 3, "colluders": 1},
    "train": {"rounds": 6, "sample_rate": 0.2, "lr": 0.1, "expected_batch": 10.0},
    "features": {"columns": {"x": {"type": "float", "range": [-1, 1], "identifier": "allow"}}},
}
POLICY: dict[str, Any] = {
    "data": {"id": "records"},
    "budget": {"epsilon_total": 50.0, "epsilon_per_study": 5.0, "delta_total": 1e-2},
    "require": {"approval": "auto"},
    "release": {"metrics": "none"},
}
BENCHES: dict[str, Any] = {}
"""Every site has the same records, so their workbenches are one: preparing it takes longer than a round."""
NAMES = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf")


def merged(base, changes):
    return {key: {**base.get(key, {}), **changes.get(key, {})} for key in [*base, *changes]}


@dataclass(frozen=True)
class Passed:
    """A message that reached a site, and what it said; the reply is None where it was lost."""

    kind: str
    party: int
    request: Message
    reply: Message | None

    @property
    def body(self) -> bytes:
        return self.reply.content.config_records[SECAGG]["body"]


class Wire(OwnGrid):
    """Brings messages to the apps. `between(request, app)` may lose or change what passes, either way."""

    def __init__(self, world):
        super().__init__()
        self._world = world
        self.between = None
        self.tape: list[Passed] = []

    def get_node_ids(self):
        return list(self._world.apps)

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            party = message.metadata.dst_node_id
            call = lambda m, party=party: self._world.apps[party](m, self._world.state[party])
            reply = self.between(message, call) if self.between else call(message)
            found = reply if isinstance(reply, list) else [] if reply is None else [reply]
            self.tape.append(Passed(message.metadata.message_type, party, message, (found or [None])[0]))
            replies += found
        return replies


@dataclass
class World:
    """A study, its sites and its server."""

    folder: Any
    n: int
    study: Study
    policy: Policy
    suite_random: Any = None
    apps: dict = field(default_factory=dict)
    sites: dict = field(default_factory=dict)
    state: dict = field(default_factory=dict)
    plain: dict = field(default_factory=lambda: defaultdict(dict))
    """What sites would have sent in clear: (run, round), party, words."""
    contexts: dict = field(default_factory=dict)
    """Of a round, as the sites have it: (run, round)."""

    def __post_init__(self):
        self.names = {101 + place: name for place, name in enumerate(NAMES[: self.n])}
        self.cohort = tuple(sorted(self.names.values()))
        self.consortium, self.members = memberships(self.names)
        self.histories = {}
        x_N = np.random.default_rng(0).uniform(-1, 1, 60)
        cells = {"x": [str(x) for x in x_N], "ill": [str(int(x > 0)) for x in x_N]}
        table = load_table(Contract.of(self.study), [Batch(cells)], source="records.csv")
        self.data = SiteData(train=table, test=table)
        self.model = arrays_of(build_model(self.study, 1, torch.Generator().manual_seed(0)))
        self.ledgers = []
        for party in self.names:
            self.start(party)
        self.wire = Wire(self)
        self.grid = SecureGrid(self.wire, lambda: self.consortium)

    @property
    def parties(self):
        return list(self.names)

    def start(self, party, **changed):
        """A new process of this site's agent: rounds that were open are gone; ledger and history are not."""
        name = self.names[party]
        if party in self.sites:
            self.sites[party].ledger.close()
        history = self.histories.setdefault(party, Forgetful())
        membership = replace(self.members[name], history=history, **changed)
        aggregation = LSA1(membership)
        enter = aggregation.enter

        def spy(ticket, words):
            key = ticket.assignment.run, ticket.assignment.round
            self.plain[key][party] = words.copy()
            self.contexts[key] = ticket.context
            return enter(ticket, words)

        aggregation.enter = spy
        home = self.folder / name
        home.mkdir(exist_ok=True)
        self.ledgers.append(Ledger(home / "ledger.db"))
        site = Site(
            name=name,
            policy=self.policy,
            policy_file="policy.toml",
            approvals=Approvals(home / "approvals.jsonl", key=self.ledgers[-1].key),
            load=lambda _: self.data,
            surroundings=Deployed(noise=UnseededNoise(), ledger=self.ledgers[-1]),
            aggregation=aggregation,
            _bench=BENCHES,
        )
        self.sites[party], self.apps[party] = site, client_app(site)
        self.state[party] = Context(
            run_id=0, node_id=party, node_config={}, state=RecordDict(), run_config={}
        )

    @staticmethod
    def runs():
        """Names of runs, one after another: to repeat a round in one world."""
        return (f"{number:032x}" for number in itertools.count(1))

    def close(self):
        for ledger in self.ledgers:
            ledger.close()

    # An honest server's messages

    def config(self, number, *, study=None, run=RUN, cohort=None, **changed):
        assignment = Assignment(
            study=study or self.study, run=run, round=number, cohort=self.cohort if cohort is None else cohort
        )
        config = assignment_config(assignment)
        config.update(changed)
        return config

    def first(self, party, number=1, *, kind=TRAIN, model=None, secagg=None, **assigned):
        """The message that begins a round at a site, as a server of any intent makes it."""
        content = RecordDict({CONFIG: self.config(number, **assigned)})
        content[ARRAYS] = to_record(self.model if model is None else model)
        content[SECAGG] = self.request() if secagg is None else secagg
        return Message(content, dst_node_id=party, message_type=kind)

    def request(self, body=b"", *, attempt=1, kind=TRAIN_SUM, roster=None):
        version = self.consortium.roster.version if roster is None else roster
        return SecureRequest(kind=kind, attempt=attempt, roster=version, body=body).record()

    def later(self, party, phase, body=b"", number=1, *, attempt=1, secagg=None, **assigned):
        content = RecordDict({CONFIG: self.config(number, **assigned)})
        content[SECAGG] = self.request(body, attempt=attempt) if secagg is None else secagg
        return Message(content, dst_node_id=party, message_type=PHASES[phase])

    def ask(self, message):
        """One message to one site, past the server."""
        party = message.metadata.dst_node_id
        return self.apps[party](message, self.state[party])

    def train(self, number=1, *, between=None, parties=None, **assigned):
        """A round by the server; what it hands the loop."""
        self.wire.between = between
        content = self.first(101, number, **assigned).content
        del content[SECAGG]
        messages = [
            Message(content, dst_node_id=party, message_type=TRAIN) for party in parties or self.parties
        ]
        return list(self.grid.send_and_receive(messages, timeout=60.0))

    # What came of it

    def judge(self, replies, number=1):
        """The loop's `Round`, with these replies taken and closed as far as it goes."""
        current = Round(number, self.names, quorum=self.study.survivors(self.n), template=self.model)
        for reply in replies:
            current.take(reply, summed=True)
        return current

    def sum_of(self, replies):
        """(parties, mean) of the one sum among `replies`; None where there is none."""
        sums = [reply for reply in replies if not reply.has_error()]
        assert len(sums) <= 1
        if not sums:
            return None
        members = tuple(sums[0].content.config_records[CONFIG]["members"])
        return members, from_record(sums[0].content.array_records[ARRAYS])

    def expected(self, number, parties, run=RUN):
        """The mean of these sites' updates, added up in clear."""
        words = self.plain[run, number]
        total = np.zeros_like(next(iter(words.values())))
        for party in parties:
            total += words[party]
        quantiser = self.contexts[run, number].quantiser
        return unflatten(
            quantiser.decode(total, n=len(parties), total_weight=len(parties)).astype(np.float32), self.model
        )

    def is_sum(self, replies, parties, number=1, run=RUN):
        """That `replies` hold the sum over exactly these sites, bit by bit."""
        members, mean = self.sum_of(replies)
        assert members == tuple(parties)
        for name, array in self.expected(number, parties, run).items():
            np.testing.assert_array_equal(mean[name], array)

    def errors(self, party):
        """Why this site refused, in full."""
        return list(self.sites[party].refusals)

    def said(self, phase, party):
        """The last reply of a site in a phase, as bytes."""
        kinds = (PHASES[phase], TRAIN) if phase is Phase.ADVERTISE else (PHASES[phase],)
        return next(p.body for p in reversed(self.wire.tape) if p.party == party and p.kind in kinds)

    def released(self, party, number=1):
        found = self.histories[party].read(bytes.fromhex(RUN), TRAIN_SUM, number)
        return found is not None and found.released


@pytest.fixture(autouse=True)
def _known_to_flower():
    identify(RUN, 1)


@pytest.fixture
def make_world(tmp_path):
    worlds = []

    def make(n=4, *, policy=None, **study):
        folder = tmp_path / f"world-{len(worlds)}"
        folder.mkdir()
        worlds.append(
            World(
                folder,
                n,
                parse(Study, merged(STUDY, study), file="study.toml"),
                parse(Policy, merged(POLICY, policy or {}), file="policy.toml"),
            )
        )
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture
def world(make_world):
    return make_world()


def reachable(root):
    """Every object that can be reached from `root`, modules and types left out; arrays' bases as well."""
    seen, todo = {}, [root]
    skipped = (type, type(gc), type(reachable), type(reachable.__code__))
    while todo:
        found = todo.pop()
        if id(found) in seen:
            continue
        seen[id(found)] = found
        inner = gc.get_referents(found) if not isinstance(found, np.ndarray) else [found.base]
        if isinstance(found, type(reachable)):
            # What a closure holds, not the module that it was made in.
            inner = list(found.__closure__ or ())
        todo += [o for o in inner if not isinstance(o, skipped[:2]) and o is not None]
    return list(seen.values())


@pytest.fixture
def walk():
    return reachable


@pytest.fixture
def record():
    return lambda **fields: ConfigRecord(fields)
