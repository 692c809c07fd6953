"""What a study says of itself before anybody approves it."""

from lepton_fl.cli.planning import describe


def test_a_study_says_who_sees_which_epsilon(make_study):
    """Readers see all of the noise, a server with its colluders less, and all others together least."""
    said = describe(make_study(privacy={"noise": "shared"}))

    found = [float(part.split()[0]) for part in str(said["epsilon_by_who_looks"]).split("; ")]
    assert len(found) == 4
    assert found[0] < found[1] == found[2] < found[3]
    assert "epsilon_by_who_looks" not in describe(make_study(privacy={"noise": "local"}))
