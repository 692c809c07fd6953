"""What a cohort is promised, and what a context binds."""

import numpy as np
import pytest

from lepton_fl.secagg.context import Cohort, Floor, max_colluders, model_digest
from lepton_fl.secagg.errors import PolicyViolation
from lepton_fl.secagg.fixedpoint import Quantiser
from lepton_fl.secagg.keys import Suite


def cohort_of(n, colluders, min_sites=0):
    return Cohort(parties=tuple(range(101, 101 + n)), colluders=colluders, min_sites=min_sites)


@pytest.mark.parametrize(
    ("n", "threshold", "spare", "colluders"),
    [(2, 2, 0, 0), (3, 3, 0, 1), (4, 3, 1, 1), (7, 5, 2, 2), (10, 7, 3, 3)],
)
def test_threshold_dropouts_and_colluders(n, threshold, spare, colluders):
    cohort = cohort_of(n, colluders)

    assert (cohort.threshold, cohort.n - cohort.quorum) == (threshold, spare)
    assert spare == -(-n // 3) - 1
    assert max_colluders(n) == colluders


@pytest.mark.parametrize("n", range(2, 60))
def test_largest_number_of_colluders_is_allowed_and_no_more(n):
    cohort_of(n, max_colluders(n))
    with pytest.raises(PolicyViolation):
        cohort_of(n, max_colluders(n) + 1)


PROMISES = {
    (2, 0, 0): "the server alone, hidden among at least t - n_C = 2 honest sites; no site may drop out",
    (3, 1, 0): "the server together with up to 1 of 3 sites, hidden among at least t - n_C = 2 honest sites; "
    "no site may drop out",
    (4, 1, 0): "the server together with up to 1 of 4 sites, hidden among at least t - n_C = 2 honest sites; "
    "1 site may drop out",
    (
        10,
        3,
        0,
    ): "the server together with up to 3 of 10 sites, hidden among at least t - n_C = 4 honest sites; "
    "3 sites may drop out",
    (10, 3, 9): "the server together with up to 3 of 10 sites, hidden among at least min_sites - n_C = 6 "
    "honest sites; 1 site may drop out",
    (150, 8, 142): "the server together with up to 8 of 150 sites, hidden among at least 33 honest sites; "
    "8 sites may drop out",
}


@pytest.mark.parametrize("numbers", PROMISES, ids=str)
def test_promise_is_one_sentence(numbers):
    assert cohort_of(*numbers).promise() == f"Against {PROMISES[numbers]}."


def test_floor_on_colluders(context_of):
    with pytest.raises(PolicyViolation, match="colluders is 1, this site's policy asks for 2"):
        Floor(colluders=2).check(context_of(10, colluders=1))


def test_every_field_is_in_the_digest(context_of):
    """Two contexts that differ in anything have different digests."""
    quantiser = {"clip": 1.0, "bits": 20, "max_n": 4, "max_weight": 1}
    changes = [
        {},
        {"run": b"\x01" * 16},
        {"kind": "evaluate"},
        {"round": 2},
        {"attempt": 2},
        {"n": 5, "quantiser": Quantiser(**quantiser | {"max_n": 5})},
        {"colluders": 0},
        {"min_sites": 4},
        {"coordinates": 201},
        {"weighted": True},
        {"model": b"\x01" * 32},
        {"study": b"\x01" * 32},
        {"roster": 2},
        {"suite": Suite.LSA1_PQ},
        *(
            {"quantiser": Quantiser(**quantiser | change)}
            for change in ({"clip": 1.5}, {"bits": 19}, {"max_n": 6}, {"max_weight": 2})
        ),
    ]
    digests = [context_of(**{"n": 4, **change}).digest for change in changes]

    assert len(set(digests)) == len(changes)


@pytest.mark.parametrize(
    "changed",
    [
        {"run": b""},
        {"model": b""},
        {"study": b"\x01"},
        {"round": 0},
        {"attempt": 0},
        {"roster": 0},
        {"coordinates": 0},
    ],
)
def test_field_out_of_range(context_of, changed):
    with pytest.raises(ValueError, match="a context's"):
        context_of(4, **changed)


def test_quantiser_for_a_smaller_cohort(context_of):
    """Its sums could wrap."""
    with pytest.raises(ValueError, match="the quantiser is for 3 sites, the cohort has 4"):
        context_of(4, quantiser=Quantiser(clip=1.0, bits=20, max_n=3))


@pytest.mark.parametrize("parties", [(102, 101, 103), (101, 101, 102), (7, 101, 102)])
def test_parties_that_are_none(parties):
    with pytest.raises(ValueError, match="part"):
        Cohort(parties=parties, colluders=0)


def test_model_digest_depends_on_all_of_a_tensor():
    one = np.arange(6, dtype="<f4")
    digests = {
        model_digest([("w", "<f4", (6,), one.data)]),
        model_digest([("w", "<f4", (2, 3), one.data)]),
        model_digest([("v", "<f4", (6,), one.data)]),
        model_digest([("w", "<i4", (6,), one.data)]),
        model_digest([("w", "<f4", (6,), (one + 1).data)]),
        model_digest([("w", "<f4", (3,), one[:3].data), ("", "<f4", (3,), one[3:].data)]),
    }

    assert len(digests) == 6
