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


Address = Annotated[str, AfterValidator(_address)]
LoopbackAddress = Annotated[str, AfterValidator(_loopback)]


class _About(Strict):
    name: Name
    """Of the consortium."""
    state: str = "state"
    """Folder of the database, runs and models, mode 0700; relative to server.toml."""
    pki: str = "pki"
    """Folder of keys and certificates, mode 0700; relative to server.toml."""
    insecure_demo: bool = False
    """Let agents in whose noise comes from a known seed. What they train can never be promoted."""


class _Listen(Strict):
    fleet: Address = "127.0.0.1:9700"
    """Mutual TLS: the sites' agents."""
    enrolment: Address | None = "127.0.0.1:9701"
    """Where invited sites ask for their certificates; leave out to close it."""
    status: LoopbackAddress | None = "127.0.0.1:9702"
    """/metrics and /healthz, in clear, on this machine only."""
    public: Address | None = None
    """How sites reach `fleet`, where that is another address, as behind a firewall."""


class _Limits(Strict):
    """What one caller, or all outsiders together, may cost."""

    connections: Annotated[int, Field(ge=1, le=100_000)] = 2_000
    """Open at once on each port, callers without a certificate included."""
    handshake_s: Annotated[float, Field(gt=0, le=60)] = 10.0
    payload_mib: Annotated[int, Field(ge=1, le=1 << 20)] = 4_096
    """Largest reply of one site."""


class _Runs(Strict):
    """Patience, in seconds. What a study itself demands is in study.toml."""

    heartbeat_s: Annotated[float, Field(gt=0, le=300)] = 10.0
    grace_s: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    """How long a round waits for a site that was cut off in the middle of it."""
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
    state: Path
    pki: Path

    @property
    def database(self) -> Path:
        return self.state / "server.db"


def load_server(path: Path) -> ServerFiles:
    """The server.toml at `path` and where it says things are, or a ConfigError."""
    config = load(ServerConfig, path)
    home = path.parent
    return ServerFiles(config=config, state=home / config.server.state, pki=home / config.server.pki)
