"""What the numbers of a run say, before any is drawn: who gains, who should keep its own model.

Read by the HTML and the Markdown alike, so that the two cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass

from lepton_fl.results import Arm, Interval, Results, SiteSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One site: its own model, the federated and the pooled one on the same held-out records."""

    site: SiteSummary
    local: Interval | None
    """None where the run did not have this arm at this site."""
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
    def intervals(self) -> tuple[Interval | None, Interval | None, Interval | None]:
        return self.local, self.federated, self.pooled

    @property
    def gain(self) -> float | None:
        """Federated minus local; None where either is missing."""
        return difference(self.federated, self.local)

    @property
    def keeps_own(self) -> bool:
        """The federated model does worse here than the site's own."""
        # On the means: a site that gains nothing for certain has still no reason to switch.
        return self.gain is not None and self.gain < 0

    @property
    def uncertain(self) -> bool:
        """The intervals of federated and local overlap, or one of them has none."""
        ours, own = self.federated, self.local
        if ours is None or own is None:
            return True
        if ours.low is None or ours.high is None or own.low is None or own.high is None:
            return True
        return ours.low <= own.high and own.low <= ours.high


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


def difference(left: Interval | None, right: Interval | None) -> float | None:
    """`left` minus `right`, where both have a mean."""
    if left is None or right is None or left.mean is None or right.mean is None:
        return None
    return left.mean - right.mean


def gain(results: Results) -> Interval | None:
    """Federated minus local over the sites: the paired interval if the run has it, else the means'.

    Only pairs say how sure the difference is: the two arms' own intervals overlap far too easily.
    """
    if results.gain is not None and results.gain.mean is not None:
        return results.gain
    federated, local = arm(results, "federated"), arm(results, "local")
    if federated is None or local is None:
        return None
    found = difference(federated.mean, local.mean)
    return None if found is None else Interval(mean=found)


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
