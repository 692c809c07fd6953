"""The checks, by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from lepton_fl.audit.canaries import check_many_runs, check_one_run
from lepton_fl.audit.charges import check_ledger
from lepton_fl.audit.finding import Finding
from lepton_fl.audit.noise import check_noise
from lepton_fl.audit.sampling import check_sampling
from lepton_fl.audit.sensitivity import check_sensitivity

log = logging.getLogger(__name__)


class Check(Protocol):
    """Looks at one property of the installed implementation."""

    def __call__(self, seed: int, /, *, full: bool) -> Iterator[Finding]: ...


CHECKS: dict[str, Check] = {
    "noise": check_noise,
    "sensitivity": check_sensitivity,
    "sampling": check_sampling,
    "ledger": check_ledger,
    "one-run": check_one_run,
    "many-run": check_many_runs,
}


def audit(only: Sequence[str] = (), *, seed: int = 0, full: bool = False) -> Iterator[Finding]:
    """Run the checks named in `only`, or all, one after another.

    The same seed gives the same findings. At a seed that was not chosen, an implementation that keeps its
    promise is refused with a chance below 1e-4, and by the canaries' three bounds with at most 3 P together.
    A check that could not be run to its end is inconclusive.
    """
    for name in only or CHECKS:
        yield from _run(name, CHECKS[name], seed, full)


def _run(name: str, check: Callable[..., Iterator[Finding]], seed: int, full: bool) -> Iterator[Finding]:
    try:
        yield from check(seed, full=full)
    except Exception as error:
        log.debug("check %s", name, exc_info=True)
        yield Finding(
            check=name,
            what="the check runs to its end",
            verdict="inconclusive",
            statistic=f"stopped by {type(error).__name__}",
            power="none",
        )
