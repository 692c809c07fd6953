"""What others published, against what we call and against the plain implementations that ours is held to.

Project Wycheproof (C2SP/wycheproof) from ../shared/vectors, the RFCs' and NIST's sets from the package
cryptography_vectors; each is skipped where it is absent.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from reference import primitives as plain

from lepton_fl.errors import VerificationFailed
from lepton_fl.secagg import masks
from lepton_fl.secagg.keys import MaskKey, Suite

WYCHEPROOF = Path(__file__).parents[4] / "shared" / "vectors"
data = bytes.fromhex


def wycheproof(name):
    """(group, test) pairs of a file."""
    file = WYCHEPROOF / name
    if not file.exists():
        pytest.skip(f"no Wycheproof vectors beside this checkout (shared/vectors/{name})")
    return [(group, test) for group in json.loads(file.read_text())["testGroups"] for test in group["tests"]]


def official(folder, name):
    """The tests of a file of cryptography_vectors, keys in upper case; each begins with its COUNT."""
    package = pytest.importorskip("cryptography_vectors", reason="no package cryptography_vectors")
    text = (Path(package.__file__).parent / folder / name).read_text()
    pairs = [line.split("=") for line in text.splitlines() if "=" in line and not line.startswith("#")]
    tests = []
    for key, value in pairs:
        if key.strip() == "COUNT":
            tests.append({})
        tests[-1][key.strip().upper()] = value.strip()
    return tests


def test_wycheproof_x25519():
    """Ours gives each secret, and refuses exactly those that are zero."""
    tests = wycheproof("x25519_test.json")
    refused = 0
    for _, test in tests:
        key = MaskKey(data(test["private"]), Suite.LSA1)
        if data(test["shared"]) == bytes(32):
            refused += 1
            with pytest.raises(VerificationFailed, match="low order"):
                key.agree(data(test["public"]))
        else:
            assert key.agree(data(test["public"])).hex() == test["shared"], test["tcId"]

    assert len(tests) > 500
    assert refused > 20


def test_wycheproof_x25519_of_the_plain_implementation():
    for _, test in wycheproof("x25519_test.json")[::10]:
        assert plain.x25519(data(test["private"]), data(test["public"])).hex() == test["shared"]


def test_wycheproof_hkdf():
    """What kdf calls, and the plain one; too long an output is refused."""
    for _, test in wycheproof("hkdf_sha256_test.json"):
        ikm, salt, info, size = *(data(test[part]) for part in ("ikm", "salt", "info")), test["size"]
        if test["result"] == "invalid":
            with pytest.raises(ValueError, match="larger"):
                HKDF(SHA256(), size, salt, info)
            continue

        assert HKDF(SHA256(), size, salt, info).derive(ikm).hex() == test["okm"], test["tcId"]
        assert plain.hkdf_sha256(ikm, salt, info, size).hex() == test["okm"], test["tcId"]


def test_wycheproof_chacha20_poly1305():
    """What a box calls, and the plain one; each changed tag is refused."""
    for group, test in wycheproof("chacha20_poly1305_test.json"):
        key, nonce, aad, plaintext = (data(test[part]) for part in ("key", "iv", "aad", "msg"))
        sealed = data(test["ct"] + test["tag"])
        if group["ivSize"] != 96:
            continue
        if test["result"] == "invalid":
            with pytest.raises(InvalidTag):
                ChaCha20Poly1305(key).decrypt(nonce, sealed, aad)
            continue

        assert ChaCha20Poly1305(key).encrypt(nonce, plaintext, aad) == sealed, test["tcId"]
        assert ChaCha20Poly1305(key).decrypt(nonce, sealed, aad) == plaintext, test["tcId"]
        assert plain.chacha20_poly1305(key, nonce, plaintext, aad) == sealed, test["tcId"]


def test_wycheproof_ed25519():
    """What identities call; every malleated or malformed signature is refused."""
    results = set()
    for group, test in wycheproof("ed25519_test.json"):
        key = Ed25519PublicKey.from_public_bytes(data(group["publicKey"]["pk"]))
        results.add(test["result"])
        if test["result"] == "valid":
            key.verify(data(test["sig"]), data(test["msg"]))
        else:
            with pytest.raises(InvalidSignature):
                key.verify(data(test["sig"]), data(test["msg"]))

    assert results == {"valid", "invalid"}


def test_wycheproof_ml_kem_768():
    """Every decapsulation, the rejected ones included, and lengths that are refused."""
    for _, test in wycheproof("mlkem_768_test.json"):
        seed, ciphertext = data(test["seed"]), data(test["c"])
        if len(seed) != 64:
            with pytest.raises(ValueError, match=r"seed|64"):
                MLKEM768PrivateKey.from_seed_bytes(seed)
        elif len(ciphertext) != 1088:
            with pytest.raises(ValueError, match=r"ciphertext|1088"):
                MLKEM768PrivateKey.from_seed_bytes(seed).decapsulate(ciphertext)
        else:
            key = MLKEM768PrivateKey.from_seed_bytes(seed)
            assert key.public_key().public_bytes_raw().hex() == test["ek"], test["tcId"]
            assert key.decapsulate(ciphertext).hex() == test["K"], test["tcId"]


def test_wycheproof_ml_kem_768_of_the_plain_implementation():
    """Some of each result; it takes 70 ms a time."""
    tests = [test for _, test in wycheproof("mlkem_768_test.json")]
    whole = [test for test in tests if (len(test["seed"]), len(test["c"])) == (2 * 64, 2 * 1088)]
    for test in whole[:: len(whole) // 6]:
        seed = data(test["seed"])
        ek, dk = plain.ml_kem_keys(seed[:32], seed[32:])

        assert ek.hex() == test["ek"], test["tcId"]
        assert plain.ml_kem_decapsulate(dk, data(test["c"])).hex() == test["K"], test["tcId"]


def test_rfc_5869():
    """Its three tests with SHA-256."""
    tests = official("KDF", "rfc-5869-HKDF-SHA256.txt")
    for test in tests:
        ikm, salt, info, size = *(data(test[part]) for part in ("IKM", "SALT", "INFO")), int(test["L"])

        assert HKDF(SHA256(), size, salt, info).derive(ikm).hex() == test["OKM"]
        assert plain.hkdf_sha256(ikm, salt, info, size).hex() == test["OKM"]

    assert len(tests) == 3


def test_rfc_7748():
    """Section 5.2, the two scalar multiplications."""
    vectors = [
        (
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
            "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
            "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
        ),
    ]
    for scalar, u, secret in vectors:
        assert MaskKey(data(scalar), Suite.LSA1).agree(data(u)).hex() == secret
        assert plain.x25519(data(scalar), data(u)).hex() == secret


def test_rfc_8032():
    """Section 7.1, tests 1 and 2: keys from seeds, and signatures over nothing and one byte."""
    vectors = [
        (
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            (
                "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
                "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
            ),
        ),
        (
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            (
                "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
                "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
            ),
        ),
    ]
    for seed, public, message, signature in vectors:
        key = Ed25519PrivateKey.from_private_bytes(data(seed))

        assert key.public_key().public_bytes_raw().hex() == public
        assert key.sign(data(message)).hex() == signature


def test_rfc_8439():
    """Section 2.8.2."""
    key, nonce = bytes(range(0x80, 0xA0)), data("070000004041424344454647")
    aad = data("50515253c0c1c2c3c4c5c6c7")
    plaintext = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
        b"sunscreen would be it."
    )
    box = ChaCha20Poly1305(key).encrypt(nonce, plaintext, aad)

    assert box[:16].hex() == "d31a8d34648e60db7b86afbc53ef7ec2"
    assert box[-16:].hex() == "1ae10b594f09e26a7e902ecbd0600691"
    assert plain.chacha20_poly1305(key, nonce, plaintext, aad) == box


def test_sp_800_38a():
    """Section F.5.5, CTR-AES256: its counters start elsewhere, so its blocks are compared, not our stream."""
    key = data("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    plaintext = data("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
    expected = data("601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5")
    counter = data("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    encryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
    stream = plain.aes256_ctr(key, int.from_bytes(counter, "big"), 32)

    assert encryptor.update(plaintext) == expected
    assert bytes(a ^ b for a, b in zip(plaintext, stream, strict=True)) == expected


def test_aes_256_ctr_of_rfc_3686():
    """The package's set, whose counter blocks are nonce, IV and 1, by the plain implementation."""
    tests = official("ciphers/AES/CTR", "aes-256-ctr.txt")
    for test in tests:
        plaintext, ciphertext = data(test["PLAINTEXT"]), data(test["CIPHERTEXT"])
        stream = plain.aes256_ctr(data(test["KEY"]), int(test["IV"], 16), len(plaintext))

        assert bytes(a ^ b for a, b in zip(plaintext, stream, strict=True)) == ciphertext

    assert len(tests) == 3


def test_a_mask_is_the_encryption_of_zeros_by_counters_from_zero():
    """GCM specification, test case 13: with a key of zeros the block of counter zero is the hash key."""
    block = masks.keystream(bytes(32), count=4).astype("<u4").tobytes()

    assert block.hex() == "dc95c078a2408989ad48a21492842087"
    assert np.array_equal(
        masks.keystream(bytes(32), start=2, count=4),
        list(itertools.islice(plain.mask_words(bytes(32), 0, 6), 2, None)),
    )
