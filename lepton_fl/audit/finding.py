"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Verdict: TypeAlias = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check's outcome."""

    check: str
    """Which, as `--only` names it."""
    what: str
    """The property that was looked at."""
    verdict: Verdict
    """`inconclusive`: what ran could not have shown a fault, or could not be run. It is no pass."""
    statistic: str
    """What was measured, and what it was held against."""
    power: str
    """What this check would have found."""

    @classmethod
    def of(cls, check: str, what: str, *, passed: bool, statistic: str, power: str) -> Finding:
        """A pass or a failure."""
        verdict: Verdict = "pass" if passed else "fail"
        return cls(check=check, what=what, verdict=verdict, statistic=statistic, power=power)
