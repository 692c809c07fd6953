"""Rounds of honest parties, controls and all: the sum of the masked is the sum of the plain."""


def test_sum_is_that_of_the_updates(world):
    """Or every refusal in this folder would show nothing."""
    world.is_sum(world.train(), world.parties)
