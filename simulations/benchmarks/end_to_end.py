"""Where the time of a whole study goes: 200 lock-step rounds with secure noise, ledgers and masks, all on.

    python simulations/benchmarks/end_to_end.py > simulations/benchmarks/end_to_end.md

The study of secure_rounds.py, an MLP of 4,973 parameters over 8 sites that hold the heart records; held-out
scores are released with noise at the end; policies and ledgers are on disk, and the protocol runs in full.
Server and sites are in one process and on one thread, so that nothing overlaps and everything is counted;
between them is a function call in place of a network (fleet_study.py has that). Each part's time is its own:
what is called in it and has a row of its own is counted there.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import loopback
import secure_rounds
from loopback import spread

SITES, ROUNDS = 8, 200
REPETITIONS = 5
REST = "server: the round loop, strategy, messages"


def seams() -> secure_rounds.Seams:
    """Every part of a round that has a seam of its own; what has none is the server's rest."""
    from lepton_fl.federation import SecureGrid, loop
    from lepton_fl.privacy.ledger import Ledger
    from lepton_fl.simulation import stacked
    from lepton_fl.site import SiteApp, app, mods, secure

    return (
        ("training", stacked, "train_together"),
        ("noise", secure, "sample"),
        ("to integers", mods, "encoded"),
        ("to integers", mods, "encoded_counts"),
        *(("protocol, sites", secure.LSA1, name) for name in ("check", "enter", "answer")),
        ("protocol, server", SecureGrid, "send_and_receive"),
        *(("ledger", Ledger, name) for name in ("reserve", "charge", "commit", "release")),
        ("evaluation", app, "_counts"),
        ("checkpoint", loop.Checkpoint, "write"),
        ("messages and policy, sites", SiteApp, "__call__"),
    )


def report(*, quick: bool, repetitions: int) -> None:
    rounds = 3 if quick else ROUNDS
    made, splits = secure_rounds.study(SITES, rounds, evaluation__release="dp", evaluation__share=0.1)
    parts = list(dict.fromkeys(what for what, _, _ in seams()))
    found = []
    for _ in range(repetitions):
        watch, _ = secure_rounds.measured(made, splits, masked=True, timed=(*seams(), whole_run()))
        assert watch.rounds == rounds
        # A part that nothing went into has lost its seam.
        assert all(watch.seconds[part] for part in (*parts, REST)), watch.seconds
        found.append(watch)
    print("# A study from end to end\n")
    print(
        f"{rounds} rounds of {SITES} sites; median [min, max] of {repetitions}. "
        f"{loopback.machine('lepton-fl', 'torch', 'flwr', 'cryptography')}.\n"
    )
    print("| part | CPU s | of all | CPU ms a round | wall s |\n|---|---|---|---|---|")
    whole = [sum(watch.seconds[part] for part in (*parts, REST)) for watch in found]
    for part in sorted((*parts, REST), key=lambda p: -statistics.median(w.seconds[p] for w in found)):
        cpu, wall = [w.seconds[part] for w in found], [w.wall[part] for w in found]
        share = [100 * c / w for c, w in zip(cpu, whole, strict=True)]
        print(
            f"| {part} | {spread(cpu, '.2f')} | {statistics.median(share):.0f} % "
            f"| {1e3 * statistics.median(cpu) / rounds:.1f} | {spread(wall, '.2f')} |"
        )
    walls = [sum(watch.wall[part] for part in (*parts, REST)) for watch in found]
    each = 1e3 * statistics.median(whole) / rounds
    print(f"| all | {spread(whole, '.1f')} | | {each:.0f} | {spread(walls, '.1f')} |")


def whole_run() -> tuple[str, object, str]:
    """The seam round all others."""
    from lepton_fl.federation import Federation

    return (REST, Federation, "run")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds, to see that it runs")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    given = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    report(quick=given.quick, repetitions=1 if given.quick else given.repetitions)


if __name__ == "__main__":
    main()
