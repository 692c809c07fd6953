"""Secure aggregation over the fleet: real agents, a run in its own process, and what can happen to them."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fleet_harness import (
    PARTY,
    PATIENCE,
    RUN,
    Consortium,
    Front,
    agents,
    apps_of,
    charged,
    first_model,
    fleet_of,
    make_study,
    once,
    outcome_of,
    sites_at,
    until,
)
from fleet_processes import HERE, ServerProcess, SiteProcess, environment, site_process

from lepton_fl.federation import Federation
from lepton_fl.fleet.agent.member import EnrolledSite
from lepton_fl.fleet.server.link import DIED
from lepton_fl.secagg import site as protocol
from lepton_fl.simulation import InProcessGrid
from lepton_fl.simulation.functional import Functional, FunctionalGrid
from lepton_fl.simulation.members import memberships
from lepton_fl.site import Site, client_app, mods
from lepton_fl.site.secure import LSA1
from lepton_fl.study import Study
from lepton_fl.tasks.arrays import model_hash

SITES = ("bank", "clinic", "e", "ward")
OTHERS = ("clinic", "e", "ward")
PARTIES = {PARTY[name]: name for name in SITES}
LONG = 4 * PATIENCE
"""Seconds in which a killed process is back, also on a machine that does much else."""
SECURE: dict[str, Any] = {"enabled": True, "min_sites": 3, "min_survivors": 3, "deadline": LONG}


@pytest.fixture
def study() -> Study:
    return make_study(secure_aggregation=SECURE, train={"deadline": LONG})


def members_of(consortium: Consortium, folder: Path, names: tuple[str, ...]) -> dict[str, EnrolledSite]:
    return {name: consortium.member(name, folder / name / "pki") for name in names}


def summed(study: Study, folder: Path) -> str:
    """The digest of the model that the four make in one process, with neither masks nor a network."""
    consortium, members = memberships(PARTIES)
    with sites_at(folder, SITES) as sites:
        apps = {
            party: client_app(replace(sites[name], aggregation=Functional(members[name])))
            for party, name in PARTIES.items()
        }
        federation = Federation(study=study, model=first_model(study), sites=PARTIES, run_id=RUN)
        federation.run(FunctionalGrid(InProcessGrid(apps), consortium))
    return model_hash(federation.model)


def rounds_of(events: list[dict[str, Any]]) -> dict[int, list[str]]:
    return {event["round"]: event["sites"] for event in events if event["event"] == "round"}


@pytest.mark.parametrize("noise", ["local", "shared"])
def test_a_fleet_makes_the_sum_that_one_process_makes(
    consortium: Consortium, tmp_path: Path, noise: str
) -> None:
    """The masks are gone to the last bit; each round is charged once; the run says what its cohort gets."""
    study = make_study(secure_aggregation=SECURE, privacy={"noise": noise})
    events: list[dict[str, Any]] = []

    async def main() -> None:
        async with fleet_of(consortium, tmp_path, SITES) as (front, sites):
            finished = await front.run(study, sites=PARTIES, progress=events.append)
            spent = {name: charged(site, RUN) for name, site in sites.items()}
        joined = next(event for event in events if event["event"] == "joined")

        assert outcome_of(finished)["model"] == summed(study, tmp_path / "reference")
        assert rounds_of(events) == {number: list(SITES) for number in (1, 2, 3, 4)}
        assert spent == {name: [1, 2, 3, 4] for name in SITES}
        assert "up to 1 of 4 sites, hidden among at least t - n_C = 2 honest sites" in joined["hiding"]

    once(main, patience=5 * PATIENCE)


class Watched(LSA1):
    """The protocol, with every secret that it draws kept for the test."""

    def __init__(self, membership: Any, drawn: list[bytes]) -> None:
        def random(length: int) -> bytes:
            drawn.append(os.urandom(length))
            return drawn[-1]

        super().__init__(membership, random=random)


def test_no_key_share_or_update_is_in_a_log_in_a_file_or_at_the_server(
    consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the bytes of what was drawn, nor of an encoded update, nor of the update itself."""
    study = make_study(secure_aggregation=SECURE, model={"name": "mlp", "hidden": [8]})
    drawn: list[bytes] = []
    clear: list[bytes] = []
    came: list[bytes] = []
    encoded, apply = mods.encoded, protocol.masks.apply
    opened: list[bytes] = []

    def seen(update_L: Any, *more: Any) -> Any:
        words_L = encoded(update_L, *more)
        clear.extend([update_L.tobytes(), words_L.tobytes()])
        return words_L

    def applied(words: Any, keys: Any, **more: Any) -> None:
        opened.extend(key for _, key in keys)
        apply(words, keys, **more)

    monkeypatch.setattr(mods, "encoded", seen)
    monkeypatch.setattr(protocol.masks, "apply", applied)
    caplog.set_level(logging.DEBUG)

    async def main() -> None:
        def watched(site: Site[Any]) -> Site[Any]:
            assert isinstance(site.aggregation, LSA1)
            return replace(site, aggregation=Watched(site.aggregation._membership, drawn))

        async with fleet_of(consortium, tmp_path, SITES, change=watched) as (front, _):
            result = front.hub.result

            def taken(session: Any, said: Any) -> None:
                came.append(said.SerializeToString())
                result(session, said)

            monkeypatch.setattr(front.hub, "result", taken)
            outcome_of(await front.run(study, sites=PARTIES))

    once(main, patience=5 * PATIENCE)
    # Some bytes are enough to find them by. What a nonce or a released share is may be seen: see below.
    secrets = [text[:24] for text in (*clear, *opened, *drawn) if len(text) >= 24]
    places = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    files = {place: found for place, found in places.items() if "/pki/" not in place}
    texts = {**files, "wire": b"".join(came), "log": caplog.text.encode()}

    assert len(secrets) > 4 * 4 * 6
    assert any(b"rounds" in place.encode() for place in files)
    # Of each site: the invitation, five exchanges in the first round, four in those that resume it.
    assert len(came) == 4 * (1 + 5 + 3 * 4)
    assert [place for place, found in texts.items() if any(secret in found for secret in secrets)] == []


def phases() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Where `bank` dies in round 1, and the sites whose updates are in that round's sum."""
    rounds = {
        "advert": ("lepton_fl.secagg.site:SiteRound.advertise:after:1", OTHERS),
        "share": ("lepton_fl.secagg.site:SiteRound.share:before:1", OTHERS),
        "mask": ("lepton_fl.secagg.site:SiteRound.mask:before:1", OTHERS),
        "masked, not sent": ("lepton_fl.secagg.site:SiteRound.mask:after:1", OTHERS),
        "confirm": ("lepton_fl.secagg.site:SiteRound.confirm:before:1", SITES),
        "unmask": ("lepton_fl.secagg.site:SiteRound.unmask:before:1", SITES),
        "released, not sent": ("lepton_fl.site.history:DiskHistory.write:after:2", SITES),
    }
    # The reply is on the disk, and is sent by the process that comes after: it can do no more than that.
    for number, (phase, included) in enumerate(
        {"advert": OTHERS, "share": OTHERS, "masked": SITES, "confirm": SITES, "unmask": SITES}.items()
    ):
        # The first reply that is kept is the one to the invitation.
        rounds[f"{phase} on disk"] = (
            f"lepton_fl.fleet.agent.cache:ReplyCache.put:after:{number + 2}",
            included,
        )
    return rounds


@asynccontextmanager
async def three_and_a_process(
    consortium: Consortium, folder: Path
) -> AsyncIterator[tuple[Front, SiteProcess, dict[str, Site[Any]]]]:
    """A server, three agents here, and `bank`'s as a process."""
    members = members_of(consortium, folder / "sites", OTHERS)
    with sites_at(folder / "sites", OTHERS, members) as sites:
        async with (
            site_process(consortium, folder) as (front, bank),
            agents(consortium, front.port, apps_of(sites), folder / "sites", members),
        ):
            yield front, bank, dict(sites)


async def _over_a_death(
    consortium: Consortium, study: Study, folder: Path, crash: str
) -> tuple[dict[int, list[str]], dict[str, list[int]]]:
    """The sites of each round, and what was charged, where `bank` dies once and is started again."""
    events: list[dict[str, Any]] = []
    async with three_and_a_process(consortium, folder) as (front, bank, sites):
        await bank.start(crash)
        await until(front.connected(*SITES))

        async def death() -> None:
            await bank.death()
            await bank.start()

        dying = asyncio.create_task(death())
        outcome_of(await front.run(study, sites=PARTIES, progress=events.append))
        await dying
        await bank.stop()
        spent = {name: charged(site, RUN) for name, site in sites.items()}
        return rounds_of(events), {**spent, "bank": bank.charged()}


@pytest.mark.slow
@pytest.mark.parametrize("phase", phases())
def test_a_round_goes_on_without_a_site_that_is_killed(
    consortium: Consortium, study: Study, tmp_path: Path, phase: str
) -> None:
    """Before its vector is whole it is not in the sum, after that it is; and it is in the next round."""
    crash, included = phases()[phase]

    async def main() -> None:
        rounds, spent = await _over_a_death(consortium, study, tmp_path, crash)

        assert rounds == {1: list(included), 2: list(SITES), 3: list(SITES), 4: list(SITES)}
        assert spent == {name: [1, 2, 3, 4] for name in SITES}

    once(main, patience=5 * PATIENCE)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "included"), [("mask", OTHERS), ("unmask", SITES)])
def test_a_session_goes_on_without_a_site_that_is_killed(
    consortium: Consortium, study: Study, tmp_path: Path, step: str, included: tuple[str, ...]
) -> None:
    """In mid-session: what it had of it is gone with it, and it is in the next round."""

    async def main() -> None:
        crash = f"lepton_fl.secagg.session_site:SessionRound.{step}:before:1"
        rounds, spent = await _over_a_death(consortium, study, tmp_path, crash)

        assert rounds == {1: list(SITES), 2: list(included), 3: list(SITES), 4: list(SITES)}
        assert spent == {name: [1, 2, 3, 4] for name in SITES}

    once(main, patience=5 * PATIENCE)


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "lost"), [("share", True), ("mask", True), ("unmask", False)])
def test_a_round_that_needs_all_is_lost_with_one(
    consortium: Consortium, tmp_path: Path, phase: str, lost: bool
) -> None:
    """Until all vectors are there. Those that did their part are not put out for it."""
    study = make_study(secure_aggregation={**SECURE, "min_survivors": "all"}, train={"deadline": LONG})

    async def main() -> None:
        rounds, spent = await _over_a_death(consortium, study, tmp_path, phases()[phase][0])

        assert rounds[1] == ([] if lost else list(SITES))
        assert all(found == list(SITES) for number, found in rounds.items() if number > 1)
        assert sum(bool(found) for found in rounds.values()) == 4
        assert all(rounds_charged == list(rounds) for rounds_charged in spent.values())

    once(main, patience=5 * PATIENCE)


RUNNER_PHASES = [
    "lepton_fl.secagg.server:ServerRound.advertised:after:2",
    "lepton_fl.secagg.server:ServerRound.shared:after:3",
    "lepton_fl.secagg.server:ServerRound.masked:after:4",
    "lepton_fl.secagg.server:ServerRound.confirmed:after:1",
    "lepton_fl.secagg.server:ServerRound.unmasked:after:3",
]


@pytest.mark.slow
def test_a_run_comes_through_the_deaths_of_its_process_in_mid_protocol(
    consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time it goes on with the next round, and nobody is stuck in the one that is no more."""
    study = make_study(secure_aggregation=SECURE, train={"spare_rounds": 4})
    crash, events = tmp_path / "crash", list[dict[str, Any]]()
    for name, value in environment(crash).items():
        monkeypatch.setenv(name, value)

    async def main() -> None:
        async with fleet_of(consortium, tmp_path, SITES) as (front, sites):
            ends = []
            for phase in RUNNER_PHASES[:4]:
                crash.write_text(phase, encoding="utf-8")
                ends.append(await front.run(study, sites=PARTIES, progress=events.append))
            finished = await front.run(study, sites=PARTIES, progress=events.append)
            spent = {name: charged(site, RUN) for name, site in sites.items()}
        outcome = outcome_of(finished)

        assert [(end.exit_code, "SIGKILL" in end.message) for end in ends] == [(DIED, True)] * 4
        assert (outcome["done"], outcome["started"]) == (4, 8)
        # No round of a process that died was opened; all that came after were, with all sites.
        assert rounds_of(events) == {number: list(SITES) for number in (5, 6, 7, 8)}
        assert spent == {name: list(range(1, 9)) for name in SITES}

    once(main, patience=5 * PATIENCE)


@pytest.mark.slow
def test_sites_that_are_told_of_different_models_open_nothing(
    consortium: Consortium, study: Study, tmp_path: Path
) -> None:
    """Though the server hides it from itself: all see it by the adverts, and the run says why it ended."""

    async def main() -> None:
        async with fleet_of(consortium, tmp_path, SITES) as (front, sites):
            program = ("-P", str(HERE / "fleet_equivocates.py"))
            finished = await front.run(study, sites=PARTIES, program=program)
        refused = {name: [type(error).__name__ for error in s.refusals] for name, s in sites.items()}

        assert finished.exit_code == 6
        assert "bank: Equivocation in share, by the server" in finished.message
        assert refused == {name: ["Equivocation"] for name in SITES}

    once(main, patience=5 * PATIENCE)


@pytest.mark.slow
def test_a_run_goes_on_without_a_site_that_is_revoked(tmp_path: Path) -> None:
    """In mid-run, with a new roster for all: three go by it, and the fourth is let in no more."""
    study = make_study(secure_aggregation=SECURE, train={"rounds": 30, "spare_rounds": 4})

    async def main() -> None:
        consortium = Consortium(tmp_path)
        server = ServerProcess(tmp_path)
        members = members_of(consortium, tmp_path / "sites", SITES)
        with sites_at(tmp_path / "sites", SITES, members) as sites:
            async with agents(consortium, server.port, apps_of(sites), tmp_path / "sites", members):
                try:
                    await server.start()
                    server.studies(lambda studies: studies.submit(study))
                    await until(lambda: len(server.studies(lambda s: s.answers(study.id))) == len(SITES))
                    server.studies(lambda studies: studies.want(studies.find(study.id)))
                    await until(lambda: server.studies(lambda s: s.rounds(s.runs()[0].id)))
                    consortium.revoke("e")
                    consortium.sign_roster()
                    await until(lambda: server.studies(lambda s: not s.runs()[0].active))
                finally:
                    code = await server.stop()
            (run,) = server.studies(lambda studies: studies.runs())
            rounds = server.studies(lambda studies: studies.rounds(run.id))
            spent = {name: charged(site, run.id) for name, site in sites.items()}
            versions = {name: member.roster_version for name, member in members.items()}
        consortium.close()
        of_all = [row.number for row in rounds if set(row.sites) == set(SITES)]
        of_three = [row.number for row in rounds if set(row.sites) == set(SITES) - {"e"}]

        assert code == 0
        assert (run.state, run.reason) == ("finished", "")
        assert of_all
        assert of_three
        assert max(of_all) < min(of_three)
        assert len(of_all) + len(of_three) == 30
        # At most the round in which it went is lost, and the one that it was still named in.
        assert len(rounds) <= 32
        assert not set(spent["e"]) & set(of_three[1:])
        assert all(versions[name] == len(PARTY) + 1 for name in ("bank", "clinic", "ward"))
        assert {row.dropped["e"] for row in rounds if "e" in row.dropped} <= {
            "no answer before the deadline",
            f"is no member of the consortium in roster {len(PARTY) + 1}",
            # It has heard of the new roster before its connection ended, in a round that began by the last.
            "OtherRoster in advertise",
        }

    once(main, patience=5 * PATIENCE)
