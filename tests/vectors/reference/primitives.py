"""LSA1's primitives in whole numbers of Python, as slow and plain as the papers have them.

Written to disagree: nothing of lepton_fl, no numpy, no tables and no tricks; of other libraries only the
AES block. Not for secrets: the time it takes depends on them.
"""

import hashlib
import hmac
from fractions import Fraction
from math import floor

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

# --- encoding, hashing, derivation


def encode(*values):
    """Every element is the length of its value as 8 bytes little-endian, a type byte, and the value."""
    out = b""
    for value in values:
        if isinstance(value, str):
            kind, body = b"s", value.encode("utf-8")
        elif isinstance(value, bytes):
            kind, body = b"b", value
        elif isinstance(value, int):
            kind, body = b"i", (value % 2**128).to_bytes(16, "little")
        else:
            kind, body = b"l", encode(*value)
        out += len(body).to_bytes(8, "little") + kind + body
    return out


def hkdf_sha256(ikm, salt, info, length):
    """RFC 5869, section 2."""
    prk = hmac.new(salt or bytes(32), ikm, hashlib.sha256).digest()
    okm, block, count = b"", b"", 0
    while len(okm) < length:
        count += 1
        block = hmac.new(prk, block + info + bytes([count]), hashlib.sha256).digest()
        okm += block
    return okm[:length]


def kdf(ikm, salt, *labels):
    return hkdf_sha256(ikm, salt, encode(*labels), 32)


# --- masks


def aes256_ctr(key, first_counter, size):
    """NIST SP 800-38A, section 6.5, over zeros."""
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305  one block at a time
    out, counter = b"", first_counter
    while len(out) < size:
        out += block.update((counter % 2**128).to_bytes(16, "big"))
        counter += 1
    return out[:size]


def mask_words(key, start, count):
    """Words `start` to `start + count` of a mask."""
    return [
        int.from_bytes(aes256_ctr(key, word // 4, 16)[word % 4 * 4 : word % 4 * 4 + 4], "little")
        for word in range(start, start + count)
    ]


def masked(words, signed_keys, start=0):
    words = list(words)
    for sign, key in signed_keys:
        mask = mask_words(key, start, len(words))
        words = [(word + sign * m) % 2**32 for word, m in zip(words, mask, strict=True)]
    return words


# --- fixed point


def quantise(coordinates, *, clip, bits, max_weight, weight, rounding_key):
    """Exact: a float is the fraction that it is."""
    half = 2 ** (bits - 1) - 1
    out = []
    for word, x in zip(mask_words(rounding_key, 0, len(coordinates)), coordinates, strict=True):
        cut = min(max(Fraction(x), -Fraction(clip)), Fraction(clip))
        exact = cut * half * weight / (Fraction(clip) * max_weight)
        below = floor(exact)
        up = Fraction(word, 2**32) < exact - below
        out.append((below + up) % 2**32)
    return out


def dequantise(words, *, clip, bits, max_weight, total_weight):
    half = 2 ** (bits - 1) - 1
    signed = [word - 2**32 if word >= 2**31 else word for word in words]
    return [float(q * Fraction(clip) * max_weight / (half * total_weight)) for q in signed]


def limbs(weight):
    return [weight // 2 ** (16 * k) % 2**16 for k in range(4)]


# --- secret sharing

AES_POLYNOMIAL = 0b1_0001_1011
POLYNOMIAL_16 = 0b1_0000_0000_0010_1011


def gf_times(a, b, polynomial):
    """Product of two polynomials over GF(2), then the remainder."""
    product = 0
    for i in range(b.bit_length()):
        if b >> i & 1:
            product ^= a << i
    return gf_divided(product, polynomial)[1]


def gf_divided(a, b):
    quotient = 0
    while a.bit_length() >= b.bit_length():
        shift = a.bit_length() - b.bit_length()
        quotient ^= 1 << shift
        a ^= b << shift
    return quotient, a


def gf_inverse(a, polynomial):
    """Euclid's algorithm, extended, over polynomials."""
    old, new, old_factor, new_factor = polynomial, a, 0, 1
    while new:
        quotient, rest = gf_divided(old, new)
        step = 0
        for i in range(quotient.bit_length()):
            if quotient >> i & 1:
                step ^= new_factor << i
        old, new, old_factor, new_factor = new, rest, new_factor, old_factor ^ step
    if old != 1:
        raise ZeroDivisionError(a)
    return gf_divided(old_factor, polynomial)[1]


def shamir_field(parties):
    """(bytes of a symbol, polynomial)."""
    return (1, AES_POLYNOMIAL) if parties <= 255 else (2, POLYNOMIAL_16)


def shamir_deal(secret, coefficients, xs):
    """`coefficients[k - 1]`, as long as the secret, belongs to x^k."""
    size, polynomial = shamir_field(max(xs))
    shares = []
    for x in xs:
        share = b""
        for at in range(0, len(secret), size):
            y, power = 0, 1
            for row in [secret, *coefficients]:
                y ^= gf_times(int.from_bytes(row[at : at + size], "little"), power, polynomial)
                power = gf_times(power, x, polynomial)
            share += y.to_bytes(size, "little")
        shares.append(share)
    return shares


def shamir_reconstruct(shares, parties):
    size, polynomial = shamir_field(parties)
    secret = b""
    for at in range(0, len(next(iter(shares.values()))), size):
        value = 0
        for x, share in shares.items():
            term = int.from_bytes(share[at : at + size], "little")
            for other in shares:
                if other != x:
                    term = gf_times(term, other, polynomial)
                    term = gf_times(term, gf_inverse(other ^ x, polynomial), polynomial)
            value ^= term
        secret += value.to_bytes(size, "little")
    return secret


# --- X25519, RFC 7748, section 5

P25519 = 2**255 - 19


def x25519(scalar, u):
    k = int.from_bytes(scalar, "little")
    k = (k & ~7 & (2**255 - 1)) | 2**254
    x1 = int.from_bytes(u, "little") % 2**255 % P25519
    x2, z2, x3, z3, swap = 1, 0, x1, 1, 0
    for t in reversed(range(255)):
        bit = k >> t & 1
        if swap != bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a, b * b, d * a, c * b
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % P25519, x1 * (da - cb) ** 2 % P25519
        x2, z2 = aa * bb % P25519, e * (aa + 121665 * e) % P25519
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, P25519 - 2, P25519) % P25519).to_bytes(32, "little")


def x25519_public(scalar):
    return x25519(scalar, (9).to_bytes(32, "little"))


# --- ChaCha20-Poly1305, RFC 8439


def _chacha_block(key, counter, nonce):
    def words(data):
        return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]

    start = words(b"expand 32-byte k" + key + counter.to_bytes(4, "little") + nonce)
    s = list(start)
    quarters = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
    quarters += [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]
    for _ in range(10):
        for a, b, c, d in quarters:
            for to, by, turn, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                s[to] = (s[to] + s[by]) % 2**32
                s[turn] ^= s[to]
                s[turn] = (s[turn] << bits | s[turn] >> (32 - bits)) % 2**32
    return b"".join(((x + y) % 2**32).to_bytes(4, "little") for x, y in zip(s, start, strict=True))


def _chacha_xor(key, nonce, data):
    stream = b"".join(_chacha_block(key, 1 + i, nonce) for i in range(-(-len(data) // 64)))
    return bytes(a ^ b for a, b in zip(data, stream, strict=False))


def _poly1305(key, message):
    r = int.from_bytes(key[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    total = 0
    for at in range(0, len(message), 16):
        total = (total + int.from_bytes(message[at : at + 16] + b"\1", "little")) * r % (2**130 - 5)
    return ((total + int.from_bytes(key[16:], "little")) % 2**128).to_bytes(16, "little")


def chacha20_poly1305(key, nonce, plaintext, aad):
    ciphertext = _chacha_xor(key, nonce, plaintext)
    lengths = len(aad).to_bytes(8, "little") + len(ciphertext).to_bytes(8, "little")
    padded = aad + bytes(-len(aad) % 16) + ciphertext + bytes(-len(ciphertext) % 16)
    return ciphertext + _poly1305(_chacha_block(key, 0, nonce)[:32], padded + lengths)


def seal(key, plaintext, aad):
    return chacha20_poly1305(key, bytes(12), plaintext, aad)


# --- ML-KEM-768, FIPS 203

Q, K = 3329, 3
_ZETAS = [pow(17, int(f"{i:07b}"[::-1], 2), Q) for i in range(128)]
_GAMMAS = [pow(17, 2 * int(f"{i:07b}"[::-1], 2) + 1, Q) for i in range(128)]


def _ntt(f):
    """Algorithm 9."""
    f, i, length = list(f), 1, 128
    while length >= 2:
        for start in range(0, 256, 2 * length):
            for j in range(start, start + length):
                t = _ZETAS[i] * f[j + length]
                f[j], f[j + length] = (f[j] + t) % Q, (f[j] - t) % Q
            i += 1
        length //= 2
    return f


def _inverse_ntt(f):
    """Algorithm 10."""
    f, i, length = list(f), 127, 2
    while length <= 128:
        for start in range(0, 256, 2 * length):
            for j in range(start, start + length):
                t = f[j]
                f[j], f[j + length] = (t + f[j + length]) % Q, _ZETAS[i] * (f[j + length] - t) % Q
            i -= 1
        length *= 2
    return [x * 3303 % Q for x in f]


def _ntt_times(f, g):
    """Algorithms 11 and 12."""
    out = []
    for i, gamma in enumerate(_GAMMAS):
        a0, a1, b0, b1 = f[2 * i], f[2 * i + 1], g[2 * i], g[2 * i + 1]
        out += [(a0 * b0 + a1 * b1 * gamma) % Q, (a0 * b1 + a1 * b0) % Q]
    return out


def _plus(*polynomials):
    return [sum(column) % Q for column in zip(*polynomials, strict=True)]


def _byte_encode(f, d):
    return sum(x << (d * i) for i, x in enumerate(f)).to_bytes(32 * d, "little")


def _byte_decode(data, d):
    number = int.from_bytes(data, "little")
    return [(number >> (d * i)) % 2**d % (Q if d == 12 else 2**d) for i in range(256)]


def _compress(f, d):
    return [floor(Fraction(2**d * x, Q) + Fraction(1, 2)) % 2**d for x in f]


def _decompress(f, d):
    return [floor(Fraction(Q * x, 2**d) + Fraction(1, 2)) for x in f]


def _sample_ntt(seed):
    """Algorithm 7; 1,200 bytes are more than any seed here needs."""
    stream, out = hashlib.shake_128(seed).digest(1200), []
    for at in range(0, len(stream), 3):
        a, b, c = stream[at : at + 3]
        out += [x for x in (a + 256 * (b % 16), b // 16 + 16 * c) if x < Q]
    return out[:256]


def _sample_noise(seed, counter):
    """Algorithm 8, eta = 2."""
    bits = int.from_bytes(hashlib.shake_256(seed + bytes([counter])).digest(128), "little")
    nibbles = [bits >> (4 * i) & 15 for i in range(256)]
    return [((v & 1) + (v >> 1 & 1) - (v >> 2 & 1) - (v >> 3 & 1)) % Q for v in nibbles]


def _g(data):
    digest = hashlib.sha3_512(data).digest()
    return digest[:32], digest[32:]


def _matrix(rho):
    return [[_sample_ntt(rho + bytes([j, i])) for j in range(K)] for i in range(K)]


def ml_kem_keys(d, z):
    """Algorithm 16: encapsulation key, decapsulation key."""
    rho, sigma = _g(d + bytes([K]))
    a = _matrix(rho)
    s = [_ntt(_sample_noise(sigma, i)) for i in range(K)]
    e = [_ntt(_sample_noise(sigma, K + i)) for i in range(K)]
    t = [_plus(*(_ntt_times(a[i][j], s[j]) for j in range(K)), e[i]) for i in range(K)]
    ek = b"".join(_byte_encode(f, 12) for f in t) + rho
    return ek, b"".join(_byte_encode(f, 12) for f in s) + ek + hashlib.sha3_256(ek).digest() + z


def _encrypt(ek, message, coins):
    """Algorithm 14."""
    t, rho = [_byte_decode(ek[384 * i : 384 * i + 384], 12) for i in range(K)], ek[384 * K :]
    a = _matrix(rho)
    y = [_ntt(_sample_noise(coins, i)) for i in range(K)]
    out = b""
    for i in range(K):
        u = _inverse_ntt(_plus(*(_ntt_times(a[j][i], y[j]) for j in range(K))))
        out += _byte_encode(_compress(_plus(u, _sample_noise(coins, K + i)), 10), 10)
    v = _inverse_ntt(_plus(*(_ntt_times(t[j], y[j]) for j in range(K))))
    v = _plus(v, _sample_noise(coins, 2 * K), _decompress(_byte_decode(message, 1), 1))
    return out + _byte_encode(_compress(v, 4), 4)


def ml_kem_encapsulate(ek, message):
    """Algorithm 17: secret, ciphertext. `message` is what an implementation draws at random."""
    secret, coins = _g(message + hashlib.sha3_256(ek).digest())
    return secret, _encrypt(ek, message, coins)


def ml_kem_decapsulate(dk, ciphertext):
    """Algorithm 18."""
    s = [_byte_decode(dk[384 * i : 384 * i + 384], 12) for i in range(K)]
    ek, digest, z = dk[384 * K : 768 * K + 32], dk[768 * K + 32 : 768 * K + 64], dk[768 * K + 64 :]
    u = [_decompress(_byte_decode(ciphertext[320 * i : 320 * i + 320], 10), 10) for i in range(K)]
    v = _decompress(_byte_decode(ciphertext[320 * K :], 4), 4)
    product = _inverse_ntt(_plus(*(_ntt_times(s[i], _ntt(u[i])) for i in range(K))))
    message = _byte_encode(_compress([(x - y) % Q for x, y in zip(v, product, strict=True)], 1), 1)
    secret, coins = _g(message + digest)
    if _encrypt(ek, message, coins) == ciphertext:
        return secret
    return hashlib.shake_256(z + ciphertext).digest(32)


# --- keys of a round

LSA1 = "lepton-fl/secagg/LSA1"
LSA1_PQ = "lepton-fl/secagg/LSA1-PQ"


def hybrid_keys(seed, purpose):
    """(X25519 scalar, encapsulation key, decapsulation key, public key) of a seed in LSA1-PQ."""
    scalar, d, z = (
        kdf(seed, b"", LSA1_PQ, f"{purpose}-{part}") for part in ("x25519", "ml-kem-d", "ml-kem-z")
    )
    ek, dk = ml_kem_keys(d, z)
    return scalar, ek, dk, x25519_public(scalar) + ek


def pair_part(seed, r1, low, high):
    """What the lower site adds to a pair's secret in LSA1-PQ."""
    return kdf(seed, r1, LSA1_PQ, "pq", low, high)


def pair_offer(part, shared, ciphertext, r1, low, high):
    return ciphertext + seal(kdf(shared, r1, LSA1_PQ, "pq-box", low, high), part, ciphertext)
