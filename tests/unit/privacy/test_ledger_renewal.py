"""A budget begins anew by its officer's signature, once for each, and forgets nothing else."""

from contextlib import closing

import pytest

from lepton_fl.errors import AlreadyCharged, BudgetExhausted, PolicyRefused, VerificationFailed
from lepton_fl.privacy import Ledger, RehearsalLedger
from lepton_fl.privacy.ledger import Renewal
from lepton_fl.privacy.ledger.audit import audit, check_limits
from lepton_fl.secagg.identity import IdentityKey

DATA = "cards-2026"
DELTA = 1e-5


@pytest.fixture
def officer():
    return IdentityKey.generate()


@pytest.fixture
def sign(ledger, officer):
    def make(**changes):
        usual = {"ledger": ledger.key, "data_set": DATA, "number": 1, "reason": "other people"}
        return Renewal.sign(officer, **{**usual, **changes})

    return make


def test_a_renewed_budget_has_room_again(ledger, spend, sign, officer):
    """All of it, in all and for each study."""
    spend(*range(1, 11))
    with pytest.raises(BudgetExhausted):
        spend(11)
    ledger.renew(sign(), officer=officer.public)

    assert ledger.spent(DATA, DELTA) == 0
    assert ledger.studies(DATA) == []
    spend(*range(11, 21))
    with pytest.raises(BudgetExhausted):
        spend(21)


def test_a_renewal_lets_no_round_be_released_twice(ledger, spend, sign, officer):
    """What left, left; and what left without noise."""
    spend(1)
    ledger.release(DATA, study="s", run="r", what="auc", charged=True)
    ledger.renew(sign(), officer=officer.public)

    with pytest.raises(AlreadyCharged):
        spend(1)
    spend(2)
    with pytest.raises(PolicyRefused, match="released once"):
        ledger.release(DATA, study="s", run="r", what="auc", charged=True)


def test_a_renewal_may_change_the_unit(ledger, spend, sign, officer):
    """Nothing is left that it would have to add up with."""
    spend(1)
    ledger.renew(sign(), officer=officer.public)

    spend(1, run="q", unit="patient")


def test_other_data_sets_are_not_renewed(ledger, budget, make_charge, spend, sign, officer):
    """One id at a time."""
    spend(1)
    ledger.renew(sign(data_set="cards-2027"), officer=officer.public)

    assert ledger.spent(DATA, DELTA) > 0


def test_a_renewal_ends_a_reservation(ledger, budget, make_charge, sign, officer, spend):
    """What was checked before it is checked again."""
    spend(*range(1, 6))
    ledger.reserve(make_charge(run="q"), rounds=5, budget=budget)
    ledger.renew(sign(), officer=officer.public)
    for round in range(1, 11):
        ledger.charge(make_charge(round, run="q"), rounds=10, budget=budget)

    with pytest.raises(BudgetExhausted):
        ledger.charge(make_charge(11, run="q"), rounds=10, budget=budget)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"number": 2}, "out of turn"),
        ({"number": 0}, "out of turn"),
        ({"ledger": bytes(32)}, "another ledger"),
    ],
)
def test_a_renewal_is_for_one_place_in_one_ledger(ledger, spend, sign, officer, changes, says):
    """It cannot be kept for later, nor used elsewhere."""
    spend(1)

    with pytest.raises(VerificationFailed, match=says):
        ledger.renew(sign(**changes), officer=officer.public)
    assert ledger.data_set(DATA).renewals == 0


def test_a_renewal_is_used_once(path, ledger, spend, sign, officer):
    """A second time, it is out of turn; and the ledger opens as if it had never been tried."""
    renewal = sign()
    ledger.renew(renewal, officer=officer.public)
    spend(1)

    with pytest.raises(VerificationFailed, match="out of turn"):
        ledger.renew(renewal, officer=officer.public)
    with closing(Ledger(path)) as again:
        assert again.spent(DATA, DELTA) == ledger.spent(DATA, DELTA) > 0


def test_a_renewal_by_another_is_refused(ledger, spend, sign):
    """The policy says who may."""
    spend(1)

    with pytest.raises(PolicyRefused, match="officer has"):
        ledger.renew(sign(), officer=IdentityKey.generate().public)


def test_a_forged_renewal_is_refused(ledger, spend, sign, officer):
    """In the officer's name, with another's signature."""
    spend(1)
    forged = Renewal.sign(IdentityKey.generate(), ledger=ledger.key, data_set=DATA, number=1, reason="mine")
    mine = Renewal(
        ledger=forged.ledger,
        data_set=DATA,
        number=1,
        reason="mine",
        officer=officer.public,
        signature=forged.signature,
    )

    with pytest.raises(VerificationFailed, match="signature"):
        ledger.renew(mine, officer=officer.public)
    assert ledger.data_set(DATA).renewals == 0


def test_the_auditor_counts_from_the_last_renewal(path, ledger, budget, spend, sign, officer):
    """Ten rounds before it and ten after are within a budget of ten; while the agent has the file open."""
    spend(*range(1, 11))
    ledger.renew(sign(), officer=officer.public)
    spend(*range(11, 21))
    found = audit(path)

    check_limits(found, budget, officer=officer.public)
    with pytest.raises(VerificationFailed, match=r"renewal 1 .* is by key"):
        check_limits(found, budget, officer=None)


def test_a_rehearsal_renews_like_a_ledger(officer):
    """One code."""
    with closing(RehearsalLedger()) as ledger:
        ledger.renew(
            Renewal.sign(officer, ledger=ledger.key, data_set=DATA, number=1, reason=""),
            officer=officer.public,
        )

        assert ledger.data_set(DATA).renewals == 1
