"""A dropped site is not reached: it neither answers nor is charged."""

import pytest

from lepton_fl.errors import ConfigError
from lepton_fl.secagg.errors import Phase
from lepton_fl.simulation import Drop
from lepton_fl.simulation.run import check_drops, prepare


@pytest.mark.parametrize(
    ("text", "drop"),
    [
        ("bank-1@3", Drop(site="bank-1", first=3)),
        ("bank-1@3-5", Drop(site="bank-1", first=3, last=5)),
        ("a@b@1-1", Drop(site="a@b", first=1, last=1)),
        ("bank-1@3:mask", Drop(site="bank-1", first=3, phase=Phase.MASK)),
        ("bank-1@3-5:unmask", Drop(site="bank-1", first=3, last=5, phase=Phase.UNMASK)),
    ],
)
def test_a_drop_is_a_site_and_rounds(text, drop):
    """From a round on, or of a first to a last one."""
    assert Drop.parse(text) == drop


@pytest.mark.parametrize(
    "text", ["bank-1", "@3", "bank-1@", "bank-1@x", "bank-1@5-3", "bank-1@-1", "b@1-", "b@1:over", "b@1:"]
)
def test_what_is_no_drop_is_refused(text):
    """With the form."""
    with pytest.raises(ConfigError, match=r"--drop: found .* allowed: SITE@ROUND, or SITE@FIRST-LAST"):
        Drop.parse(text)


def test_a_drop_lasts_from_first_to_last():
    """Both inclusive."""
    assert [n for n in range(1, 7) if Drop(site="a", first=3, last=4).silences(n)] == [3, 4]
    assert [n for n in range(1, 7) if Drop(site="a", first=5).silences(n)] == [5, 6]


def test_a_drop_in_mid_round_lasts_from_its_phase():
    """In its first round; in those after it from their beginning."""
    drop = Drop.parse("a@3-4:mask")
    phases = [phase for phase in Phase if phase is not Phase.OVER]

    silenced = {n: [phase.value for phase in phases if drop.silences(n, phase)] for n in (2, 3, 4, 5)}

    assert silenced == {2: [], 3: ["mask", "confirm", "unmask"], 4: [phase.value for phase in phases], 5: []}
    assert str(drop) == "a from mask of round 3 to 4"


def test_a_phase_needs_secure_aggregation(make_study, splits):
    """Without it a round is one exchange."""
    study = make_study(secure_aggregation={"enabled": False}, privacy={"noise": "local"})

    with pytest.raises(ConfigError, match="found 'a from unmask of round 1', allowed: a round without a"):
        check_drops([Drop.parse("a@1:unmask")], study, splits)


def test_an_unknown_site_is_refused_with_those_there_are(study, splits):
    """A misspelt site would drop nobody."""
    with pytest.raises(ConfigError, match="found 'e', allowed: a site of this run: a, b, c, d"):
        check_drops([Drop(site="e", first=1)], study, splits)


@pytest.mark.parametrize(("first", "last"), [(0, None), (4, None), (1, 5)])
def test_a_round_beyond_the_study_is_refused(study, splits, first, last):
    """It would never come: three rounds, and one spare."""
    with pytest.raises(ConfigError, match="from a round of 1 to 3, to one of at most 4"):
        check_drops([Drop(site="a", first=first, last=last)], study, splits)


@pytest.fixture
def rounds_charged(make_study, splits):
    """The rounds in each site's ledger after a run with drops; a round needs three of the four."""

    def run(*drops):
        study = make_study(secure_aggregation={"min_survivors": 3}, train={"rounds": 4})
        started = prepare(study, splits, 0, drops=drops)
        started.start()
        found = {
            name: [row["round"] for row in site.ledger.history(f"{name}-ill")]
            for name, site in started.sites.items()
        }
        started.close()
        return found, started.federation

    return run


def test_a_site_is_not_charged_for_what_does_not_reach_it(rounds_charged):
    """Down from round two on: one round."""
    charged, federation = rounds_charged(Drop(site="b", first=2))

    assert charged == {"a": [1, 2, 3, 4], "b": [1], "c": [1, 2, 3, 4], "d": [1, 2, 3, 4]}
    assert federation.refused == {"b": "no answer before the deadline"}


def test_a_site_that_comes_back_in_time_is_asked_again(rounds_charged):
    """One round of silence is within the server's patience."""
    charged, federation = rounds_charged(Drop(site="b", first=2, last=2))

    assert charged["b"] == [1, 3, 4]
    assert federation.refused == {}


def test_a_site_that_was_put_out_comes_back_where_a_round_can_lose_it_again(rounds_charged):
    """After two rounds of silence it is out, and asked before the next."""
    charged, _ = rounds_charged(Drop(site="b", first=2, last=3))

    assert charged["b"] == [1, 4]


def test_sites_are_dropped_apart(rounds_charged):
    """Each by its own rounds."""
    charged, _ = rounds_charged(Drop(site="a", first=1, last=1), Drop(site="d", first=3, last=3))

    assert charged == {"a": [2, 3, 4], "b": [1, 2, 3, 4], "c": [1, 2, 3, 4], "d": [1, 2, 4]}
