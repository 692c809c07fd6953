"""The ledger under kill -9 and between processes. Each script forks, so that Python starts once."""

import json
import subprocess
import sys
from contextlib import closing

import pytest

from lepton_fl.privacy import Ledger

COMMON = """
import json, os, signal, sys
from dataclasses import replace
from pathlib import Path
from lepton_fl.errors import BudgetExhausted
from lepton_fl.privacy import Charge, Gaussian, Ledger, epsilon
from lepton_fl.privacy.ledger import Budget

FOLDER, STEP = Path(sys.argv[1]), Gaussian(noise_multiplier=2.0, sampling_rate=0.2, steps=1)
ROOM = epsilon([replace(STEP, steps=10)], 1e-5)
BUDGET = Budget(
    data_set="d", epsilon_total=ROOM, epsilon_per_study=ROOM, delta_total=1e-5, file="policy.toml"
)

def charge(round, run="r"):
    return Charge(study="s", study_name="s", run=run, round=round, event=STEP, clip=1.0, unit="record",
                  delta=1e-5, fingerprint="")
"""

KILLED = """
class Fatal:
    # A connection that kills its process before, or after, the n-th statement from now.
    def __init__(self, db, n, after):
        self.db, self.n, self.after = db, n, after
    def execute(self, *arguments):
        self.n -= 1
        if self.n == 0 and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        cursor = self.db.execute(*arguments)
        if self.n == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return cursor
    def __getattr__(self, name):
        return getattr(self.db, name)

def site(home, n, after):
    ledger = Ledger(home / "ledger.db")
    ledger._db = Fatal(ledger._db, n, after)
    for round in (1, 2, 3):
        ledger.charge(charge(round), rounds=3, budget=BUDGET)
        ledger.commit("d", run="r", round=round, sha256=bytes(32))
        with (home / "released").open("a") as released:
            released.write(f"{round}\\n")
    os._exit(0)

died, n = 0, 0
while True:
    n, ends = n + 1, []
    for after in (False, True):
        home = FOLDER / f"{n:03}-{'after' if after else 'before'}"
        home.mkdir()
        (home / "released").touch()
        if (child := os.fork()) == 0:
            site(home, n, after)
        ends.append(os.waitpid(child, 0)[1])
    if ends == [0, 0]:
        break
print(n)
"""

CUT_DOWN = """
import time
import numpy as np

QUIET = Gaussian(noise_multiplier=500.0, sampling_rate=0.01, steps=1)
RNG = np.random.default_rng(5)
path, sent = FOLDER / "ledger.db", FOLDER / "released"
sent.touch()
lives = []
for attempt in range(15):
    if (child := os.fork()) == 0:
        ledger, out = Ledger(path), os.open(sent, os.O_WRONLY | os.O_APPEND)
        last = max((row["round"] for row in ledger.history("d")), default=0)
        while True:
            last += 1
            ledger.charge(replace(charge(last), event=QUIET), rounds=100_000, budget=BUDGET)
            ledger.commit("d", run="r", round=last, sha256=bytes(32))
            os.write(out, f"{last}\\n".encode())
    # Some die while they open it, and the others at some moment of a round.
    goal, until = len(sent.read_text().split()) + RNG.integers(0, 4), time.monotonic() + 20
    while len(sent.read_text().split()) < goal and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(RNG.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    ledger = Ledger(path)
    rows = {row["round"]: row["outcome"] for row in ledger.history("d")}
    released = [int(line) for line in sent.read_text().split()]
    lives.append([len(rows), len(released), sum(rows.get(round) == "released" for round in released)])
    ledger.close()
print(json.dumps(lives))
"""

TOGETHER = """
# Composed once, here: the forks have it in their cache.
for steps in (1, 2, 3):
    epsilon([replace(STEP, steps=steps)], 1e-5)
results = []
for attempt in range(5):
    path = FOLDER / str(attempt) / "ledger.db"
    path.parent.mkdir()
    start, go = os.pipe()
    children = []
    for run in ("a", "b", "c"):
        if (child := os.fork()) == 0:
            os.close(go)
            os.read(start, 1)
            try:
                Ledger(path).charge(charge(1, run), rounds=1, budget=BUDGET)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    os.close(start)
    os.close(go)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    ledger = Ledger(path)
    results.append([codes, ledger.head().counter])
    ledger.close()
print(json.dumps(results))
"""

RACE = """
results = []
for attempt in range(8):
    path = FOLDER / f"{attempt}.db"
    ledger = Ledger(path)
    for round in range(1, 10):
        ledger.charge(charge(round), rounds=1, budget=BUDGET)
    ledger.close()
    start, go = os.pipe()
    children = []
    for run in ("a", "b"):
        if (child := os.fork()) == 0:
            os.close(go)
            mine = Ledger(path)
            os.read(start, 1)    # returns in both at once, when the parent closes its end
            try:
                mine.charge(charge(1, run), rounds=1, budget=BUDGET)
            except BudgetExhausted:
                os._exit(4)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    os.close(start)
    os.close(go)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    after = Ledger(path)
    results.append([sorted(codes), after.spent("d", 1e-5) <= ROOM, len(after.history("d"))])
    after.close()
print(json.dumps(results))
"""


def run(script, folder):
    command = [sys.executable, "-c", COMMON + script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """One folder for each moment at which a site was killed, before and after each statement."""
    folder = tmp_path_factory.mktemp("killed")
    moments = int(run(KILLED, folder))
    assert moments > 15
    return sorted(folder.iterdir())


def test_what_was_released_was_charged(killed):
    """Spend before send: at no moment of death is a round out that the file does not hold."""
    for home in killed:
        released = (home / "released").read_text().split()
        with closing(Ledger(home / "ledger.db")) as ledger:
            charged = [str(row["round"]) for row in ledger.history("d")]

        assert charged[: len(released)] == released, home.name
        assert len(charged) <= len(released) + 1, home.name


def test_some_died_between_charge_and_release(killed):
    """The moment that matters is among those tried: charged, and not yet out."""
    wasted = 0
    for home in killed:
        released = (home / "released").read_text().split()
        with closing(Ledger(home / "ledger.db")) as ledger:
            wasted += len(ledger.history("d")) == len(released) + 1

    assert wasted >= 3


def test_three_processes_begin_one_ledger(tmp_path):
    """At once, where there is none: one key, one first entry, and each one's charge."""
    assert json.loads(run(TOGETHER, tmp_path)) == [[[0, 0, 0], 4]] * 5


def test_a_site_that_is_cut_down_again_and_again(tmp_path):
    """SIGKILL at moments that nobody chose, fifteen times on one ledger: all that left is in it."""
    lives = json.loads(run(CUT_DOWN, tmp_path))
    charged, released, committed = lives[-1]

    assert released > 10
    for charged, released, committed in lives:
        assert committed == released <= charged <= released + len(lives)


def test_two_processes_cannot_both_take_the_last_round(tmp_path):
    """One is given the room, the other is refused, however they meet."""
    for codes, within, charges in json.loads(run(RACE, tmp_path)):
        assert codes == [0, 4]
        assert within
        assert charges == 10
