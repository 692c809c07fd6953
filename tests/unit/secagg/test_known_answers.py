"""Our primitives agree with the plain-integer ones, by tests/vectors/secagg_primitives.json."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lepton_fl.secagg import masks, shamir
from lepton_fl.secagg.fixedpoint import Quantiser
from lepton_fl.secagg.keys import ChannelKey, MaskKey, OneTimeKey, Suite, kdf

FOLDER = Path(__file__).parents[2] / "vectors"
FILE = FOLDER / "secagg_primitives.json"
SCENARIOS = json.loads(FILE.read_text())


def scenarios(kind):
    chosen = [scenario for scenario in SCENARIOS if scenario["kind"] == kind]
    return pytest.mark.parametrize("v", chosen, ids=[scenario["name"] for scenario in chosen])


def data(text):
    return bytes.fromhex(text)


def words(numbers):
    return np.array(numbers, np.uint32)


def test_the_file_is_what_its_generator_writes(tmp_path):
    """Nobody mended a vector by hand."""
    subprocess.run([sys.executable, FOLDER / "make_secagg_primitives.py", tmp_path / "new.json"], check=True)

    assert (tmp_path / "new.json").read_bytes() == FILE.read_bytes()


@scenarios("mask")
def test_mask(v):
    stream = masks.keystream(data(v["key"]), start=v["start"], count=v["count"])

    assert stream.tolist() == v["words"]


@scenarios("apply")
def test_apply(v):
    vector_L = words(v["vector"])
    masks.apply(vector_L, [(sign, data(key)) for sign, key in v["signed_keys"]], start=v["start"])

    assert vector_L.tolist() == v["masked"]


def quantiser(v):
    return Quantiser(clip=v["clip"], bits=v["bits"], max_weight=v["max_weight"], max_n=v.get("n", 1))


@scenarios("encode")
def test_encode(v):
    vector_L = np.array(v["coordinates"], np.float32)
    encoded_L = quantiser(v).encode(vector_L, weight=v["weight"], rounding_key=data(v["rounding_key"]))

    assert vector_L.tolist() == v["coordinates"], "the file has a coordinate that float32 has not"
    assert encoded_L.tolist() == v["words"]


@scenarios("decode")
def test_decode(v):
    mean_L = quantiser(v).decode(words(v["words"]), n=v["n"], total_weight=v["total_weight"])

    np.testing.assert_allclose(mean_L, v["means"], rtol=2**-52, atol=0)


@scenarios("limbs")
def test_weight_limbs(v):
    weights = Quantiser(clip=1.0, bits=8, max_n=1, max_weight=2**64 - 1)

    assert weights.weight_limbs(v["weight"]).tolist() == v["limbs"]
    assert weights.total_weight(words(v["limbs"]), n=1) == v["weight"]


@scenarios("shares")
def test_shares(v):
    xs = [int(x) for x in v["shares"]]
    rows = iter(v["coefficients"])
    dealt = shamir.deal(data(v["secret"]), threshold=v["threshold"], xs=xs, random=lambda _: data(next(rows)))
    last = dict(list(zip(xs, dealt, strict=True))[-v["threshold"] :])

    assert {str(x): share.hex() for x, share in zip(xs, dealt, strict=True)} == v["shares"]
    assert shamir.reconstruct(last, parties=max(xs)).hex() == v["secret"]


@scenarios("kdf")
def test_kdf(v):
    assert kdf(data(v["ikm"]), data(v["salt"]), *v["labels"]).hex() == v["key"]


@scenarios("box")
def test_box(v):
    key, aad = data(v["key"]), data(v["aad"])

    assert OneTimeKey(key).seal(data(v["plaintext"]), aad).hex() == v["box"]
    assert OneTimeKey(key).open(data(v["box"]), aad).hex() == v["plaintext"]


@scenarios("agree")
@pytest.mark.parametrize("kind", [ChannelKey, MaskKey])
def test_agree(v, kind):
    key = kind(data(v["seed"]), Suite.LSA1)

    assert key.public.hex() == v["public"]
    assert key.agree(data(v["peer"])).hex() == v["secret"]


@scenarios("hybrid public")
def test_hybrid_public_key(v):
    kind = {"mask": MaskKey, "channel": ChannelKey}[v["purpose"]]

    assert kind(data(v["seed"]), Suite.LSA1_PQ).public.hex() == v["public"]


@scenarios("hybrid pair")
def test_hybrid_pair_from_either_seed(v):
    low, high = (MaskKey(data(v[seed]), Suite.LSA1_PQ) for seed in ("low_seed", "high_seed"))
    bound = (data(v["r1"]), *v["ids"])

    assert low.secret(data(v["high_public"]), *bound).hex() == v["secret"]
    assert high.accept(data(v["low_public"]), data(v["offer"]), *bound).hex() == v["secret"]


@scenarios("hybrid channel")
def test_hybrid_channel(v):
    receiver = ChannelKey(data(v["receiver_seed"]), Suite.LSA1_PQ)

    assert receiver.accept(data(v["sender_public"]), data(v["offer"])).hex() == v["secret"]


def test_every_scenario_is_read():
    """A kind that no test knows would be a vector that tests nothing."""
    known = {"mask", "apply", "encode", "decode", "limbs", "shares", "kdf", "box", "agree"}

    assert {v["kind"] for v in SCENARIOS} == known | {"hybrid public", "hybrid pair", "hybrid channel"}
