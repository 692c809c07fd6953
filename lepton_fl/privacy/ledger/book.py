"""What a ledger's entries come to. Derived from them alone, one after another, and never stored."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from lepton_fl.errors import VerificationFailed
from lepton_fl.privacy.accounting import Event
from lepton_fl.privacy.ledger.entries import (
    Charge,
    Commit,
    Entry,
    Opening,
    RecoveredCharge,
    Recovery,
    Release,
    Renewal,
)
from lepton_fl.privacy.ledger.receipts import NO_ENTRY, Head


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a policy allows per privacy unit, over all studies on one data-set id."""

    data_set: str
    epsilon_total: float
    epsilon_per_study: float
    delta_total: float
    file: str
    """The policy file, for the error that names whose limit it is."""

    def __post_init__(self) -> None:
        for name, value in (
            ("epsilon_total", self.epsilon_total),
            ("epsilon_per_study", self.epsilon_per_study),
        ):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} {value} must be finite, above 0")
        if not 0 < self.delta_total < 1:
            raise ValueError(f"delta_total {self.delta_total} must be above 0 and below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """A study's part of what was spent."""

    study: str
    study_name: str
    delta: float
    epsilon: float
    runs: int
    rounds: int
    last: str


@dataclass(slots=True)
class Round:
    """What became of a round that was charged."""

    seq: int
    """Number of the entry that charged it."""
    outcome: str
    """`charged`, `released` or `recovered`."""
    sha256: bytes = b""
    """Of what left."""


@dataclass(slots=True)
class Study:
    """A study's charges since the last renewal."""

    name: str
    delta: float = 0.0
    """The largest that it was charged at."""
    runs: set[str] = field(default_factory=set)
    rounds: int = 0
    last: str = ""


@dataclass(slots=True)
class DataSet:
    """All that was charged to one data-set id, whatever version of the data it was."""

    unit: str = ""
    """The one privacy unit of the charges since the last renewal; empty where there are none."""
    charges: Counter[tuple[str, str, Event]] = field(default_factory=Counter)
    """Rounds since the last renewal, by run, study and event."""
    charged: int = 0
    """Their sum."""
    studies: dict[str, Study] = field(default_factory=dict)
    """By id, in order of first charge since the last renewal."""
    rounds: dict[str, dict[int, Round]] = field(default_factory=dict)
    """By run, since ever: no renewal lets a round be released twice."""
    released: dict[str, list[str]] = field(default_factory=dict)
    """What left without noise, by run, since ever."""
    renewals: int = 0

    def events(self, *, study: str | None = None, run: str | None = None) -> list[Event]:
        """The events charged since the last renewal, of one study or run or of all; equal ones as one."""
        found: Counter[Event] = Counter()
        for (of_run, of_study, event), rounds in self.charges.items():
            if study in (None, of_study) and run in (None, of_run):
                found[event] += rounds
        return [event.times(rounds) for event, rounds in found.items()]

    def round(self, run: str, round: int) -> Round | None:
        """What became of a round; None where it was never charged."""
        return self.rounds.get(run, {}).get(round)


class Book:
    """The state of a ledger after some of its entries. Applying one more costs the same however many."""

    def __init__(self) -> None:
        self.head: Head = NO_ENTRY
        self.key: bytes = b""
        """The public key that signs the ledger; empty before the first entry."""
        self.settled: set[tuple[bytes, bytes]] = set()
        """Ledger key and digest of the lost heads that a recovery has settled."""
        self.lost_ends: dict[bytes, Head] = {}
        """The highest of them, by ledger key."""
        self.lost = 0
        """Entries that recoveries could not explain."""
        self._sets: dict[str, DataSet] = {}

    def of(self, data_set: str) -> DataSet:
        """What was charged to a data-set id."""
        return self._sets.get(data_set) or DataSet()

    @property
    def data_sets(self) -> Iterable[str]:
        """The data-set ids that something was charged to, in order of first use."""
        return self._sets

    def apply(self, entry: Entry) -> None:
        """Take in the next entry, whose signature somebody answers for.

        Raises:
            VerificationFailed: it does not follow the last one, or contradicts what went before.
        """
        if entry.seq != self.head.counter + 1 or entry.previous != self.head.digest:
            raise VerificationFailed("does not follow the entry before")
        if isinstance(entry.content, Opening) != (entry.seq == 1):
            raise VerificationFailed("a ledger has one opening, its first entry")
        self._take(entry)
        self.head = Head(entry.seq, entry.digest)

    def _take(self, entry: Entry) -> None:
        content = entry.content
        if isinstance(content, Opening):
            self.key = content.key
            return
        if isinstance(content, Recovery):
            for key, counter, digest in content.settled:
                self.settled.add((key, digest))
                if counter > self.lost_ends.get(key, NO_ENTRY).counter:
                    self.lost_ends[key] = Head(counter, digest)
            self.lost += content.lost
            return
        found = self._sets.setdefault(entry.data_set, DataSet())
        if isinstance(content, Charge):
            _charge(found, entry, content, "charged")
        elif isinstance(content, RecoveredCharge):
            _charge(found, entry, content.charge, "recovered")
        elif isinstance(content, Commit):
            round = found.round(content.run, content.round)
            if round is None or round.outcome != "charged":
                raise VerificationFailed(
                    f"commits round {content.round} of a run that was not charged for it"
                )
            round.outcome, round.sha256 = "released", content.sha256
        elif isinstance(content, Release):
            found.released.setdefault(content.run, []).append(content.what)
        else:
            _renew(found, entry, content, self.key)


def _charge(found: DataSet, entry: Entry, charge: Charge, outcome: str) -> None:
    rounds = found.rounds.setdefault(charge.run, {})
    # Two agents on copies of a ledger may each have released a round: then a recovery charges it once more.
    if charge.round in rounds and outcome != "recovered":
        raise VerificationFailed(f"charges round {charge.round} of a run a second time")
    rounds.setdefault(charge.round, Round(entry.seq, outcome))
    found.unit = found.unit or charge.unit
    found.charges[charge.run, charge.study, charge.event] += 1
    found.charged += 1
    study = found.studies.setdefault(charge.study, Study(charge.study_name))
    study.delta = max(study.delta, charge.delta)
    study.runs.add(charge.run)
    study.rounds += 1
    study.last = max(study.last, entry.at)


def _renew(found: DataSet, entry: Entry, renewal: Renewal, key: bytes) -> None:
    renewal.check()
    expected = key, entry.data_set, found.renewals + 1
    if (renewal.ledger, renewal.data_set, renewal.number) != expected:
        raise VerificationFailed("renewal of another ledger or data set, or out of turn")
    found.renewals += 1
    found.unit, found.charged = "", 0
    found.charges.clear()
    found.studies.clear()
