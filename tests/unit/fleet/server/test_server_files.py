"""server.toml, its template, the log, and what the server tells of itself."""

import json
import logging
import urllib.error
import urllib.request

import pytest

from lepton_fl.cli.texts import server_text
from lepton_fl.errors import ConfigError
from lepton_fl.fleet.logs import JsonLines, log_to
from lepton_fl.fleet.server.config import load_server
from lepton_fl.fleet.server.models import rollback
from lepton_fl.fleet.server.telemetry import LATE_S, StatusServer, Telemetry


@pytest.fixture
def write(tmp_path):
    def server_toml(text):
        path = tmp_path / "server.toml"
        path.write_text(text)
        return path

    return server_toml


def test_the_template_is_a_server_toml_with_the_defaults(write, tmp_path):
    template = load_server(write(server_text(tmp_path / "Bank Consortium!"))).config
    least = load_server(write('[server]\nname = "Bank-Consortium"\n')).config

    assert template == least


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fleet", "9700"),
        ("fleet", "host:99999"),
        ("enrolment", ":1"),
        ("status", "0.0.0.0:9702"),
        ("status", "10.0.0.1:9702"),
    ],
)
def test_an_address_that_is_none_is_refused(write, key, value):
    """And one for /metrics that others could reach, since it is in clear."""
    path = write(f'[server]\nname = "n"\n[listen]\n{key} = "{value}"\n')

    with pytest.raises(ConfigError, match=rf"listen\.{key}"):
        load_server(path)


def test_a_port_can_be_closed_but_not_the_agents(write):
    listen = load_server(write('[server]\nname = "n"\n[listen]\nenrolment = "off"\nstatus = "off"\n'))

    assert (listen.config.listen.enrolment, listen.config.listen.status) == ("off", "off")
    with pytest.raises(ConfigError, match=r"listen\.fleet"):
        load_server(write('[server]\nname = "n"\n[listen]\nfleet = "off"\n'))


def test_a_log_line_is_json_with_its_fields(tmp_path, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    monkeypatch.setattr(root, "level", root.level)
    path = tmp_path / "server.log"
    log_to(path)
    logging.getLogger("lepton_fl.x").info("round", extra={"run": "ab", "round": 3, "sites": ["a"]})
    handler = root.handlers[0]
    handler.close()
    line = json.loads(path.read_text())

    assert {k: v for k, v in line.items() if k != "time"} == {
        "level": "info",
        "event": "round",
        "run": "ab",
        "round": 3,
        "sites": ["a"],
    }
    assert path.stat().st_mode & 0o077 == 0


def test_nobody_can_forge_a_line_of_the_log():
    record = logging.makeLogRecord({"msg": "refused: %s", "args": ('x\n{"event": "server started"}',)})

    assert "\n" not in JsonLines().format(record)


@pytest.fixture
def status():
    telemetry = Telemetry()
    server = StatusServer(telemetry, "127.0.0.1", 0)
    yield telemetry, lambda path: _get(server.port, path)
    server.close()


def _get(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_health_is_told_in_one_line(status, monkeypatch):
    telemetry, get = status
    found = [get("/healthz")]
    telemetry.trouble = "the disk is full"
    found.append(get("/healthz"))
    telemetry.trouble = ""
    monkeypatch.setattr(telemetry, "_ticked", telemetry._ticked - 2 * LATE_S)
    found.append(get("/healthz"))

    assert found == [(200, "ok\n"), (503, "the disk is full\n"), (503, "the server's loop stands still\n")]
    assert get("/other")[0] == 404


def test_metrics_are_counts(status):
    telemetry, get = status
    telemetry.states({"running": 2})
    telemetry.states({"finished": 3})
    telemetry.refusals.labels("certificate").inc()
    code, text = get("/metrics")

    assert code == 200
    assert 'lepton_fl_runs{state="finished"} 3.0' in text
    assert 'state="running"' not in text
    assert 'lepton_fl_refusals_total{reason="certificate"} 1.0' in text


def test_rollback_goes_back_one_version_at_a_time(write):
    files = load_server(write('[server]\nname = "n"\n'))
    home = files.models / "s"
    for version in ("1", "2", "10", ".11.draft"):
        (home / version).mkdir(parents=True)
    (home / "current").symlink_to("10")

    assert [rollback(files, "s")[0], rollback(files, "s")[0]] == [2, 1]
    assert (home / "current").resolve().name == "1"
    with pytest.raises(ConfigError, match="no version before 1"):
        rollback(files, "s")
    with pytest.raises(ConfigError, match="no model was promoted"):
        rollback(files, "other")
