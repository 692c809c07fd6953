"""The ledger as a state machine: two open connections, reopened at will, over runs and studies."""

import tempfile
from collections import Counter
from pathlib import Path

import dp_accounting
from dp_accounting.pld import PLDAccountant
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lepton_fl.errors import BudgetExhausted, PolicyRefused
from lepton_fl.privacy import Charge, Gaussian, Ledger
from lepton_fl.privacy.ledger import Budget

DELTA = 1e-5
BUDGET = Budget(data_set="d", epsilon_total=2.5, epsilon_per_study=1.8, delta_total=DELTA, file="policy.toml")
# (noise multiplier, sampling rate, steps) of a round.
EVENTS = [(2.0, 0.2, 1), (3.0, 0.5, 2), (8.0, 1.0, 3)]
_KNOWN: dict[frozenset, float] = {}


def composed(charges):
    """Epsilon by dp-accounting alone, from a bag of (noise multiplier, sampling rate, steps)."""
    counts = Counter()
    for sigma, q, steps in charges:
        counts[sigma, q] += steps
    key = frozenset(counts.items())
    if key not in _KNOWN:
        accountant = PLDAccountant(value_discretization_interval=1e-3)
        for (sigma, q), steps in sorted(counts.items()):
            event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
            accountant.compose(event, steps)
        _KNOWN[key] = accountant.get_epsilon(DELTA)
    return _KNOWN[key]


STUDIES, RUNS = st.sampled_from(["s", "t"]), st.sampled_from(["p", "q"])
ROUNDS = st.integers(1, 12)


class LedgerMachine(RuleBasedStateMachine):
    """Spending never passes the budget, never shrinks, and is what the returned charges compose to."""

    @initialize()
    def start(self):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger.db"
        self.open = [Ledger(self.path), Ledger(self.path)]
        self.charged = {}
        self.before = 0.0

    def teardown(self):
        for ledger in self.open:
            ledger.close()
        self.folder.cleanup()

    def make(self, study, run, round, event):
        sigma, q, steps = event
        return Charge(
            study=study,
            study_name=study,
            run=run,
            round=round,
            event=Gaussian(noise_multiplier=sigma, sampling_rate=q, steps=steps),
            clip=1.0,
            unit="record",
            delta=DELTA,
            fingerprint="",
        )

    def fits(self, study, run, event, rounds):
        """Whether the rest of a run of so many rounds fits, by the returned charges alone."""
        left = rounds - sum(r == run for r, _ in self.charged)
        asked = [event] * max(left, 0)
        total = [e for _, e in self.charged.values()] + asked
        mine = [e for s, e in self.charged.values() if s == study] + asked
        return composed(total) <= BUDGET.epsilon_total and composed(mine) <= BUDGET.epsilon_per_study

    @rule(which=st.integers(0, 1))
    def reopen(self, which):
        self.open[which].close()
        self.open[which] = Ledger(self.path)

    @rule(which=st.integers(0, 1), study=STUDIES, run=RUNS, event=st.sampled_from(EVENTS), rounds=ROUNDS)
    def reserve(self, which, study, run, event, rounds):
        fits = self.fits(study, run, event, rounds)
        try:
            self.open[which].reserve(self.make(study, run, 1, event), rounds=rounds, budget=BUDGET)
        except BudgetExhausted:
            assert not fits
        else:
            assert fits

    @rule(
        which=st.integers(0, 1),
        study=STUDIES,
        run=RUNS,
        round=ROUNDS,
        event=st.sampled_from(EVENTS),
        rounds=ROUNDS,
    )
    def charge(self, which, study, run, round, event, rounds):
        try:
            self.open[which].charge(self.make(study, run, round, event), rounds=rounds, budget=BUDGET)
        except BudgetExhausted:
            assert (run, round) not in self.charged
            assert not self.fits(study, run, event, max(rounds, sum(r == run for r, _ in self.charged) + 1))
        except PolicyRefused:
            assert (run, round) in self.charged
        else:
            assert (run, round) not in self.charged
            self.charged[run, round] = (study, event)

    @invariant()
    def spending_is_that_of_the_charges(self):
        for ledger in self.open:
            spent = ledger.spent("d", DELTA)

            assert abs(spent - composed(e for _, e in self.charged.values())) < 1e-6
            assert self.before - 1e-9 <= spent <= BUDGET.epsilon_total
            for study in ledger.studies("d"):
                assert study.epsilon <= BUDGET.epsilon_per_study
        self.before = spent


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
