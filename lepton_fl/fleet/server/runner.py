"""The process of one run: Flower's ServerApp over the fleet's Grid. Started by the server, ends with it.

Everything it needs is in the run's folder: `run.json`, `study.canonical`, and where the run is gone on with,
`checkpoint.safetensors`. What it makes stays there. It is told of the sites, and tells what happens, through
the socket pair that it is started with.
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
from safetensors.numpy import load_file

from lepton_fl.data import Contract
from lepton_fl.errors import ConfigError, LeptonError
from lepton_fl.federation import Federation, server_app
from lepton_fl.federation.loop import RoundReport
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.frames import Frames
from lepton_fl.fleet.server.grid import FleetGrid
from lepton_fl.fleet.server.link import RunSpec
from lepton_fl.study import Study, parse_canonical
from lepton_fl.tasks import Arrays, arrays_of, build_model
from lepton_fl.tasks.model_file import write_model

log = logging.getLogger(__name__)

INSECURE = "INSECURE SEED: a demonstration, no privacy"
"""Label of every model that a site with a known seed has had a part in."""


class _Teller:
    """An Observer that tells the server what happens."""

    def __init__(self, frames: Frames[pb.ToRunner]) -> None:
        self._frames = frames

    def tell(self, **event: object) -> None:
        self._frames.send(pb.FromRunner(progress=pb.Progress(json=json.dumps(event))))

    def joined(self, cohort: tuple[str, ...], refused: Mapping[str, str]) -> None:
        self.tell(event="joined", cohort=list(cohort), refused=dict(refused))

    def round_done(self, report: RoundReport, model: Arrays) -> None:  # noqa: ARG002 - an Observer's form
        self.tell(
            event="round",
            round=report.number,
            sites=list(report.sites),
            dropped=dict(report.dropped),
            seconds=report.seconds,
        )


def run(folder: Path, frames: Frames[pb.ToRunner]) -> pb.Finished:
    """The whole run; what there is to say of its end."""
    spec = RunSpec.read(folder / "run.json")
    frames.send(pb.FromRunner(ready=pb.Ready(run=spec.run)))
    try:
        study = parse_canonical((folder / "study.canonical").read_bytes(), spec.study_id)
        federation = _federation(folder, spec, study, frames)
        spool = folder / "spool"
        spool.mkdir(mode=0o700, exist_ok=True)
        grid = FleetGrid(frames, spool, stop=federation.stop)
        context = Context(run_id=0, node_id=1, node_config={}, state=RecordDict(), run_config={})
        server_app(federation)(grid, context)
        return _finished(folder, study, federation, grid)
    except LeptonError as error:
        log.warning("run %s: %s", spec.run, error)
        return pb.Finished(exit_code=error.exit_code, message=str(error), json="{}")


def _federation(folder: Path, spec: RunSpec, study: Study, frames: Frames[pb.ToRunner]) -> Federation:
    checkpoint, teller = folder / "checkpoint.safetensors", _Teller(frames)
    if checkpoint.exists():
        return Federation.resume(checkpoint, study=study, sites=spec.sites, observer=teller, context="fleet")
    return Federation(
        study=study,
        model=_first_model(folder, spec, study),
        sites=spec.sites,
        observer=teller,
        checkpoint=checkpoint,
        context="fleet",
        run_id=spec.run,
    )


def _first_model(folder: Path, spec: RunSpec, study: Study) -> Arrays:
    model = arrays_of(build_model(study, Contract.of(study).width, torch.Generator()))
    if spec.first_model is None:
        return model
    found = load_file(folder / spec.first_model)
    if {n: a.shape for n, a in found.items()} != {n: a.shape for n, a in model.items()}:
        raise ConfigError(f"{spec.first_model}: not a model of study {study.study.name}")
    return {name: found[name] for name in model}


def _finished(folder: Path, study: Study, federation: Federation, grid: FleetGrid) -> pb.Finished:
    labels = (INSECURE,) if grid.insecure else ()
    whole = federation.done == study.train.rounds or bool(federation.stopped_early)
    digest = write_model(folder / "model.safetensors", study, federation.model, labels) if whole else ""
    about = {
        "done": federation.done,
        "started": federation.started,
        "model": digest,
        "labels": list(labels),
        "released": federation.released,
        "refused": federation.refused,
        "stopped_early": federation.stopped_early,
        "stopped": not whole,
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
    sock = socket.socket(fileno=given.fd)
    frames = Frames(sock, pb.ToRunner)
    try:
        finished = run(given.folder, frames)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        log.warning("the server is gone; the run can be gone on with from its checkpoint")
        sys.exit(1)
    frames.send(pb.FromRunner(finished=finished))
    # Until the server has read it and closed its end.
    threading.Timer(10.0, os._exit, (0,)).start()
    try:
        while True:
            frames.receive(10.0)
    except EOFError:
        os._exit(0)


if __name__ == "__main__":
    main()
