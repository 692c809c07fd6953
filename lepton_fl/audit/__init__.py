"""Audit of the installed implementation: does it add the noise, bound the sensitivity and keep the books?

Each check runs the code that trains, sums and charges at a site, on records of its own making, and holds
what comes out against what accounting says of it. docs/audit.md has the statistics and their power.
"""

from lepton_fl.audit.checks import CHECKS, audit
from lepton_fl.audit.finding import Finding, Verdict

__all__ = ["CHECKS", "Finding", "Verdict", "audit"]
