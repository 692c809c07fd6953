"""A Flower app run on Flower's Ray engine, as `flwr run` does it: a SuperLink on the loopback, and its nodes.

Flower offers no other way that it means to keep: `run_simulation` is deprecated.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lepton_fl.errors import ConfigError, LeptonError

_PATIENCE = 60.0
"""Seconds that a SuperLink has to start, and to end with its own processes."""
_POLL = 0.2


def require_ray() -> None:
    """Refuse where Ray is not installed.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("engine ray: Ray is not installed", fix="pip install 'lepton-fl[simulation]'")


def run_on_ray(app: Path, sites: int) -> Path:
    """Run the Flower app in `app` over `sites` simulated nodes; returns the folder with its model.

    Raises:
        LeptonError: the run left no model; what Flower said is on standard error.
    """
    env = _environment(app)
    with _superlink(app, env):
        streamed = subprocess.run(  # noqa: S603 - our own words and a path
            [
                *(_script("flwr"), "run", str(app), "loopback", "--stream"),
                *("--federation-config", f"num-supernodes={sites}"),
            ],
            env=env,
            stdout=2,
            check=False,
        )
    made = list((app / "runs").glob("*/model.safetensors"))
    if streamed.returncode or not made:
        raise LeptonError(f"the run left no model: Flower's last words are above and in {app}/superlink.log")
    return made[0].parent


@contextmanager
def _superlink(app: Path, env: dict[str, str]) -> Iterator[None]:
    """A SuperLink with the simulation engine on a free port, known to flwr as `loopback`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    config = app / ".flwr" / "config.toml"
    config.write_text(
        f'[superlink.loopback]\naddress = "127.0.0.1:{port}"\ninsecure = true\n', encoding="utf-8"
    )
    command = [
        _script("flower-superlink"),
        "--insecure",
        "--simulation",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with (
        (app / "superlink.log").open("wb") as log,
        # A session of its own: Ctrl-C is ours to pass on, in order.
        subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True) as link,  # noqa: S603
    ):
        try:
            wait_for_port(port)
            yield
        finally:
            link.terminate()
            try:
                link.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                link.kill()


def wait_for_port(port: int) -> None:
    """Wait until a process listens on a port of the loopback.

    Raises:
        LeptonError: none does within a minute.
    """
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), _PATIENCE).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise LeptonError(f"nothing listens on 127.0.0.1:{port}: {error}") from None
        time.sleep(_POLL)


def _environment(app: Path) -> dict[str, str]:
    """This process's, and what the app's flower.env exports."""
    lines = (app / "flower.env").read_text(encoding="utf-8").splitlines()
    exported = [shlex.split(line)[1].split("=", 1) for line in lines if line.startswith("export ")]
    # Flower starts some of its commands by name.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **dict(exported), "PATH": path}


def _script(name: str) -> str:
    return str(Path(sys.executable).parent / name)
