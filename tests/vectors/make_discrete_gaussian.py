"""Writes discrete_gaussian.json: known answers for the noise, by levels and sigma.

Uses reference/discrete_gaussian.py, which has nothing of lepton_fl, so that it can disagree with it.
`python tests/vectors/make_discrete_gaussian.py [FILE]`
"""

import hashlib
import json
import struct
import sys
from pathlib import Path

from reference import discrete_gaussian

HERE = Path(__file__).parent

SCENARIOS = {
    "the smallest sigma": (1.0, 40),
    "a sigma that binary fractions miss": (3.3, 40),
    "the largest sigma of one level": (256.0, 300),
    "the smallest sigma of two levels": (256.00000000000006, 300),
    "a power of two": (4096.0, 100),
    "the largest sigma of two levels": (16384.0, 100),
    "the smallest sigma of three levels": (16384.000000000004, 100),
    "a sigma that is twice a cube": (2.0 * 50**3, 100),
    "a sigma just below twice a cube": (249999.99999999997, 100),
    "the largest sigma": (16777216.0, 300),
    "several tiles": (65432.1, 70_001),
}


def scenario(name, sigma, count):
    key = hashlib.shake_256(name.encode()).digest(32)
    drawn = discrete_gaussian.sample(sigma, count, key)
    digest = hashlib.sha256(struct.pack(f"<{count}q", *drawn)).hexdigest()
    return {
        "name": name,
        "sigma": sigma,
        "key": key.hex(),
        "count": count,
        "first": drawn[:40],
        "sha256": digest,
    }


def main():
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "discrete_gaussian.json"
    rows = [scenario(name, sigma, count) for name, (sigma, count) in SCENARIOS.items()]
    target.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
