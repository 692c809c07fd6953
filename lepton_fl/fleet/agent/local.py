"""The site's own people and their agent: a Unix socket in the state folder, one line of JSON each way.

The socket has mode 0600 from its first moment, in a folder of mode 0700: who may not read the ledger may not
command the agent either.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from lepton_fl.errors import ConfigError, ConnectionFailed, ProtocolError

SOCKET = "agent.sock"
LOCK = "agent.lock"
_LONGEST_PATH = 103
"""Bytes of the path of a Unix socket: 107 on Linux, 103 elsewhere."""
_MAX_REQUEST = 1024
_MAX_REPLY = 1 << 20
_MAX_CALLERS = 8
_PATIENCE_S = 5.0

Command = Callable[[], Mapping[str, object]]


def socket_path(state: Path) -> Path:
    """Where the socket of the agent with this state folder is.

    Raises:
        ConfigError: the path is longer than that of a socket may be.
    """
    path = state.resolve() / SOCKET
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ConfigError(
            f"{path}: {len(os.fsencode(path))} bytes, the path of a Unix socket may have {_LONGEST_PATH}",
            fix="set site.state in site.toml to a folder with a shorter path",
        )
    return path


@asynccontextmanager
async def serve(state: Path, commands: Mapping[str, Command]) -> AsyncIterator[None]:
    """Answer `commands` on the socket in `state` while the block runs. The caller holds the folder's lock."""
    path = socket_path(state)
    # Of an agent that was killed: nobody else has the folder.
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Before bind, which makes the file: a umask would be the whole process's.
    os.fchmod(listener.fileno(), 0o600)
    listener.bind(os.fspath(path))
    # For systems where the file does not take the socket's mode; the folder has been closed all along.
    path.chmod(0o600)
    callers = asyncio.Semaphore(_MAX_CALLERS)

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with callers, asyncio.timeout(_PATIENCE_S):
                writer.write(json.dumps(_answer(await reader.readline(), commands)).encode() + b"\n")
                await writer.drain()
        except (OSError, ValueError, TimeoutError):
            pass  # Not a line, too long a one, or nobody there any more.
        finally:
            writer.close()

    server = await asyncio.start_unix_server(take, sock=listener, limit=_MAX_REQUEST)
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


def _answer(line: bytes, commands: Mapping[str, Command]) -> Mapping[str, object]:
    try:
        asked = json.loads(line)
    except (ValueError, RecursionError):
        asked = None
    name = asked.get("do") if isinstance(asked, dict) else None
    command = commands.get(name) if isinstance(name, str) else None
    if command is None:
        return {"error": f"found {name!r}, allowed: {', '.join(commands)}"}
    return command()


def ask(state: Path, command: str) -> dict[str, Any]:
    """What the running agent with this state folder answers to `command`.

    Raises:
        ConnectionFailed: there is none, or it may not be asked by this user.
        ProtocolError: it answers something else.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.settimeout(_PATIENCE_S)
        try:
            caller.connect(os.fspath(socket_path(state)))
            caller.sendall(json.dumps({"do": command}).encode() + b"\n")
            with caller.makefile("rb") as file:
                line = file.readline(_MAX_REPLY)
        except (FileNotFoundError, ConnectionRefusedError):
            raise ConnectionFailed(
                f"{state}: no agent is running here", fix="lepton-fl client start -c site.toml"
            ) from None
        except PermissionError:
            raise ConnectionFailed(
                f"{state}: the agent there is another user's", fix="use the account that runs the agent"
            ) from None
        except OSError as error:
            raise ConnectionFailed(f"{state}: the agent does not answer: {error}") from None
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict) or "error" in found:
        raise ProtocolError(f"{state}: the agent answers {line[:200]!r}")
    return found


def wait_until_gone(state: Path) -> None:
    """Wait until the agent with this state folder has ended."""
    with (state / LOCK).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
