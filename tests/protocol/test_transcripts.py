"""Our rounds are those of the plain-integer implementation, byte for byte (secagg_round.json)."""

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
from lepton_fl.secagg.fixedpoint import Quantiser
from lepton_fl.secagg.server import ServerRound
from lepton_fl.secagg.site import EncodedUpdate, SiteRound

FOLDER = Path(__file__).parents[1] / "vectors"
FILE = FOLDER / "secagg_round.json"
SCENARIOS = json.loads(FILE.read_text())
NOW = datetime(2026, 11, 22, tzinfo=UTC)


def test_the_file_is_what_its_generator_writes(tmp_path):
    """Nobody mended a vector by hand."""
    subprocess.run([sys.executable, FOLDER / "make_secagg_round.py", tmp_path / "new.json"], check=True)

    assert (tmp_path / "new.json").read_bytes() == FILE.read_bytes()


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


@pytest.mark.parametrize("v", SCENARIOS, ids=[scenario["name"] for scenario in SCENARIOS])
def test_transcript(v):
    """Every reply of a site, every request of the server, the masked vectors and the sum."""
    parties, messages = v["parties"], v["messages"]
    root = key(v["root"])
    members = [Member(p, f"site-{p}", key_digest(key(v["identities"][str(p)]).public)) for p in parties]
    roster = Roster.issue(root, consortium=bytes(32), version=5, members=members, revoked=())
    consortium = Consortium(root.public, roster)
    quantiser = Quantiser(clip=v["clip"], bits=v["bits"], max_n=len(parties), max_weight=v["max_weight"])
    context = Context(
        run=data(v["run"]),
        kind="train",
        round=3,
        attempt=2,
        cohort=Cohort(parties=tuple(parties), colluders=1),
        coordinates=v["coordinates"],
        quantiser=quantiser,
        weighted=v["weighted"],
        model=data(v["model"]),
        study=data(v["study"]),
        roster=5,
    )
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
    result = server.result()

    total = np.array(v["total"], np.uint32)
    n = len(result.survivors)
    weight = quantiser.total_weight(total[v["coordinates"] :], n=n) if v["weighted"] else n
    expected = quantiser.decode(total[: v["coordinates"]], n=n, total_weight=weight)
    np.testing.assert_array_equal(result.mean_L, expected)
    assert result.total_weight == weight
    assert {str(p) for p in result.survivors} == set(messages["posts"])
