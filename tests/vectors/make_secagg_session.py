"""Writes secagg_session.json: session rounds of LSA1 after an ordinary one, every byte that is sent.

Written from docs/protocol.md, with nothing of lepton_fl: reference/sessions.py does the steps, and the
ordinary round is that of make_secagg_round.py. `python tests/vectors/make_secagg_session.py [FILE]`
"""

import make_secagg_round as ordinary
from make_secagg_round import PARTIES, SUITE, fixed, sha
from reference import primitives as p
from reference import sessions


def pair_roots(start, members):
    """Of the ordinary round `start`, by pair: in LSA1 the secret of both directions is the same."""
    adverts = start["messages"]["adverts"]
    digests = b"".join(sha(SUITE, "advert digest", advert) for advert in adverts.values())
    r1 = sha(SUITE, "r1", start["context"], ordinary.packed(adverts), digests)
    channel = {i: start["draws"][i][0] for i in adverts}
    roots = {}
    for low, high in [(i, j) for i in members for j in members if i < j]:
        secret = p.x25519(channel[low], p.x25519_public(channel[high]))
        roots[low, high] = sessions.root(SUITE, r1, secret, secret, low, high)
    return r1, roots


def session_round(session, roots, *, number, step, cohort, gone):
    """`gone[phase]` do not answer in that phase, nor after."""
    threshold = 2 * len(cohort) // 3 + 1
    ctx = ordinary.context(1, threshold, False, 1, round=number, attempt=1, parties=cohort)
    left, out = {}, set()
    for phase in ("advertise", "mask", "confirm", "unmask"):
        out |= set(gone.get(phase, ()))
        left[phase] = [i for i in cohort if i not in out]
    draws = {
        i: [
            fixed(f"draw {place} of {i} in round {number}", size)
            for place, size in enumerate([32, 32, *[64] * (threshold - 1)])
        ]
        for i in left["advertise"]
    }
    encoded = {i: ordinary.encoded_update(f"{i} in round {number}") for i in left["advertise"]}
    attempt = sessions.Step(SUITE, ctx, session, step, cohort, threshold, roots, draws)
    rolls = attempt.enrol(left["advertise"])
    u3 = left["mask"]
    masked = {i: attempt.mask(i, encoded[i]) for i in u3}
    words_of = {i: words for i, (words, _) in masked.items()}
    total = attempt.total(words_of, u3, left["unmask"])
    assert total == [sum(column) % 2**32 for column in zip(*(encoded[i] for i in u3), strict=True)]
    return {
        "round": number,
        "step": step,
        "cohort": cohort,
        "context": ctx,
        "session_context": attempt.sctx,
        "draws": draws,
        "encoded": encoded,
        "adverts": attempt.adverts,
        "rolls": {i: rolls[i] for i in u3},
        "headers": {i: header for i, (_, header) in masked.items()},
        "survivors": p.encode(SUITE, "survivors", ordinary.packed(u3)),
        "confirms": {i: attempt.confirm(i, u3) for i in left["confirm"]},
        "confirmed": {i: attempt.confirmed(i, u3, left["confirm"]) for i in left["unmask"]},
        "unmasks": {i: attempt.unmask(i, u3) for i in left["unmask"]},
        "masked": words_of,
        "total": total,
    }


def session(*, start, rounds):
    """What the survivors of an ordinary round (its name in secagg_round.json) resume."""
    first = ordinary.SCENARIOS[start]()
    members = list(first["masked"])
    r1, roots = pair_roots(first, members)
    found = sessions.session_id(SUITE, r1, members)
    return {
        "start": start,
        "session": found,
        "rounds": [session_round(found, roots, number=4 + place, **how) for place, how in enumerate(rounds)],
    }


SCENARIOS = {
    "four sites": lambda: session(
        start="four sites",
        rounds=[
            {"step": 0, "cohort": PARTIES, "gone": {}},
            {"step": 1, "cohort": PARTIES, "gone": {"mask": [205]}},
            {"step": 2, "cohort": PARTIES, "gone": {"confirm": [4711]}},
            {"step": 3, "cohort": PARTIES, "gone": {"unmask": [101]}},
        ],
    ),
    "steps passed over, a cohort of some, and one who never came": lambda: session(
        start="four sites",
        rounds=[
            {"step": 2, "cohort": PARTIES[1:], "gone": {}},
            {"step": 9, "cohort": PARTIES, "gone": {"advertise": [2**40]}},
        ],
    ),
    "after a round that one had left": lambda: session(
        start="one leaves after it shared",
        rounds=[{"step": 0, "cohort": [101, 4711, 2**40], "gone": {}}],
    ),
}


if __name__ == "__main__":
    ordinary.write(SCENARIOS, "secagg_session.json")
