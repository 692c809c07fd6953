"""A query on a real PostgreSQL server, started here, over TLS and over its socket."""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from lepton_fl.data import load_table, open_batches
from lepton_fl.data.sources import CsvFile, Password, Postgres
from lepton_fl.errors import ConfigError, ConnectionFailed, DataError

psycopg = pytest.importorskip("psycopg")
INSTALLED = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
pytestmark = pytest.mark.skipif(not INSTALLED, reason="no PostgreSQL server is installed here")
PASSWORD = "correct-horse"
CSV = """\
patient,seen,age,dose,paid,visits,smoker,ward,ill
p1,2026-01-02T03:04:05+02:00,61.25,0.1,12.50,3,true,7,1
p1,2026-01-02T03:04:05.5Z,0.1,16777216,0.00,,false,,0
p2,2025-12-31T23:30:00-01:00,,1e-7,NaN,9007199254740993,,07,0
p3,2026-07-01 12:00:00Z,NaN,,1000000.01,-4,true,12,1
p4,2026-07-01 12:00:01Z,0.30000000000000004,1e30,1.10,1,false,3,1
"""
COLUMNS = {
    **{
        name: {"type": "float", "range": [-1e31, 1e31], "missing": "flag"}
        for name in ("age", "dose", "paid", "visits")
    },
    "smoker": {"type": "category", "vocabulary": [True, False], "missing": "flag"},
    "ward": {"type": "category", "hash": 16, "missing": "flag"},
}


@pytest.fixture(scope="module")
def server(write_certificate):
    """Host folder, port and CA file of a server with a table `visits`; stopped at the end."""
    # Short and of its own: a socket's path has at most 107 bytes, and the server is not root.
    home = Path(tempfile.mkdtemp(prefix="lepton-pg-"))
    user = "nobody" if os.geteuid() == 0 else None

    def run(*command):
        subprocess.run(command, check=True, capture_output=True, cwd=home, user=user, timeout=120)

    tools, data = INSTALLED[-1].parent, home / "data"
    (home / "password").write_text(PASSWORD)
    certificate, key = write_certificate(home, "localhost")
    if user:
        account = pwd.getpwnam(user)
        for path in (home, *home.iterdir()):
            os.chown(path, account.pw_uid, account.pw_gid)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run(tools / "initdb", "-D", data, "-U", "owner", "-A", "scram-sha-256", f"--pwfile={home / 'password'}")
    settings = {
        "port": port,
        "listen_addresses": "localhost",
        "unix_socket_directories": home,
        "ssl": "on",
        "ssl_cert_file": certificate,
        "ssl_key_file": key,
        "fsync": "off",
        "TimeZone": "Asia/Tokyo",
    }
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    try:
        run(tools / "pg_ctl", "-D", data, "-w", "-l", home / "log", "-o", options, "start")
        with psycopg.connect(
            host=str(home), port=port, dbname="postgres", user="owner", password=PASSWORD
        ) as connection:
            connection.execute("SET TimeZone = 'UTC'")
            connection.execute(
                "CREATE TABLE visits (patient text, seen timestamptz, age double precision, dose real, "
                "paid numeric(12, 2), visits bigint, smoker boolean, ward integer, ill smallint)"
            )
            with connection.cursor().copy("COPY visits FROM STDIN (FORMAT csv, HEADER)") as copy:
                copy.write(CSV)
            connection.execute("CREATE SEQUENCE counter")
            connection.execute("CREATE TABLE words (age text, ill int)")
            connection.execute("INSERT INTO words VALUES ('secret-cell', 1)")
        yield home, port
    finally:
        subprocess.run(
            [tools / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop"],
            capture_output=True,
            cwd=home,
            user=user,
            timeout=120,
        )
        shutil.rmtree(home)


@pytest.fixture
def source(server, monkeypatch):
    """A query on that server, over TLS; other fields may be given."""
    home, port = server
    monkeypatch.setenv("DB_PASSWORD", PASSWORD)

    def make(query="SELECT * FROM visits", **others):
        fields = {
            "host": "localhost",
            "port": port,
            "dbname": "postgres",
            "user": "owner",
            "password": Password(env="DB_PASSWORD"),
            "ca_file": home / "server.crt",
        }
        return Postgres(query=query, **{**fields, **others})

    return make


@pytest.fixture
def contract(make_contract, by_patient):
    evaluation = {"split": "time", "time_column": "seen", "cutoff": "2026-02-01"}
    return make_contract(COLUMNS, privacy=by_patient, evaluation=evaluation)


@pytest.fixture
def small(make_contract):
    return make_contract({"age": {"type": "float", "range": [0, 9]}})


def load(source, contract, **options):
    return load_table(contract, open_batches(source, contract, **options), source=str(source))


@pytest.mark.parametrize("batch_rows", [1, 2, 100])
def test_a_query_is_read_as_csv_is(source, contract, write, batch_rows):
    """Over TLS, in batches of any size, whatever the server's time zone."""
    ours = load(CsvFile(path=write(CSV)), contract)
    theirs = load(source(), contract, batch_rows=batch_rows)

    for name in ("x_NF", "y_N", "unit_N", "key_U", "time_N", "raw_NC"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_a_socket_needs_no_certificate(source, contract, server):
    """It does not leave the machine."""
    table = load(source(host=str(server[0]), ca_file=None), contract)

    assert len(table) == 5


def test_tls_may_be_left_out(source, contract):
    """For whoever says so, because of a tunnel of their own."""
    assert len(load(source(encrypted=False, ca_file=None), contract)) == 5


@pytest.mark.parametrize(
    "query",
    [
        "DROP TABLE words",
        "SELECT 1 AS age; DROP TABLE words",
        "SELECT 1) AS s; DROP TABLE words; --",
        "WITH gone AS (DELETE FROM words RETURNING *) SELECT * FROM gone",
        "SELECT * FROM no_such_table",
        "SELECT set_config('transaction_read_only', 'off', false) AS age, 1 AS ill; DROP TABLE words",
    ],
)
def test_only_one_select_is_run(source, small, query):
    """Everything else is refused, and changes nothing."""
    with pytest.raises(ConfigError):
        load(source(query), small)

    with pytest.raises(DataError, match="are not numbers"):
        load(source("SELECT * FROM words"), small)


def test_a_function_that_writes_is_refused(source, small):
    """The transaction is read only, not only the query."""
    with pytest.raises((ConfigError, DataError), match=r"read-only|ReadOnlySqlTransaction"):
        load(source("SELECT nextval('counter') AS age, 1 AS ill"), small)


def test_an_error_never_shows_a_cell(source, small):
    """A cast that fails quotes what it failed on; we do not."""
    with pytest.raises(DataError, match="InvalidTextRepresentation") as refused:
        load(source("SELECT age::int AS age, ill FROM words"), small)

    assert "secret" not in str(refused.value)


def test_a_wrong_password_is_refused_and_not_shown(source, small, monkeypatch):
    """Neither in the error nor in the source's own words."""
    monkeypatch.setenv("DB_PASSWORD", "wrong-horse")
    with pytest.raises(ConnectionFailed, match="password authentication failed") as refused:
        load(source(), small)

    assert "wrong-horse" not in str(refused.value) + repr(source())


def test_a_server_that_nobody_vouches_for_is_refused(source, small):
    """The machine's own authorities do not know it: no password is sent."""
    with pytest.raises(ConnectionFailed, match="certificate"):
        load(source(ca_file=None), small)


def test_a_server_of_another_name_is_refused(source, small):
    """The certificate is localhost's."""
    with pytest.raises(ConnectionFailed, match=r"certificate|does not match"):
        load(source(host="127.0.0.1"), small)


def test_no_server_is_one_line(source, small):
    """With the address that was tried."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionFailed, match="localhost") as refused:
            load(source(port=probe.getsockname()[1]), small)

    assert "\n" not in str(refused.value)


def test_without_the_extra_one_line_says_so(source, small, monkeypatch):
    """With the command that installs it."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"fix: pip install 'lepton-fl\[postgres\]'"):
        load(source(), small)
