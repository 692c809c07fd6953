"""SIGKILL, at each phase, of an agent, a run's process and the server: nothing is lost, doubled or reused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

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
    make_site,
    make_study,
    once,
    outcome_of,
    request,
    sites_at,
    undisturbed,
    until,
)

from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.server.config import load_server
from lepton_fl.fleet.server.database import Database
from lepton_fl.fleet.server.link import DIED
from lepton_fl.fleet.server.lock import running
from lepton_fl.fleet.server.studies import Studies
from lepton_fl.messages import SITS_OUT, TRAIN
from lepton_fl.study import Study

T = TypeVar("T")

HERE = Path(__file__).parent
LARGE_STUDY = make_study(model=LARGE)


def environment(crash: Path) -> dict[str, str]:
    """Of a process that dies where the file `crash` says, if it is there."""
    path = [str(HERE / "crash"), str(HERE), *filter(None, sys.path)]
    return {
        **os.environ,
        "LEPTON_FL_CRASH": str(crash),
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
    }


class SiteProcess:
    """`bank`'s agent, as a process."""

    def __init__(self, consortium: Consortium, folder: Path, port: int) -> None:
        self._folder, self._port = folder, port
        self.process: asyncio.subprocess.Process | None = None
        folder.mkdir(parents=True, exist_ok=True)
        bank = consortium.site("bank")
        parts = {"root": consortium.root_pem, "key": bank.key, "certificate": bank.certificate}
        for name, content in parts.items():
            (folder / f"{name}.pem").write_bytes(content)

    async def start(self, crash: str = "") -> None:
        """Start it, to die at `crash`."""
        file = self._folder / "crash"
        file.unlink(missing_ok=True)
        if crash:
            file.write_text(crash, encoding="utf-8")
        with (self._folder / "stderr.log").open("ab") as errors:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                str(HERE / "fleet_site.py"),
                str(self._folder),
                "bank",
                str(self._port),
                env=environment(file),
                stdout=errors,
                stderr=errors,
            )

    async def death(self) -> None:
        """Wait until it has been killed, where it was to be."""
        assert self.process is not None
        async with asyncio.timeout(PATIENCE):
            code = await self.process.wait()

        assert code == -signal.SIGKILL, (self._folder / "stderr.log").read_text()[-2000:]
        assert not (self._folder / "crash").exists()

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    def charged(self) -> list[int]:
        """The rounds in its ledger, once it has ended."""
        site = make_site("bank", self._folder)
        try:
            return charged(site, RUN)
        finally:
            site.ledger.close()


@contextlib.asynccontextmanager
async def site_process(consortium: Consortium, folder: Path) -> AsyncIterator[tuple[Front, SiteProcess]]:
    async with Front(consortium, folder / "server", grace=PATIENCE) as front:
        bank = SiteProcess(consortium, folder / "bank", front.port)
        try:
            yield front, bank
        finally:
            await bank.stop()


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


SERVER_TOML = """
[server]
name = "faults"
insecure_demo = true
[listen]
fleet = "127.0.0.1:0"
enrolment = "off"
status = "off"
[runs]
heartbeat_s = 2.0
settle_s = 1.0
"""

SERVER_PHASES = [
    "lepton_fl.fleet.server.link:RunnerLink._forward:before:2",  # A request has its number, and is not sent.
    "lepton_fl.fleet.server.hub:Hub.send:after:4",  # After the joins, one site has been sent its round.
    "lepton_fl.fleet.server.hub:Hub.result:before:5",  # Of a round, one answer has been counted.
    "lepton_fl.fleet.server.studies:Studies.ended:before:1",  # The model is made, and not recorded.
]


class ServerProcess:
    """`lepton-fl server start`, as a user starts it."""

    def __init__(self, home: Path) -> None:
        self._home, self._config, self._crash = home, home / "server.toml", home / "crash"
        self._config.write_text(SERVER_TOML, encoding="utf-8")
        self._files = load_server(self._config)
        self._process: asyncio.subprocess.Process | None = None
        self._port = 1

    def port(self) -> int:
        """Where it listens, or did when it was last seen to."""
        found = running(self._files)
        if found is not None and found.fleet:
            self._port = int(found.fleet.rpartition(":")[2])
        return self._port

    async def start(self, crash: str = "") -> None:
        if crash:
            self._crash.write_text(crash, encoding="utf-8")
        with (self._home / "server.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "lepton_fl", "server", "start", "-c", str(self._config)),
                env=environment(self._crash),
                stdout=log,
                stderr=log,
            )

    async def death(self) -> int:
        """Its exit code, once it has ended."""
        assert self._process is not None
        async with asyncio.timeout(2 * PATIENCE):
            return await self._process.wait()

    async def stop(self) -> int:
        """As systemd ends it."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
        return await self.death()

    def studies(self, work: Callable[[Studies], T]) -> T:
        """What `work` finds in, or does to, its database."""
        database = Database(self._files.database)
        try:
            return work(Studies(database))
        finally:
            database.close()

    def runners(self) -> list[str]:
        """Command lines of its runs' processes."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                found.append(path.read_text().replace("\0", " "))
        return [line for line in found if str(self._home) in line and "server.runner" in line]


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
