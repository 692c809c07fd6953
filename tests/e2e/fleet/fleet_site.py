"""One site's agent as a process, which tests kill: `python fleet_site.py FOLDER NAME PORT`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import fleet_harness
import grpc
import grpc.aio
import torch

from lepton_fl.fleet.agent.agent import Agent
from lepton_fl.fleet.agent.enrol import AgentIdentity
from lepton_fl.fleet.agent.member import EnrolledSite
from lepton_fl.fleet.protocol.methods import OPTIONS
from lepton_fl.site import client_app


async def main(folder: Path, name: str, port: str) -> None:
    root, key, certificate = (
        (folder / f"{part}.pem").read_bytes() for part in ("root", "key", "certificate")
    )
    credentials = grpc.ssl_channel_credentials(root, key, certificate)
    member = EnrolledSite(AgentIdentity.load(folder / "pki"), f"127.0.0.1:{port}")
    site = fleet_harness.make_site(name, folder, member)
    agent = Agent(
        client_app(site),
        lambda: grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=OPTIONS),
        folder / "state",
        insecure_seed=True,
        member=member,
    )
    await agent.run()


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
