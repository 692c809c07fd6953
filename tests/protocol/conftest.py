"""A round in memory: sites, a server, and somebody between them who may drop or change what passes."""

import functools
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from lepton_fl.secagg import IdentityCertificate, IdentityKey, Member, Roster, key_digest
from lepton_fl.secagg.context import Cohort, Consortium, Context, Floor, Forgetful
from lepton_fl.secagg.errors import Phase, SecaggError
from lepton_fl.secagg.fixedpoint import Quantiser
from lepton_fl.secagg.messages import Confirm, Confirmed, Post, Shares
from lepton_fl.secagg.server import ServerRound
from lepton_fl.secagg.site import SiteRound, Update

NOW = datetime(2026, 11, 22, tzinfo=UTC)
ROOT = IdentityKey.generate()
CLIP = 1.0


@functools.cache
def identity(party):
    return IdentityKey.generate()


def certify(party, *, root=ROOT, key=None, name=None, days=1, serial=None):
    return IdentityCertificate.issue(
        root,
        party=party,
        name=name or f"site-{party}",
        key=(key or identity(party)).public,
        not_before=NOW - timedelta(days=2),
        not_after=NOW + timedelta(days=days),
        serial=serial or party,
    ).signed


@functools.cache
def certificate(party):
    return certify(party)


@functools.cache
def consortium(parties, version=1, revoked=()):
    members = [Member(p, f"site-{p}", key_digest(identity(p).public)) for p in parties]
    roster = Roster.issue(ROOT, consortium=bytes(32), version=version, members=members, revoked=revoked)
    return Consortium(ROOT.public, roster)


def ids(n):
    return tuple(101 + 3 * place for place in range(n))


def make_context(n=4, *, colluders=1, min_sites=3, coordinates=200, bits=None, **changed):
    cohort = Cohort(parties=ids(n), colluders=colluders, min_sites=min_sites)
    fields = {
        "run": bytes(16),
        "kind": "train",
        "round": 1,
        "attempt": 1,
        "cohort": cohort,
        "coordinates": coordinates,
        "quantiser": Quantiser(clip=CLIP, bits=bits or 20, max_n=n),
        "weighted": False,
        "model": bytes(32),
        "study": bytes(32),
        "roster": 1,
    }
    return Context(**{**fields, **changed})


@dataclass
class Net:
    """One attempt. `drops[phase]` do not reply in that phase, nor after."""

    context: Context
    updates: dict = field(default_factory=dict)
    contexts: dict = field(default_factory=dict)
    """Of sites that were told something else."""
    histories: dict = field(default_factory=lambda: defaultdict(Forgetful))
    floor: Floor = field(default_factory=Floor)
    now: datetime = NOW

    def __post_init__(self):
        self.parties = self.context.cohort.parties
        self.consortium = consortium(self.parties)
        rng = np.random.default_rng(7)
        for party in self.parties:
            vector = rng.uniform(-CLIP, CLIP, self.context.coordinates).astype(np.float32)
            self.updates.setdefault(party, Update(vector))
        self.encoded = {}
        self.sites = {party: self.site(party) for party in self.parties}
        self.server = ServerRound(self.context, self.consortium)
        self.left = defaultdict(dict)
        """What left the sites: phase, party, reply."""
        self.asked = defaultdict(dict)
        self.errors = {}
        """What a site raised."""
        self.blamed = {}
        """What the server raised over a reply."""

    def site(self, party, **changed):
        context = self.contexts.get(party, self.context)
        encoded = self.updates[party].encode(context)
        self.encoded[party] = encoded._words.copy()
        arguments = {
            "identity": identity(party),
            "certificate": certificate(party),
            "party": party,
            "consortium": self.consortium,
            "history": self.histories[party],
            "floor": self.floor,
        }
        return SiteRound(context, encoded, **{**arguments, **changed})

    def call(self, phase, party, request):
        site = self.sites[party]
        if phase is Phase.ADVERTISE:
            return site.advertise()
        if phase is Phase.SHARE:
            return site.share(request, self.now)
        return getattr(site, phase.value)(request)

    def receive(self, phase, party, reply):
        server = self.server
        if phase is Phase.ADVERTISE:
            server.advertised(party, reply, self.now)
        elif phase is Phase.SHARE:
            server.shared(party, reply)
        elif phase is Phase.MASK:
            server.masked(party, reply.header, reply.words)
        elif phase is Phase.CONFIRM:
            server.confirmed(party, reply)
        else:
            server.unmasked(party, reply)

    def exchange(self, phase, requests, *, drops=(), on_reply=None, order=None):
        """The requests of one phase to the sites, and what they reply to the server."""
        for party in order(requests) if order else requests:
            if party in drops:
                continue
            request = requests[party]
            self.asked[phase][party] = request
            try:
                reply = self.call(phase, party, request)
            except SecaggError as error:
                self.errors[party] = error
                continue
            self.left[phase][party] = reply
            if on_reply:
                reply = on_reply(phase, party, reply)
            if reply is None:
                continue
            try:
                self.receive(phase, party, reply)
            except SecaggError as error:
                self.blamed[party] = error

    def run(self, *, drops=None, on_requests=None, on_reply=None, order=None, until=Phase.OVER):
        """All phases in turn; `on_requests` and `on_reply` may change what passes. The sum, or an error."""
        gone = set()
        ends = {
            Phase.ADVERTISE: lambda: dict.fromkeys(self.parties, b""),
            Phase.SHARE: self.server.share_requests,
            Phase.MASK: self.server.mask_requests,
            Phase.CONFIRM: self.server.confirm_requests,
            Phase.UNMASK: self.server.unmask_requests,
        }
        for phase, requests in ends.items():
            if phase is until:
                return None
            asked = requests()
            gone |= set((drops or {}).get(phase, ()))
            if on_requests:
                asked = on_requests(phase, asked)
            self.exchange(phase, asked, drops=gone, on_reply=on_reply, order=order)
        return self.server.result()

    def expected(self, survivors):
        """The sum of the encoded updates, in clear, decoded."""
        total = np.zeros(self.context.coordinates, np.uint32)
        weights = 0
        for party in survivors:
            total += self.encoded[party][: self.context.coordinates]
            weights += self.updates[party].weight
        return self.context.quantiser.decode(total, n=len(survivors), total_weight=weights)

    def post(self, receiver, senders=None):
        """A `Post` made of what left the sites: what a server can make that checks nothing."""
        neighbours = {p: [q for q in self.parties if q != p] for p in self.parties}
        senders = [p for p in self.left[Phase.SHARE] if p != receiver] if senders is None else senders
        read = {p: Shares.decode(self.context.suite, self.left[Phase.SHARE][p]) for p in senders}
        return Post(
            senders=tuple(senders),
            seeds=tuple(read[p].seed for p in senders),
            envelopes=tuple(read[p].envelopes[neighbours[p].index(receiver)] for p in senders),
        )

    def confirmed(self, parties):
        """`Confirmed`, of what left the sites."""
        left = self.left[Phase.CONFIRM]
        confirms = tuple(Confirm.decode(self.context.suite, left[p]) for p in parties)
        return Confirmed(parties=tuple(parties), confirms=confirms).encode(self.context.suite)

    def opened_nothing(self):
        """That so few shares left the sites that no secret can be rebuilt, colluders' included."""
        cohort = self.context.cohort
        return len(self.left[Phase.UNMASK]) + cohort.colluders < cohort.threshold


@pytest.fixture
def make_net():
    def make(n=4, *, net=None, **fields):
        return Net(make_context(n, **fields), **(net or {}))

    return make


@pytest.fixture
def context_of():
    return make_context


@pytest.fixture
def world():
    """The names that forge: what a test needs to be somebody else."""
    return type(
        "World",
        (),
        {
            name: staticmethod(value) if callable(value) else value
            for name, value in {
                "NOW": NOW,
                "ROOT": ROOT,
                "Net": Net,
                "certify": certify,
                "certificate": certificate,
                "consortium": consortium,
                "identity": identity,
                "ids": ids,
            }.items()
        },
    )
