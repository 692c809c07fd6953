"""Our rounds are those of the plain-integer implementation, byte for byte (secagg_*.json)."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lepton_fl.secagg import IdentityKey, Member, Roster, key_digest
from lepton_fl.secagg.context import Cohort, Consortium, Context, Forgetful
from lepton_fl.secagg.exchanges import EncodedUpdate
from lepton_fl.secagg.fixedpoint import Quantiser
from lepton_fl.secagg.server import ServerRound
from lepton_fl.secagg.session_server import SessionServerRound
from lepton_fl.secagg.session_site import SessionRound
from lepton_fl.secagg.site import SiteRound

FOLDER = Path(__file__).parents[1] / "vectors"
SCENARIOS = json.loads((FOLDER / "secagg_round.json").read_text())
SESSIONS = json.loads((FOLDER / "secagg_session.json").read_text())
NOW = datetime(2026, 11, 22, tzinfo=UTC)


@pytest.mark.parametrize("name", ["secagg_round", "secagg_session"])
def test_the_file_is_what_its_generator_writes(tmp_path, name):
    """Nobody mended a vector by hand."""
    subprocess.run([sys.executable, FOLDER / f"make_{name}.py", tmp_path / "new.json"], check=True)

    assert (tmp_path / "new.json").read_bytes() == (FOLDER / f"{name}.json").read_bytes()


def data(text):
    return bytes.fromhex(text)


def key(text):
    return IdentityKey(Ed25519PrivateKey.from_private_bytes(data(text)))


def drawing(draws):
    """The draws of a file, in their order and of their sizes."""
    left = [data(draw) for draw in draws]

    def random(size):
        draw = left.pop(0)
        assert len(draw) == size
        return draw

    return random


def context_of(v, *, round, attempt, parties):
    return Context(
        run=data(v["run"]),
        kind="train",
        round=round,
        attempt=attempt,
        cohort=Cohort(parties=tuple(parties), colluders=1),
        coordinates=v["coordinates"],
        quantiser=Quantiser(clip=v["clip"], bits=v["bits"], max_n=len(parties), max_weight=v["max_weight"]),
        weighted=v["weighted"],
        model=data(v["model"]),
        study=data(v["study"]),
        roster=5,
    )


def whole_round(v):
    """The ordinary round of a scenario: every reply of a site, request of the server, and masked vector.

    The sites by party, and what the server read.
    """
    parties, messages = v["parties"], v["messages"]
    root = key(v["root"])
    members = [Member(p, f"site-{p}", key_digest(key(v["identities"][str(p)]).public)) for p in parties]
    roster = Roster.issue(root, consortium=bytes(32), version=5, members=members, revoked=())
    consortium = Consortium(root.public, roster)
    context = context_of(v, round=3, attempt=2, parties=parties)
    assert context.digest == data(v["context"])
    server = ServerRound(context, consortium)
    sites = {}
    for name, draws in v["draws"].items():
        sites[name] = SiteRound(
            context,
            EncodedUpdate(np.array(v["encoded"][name], np.uint32)),
            identity=key(v["identities"][name]),
            certificate=data(v["certificates"][name]),
            party=int(name),
            consortium=consortium,
            history=Forgetful(),
            sessions=True,
            random=drawing(draws),
        )
    for name, site in sites.items():
        assert site.advertise() == data(messages["adverts"][name])
        server.advertised(site.party, site.advertise(), NOW)
    for party, request in server.share_requests().items():
        assert request == data(messages["roll"])
        reply = sites[str(party)].share(request, NOW)
        assert reply == data(messages["shares"][str(party)])
        server.shared(party, reply)
    for party, request in server.mask_requests().items():
        name = str(party)
        if name not in messages["posts"]:
            continue
        assert request == data(messages["posts"][name])
        masked = sites[name].mask(request)
        assert masked.header == data(messages["headers"][name])
        assert masked.words.tolist() == v["masked"][name]
        server.masked(party, masked.header, masked.words)
    for party, request in server.confirm_requests().items():
        assert request == data(messages["survivors"])
        reply = sites[str(party)].confirm(request)
        assert reply == data(messages["confirms"][str(party)])
        server.confirmed(party, reply)
    for party, request in server.unmask_requests().items():
        assert request == data(messages["confirmed"])
        reply = sites[str(party)].unmask(request)
        assert reply == data(messages["unmasks"][str(party)])
        server.unmasked(party, reply)
    return sites, server.result()


@pytest.mark.parametrize("v", SCENARIOS, ids=[scenario["name"] for scenario in SCENARIOS])
def test_transcript(v):
    """The sum is the one that plain integers give."""
    _, result = whole_round(v)

    quantiser = context_of(v, round=3, attempt=2, parties=v["parties"]).quantiser
    total = np.array(v["total"], np.uint32)
    n = len(result.survivors)
    weight = quantiser.total_weight(total[v["coordinates"] :], n=n) if v["weighted"] else n
    expected = quantiser.decode(total[: v["coordinates"]], n=n, total_weight=weight)
    np.testing.assert_array_equal(result.mean_L, expected)
    assert result.total_weight == weight
    assert {str(p) for p in result.survivors} == set(v["messages"]["posts"])


@pytest.mark.parametrize("v", SESSIONS, ids=[scenario["name"] for scenario in SESSIONS])
def test_session_transcript(v):
    """Rounds that resume an ordinary one: every byte of every exchange, the masked vectors and the sums."""
    (first,) = (scenario for scenario in SCENARIOS if scenario["name"] == v["start"])
    sites, _ = whole_round(first)
    held = {name: site.session for name, site in sites.items() if site.session}
    assert held.keys() == first["masked"].keys()
    assert {session.id for session in held.values()} == {data(v["session"])}
    for r in v["rounds"]:
        context = context_of(first, round=r["round"], attempt=1, parties=r["cohort"])
        assert context.digest == data(r["context"])
        server = SessionServerRound(context, data(v["session"]), r["step"])
        attempts = {}
        for name, draws in r["draws"].items():
            assert held[name].serves(context, data(v["session"]), r["step"], NOW)
            attempts[name] = SessionRound(
                context,
                EncodedUpdate(np.array(r["encoded"][name], np.uint32)),
                session=held[name],
                step=r["step"],
                history=Forgetful(),
                random=drawing(draws),
            )
        for name, site in attempts.items():
            assert site.advertise() == data(r["adverts"][name])
            server.advertised(site.party, site.advertise())
        for party, request in server.mask_requests().items():
            name = str(party)
            if name not in r["rolls"]:
                continue
            assert request == data(r["rolls"][name])
            masked = attempts[name].mask(request)
            assert masked.header == data(r["headers"][name])
            assert masked.words.tolist() == r["masked"][name]
            server.masked(party, masked.header, masked.words)
        for party, request in server.confirm_requests().items():
            name = str(party)
            assert request == data(r["survivors"])
            if name not in r["confirms"]:
                continue
            reply = attempts[name].confirm(request)
            assert reply == data(r["confirms"][name])
            server.confirmed(party, reply)
        for party, request in server.unmask_requests().items():
            name = str(party)
            if name not in r["unmasks"]:
                continue
            assert request == data(r["confirmed"][name])
            reply = attempts[name].unmask(request)
            assert reply == data(r["unmasks"][name])
            server.unmasked(party, reply)
        result = server.result()

        total = np.array(r["total"], np.uint32)
        n = len(result.survivors)
        np.testing.assert_array_equal(result.mean_L, context.quantiser.decode(total, n=n, total_weight=n))
        assert {str(p) for p in result.survivors} == set(r["masked"])
