"""What the numbers of a run say, before any is drawn: who gains, who should keep its own model.

Read by the HTML and the Markdown alike, so that the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from lepton_fl.results import Arm, Confusion, FirstSeed, Interval, RecallAt, Results, SiteSummary

OWN: tuple[Literal["local", "linear"], ...] = ("local", "linear")
"""The arms of a site's own model, without us."""
Advice = Literal["keep", "unclear", "gains"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One site: its own two models, the federated and the pooled one on the same held-out records."""

    site: SiteSummary
    local: Interval | None
    """Own gradient boosting. None where the run did not have this arm at this site."""
    linear: Interval | None
    """Own logistic regression."""
    federated: Interval | None
    pooled: Interval | None

    @property
    def defined(self) -> bool:
        """Whether any arm has a figure here."""
        return any(i is not None and i.mean is not None for i in self.intervals)

    @property
    def measured(self) -> bool:
        """Whether any arm was judged here at all."""
        return any(i is not None for i in self.intervals)

    @property
    def intervals(self) -> tuple[Interval | None, Interval | None, Interval | None, Interval | None]:
        """In the order of the report's columns: local, linear, federated, pooled."""
        return self.local, self.linear, self.federated, self.pooled

    @property
    def own(self) -> Interval | None:
        """The better of the site's own models: as the run chose, or whichever it has the higher mean for."""
        named = {"local": self.local, "linear": self.linear}
        chosen = named[self.site.own_best] if self.site.own_best else None
        return chosen or better(named.values())

    @property
    def gain(self) -> Interval | None:
        """Federated minus own: paired if the run has it, else of the means, without bounds."""
        if self.site.gain is not None and self.site.gain.mean is not None:
            return self.site.gain
        return difference(self.federated, self.own)

    @property
    def paired(self) -> bool:
        """The difference has an interval of its own."""
        return self.gain is not None and self.gain.low is not None and self.gain.high is not None

    @property
    def keeps_own(self) -> bool:
        """The federated model does worse here than the site's own."""
        # On the means: a site that gains nothing for certain has still no reason to switch.
        return self.gain is not None and self.gain.mean is not None and self.gain.mean < 0

    @property
    def uncertain(self) -> bool:
        """The paired interval holds zero; without pairs: the two intervals overlap, or one is missing."""
        if self.gain is not None and self.gain.low is not None and self.gain.high is not None:
            return self.gain.low <= 0 <= self.gain.high
        ours, own = self.federated, self.own
        if ours is None or own is None:
            return True
        if ours.low is None or ours.high is None or own.low is None or own.high is None:
            return True
        return ours.low <= own.high and own.low <= ours.high

    @property
    def advice(self) -> Advice | None:
        """What to tell the site; None where there is nothing to compare."""
        if self.gain is None:
            return None
        if self.uncertain:
            return "unclear"
        # The mean of a skewed bootstrap may lie outside its interval: where there is one, it decides.
        loses = self.gain.high < 0 if self.gain.high is not None else self.keeps_own
        return "keep" if loses else "gains"


@dataclass(frozen=True, slots=True, kw_only=True)
class MostSpent:
    """The site nearest to the end of its privacy budget."""

    site: SiteSummary
    epsilon: float

    @property
    def share(self) -> float:
        """Spent over allowed; 1 where nothing is allowed."""
        allowed = self.site.epsilon_allowed
        return self.epsilon / allowed if allowed > 0 else 1.0


def difference(left: Interval | None, right: Interval | None) -> Interval | None:
    """`left` minus `right`, where both have a mean; without bounds, which only pairs could give."""
    if left is None or right is None or left.mean is None or right.mean is None:
        return None
    return Interval(mean=left.mean - right.mean)


def better(found: Iterable[Interval | None]) -> Interval | None:
    """The one with the highest mean; one without a mean only where none has any."""
    ranked = [i for i in found if i is not None]
    return max(ranked, key=lambda i: -1.0 if i.mean is None else i.mean, default=None)


def gain(results: Results) -> Interval | None:
    """Federated minus each site's own best over the sites: paired if the run has it, else the means'.

    Only pairs say how sure the difference is: the two arms' own intervals overlap far too easily.
    """
    if results.gain is not None and results.gain.mean is not None:
        return results.gain
    gains = [row.gain.mean for row in comparisons(results) if row.gain and row.gain.mean is not None]
    return Interval(mean=fmean(gains)) if gains else None


def by_advice(results: Results) -> dict[Advice, tuple[Comparison, ...]]:
    """The sites that can be compared, by what they are told; no class is empty."""
    rows = comparisons(results)
    order: tuple[Advice, ...] = ("keep", "unclear", "gains")
    classes = {advice: tuple(row for row in rows if row.advice == advice) for advice in order}
    return {advice: told for advice, told in classes.items() if told}


def arm(results: Results, name: str) -> Arm | None:
    """The arm called `name`, or None where the run did not have it."""
    return next((a for a in results.arms if a.arm == name), None)


def comparisons(results: Results) -> tuple[Comparison, ...]:
    """One row for each site, in the order of the run."""
    of = {a.arm: a.per_site for a in results.arms}
    return tuple(
        Comparison(
            site=site,
            local=of.get("local", {}).get(site.site),
            linear=of.get("linear", {}).get(site.site),
            federated=of.get("federated", {}).get(site.site),
            pooled=of.get("pooled", {}).get(site.site),
        )
        for site in results.sites
    )


def most_spent(results: Results) -> MostSpent | None:
    """Where the least of the budget is left; None where no site has a bounded epsilon."""
    if results.promise.noise == "none":
        # A ledger may hold earlier studies' epsilon; after a run without noise it bounds nothing.
        return None
    found = [
        MostSpent(site=site, epsilon=site.epsilon_spent)
        for site in results.sites
        if site.epsilon_spent is not None
    ]
    return max(found, key=lambda m: m.share, default=None)


def first_seeds(results: Results) -> dict[str, tuple[Arm, FirstSeed]]:
    """The arms with one seed's scores, by name, in the order of the run."""
    return {a.arm: (a, a.first_seed) for a in results.arms if a.first_seed is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class AtPoint:
    """An arm at the operating point: the held-out records of all sites that could set a threshold."""

    arm: Arm
    total: Confusion
    sites: tuple[str, ...]


def at_point(results: Results) -> tuple[AtPoint, ...]:
    """The arms that some site could set a threshold for."""
    found = []
    for arm_, first in first_seeds(results).values():
        counted = {site: part for site, part in first.at_point.items() if part is not None}
        if counted:
            found.append(AtPoint(arm=arm_, total=Confusion.total(counted.values()), sites=tuple(counted)))
    return tuple(found)


def without_threshold(results: Results) -> tuple[str, ...]:
    """The sites whose training records cannot set a threshold; by the federated arm or whatever there is."""
    for _, first in first_seeds(results).values():
        if first.at_point:
            return tuple(site for site, part in first.at_point.items() if part is None)
    return ()


def recall_at(found: Arm, fpr: float) -> RecallAt | None:
    """The arm's recall at that false positive rate."""
    return next((r for r in found.recall if r.fpr == fpr), None)


def fprs(results: Results) -> tuple[float, ...]:
    """The false positive rates at which recall was told, lowest first."""
    return tuple(sorted({r.fpr for a in results.arms for r in a.recall}))


def rare(results: Results) -> bool:
    """Fewer than one record in twenty is positive."""
    return any(first.positives < first.records / 20 for _, first in first_seeds(results).values())
