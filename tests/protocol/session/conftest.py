"""Session attempts in memory, after an ordinary round; and what an adversary can know of them, exactly."""

import copy
import gc
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from lepton_fl.secagg.context import Cohort
from lepton_fl.secagg.errors import Phase, SecaggError
from lepton_fl.secagg.exchanges import EncodedUpdate
from lepton_fl.secagg.session_messages import (
    SessionAdvert,
    SessionConfirm,
    SessionConfirmed,
    SessionRoll,
    advert_digest,
)
from lepton_fl.secagg.session_server import SessionServerRound
from lepton_fl.secagg.session_site import SessionRound

PHASES = (Phase.ADVERTISE, Phase.MASK, Phase.CONFIRM, Phase.UNMASK)


class Run:
    """A run of which `first`, an ordinary round, is over; `sessions` are what its sites keep."""

    def __init__(self, first):
        self.first = first
        self.rng = np.random.default_rng(11)
        self.begin()

    def begin(self):
        """As it was after the first round."""
        self.sessions = {
            p: copy.deepcopy(site.session) for p, site in self.first.sites.items() if site.session
        }
        self.histories = copy.deepcopy(self.first.histories)
        self.id = next(iter(self.sessions.values())).id
        self.rounds = 1

    def context(self, *, cohort=None, **changed):
        """That of the next round's first attempt."""
        context = replace(self.first.context, round=self.rounds + 1, **changed)
        if cohort is not None:
            old = context.cohort
            parties = Cohort(parties=tuple(cohort), colluders=old.colluders, min_sites=old.min_sites)
            context = replace(context, cohort=parties)
        return context

    def attempt(
        self, *, step=None, cohort=None, contexts=None, steps=None, sites=None, words=None, **changed
    ):
        """The next round, in the session. `contexts` and `steps` are of sites that were told others."""
        context = self.context(cohort=cohort, **changed)
        self.rounds += 1
        if step is None:
            step = max(self.sessions[p].next for p in context.cohort.parties if p in self.sessions)
        return Attempt(self, context, step, contexts or {}, steps or {}, sites, words)

    def resume(self, context, step, words):
        """An attempt that no site has entered yet."""
        return Attempt(self, context, step, {}, {}, (), words)


class Attempt:
    """One session attempt: sites, a server, and somebody between them who may drop or change what passes."""

    def __init__(self, run, context, step, contexts, steps, sites, words):
        self.run_, self.context, self.step = run, context, step
        self.parties = context.cohort.parties
        self.server = SessionServerRound(context, run.id, step)
        self.encoded = words or {
            p: run.rng.integers(-500, 500, context.words).astype(np.int32).view(np.uint32)
            for p in self.parties
        }
        self._told = contexts, steps
        self.sites = {p: self.site(p) for p in (self.parties if sites is None else sites)}
        self.left, self.asked = defaultdict(dict), defaultdict(dict)
        self.errors, self.blamed = {}, {}
        self.held = {}
        """By party, what shares it held while it confirmed: a colluder's, for its friends."""
        self.keys = {}
        """By party, its pairs' keys of this step as they were before it masked."""

    def site(self, party):
        contexts, steps = self._told
        return SessionRound(
            contexts.get(party, self.context),
            EncodedUpdate(self.encoded[party].copy()),
            session=self.run_.sessions[party],
            step=steps.get(party, self.step),
            history=self.run_.histories[party],
        )

    def call(self, phase, party, request):
        site = self.sites[party]
        if phase is Phase.ADVERTISE:
            return site.advertise()
        if phase is Phase.MASK and party not in self.keys:
            self.keys[party] = {q: (k.seed, k.mac, k.peer_mac) for q, k in site._pairs.items()}
        reply = getattr(site, phase.value)(request)
        if phase is Phase.MASK and party not in self.held:
            self.held[party] = dict(site._shares)
        return reply

    def receive(self, phase, party, reply):
        if phase is Phase.ADVERTISE:
            self.server.advertised(party, reply)
        elif phase is Phase.MASK:
            self.server.masked(party, reply.header, reply.words)
        elif phase is Phase.CONFIRM:
            self.server.confirmed(party, reply)
        else:
            self.server.unmasked(party, reply)

    def ask(self, phase, party, request):
        """The site's reply, which leaves it; None if it refuses."""
        self.asked[phase][party] = request
        try:
            reply = self.call(phase, party, request)
        except SecaggError as error:
            self.errors[party] = error
            return None
        self.left[phase][party] = reply
        return reply

    def requests(self, phase):
        if phase is Phase.ADVERTISE:
            return dict.fromkeys(self.sites, b"")
        return {
            Phase.MASK: self.server.mask_requests,
            Phase.CONFIRM: self.server.confirm_requests,
            Phase.UNMASK: self.server.unmask_requests,
        }[phase]()

    def run(self, *, drops=None, on_requests=None, on_reply=None, until=Phase.OVER):
        """All phases in turn; `drops[phase]` do not answer then nor later. The sum, or an error."""
        gone = set()
        for phase in PHASES:
            if phase is until:
                return None
            requests = self.requests(phase)
            gone |= set((drops or {}).get(phase, ()))
            if on_requests:
                requests = on_requests(phase, requests)
            for party, request in requests.items():
                if party in gone or party not in self.sites:
                    continue
                reply = self.ask(phase, party, request)
                if reply is not None and on_reply:
                    reply = on_reply(phase, party, reply)
                if reply is None:
                    continue
                try:
                    self.receive(phase, party, reply)
                except SecaggError as error:
                    self.blamed[party] = error
        return self.server.result()

    def expected(self, survivors):
        """The plain sum, decoded."""
        total = np.zeros(self.context.words, np.uint32)
        for party in survivors:
            total += self.encoded[party]
        n = len(survivors)
        return self.context.quantiser.decode(total, n=n, total_weight=n)

    # What a server can make that checks nothing.

    def advert(self, party):
        return SessionAdvert.decode(self.context.suite, self.left[Phase.ADVERTISE][party], len(self.parties))

    def box(self, sender, receiver):
        others = [p for p in self.parties if p != sender]
        return self.advert(sender).boxes[others.index(receiver)]

    def commitments(self, dealer, holder):
        return self.advert(dealer).commitments[self.parties.index(holder)]

    def roll(self, receiver, u1, digests=None):
        """A roll of these parties; `digests` of some that are not their adverts'."""
        suite, left = self.context.suite, self.left[Phase.ADVERTISE]
        others = [p for p in u1 if p != receiver]
        true = {p: advert_digest(suite, left[p]) for p in u1 if p in left}
        return SessionRoll(
            parties=tuple(u1),
            digests=tuple({**true, **(digests or {})}[p] for p in u1),
            commitments=tuple(self.commitments(p, receiver) for p in others),
            boxes=tuple(self.box(p, receiver) for p in others),
        )

    def mac(self, sender, receiver):
        """Of the confirmation that left `sender`."""
        survivors = self.sites[sender]._survivors.parties
        others = [p for p in survivors if p != sender]
        reply = SessionConfirm.decode(self.context.suite, self.left[Phase.CONFIRM][sender], len(survivors))
        return reply.macs[others.index(receiver)]

    def confirmed(self, receiver, parties):
        macs = tuple(self.mac(p, receiver) for p in parties)
        return SessionConfirmed(parties=tuple(parties), macs=macs).encode(self.context.suite)

    # What an adversary has.

    def opened(self, colluders):
        """(whose b, whose k) t shares of which are with the server and the colluders."""
        found = {"b": defaultdict(set), "k": defaultdict(set)}
        for holder in self.left[Phase.UNMASK]:
            site = self.sites[holder]
            for dealer in site._roll:
                found["b" if dealer in site._survivors.parties else "k"][dealer].add(holder)
        for holder in colluders:
            for dealer in self.held.get(holder, ()):
                found["b"][dealer].add(holder)
                found["k"][dealer].add(holder)
        t = self.context.cohort.threshold
        return tuple({d for d, held in found[which].items() if len(held) >= t} for which in "bk")

    def rows(self, colluders):
        """The honest sites' vectors that left, each as what it is the sum of; masks that are known left out.

        A term is (what, sign): the update of a party in this round, or a mask, named by all it is made of.
        """
        b, k = self.opened(colluders)
        for party, masked in self.left[Phase.MASK].items():
            if party in colluders or masked is None:
                continue
            site = self.sites[party]
            row = {("x", self.context.round, party): 1}
            if party not in b:
                row["b", id(self), party, site._r1] = 1
            for peer in site._roll:
                known = peer in colluders or party in k or peer in k
                if peer != party and not known:
                    low, high = min(party, peer), max(party, peer)
                    row["pair", id(self), low, high, site._r1] = 1 if party == low else -1
            yield row


def ordinary_rows(net, colluders):
    """The same of an ordinary attempt: mask seeds in place of k."""
    t = net.context.cohort.threshold
    shares = {"b": defaultdict(set), "k": defaultdict(set)}
    for holder in net.left[Phase.UNMASK]:
        site = net.sites[holder]
        for dealer in site._active:
            shares["b" if dealer in site._survivors.parties else "k"][dealer].add(holder)
    for which in shares.values():
        for dealer in net.left[Phase.SHARE]:
            which[dealer] |= set(colluders)
    b, k = ({d for d, held in shares[which].items() if len(held) >= t} for which in "bk")
    for party in net.left[Phase.MASK]:
        if party in colluders:
            continue
        site = net.sites[party]
        row = {("x", net.context.round, party): 1}
        if party not in b:
            row["b", id(net), party, site._r1] = 1
        for peer in site._active:
            if peer != party and peer not in colluders and party not in k and peer not in k:
                low, high = min(party, peer), max(party, peer)
                row["pair", id(net), low, high, site._r1] = 1 if party == low else -1
        yield row


def combinations(rows):
    """A basis of the combinations of rows in which all masks cancel, as sums of updates (Gauss)."""
    rows = [{what: Fraction(sign) for what, sign in row.items()} for row in rows]

    def eliminate(rows, wanted):
        kept, done = list(rows), []
        for what in sorted({w for row in kept for w in row if wanted(w)}, key=repr):
            at = next((place for place, row in enumerate(kept) if what in row), None)
            if at is None:
                continue
            pivot = kept.pop(at)
            done.append(pivot)
            for place, row in enumerate(kept):
                if what in row:
                    factor = row[what] / pivot[what]
                    merged = {w: row.get(w, 0) - factor * pivot.get(w, 0) for w in row | pivot}
                    kept[place] = {w: value for w, value in merged.items() if value}
        return kept, done

    free, _ = eliminate(rows, lambda what: what[0] != "x")
    _, basis = eliminate(free, lambda what: what[0] == "x")
    return basis


def learned(*attempts, colluders=()):
    """The sets of honest sites whose sum an adversary learns, from the attempts at one round.

    It must be one plain sum at most; anything else is an update, or a difference, that leaked.
    """
    rows = []
    for attempt in attempts:
        rows += attempt.rows(colluders) if isinstance(attempt, Attempt) else ordinary_rows(attempt, colluders)
    found = []
    for combination in combinations(rows):
        values = set(combination.values())
        assert len(values) == 1, f"a combination that is no sum leaks: {combination}"
        found.append({party for _, _, party in combination})
    return found


def reachable(*roots):
    """All bytes that the object graph below these holds, classes and modules left out."""
    seen, found, left = set(), [], list(roots)
    while left:
        thing = left.pop()
        if id(thing) in seen or isinstance(thing, type) or type(thing).__name__ in ("module", "function"):
            continue
        seen.add(id(thing))
        if isinstance(thing, bytes | bytearray):
            found.append(bytes(thing))
        elif isinstance(thing, np.ndarray):
            found.append(thing.tobytes())
        left += gc.get_referents(thing)
        # Instances with slots are tracked, but a slot with bytes in it is reached by name alone.
        for kind in type(thing).__mro__:
            slots = getattr(kind, "__slots__", ())
            left += [
                getattr(thing, slot)
                for slot in ([slots] if isinstance(slots, str) else slots)
                if hasattr(thing, slot)
            ]
    return found


@pytest.fixture(scope="session")
def first_rounds():
    """Ordinary rounds that are over, by what they are of: they take most of a test's time."""
    return {}


@pytest.fixture
def make_run(world, context_of, first_rounds):
    def make(n=4, *, drops=None, **fields):
        key = n, repr(drops), repr(fields)
        if key not in first_rounds:
            net = world.Net(context_of(n, **{"coordinates": 40, **fields}))
            net.sites = {p: net.site(p, sessions=True) for p in net.parties}
            net.run(drops=drops)
            first_rounds[key] = net
        return Run(first_rounds[key])

    return make


@pytest.fixture
def adversary():
    """What can be known: `learned`, `reachable`."""
    return type("Adversary", (), {"learned": staticmethod(learned), "reachable": staticmethod(reachable)})
