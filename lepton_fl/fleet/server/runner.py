"""The process of one run: Flower's ServerApp over the fleet's Grid. Started by the server, ends with it.

Everything it needs is in the run's folder: `run.json`, `study.canonical`, and where the run is gone on with,
`checkpoint.safetensors`; and the newest roster, in the file that run.json names. What it makes stays in the
folder. It is told of the sites, and tells what happens, through the socket pair that it is started with.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from flwr.app import Context, RecordDict
from flwr.serverapp import Grid

from lepton_fl.data import Contract
from lepton_fl.errors import ConfigError, LeptonError, VerificationFailed
from lepton_fl.federation import Deadlines, Federation, RoundReport, SecureGrid, server_app
from lepton_fl.files import lock, write_atomic
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.frames import Frames
from lepton_fl.fleet.server.grid import FleetGrid
from lepton_fl.fleet.server.link import INSECURE, RunSpec
from lepton_fl.secagg.context import Consortium
from lepton_fl.secagg.identity import Roster
from lepton_fl.secure_rounds import what_hides
from lepton_fl.study import Study, parse_canonical
from lepton_fl.tasks import Arrays, arrays_of, build_model, model_hash
from lepton_fl.tasks.model_file import read_model, write_model

log = logging.getLogger(__name__)

_STAMP = "insecure"
"""File in the run's folder, made once a site whose noise comes from a known seed is there."""
PREDECESSOR_S = 60.0
"""How long the process of the same run before this one has to end, once its server is gone."""


class _Teller:
    """An Observer that tells the server what happens."""

    def __init__(self, frames: Frames[pb.ToRunner], study: Study) -> None:
        self._frames = frames
        self._study = study

    def tell(self, **event: object) -> None:
        self._frames.send(pb.FromRunner(progress=pb.Progress(json=json.dumps(event))))

    def joined(self, cohort: tuple[str, ...], refused: Mapping[str, str]) -> None:
        hiding = what_hides(self._study, len(cohort))
        log.info("cohort: %s: %s", ", ".join(cohort), hiding)
        self.tell(event="joined", cohort=list(cohort), refused=dict(refused), hiding=hiding)

    def round_done(self, report: RoundReport, model: Arrays) -> None:  # noqa: ARG002 - an Observer's form
        self.tell(
            event="round",
            round=report.number,
            sites=list(report.sites),
            dropped=dict(report.dropped),
            seconds=report.seconds,
        )


class _Members:
    """The consortium, with the newest roster that the server has: asked anew, and verified here too."""

    def __init__(self, spec: RunSpec) -> None:
        self._key, self._path = bytes.fromhex(spec.roster_key), Path(spec.roster)
        self._held: Consortium | None = None

    def __call__(self) -> Consortium:
        """As the file says now.

        Raises:
            VerificationFailed: it holds no roster of the consortium, or one that is older than before.
            ConfigError: it cannot be read.
        """
        try:
            signed = self._path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{self._path}: the roster cannot be read: {error.strerror}") from None
        if self._held is None or signed != self._held.roster.signed:
            roster = Roster.read(signed, self._key)
            roster.supersedes(None if self._held is None else self._held.roster)
            self._held = Consortium(self._key, roster)
        return self._held


def run(folder: Path, frames: Frames[pb.ToRunner]) -> pb.Finished:
    """The whole run; what there is to say of its end."""
    spec = RunSpec.read(folder / "run.json")
    try:
        study = parse_canonical((folder / "study.canonical").read_bytes(), spec.study_id)
        federation = _federation(folder, spec, study, frames)
        spool = folder / "spool"
        for left in spool.iterdir():
            left.unlink()
        stamp = folder / _STAMP
        grid: Grid = FleetGrid(frames, spool, stop=federation.stop, insecure=lambda: write_atomic(stamp, b""))
        if study.secure_aggregation.enabled:
            grid = SecureGrid(grid, _Members(spec))
        frames.send(pb.FromRunner(ready=pb.Ready(run=spec.run)))
        context = Context(run_id=0, node_id=1, node_config={}, state=RecordDict(), run_config={})
        server_app(federation)(grid, context)
        return _finished(folder, study, federation)
    except LeptonError as error:
        log.warning("run %s: %s", spec.run, error)
        return pb.Finished(exit_code=error.exit_code, message=str(error), json="{}")


def _federation(folder: Path, spec: RunSpec, study: Study, frames: Frames[pb.ToRunner]) -> Federation:
    checkpoint, teller = folder / "checkpoint.safetensors", _Teller(frames, study)
    deadlines = Deadlines(
        join=spec.join_deadline, train=study.train.deadline, evaluate=spec.evaluate_deadline
    )
    if checkpoint.exists():
        return Federation.resume(
            checkpoint,
            study=study,
            sites=spec.sites,
            observer=teller,
            context="fleet",
            deadlines=deadlines,
            settle=spec.settle,
            reconnect=spec.join_deadline,
        )
    return Federation(
        study=study,
        model=_first_model(folder, spec, study),
        sites=spec.sites,
        observer=teller,
        checkpoint=checkpoint,
        context="fleet",
        run_id=spec.run,
        deadlines=deadlines,
        settle=spec.settle,
        reconnect=spec.join_deadline,
    )


def _alone(folder: Path) -> None:
    """Wait until no other process works on this run: one of a server that was killed may be at its round.

    Raises:
        ConfigError: one still does.
    """
    # Held until this process ends.
    if lock(folder / "run.lock", patience=PREDECESSOR_S) is None:
        raise ConfigError(f"{folder}: another process still works on this run")


def _first_model(folder: Path, spec: RunSpec, study: Study) -> Arrays:
    if spec.first_model is None:
        return arrays_of(build_model(study, Contract.of(study).width, torch.Generator()))
    model = read_model((folder / spec.first_model).read_bytes(), study, file=spec.first_model)
    if model_hash(model) != spec.first_model_sha256:
        raise VerificationFailed(f"{spec.first_model}: is not the model that was submitted with the study")
    return model


def _finished(folder: Path, study: Study, federation: Federation) -> pb.Finished:
    about: dict[str, object] = {
        "done": federation.done,
        "started": federation.started,
        "stopped": federation.stopped,
        "refused": federation.refused,
    }
    if not federation.stopped:
        labels = [INSECURE] if (folder / _STAMP).exists() else []
        digest = write_model(folder / "model.safetensors", study, federation.model, labels)
        about |= {
            "model": digest,
            "labels": labels,
            "released": federation.released,
            "pooled": None if federation.pooled is None else federation.pooled.model_dump(),
            "stopped_early": federation.stopped_early,
        }
    return pb.Finished(exit_code=0, message="", json=json.dumps(about))


def main() -> None:
    """`python -m lepton_fl.fleet.server.runner --fd N FOLDER`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    # The server decides when a run ends; a Ctrl-C on the terminal reaches the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.umask(0o077)
    logging.basicConfig(
        filename=given.folder / "run.log",
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    torch.set_num_threads(1)
    frames = Frames(socket.socket(fileno=given.fd), pb.ToRunner)
    try:
        _alone(given.folder)
        finished = run(given.folder, frames)
        frames.send(pb.FromRunner(finished=finished))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        log.warning("the server is gone; the run can be gone on with from its checkpoint")
        sys.exit(1)
    # Until the server has read it and closed its end.
    threading.Timer(10.0, os._exit, (0,)).start()
    try:
        while True:
            frames.receive(10.0)
    except EOFError:
        os._exit(0)


if __name__ == "__main__":
    main()
