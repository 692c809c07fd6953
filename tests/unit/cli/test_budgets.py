"""What `budget` prints of an epsilon."""

import pytest

from lepton_fl.cli.budgets import _up


@pytest.mark.parametrize(("epsilon", "said"), [(1.0001, "1.001"), (1.001, "1.001"), (0.0, "0.000")])
def test_an_epsilon_spent_is_rounded_up(epsilon, said):
    """So that what is left is never overstated; what is exact to three decimals stays."""
    assert _up(epsilon) == said
