"""The site's own people and their agent."""

import asyncio
import json
import os
import socket
import stat

import pytest

from lepton_fl.errors import ConfigError, ConnectionFailed
from lepton_fl.fleet.agent.local import ask, serve, socket_path
from lepton_fl.fleet.agent.process import own_state


@pytest.fixture
def state(tmp_path):
    (tmp_path / "s").mkdir(mode=0o700)
    return tmp_path / "s"


def during(state, work, **commands):
    """What `work` gives, in a thread, while the commands are served."""

    async def whole():
        async with serve(state, commands):
            return await asyncio.to_thread(work)

    return asyncio.run(whole())


def raw(state, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(10)
        caller.connect(os.fspath(socket_path(state)))
        caller.sendall(data)
        caller.shutdown(socket.SHUT_WR)
        return caller.makefile("rb").read()


def test_a_command_is_answered(state):
    """One line of JSON each way."""
    assert during(state, lambda: ask(state, "status"), status=lambda: {"site": "clinic"}) == {
        "site": "clinic"
    }


def test_the_socket_is_closed_to_others_whatever_the_umask(state):
    """From its first moment: bind makes it so."""
    before = os.umask(0)
    try:
        mode = during(state, lambda: stat.S_IMODE(socket_path(state).stat().st_mode))
    finally:
        os.umask(before)

    assert mode == 0o600
    assert not socket_path(state).exists()


@pytest.mark.parametrize(
    "line",
    [b"", b"\n", b"{}\n", b"[]\n", b'{"do": 7}\n', b'{"do": "run"}\n', b"[" * 900 + b"\n", b"x" * 5000],
)
def test_a_line_that_is_no_command_changes_nothing(state, line):
    """And the next one is answered."""
    called = []

    def work():
        said = raw(state, line)
        return said, ask(state, "pause")

    said, after = during(state, work, pause=lambda: called.append(1) or {"ok": True})

    assert said == b"" or "error" in json.loads(said)
    assert (called, after) == ([1], {"ok": True})


def test_the_socket_of_an_agent_that_was_killed_is_no_hindrance(state):
    """Its file is there, and nobody behind it."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(os.fspath(socket_path(state)))

    with pytest.raises(ConnectionFailed, match="no agent is running"):
        ask(state, "status")

    assert during(state, lambda: ask(state, "status"), status=dict) == {}


def test_a_path_that_is_too_long_for_a_socket_is_told(tmp_path):
    """Before anything is started."""
    with pytest.raises(ConfigError, match="103"):
        socket_path(tmp_path / ("s" * 100))


def test_one_agent_has_the_folder(state):
    """A second one is told so, and a third may have it afterwards."""
    with own_state(state), pytest.raises(ConfigError, match="another agent runs here"), own_state(state):
        pass

    with own_state(state):
        pass


def test_the_folder_is_closed_to_others(tmp_path):
    """Also where it was open."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s").chmod(0o755)

    with own_state(tmp_path / "s"):
        mode = stat.S_IMODE((tmp_path / "s").stat().st_mode)

    assert mode == 0o700
