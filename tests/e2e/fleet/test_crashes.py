"""SIGKILL, at each phase, of an agent, a run's process and the server: nothing is lost, doubled or reused."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet_harness import (
    LARGE,
    PATIENCE,
    RUN,
    SITES,
    Consortium,
    Front,
    agents,
    apps_of,
    charged,
    content_of,
    make_study,
    once,
    outcome_of,
    request,
    sites_at,
    undisturbed,
    until,
)
from fleet_processes import ServerProcess, SiteProcess, environment, site_process

from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.server.link import DIED
from lepton_fl.messages import SITS_OUT, TRAIN
from lepton_fl.study import Study

LARGE_STUDY = make_study(model=LARGE)


@contextlib.contextmanager
def killed_in_mid_upload(front: Front, bank: SiteProcess) -> Iterator[None]:
    """The second chunk of a result is the last that its sender sends."""
    take, seen = front.hub.chunk, 0

    def chunk(session: Any, said: pb.Chunk) -> None:
        nonlocal seen
        take(session, said)
        seen += 1
        if seen == 2 and bank.process is not None:
            bank.process.kill()

    front.hub.chunk = chunk  # type: ignore[method-assign]
    try:
        yield
    finally:
        del front.hub.chunk  # type: ignore[method-assign]


AGENT_PHASES = {
    "before it accepts": "lepton_fl.fleet.agent.exchanges:Exchanges.assign:before:1",
    "in mid-download": "lepton_fl.fleet.protocol.transfer:Incoming.take:after:2",
    "after the reply is on its disk": "lepton_fl.fleet.agent.cache:ReplyCache.put:after:1",
}


async def _answer_over_a_death(
    consortium: Consortium, folder: Path, crash: str
) -> tuple[list[Any], list[int]]:
    """The digests of two answers to one request, the first over an agent's death; and what was charged."""
    async with site_process(consortium, folder) as (front, bank):
        await bank.start(crash)
        await until(front.connected("bank"))
        first = front.ask("bank", request(LARGE_STUDY, TRAIN, number=1), deadline=4 * PATIENCE)
        if crash:
            await bank.death()
        else:
            with killed_in_mid_upload(front, bank):
                await until(lambda: bank.process is not None and bank.process.returncode is not None)
        await bank.start()
        answers = [await first, await front.ask("bank", request(LARGE_STUDY, TRAIN, number=1))]
        for answer in answers:
            content_of(answer)
        await bank.stop()
        return [answer.payload.sha256 for answer in answers if answer.payload], bank.charged()


@pytest.mark.slow
def test_an_agent_that_is_killed_with_its_reply_on_disk_sends_that_reply(
    consortium: Consortium, tmp_path: Path
) -> None:
    """A request that is repeated has the same bytes for an answer, and was charged once."""

    async def main() -> None:
        crash = AGENT_PHASES["after the reply is on its disk"]
        digests, spent = await _answer_over_a_death(consortium, tmp_path, crash)

        assert len(digests) == 2
        assert len(set(digests)) == 1
        assert spent == [1]

    once(main)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["before it accepts", "in mid-download", "in mid-upload"])
def test_an_agent_that_is_killed_goes_on_where_it_was(
    consortium: Consortium, tmp_path: Path, phase: str
) -> None:
    """Before the charge there is nothing to lose; after it the reply is on the disk."""

    async def main() -> None:
        digests, spent = await _answer_over_a_death(consortium, tmp_path, AGENT_PHASES.get(phase, ""))

        assert len(digests) == 2
        assert len(set(digests)) == 1
        assert spent == [1]

    once(main)


@pytest.mark.slow
def test_an_agent_that_is_killed_after_the_charge_sits_the_round_out(
    consortium: Consortium, study: Study, tmp_path: Path
) -> None:
    """What was spent stays spent, is not spent twice, and the next round is answered."""

    async def main() -> None:
        async with site_process(consortium, tmp_path) as (front, bank):
            await bank.start("lepton_fl.privacy.ledger:AnyLedger.charge:after:1")
            await until(front.connected("bank"))
            first = front.ask("bank", request(study, TRAIN, number=1), deadline=4 * PATIENCE)
            await bank.death()
            await bank.start()
            answer = await first
            content_of(await front.ask("bank", request(study, TRAIN, number=2), number=2))
            await bank.stop()

            assert answer.payload is None
            assert answer.error_code == SITS_OUT
            assert bank.charged() == [1, 2]

    once(main)


@pytest.mark.slow
def test_a_run_comes_through_the_deaths_of_an_agent(consortium: Consortium, tmp_path: Path) -> None:
    """Killed at each phase of two rounds, started again each time: the model of a run without a death."""

    async def main() -> None:
        events: list[dict[str, Any]] = []
        with sites_at(tmp_path / "sites", ("clinic", "ward")) as sites:
            async with (
                site_process(consortium, tmp_path) as (front, bank),
                agents(consortium, front.port, apps_of(sites), tmp_path / "sites"),
            ):

                async def deaths() -> None:
                    for crash in (
                        "lepton_fl.fleet.agent.exchanges:Exchanges.assign:before:2",
                        "lepton_fl.fleet.protocol.transfer:Incoming.take:after:2",
                        "lepton_fl.fleet.agent.cache:ReplyCache.put:after:1",
                        # The join was forgotten by a process before; this is the acknowledgement of a round.
                        "lepton_fl.fleet.agent.exchanges:Exchanges.forget:after:1",
                    ):
                        await bank.start(crash)
                        await bank.death()
                    await bank.start()

                dying = asyncio.create_task(deaths())
                await until(front.connected(*SITES))
                finished = await front.run(LARGE_STUDY, progress=events.append)
                await dying
                await bank.stop()
                spent = {name: charged(site, RUN) for name, site in sites.items()}
                spent["bank"] = bank.charged()
        rounds = [event for event in events if event["event"] == "round"]

        assert [(event["round"], event["sites"]) for event in rounds] == [
            (number, list(SITES)) for number in (1, 2, 3, 4)
        ]
        assert outcome_of(finished)["model"] == undisturbed(LARGE_STUDY, tmp_path / "reference")
        assert spent == {name: [1, 2, 3, 4] for name in SITES}

    once(main)


RUNNER_PHASES = [
    "lepton_fl.federation.checkpoint:Checkpoint.write:after:3",  # Round 2 has its number, and was not sent.
    "lepton_fl.federation.checkpoint:Checkpoint.write:before:2",  # Round 3 is aggregated, in memory only.
    "lepton_fl.fleet.server.grid:FleetGrid._send:after:2",  # Round 4 is sent.
    "lepton_fl.fleet.server.grid:FleetGrid._arrived:after:4",  # Of round 5 one answer has come.
    "lepton_fl.federation.checkpoint:Checkpoint.write:after:2",  # Round 6 is done, and on disk.
]


@pytest.mark.slow
def test_a_run_comes_through_the_deaths_of_its_process(
    consortium: Consortium, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started again each time, it goes on from what is on disk; no number of a round is used twice."""
    crash, events = tmp_path / "crash", list[dict[str, Any]]()
    for name, value in environment(crash).items():
        monkeypatch.setenv(name, value)

    async def main() -> None:
        with sites_at(tmp_path / "sites") as sites:
            async with (
                Front(consortium, tmp_path / "server") as front,
                agents(consortium, front.port, apps_of(sites), tmp_path / "sites"),
            ):
                await until(front.connected(*SITES))
                ends = []
                for phase in RUNNER_PHASES:
                    crash.write_text(phase, encoding="utf-8")
                    ends.append(await front.run(study, progress=events.append))
                finished = await front.run(study, progress=events.append)
            spent = {name: charged(site, RUN) for name, site in sites.items()}
        told = [event["round"] for event in events if event["event"] == "round"]
        outcome = outcome_of(finished)

        assert [(end.exit_code, "SIGKILL" in end.message) for end in ends] == [(DIED, True)] * 5
        assert (outcome["done"], outcome["started"]) == (4, 8)
        # Of round 6 its process could tell nobody.
        assert told == [1, 7, 8]
        # Round 2 was never sent; of what was sent each site was charged once, and answered or died with it.
        assert all(len(set(rounds)) == len(rounds) and 2 not in rounds for rounds in spent.values())
        assert all({1, 3, 6, 7, 8} <= set(rounds) <= set(range(1, 9)) for rounds in spent.values())

    once(main)


SERVER_PHASES = [
    "lepton_fl.fleet.server.link:RunnerLink._forward:before:2",  # A request has its number, and is not sent.
    "lepton_fl.fleet.server.hub:Hub.send:after:4",  # After the joins, one site has been sent its round.
    "lepton_fl.fleet.server.hub:Hub.result:before:5",  # Of a round, one answer has been counted.
    "lepton_fl.fleet.server.studies:Studies.ended:before:1",  # The model is made, and not recorded.
]


@pytest.mark.slow
def test_a_run_comes_through_the_deaths_of_the_server(study: Study, tmp_path: Path) -> None:
    """Killed at each phase and started again, it ends what it had begun; nothing is asked twice or lost."""

    async def main() -> None:
        consortium = Consortium(tmp_path)
        server = ServerProcess(tmp_path)
        ends = []
        with sites_at(tmp_path / "sites") as sites:
            async with agents(consortium, server.port, apps_of(sites), tmp_path / "sites"):
                try:
                    await server.start(SERVER_PHASES[0])
                    server.studies(lambda studies: studies.submit(study))
                    await until(lambda: len(server.studies(lambda s: s.answers(study.id))) == len(SITES))
                    server.studies(lambda studies: studies.want(studies.find(study.id)))
                    for phase in (*SERVER_PHASES[1:], ""):
                        ends.append(await server.death())
                        await server.start(phase)
                    await until(lambda: server.studies(lambda s: not s.runs()[0].active))
                finally:
                    ends.append(await server.stop())
            (run,) = server.studies(lambda studies: studies.runs())
            rounds = server.studies(lambda studies: studies.rounds(run.id))
            spent = {name: charged(site, run.id) for name, site in sites.items()}
        consortium.close()
        await until(lambda: not server.runners())
        numbers = [row.number for row in rounds]
        aggregated = {row.number: set(row.sites) for row in rounds if row.sites}

        assert ends == [-signal.SIGKILL] * 4 + [0]
        assert (run.state, run.reason, len(aggregated)) == ("finished", "", 4)
        assert len(set(numbers)) == len(numbers)
        for name, charges in spent.items():
            assert len(set(charges)) == len(charges)
            assert {number for number, names in aggregated.items() if name in names} <= set(charges)
            # A round that the server took with it is spent: one for each death that came after its sending.
            assert len(set(charges) - set(aggregated)) <= 3

    once(main)
