"""The server's end of a run's process: starts it, carries its requests to the hub and the replies back."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lepton_fl.files import write_atomic
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.frames import frame, read_frame
from lepton_fl.fleet.protocol.limits import printable
from lepton_fl.fleet.protocol.payload import Payload
from lepton_fl.fleet.server.hub import Hub, Reply

log = logging.getLogger(__name__)

_SETTLE_S = 0.02
"""So that a thousand sites that come at once are told of a few times, not a thousand."""
END_S = 15.0
"""Patience with a process that has said its last word."""
MAX_HELD = 8 << 20
"""Bytes that wait in memory for one process; what comes then goes through files."""
RUNNER: tuple[str, ...] = ("-P", "-m", "lepton_fl.fleet.server.runner")
"""What Python runs; with -P, so that nothing is imported from where the server happens to be started."""
DIED = -1
"""Exit code of a process that has not said how it ended."""
INSECURE = "INSECURE SEED: a demonstration, no privacy"
"""Label of every model that a site with a known seed has had a part in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """run.json: what the server asks of a run's process."""

    run: str
    study_id: str
    sites: dict[int, str]
    """Parties that may take part, and their names."""
    join_deadline: float
    evaluate_deadline: float
    settle: float = 0.0
    first_model: str | None = None
    """A safetensors file to begin with, in the run's folder."""
    first_model_sha256: str | None = None
    roster_key: str = ""
    """Verifies the consortium's rosters, 64 hexadecimal digits; empty, as `roster`: there is none."""
    roster: str = ""
    """File of the newest roster."""

    def write(self, path: Path) -> None:
        write_atomic(path, json.dumps(asdict(self)).encode(), mode=0o600)

    @classmethod
    def read(cls, path: Path) -> RunSpec:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**raw, "sites": {int(party): site for party, site in raw["sites"].items()}})


class RunnerLink:
    """One run's process, from its start to its end."""

    def __init__(
        self,
        hub: Hub,
        folder: Path,
        run: str,
        study_id: str,
        parties: Collection[int],
        heard: Callable[[str, dict[str, Any]], None],
    ) -> None:
        """`parties` may take part; `heard` is told of each event of the run."""
        self._hub = hub
        self._folder = folder
        self._run = run
        self._study_id = study_id
        self._parties = parties
        self._heard = heard
        self.program: tuple[str, ...] = RUNNER
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._open: set[bytes] = set()
        self._telling: asyncio.TimerHandle | None = None
        self._stopping = False
        self.rounds = 0
        """That this process has told of."""

    async def run(self) -> pb.Finished:
        """Start the process and serve it to its end. Exit code `DIED`: it has died, and the message says how.

        Raises:
            OSError: it cannot be started.
        """
        ours, theirs = socket.socketpair()
        errors = self._folder / "stderr.log"
        try:
            with theirs, errors.open("wb") as stderr:
                self._process = process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *self.program,
                    "--fd",
                    str(theirs.fileno()),
                    str(self._folder),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=stderr,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
        except BaseException:
            ours.close()
            raise
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._hub.watchers.append(self._tell_soon)
        finished = None
        try:
            while finished is None and (said := await read_frame(reader, pb.FromRunner)) is not None:
                finished = self._take(said)
        finally:
            self._hub.watchers.remove(self._tell_soon)
            if self._telling is not None:
                self._telling.cancel()
            for exchange in list(self._open):
                self._hub.cancel(exchange)
            self._writer.close()
            self._writer = None
            try:
                await asyncio.wait_for(process.wait(), END_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        if finished is None:
            code = process.returncode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            finished = pb.Finished(exit_code=DIED, message=f"its process died: {how}{_last_line(errors)}")
        return finished

    def stop(self) -> None:
        """Ask the run to end after its round."""
        self._stopping = True
        self._send(pb.ToRunner(stop=pb.Stop()))

    def kill(self) -> None:
        """End it now."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def _take(self, said: pb.FromRunner) -> pb.Finished | None:
        match said.WhichOneof("kind"):
            case "ready":
                self._tell_connected()
                if self._stopping:
                    self.stop()
            case "send":
                self._forward(said.send)
            case "cancel":
                self._open.discard(said.cancel.exchange)
                self._hub.cancel(said.cancel.exchange)
            case "progress":
                event = json.loads(said.progress.json)
                self.rounds += event["event"] == "round"
                self._heard(self._run, event)
            case "finished":
                return said.finished
        return None

    def _forward(self, send: pb.Send) -> None:
        payload = Payload.at(send.body, send.sha256)
        for to in send.to:
            request = pb.Assign(
                exchange=to.exchange,
                run=self._run,
                study_id=self._study_id,
                round=send.round,
                type=send.type,
                size=payload.size,
                sha256=payload.sha256,
                deadline_s=send.deadline_s,
                inline=payload.inline,
            )
            self._open.add(to.exchange)
            self._hub.send(
                request, payload, party=to.party, spool=self._folder / "spool", arrived=self._arrived
            )

    def _arrived(self, reply: Reply) -> None:
        self._open.discard(reply.exchange)
        arrived = pb.Arrived(exchange=reply.exchange, lost=reply.lost)
        arrived.error_code, arrived.error_reason = reply.error_code, reply.error_reason
        try:
            arrived.body.CopyFrom(self._body(reply) or pb.Body())
        except OSError as error:
            log.warning("a reply cannot be stored: %s", error, extra={"run": self._run})
            arrived.lost = True
        self._send(pb.ToRunner(arrived=arrived))

    def _body(self, reply: Reply) -> pb.Body | None:
        payload = reply.payload
        if payload is None:
            return None
        held = self._writer.transport.get_write_buffer_size() if self._writer is not None else 0
        if payload.path is None and held > MAX_HELD:
            # The process is behind: what a thousand sites answer must not pile up here.
            path = self._folder / "spool" / f"{reply.exchange.hex()}.in"
            # Not forced to the disk: it dies with its run, and all agents would wait for that.
            path.touch(mode=0o600)
            path.write_bytes(payload.inline)
            payload = replace(payload, inline=b"", path=path)
        return payload.body()

    def _tell_soon(self) -> None:
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(_SETTLE_S, self._tell_connected)

    def _tell_connected(self) -> None:
        self._telling = None
        members = [
            pb.Connected.Member(party=s.party, site=s.site, insecure_seed=s.insecure_seed)
            for s in self._hub.sessions.values()
            if s.party in self._parties
        ]
        self._send(pb.ToRunner(connected=pb.Connected(members=members)))

    def _send(self, message: pb.ToRunner) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(message))


def _last_line(errors: Path) -> str:
    """What a process said last on standard error, as a remark; its own words, so short and printable."""
    lines = errors.read_text(encoding="utf-8", errors="replace").splitlines()
    last = printable(next((line for line in reversed(lines) if line.strip()), ""), 300)
    return f" ({last})" if last else ""
