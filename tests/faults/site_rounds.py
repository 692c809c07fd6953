"""A site's rounds on a disk that fails at each of its writes in turn: FOLDER FAULT once|lasting.

For each n a fork takes part in two rounds on a ledger that it begins, and the n-th write or fsync fails.
What leaves is written down apart, as the network would have it. Prints how many writes there were.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from faulty_disk import FaultyDisk, sqlite_library

from lepton_fl.errors import LeptonError
from lepton_fl.privacy import Charge, Gaussian, Ledger, RehearsalLedger, epsilon
from lepton_fl.privacy.ledger import Budget

STEP = Gaussian(noise_multiplier=2.0, sampling_rate=0.2, steps=1)
ROOM = epsilon([replace(STEP, steps=10)], 1e-5)
BUDGET = Budget(
    data_set="d", epsilon_total=ROOM, epsilon_per_study=ROOM, delta_total=1e-5, file="policy.toml"
)
ROUNDS = (1, 2)


def charge(round: int) -> Charge:
    return Charge(
        study="s",
        study_name="s",
        run="r",
        round=round,
        event=STEP,
        clip=1.0,
        unit="record",
        delta=1e-5,
        fingerprint="",
    )


def take_part(home: Path) -> None:
    """As the mods of a site do it: spend, train, commit, send; a refusal costs the round and no more."""
    for round in ROUNDS:
        try:
            ledger = Ledger(home / "ledger.db")
        except LeptonError:
            continue
        try:
            ledger.charge(charge(round), rounds=len(ROUNDS), budget=BUDGET)
            send(home, "read", round)
            ledger.commit("d", run="r", round=round, sha256=bytes(32))
            send(home, "released", round)
        except LeptonError:
            continue
        finally:
            ledger.close()


def send(home: Path, what: str, round: int) -> None:
    with (home / what).open("a") as file:
        file.write(f"{round}\n")


def main(folder: Path, fault: str, mode: str) -> None:
    library = sqlite_library()
    assert library is not None
    # What the forks have in common: compositions that are cached, modules that are there.
    rehearsal = RehearsalLedger()
    for round in ROUNDS:
        rehearsal.charge(charge(round), rounds=len(ROUNDS), budget=BUDGET)
    rehearsal.reserve(charge(1), rounds=2, budget=BUDGET)
    rehearsal.close()
    for left in range(len(ROUNDS) + 1):
        epsilon([replace(STEP, steps=left)], 1e-5)
    n = 0
    while True:
        n += 1
        home = folder / f"{n:03}"
        home.mkdir()
        if (child := os.fork()) == 0:
            disk = FaultyDisk(library, fault, n, lasting=mode == "lasting")
            take_part(home)
            os._exit(0 if disk.met else 1)
        status = os.waitpid(child, 0)[1]
        died = os.WIFSIGNALED(status)
        assert not died or os.WTERMSIG(status) == signal.SIGKILL
        if not died and os.WEXITSTATUS(status) == 1:
            break
        assert died or os.WEXITSTATUS(status) == 0
    sys.stdout.write(f"{n - 1}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
