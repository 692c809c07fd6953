"""The README's section "Deploy", typed into five terminals as it stands there."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lepton_fl.data import dataset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="terminals are made with setsid of Linux"),
]
ROOT = Path(__file__).parents[2]
BANKS = [f"bank-{number}" for number in range(1, 5)]
PASSPHRASE = "correct horse battery"
PATIENCE_S = 240
OFFLINE = {"credit-default": "heart-disease", "--template credit": "--template diagnosis", "credit": "heart"}
"""What the README itself says to replace, where nothing can be fetched."""


class Terminal:
    """A shell on a terminal of its own, into which a person types."""

    def __init__(self, folder, env):
        self._ours, theirs = os.openpty()
        self._process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", "bash", "--norc", "--noprofile", "--noediting"],
            cwd=folder,
            env=env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        self._said = ""
        self._read = 0
        self._reader = threading.Thread(target=self._listen)
        self._reader.start()

    def _listen(self):
        while True:
            try:
                data = os.read(self._ours, 4096)
            except OSError:  # The last process on it is gone.
                return
            if not data:
                return
            self._said += data.decode(errors="replace").replace("\r", "")

    def begin(self, line):
        """Type a command, and behind it one that says how it ended."""
        self._write(line if line.endswith("&") else f"{line}; echo ended $? .")
        if line.endswith("&"):
            self._write("echo ended $? .")

    def end(self, line):
        """Answer what the command asks; it must end well. What it said."""
        before = self._read
        while True:
            pattern, match = self.until(ENDED, *ANSWERS)
            if pattern == ENDED:
                assert match[1] == "0", f"{line}:\n{self._said[before:]}"
                return self._said[before : self._read]
            self._write(ANSWERS[pattern])

    def until(self, *patterns):
        """Wait for the first of `patterns` in what has not been read yet; which one, and its match."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            found = [(m.start(), p, m) for p in patterns if (m := re.search(p, self._said[self._read :]))]
            if found:
                _, pattern, match = min(found, key=lambda one: one[0])
                self._read += match.end()
                return pattern, match
            time.sleep(0.05)
        raise AssertionError(f"waited for {patterns}, in:\n{self._said[-3000:]}")

    def _write(self, text):
        os.write(self._ours, f"{text}\n".encode())

    def close(self):
        self._write("exit")
        self._process.wait(30)
        self._reader.join(30)
        os.close(self._ours)


ENDED = r"(?m)^ended (\d+) \.\n"
ANSWERS = {
    r"Passphrase of the consortium's root: ?$": PASSPHRASE,
    r"(?i)repeat for confirmation: ?$": PASSPHRASE,
    r"Has the site read out the same\? \[y/N\]: ?$": "y",
    r"Approve this study at bank-\d\? \[y/N\]: ?$": "y",
}


def blocks(text):
    """(who, lines) of each block of the section."""
    section = re.search(r"\n## Deploy\n(.*?)\n## ", text, re.DOTALL)[1]
    for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL):
        who, *lines = block.strip().splitlines()
        yield who.removeprefix("# "), lines


def free_ports(number):
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [str(sock.getsockname()[1]) for sock in held]
    for sock in held:
        sock.close()
    return ports


@pytest.fixture
def place(tmp_path_factory):
    """A folder of a short name: the path of a Unix socket has room for a hundred bytes."""
    return tmp_path_factory.mktemp("d")


@pytest.fixture
def terminals(place):
    """One for the server and one for each bank, in one folder where `lepton-fl` is installed."""
    (place / ".venv/bin").mkdir(parents=True)
    for folder in ("server", "client"):  # As in the project's folder: they must be in nobody's way.
        shutil.copytree(ROOT / folder, place / folder)
    (place / ".venv/bin/activate").write_text(f"export PATH={place}/.venv/bin:$PATH\n")
    command = place / ".venv/bin/lepton-fl"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m lepton_fl "$@"\n')
    command.chmod(0o755)
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TERM": "dumb",
        "NO_COLOR": "1",
        "COLUMNS": "200",
        "PS1": "",
    }
    opened = {who: Terminal(place, env) for who in ("server", *BANKS)}
    yield opened
    for lock in place.glob("deployment/*/state/*.lock"):
        for pid in _holders(lock):
            os.kill(pid, signal.SIGKILL)
    for terminal in opened.values():
        terminal.close()


def _holders(lock):
    """Processes that have the file open."""
    found = []
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if handle.resolve() == lock:
                found.append(int(handle.parts[2]))
        except OSError:
            pass
    return found


def test_the_section_ends_with_a_promoted_model(terminals, place):
    """Every line of it, in its order; only ports are others, and TOKEN is what was printed for the bank."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    data = "credit" if dataset("credit").cached.exists() else "heart"
    if data == "heart":
        for said, instead in OFFLINE.items():
            text = text.replace(said, instead)
    ports = dict(zip(("9700", "9701", "9702"), free_ports(3), strict=True))
    tokens = {}

    def typed(line, bank=""):
        line = re.sub(r"\s+# .*", "", line)  # What is typed behind it would be part of the remark.
        for port, instead in ports.items():
            line = line.replace(f":{port}", f":{instead}")
        return line.replace("TOKEN", tokens.get(bank, "TOKEN")).replace("BANK=bank-1", f"BANK={bank}")

    for who, lines in blocks(text):
        for line in lines:
            for name in BANKS if who == "bank" else ["server"]:
                if "enroll approve" in line:
                    bank = re.search(r"bank-\d", line)[0]
                    terminals[bank].until("waiting; Ctrl-C")
                terminals[name].begin(typed(line, name))
                if "enroll join" in line:
                    continue  # It waits for the server's next block.
                said = terminals[name].end(line)
                if "enroll invite" in line:
                    (token,) = re.findall(r"(?m)^(lfl1-\S+)$", said)
                    tokens[re.search(r"bank-\d", line)[0]] = token
                if "enroll approve" in line:
                    terminals[bank].end("enroll join")
            if "init server" in line:
                config = place / "deployment/server/server.toml"
                settings = config.read_text().splitlines()
                config.write_text("\n".join(typed(setting) for setting in settings))

    name = "heart-disease" if data == "heart" else "credit-default"
    assert (place / f"deployment/server/state/models/{name}/current/weights.safetensors").is_file()
    assert not (place / "deployment/server/state/models" / name / "2").exists()
