"""What `budget` prints of an epsilon."""

import pytest

from lepton_fl.cli.budgets import _up, budget_at, plan_run
from lepton_fl.privacy import Guarantee, epsilon


@pytest.mark.parametrize(("epsilon", "said"), [(1.0001, "1.001"), (1.001, "1.001"), (0.0, "0.000")])
def test_an_epsilon_spent_is_rounded_up(epsilon, said):
    """So that what is left is never overstated; what is exact to three decimals stays."""
    assert _up(epsilon) == said


@pytest.mark.parametrize(("release", "fits"), [("dp", False), ("none", True)])
def test_a_plan_counts_the_figures_that_would_be_released(make_study, tmp_path, release, fits):
    """A budget for training alone covers a run only where the policy releases nothing beside it."""
    study = make_study(evaluation={"release": "dp", "share": 0.5})
    guarantee, delta = Guarantee.of(study), study.privacy.delta
    training = guarantee.event
    only = epsilon([training], delta)
    (tmp_path / "policy.toml").write_text(
        f'data = {{ id = "cards" }}\nrelease = {{ metrics = "{release}" }}\n'
        f"budget = {{ epsilon_total = {only + 1e-6}, epsilon_per_study = 3.0, delta_total = {delta} }}\n"
        'require = { approval = "auto" }\n'
    )

    plan = plan_run(budget_at(tmp_path), study)

    whole = epsilon([training, guarantee.metrics], delta)
    assert plan.after == pytest.approx(only if fits else whole)
    assert plan.fits is fits
