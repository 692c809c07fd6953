"""server.toml: what the consortium's operator owns. Places, ports and limits; no promise depends on them."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from lepton_fl.config import Strict, load
from lepton_fl.study import Name


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ValueError(f"found {text!r}, allowed: HOST:PORT, as 127.0.0.1:9700 or [::1]:9700")
    return text


def _loopback(text: str) -> str:
    host = _address(text).rpartition(":")[0].strip("[]")
    if host != "localhost" and not (_is_ip(host) and ipaddress.ip_address(host).is_loopback):
        raise ValueError(f"found {text!r}, allowed: an address of this machine only, as 127.0.0.1:9702")
    return text


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


OFF = "off"
"""In place of an address: that port is closed."""
Address = Annotated[str, AfterValidator(_address)]
AddressOrOff = Annotated[str, AfterValidator(lambda text: text if text == OFF else _address(text))]
LoopbackOrOff = Annotated[str, AfterValidator(lambda text: text if text == OFF else _loopback(text))]


class _About(Strict):
    name: Name
    """Of the consortium."""
    state: str = "state"
    """Folder of the database, runs and models, mode 0700; relative to server.toml."""
    pki: str = "pki"
    """Folder of keys and certificates, mode 0700; relative to server.toml."""
    log: str | None = None
    """File for the log, relative to server.toml; standard error if not given."""
    insecure_demo: bool = False
    """Let agents in whose noise comes from a known seed. What they train can never be promoted."""


class _Listen(Strict):
    fleet: Address = "127.0.0.1:9700"
    """Mutual TLS: the sites' agents."""
    enrolment: AddressOrOff = "127.0.0.1:9701"
    """Where invited sites ask for their certificates."""
    status: LoopbackOrOff = "127.0.0.1:9702"
    """/metrics and /healthz, in clear, on this machine only."""
    public: Address | None = None
    """How sites reach `fleet`, where that is another address, as behind a firewall."""


class _Limits(Strict):
    """What one caller, or all outsiders together, may cost."""

    connections: Annotated[int, Field(ge=1, le=100_000)] = 1_000
    """Open at once on the agents' port. A caller without a certificate may cost 0.2 MiB until it is sent
    away, so a thousand of them stay below 256 MiB."""
    handshake_s: Annotated[float, Field(gt=0, le=60)] = 10.0
    payload_mib: Annotated[int, Field(ge=1, le=1 << 20)] = 4_096
    """Largest reply of one site."""


class _Runs(Strict):
    """Patience, in seconds. What a study itself demands is in study.toml."""

    heartbeat_s: Annotated[float, Field(gt=0, le=300)] = 10.0
    grace_s: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    """How long a round waits for a site that was cut off in the middle of it."""
    settle_s: Annotated[float, Field(ge=0, le=3_600)] = 5.0
    """How long a run that could begin waits for the other sites that have approved it."""
    leave_s: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    """How long a server that is asked to end lets runs finish their round; they go on at its next start."""
    join_deadline_s: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    evaluate_deadline_s: Annotated[float, Field(gt=0, le=86_400)] = 600.0


class ServerConfig(Strict):
    """One consortium's server."""

    server: _About
    listen: _Listen = _Listen()
    limits: _Limits = _Limits()
    runs: _Runs = _Runs()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFiles:
    """Where the server's own files are."""

    config: ServerConfig
    path: Path
    """server.toml."""
    state: Path
    pki: Path

    @property
    def database(self) -> Path:
        return self.state / "server.db"

    @property
    def roster(self) -> Path:
        """The newest signed roster, for the processes of runs."""
        return self.state / "roster.bin"

    @property
    def witness(self) -> Path:
        """What the server has seen of the sites' ledgers."""
        return self.state / "witness.db"

    @property
    def witness_key(self) -> Path:
        """What signs its receipts."""
        return self.state / "witness.pem"

    @property
    def models(self) -> Path:
        """Promoted models, by study and version."""
        return self.state / "models"

    @property
    def log(self) -> Path | None:
        return None if self.config.server.log is None else self.path.parent / self.config.server.log

    def run(self, run: str) -> Path:
        """Folder of a run."""
        return self.state / "runs" / run

    def first_model(self, digest: str) -> Path:
        """A model that runs of a study begin with, where the operator gave one, by its digest."""
        return self.state / "first" / f"{digest}.safetensors"


def load_server(path: Path) -> ServerFiles:
    """The server.toml at `path` and where it says things are, or a ConfigError."""
    config = load(ServerConfig, path)
    home = path.parent
    return ServerFiles(
        config=config, path=path, state=home / config.server.state, pki=home / config.server.pki
    )
