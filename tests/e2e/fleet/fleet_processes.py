"""A site's agent and the server as processes, which tests kill at a point that they name."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

from fleet_harness import PATIENCE, RUN, Consortium, Front, charged, close_site, make_site

from lepton_fl.fleet.server.config import load_server
from lepton_fl.fleet.server.database import Database
from lepton_fl.fleet.server.lock import running
from lepton_fl.fleet.server.studies import Studies

T = TypeVar("T")

HERE = Path(__file__).parent
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
        consortium.member("bank", folder / "pki")

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
            close_site(site)


@contextlib.asynccontextmanager
async def site_process(consortium: Consortium, folder: Path) -> AsyncIterator[tuple[Front, SiteProcess]]:
    async with Front(consortium, folder / "server", grace=4 * PATIENCE) as front:
        bank = SiteProcess(consortium, folder / "bank", front.port)
        try:
            yield front, bank
        finally:
            await bank.stop()


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
