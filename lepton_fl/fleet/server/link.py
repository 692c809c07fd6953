"""The server's end of a run's process: starts it, carries its requests to the hub and the answers back."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.frames import frame, read_frame
from lepton_fl.fleet.protocol.payload import Payload
from lepton_fl.fleet.server.hub import Answer, Hub

log = logging.getLogger(__name__)

_SETTLE_S = 0.02
"""So that a thousand sites that come at once are told of a few times, not a thousand."""
END_S = 15.0
"""Patience with a process that has said its last word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """run.json: what the server asks of a run's process."""

    run: str
    study_id: str
    sites: dict[int, str]
    """Parties that may take part, and their names."""
    join_deadline: float
    evaluate_deadline: float
    first_model: str | None = None
    """A safetensors file to begin with, in the run's folder."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

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
        spec: RunSpec,
        *,
        progress: Callable[[dict[str, Any]], None],
    ) -> None:
        """`progress` hears each event of the run."""
        self._hub = hub
        self._folder = folder
        self._spec = spec
        self._progress = progress
        self._writer: asyncio.StreamWriter | None = None
        self._open: set[bytes] = set()
        self._telling: asyncio.TimerHandle | None = None

    async def run(self) -> pb.Finished:
        """Start the process and serve it to its end. Exit code -1: it died."""
        ours, theirs = socket.socketpair()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "lepton_fl.fleet.server.runner",
            "--fd",
            str(theirs.fileno()),
            str(self._folder),
            pass_fds=(theirs.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=(self._folder / "stderr.log").open("ab"),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._hub.watchers.append(self._tell_soon)
        finished = pb.Finished(exit_code=-1, message="the run's process died", json="{}")
        try:
            while (said := await read_frame(reader, pb.FromRunner)) is not None:
                if said.WhichOneof("kind") == "finished":
                    finished = said.finished
                    break
                self._take(said)
        finally:
            self._hub.watchers.remove(self._tell_soon)
            for exchange in list(self._open):
                self._hub.cancel(exchange)
            self._writer.close()
            self._writer = None
            try:
                await asyncio.wait_for(process.wait(), END_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        return finished

    def stop(self) -> None:
        """Ask the run to end after its round."""
        self._send(pb.ToRunner(stop=pb.Stop()))

    def _take(self, said: pb.FromRunner) -> None:
        match said.WhichOneof("kind"):
            case "ready":
                self._tell_connected()
            case "send":
                self._forward(said.send)
            case "cancel":
                self._open.discard(said.cancel.exchange)
                self._hub.cancel(said.cancel.exchange)
            case "progress":
                self._progress(json.loads(said.progress.json))

    def _forward(self, send: pb.Send) -> None:
        payload = Payload.at(send.body, send.sha256)
        for to in send.to:
            request = pb.Assign(
                exchange=to.exchange,
                run=self._spec.run,
                study_id=self._spec.study_id,
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

    def _arrived(self, answer: Answer) -> None:
        self._open.discard(answer.exchange)
        self._send(
            pb.ToRunner(
                arrived=pb.Arrived(
                    exchange=answer.exchange,
                    body=None if answer.payload is None else answer.payload.body(),
                    error_code=answer.error_code,
                    error_reason=answer.error_reason,
                    lost=answer.lost,
                )
            )
        )

    def _tell_soon(self) -> None:
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(_SETTLE_S, self._tell_connected)

    def _tell_connected(self) -> None:
        self._telling = None
        members = [
            pb.Connected.Member(party=s.party, site=s.site, insecure_seed=s.insecure_seed)
            for s in self._hub.sessions.values()
            if s.party in self._spec.sites
        ]
        self._send(pb.ToRunner(connected=pb.Connected(members=members)))

    def _send(self, message: pb.ToRunner) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(message))
