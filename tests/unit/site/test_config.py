"""site.toml names one source, and what goes with its kind."""

import pytest

from lepton_fl.config import parse
from lepton_fl.data.sources import CsvFile, DuckDB, ParquetFile, Password, Postgres, SQLite
from lepton_fl.errors import ConfigError
from lepton_fl.site import SiteConfig

SERVER = {"kind": "postgres", "host": "db.bank", "dbname": "cards", "user": "agent"}


@pytest.fixture
def source_of(tmp_path):
    """The source that a [data] table describes, in the folder of site.toml."""

    def make(**data):
        config = parse(SiteConfig, {"site": {"id": "bank"}, "data": data}, file="site.toml")
        return config.data.at(tmp_path)

    return make


def test_a_file_is_known_by_its_suffix(source_of, tmp_path):
    """And its delimiter goes with CSV."""
    assert source_of(source="a.parquet") == ParquetFile(path=tmp_path / "a.parquet")
    assert source_of(source="a.csv", delimiter=";") == CsvFile(path=tmp_path / "a.csv", delimiter=";")


@pytest.mark.parametrize(("kind", "source"), [("duckdb", DuckDB), ("sqlite", SQLite)])
def test_a_query_on_a_file(source_of, tmp_path, kind, source):
    """Relative to site.toml."""
    found = source_of(query="SELECT 1", database={"kind": kind, "file": "a.db"})

    assert found == source(path=tmp_path / "a.db", query="SELECT 1")


def test_a_query_on_a_server(source_of, tmp_path):
    """Encrypted, with the server's name verified, unless it says otherwise."""
    database = {**SERVER, "port": 5433, "password_file": "secret", "ca_file": "ca.pem"}

    assert source_of(query="SELECT 1", database=database) == Postgres(
        host="db.bank",
        port=5433,
        dbname="cards",
        user="agent",
        password=Password(file=tmp_path / "secret"),
        ca_file=tmp_path / "ca.pem",
        encrypted=True,
        query="SELECT 1",
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "both source and query, or neither"),
        ({"source": "a.csv", "query": "SELECT 1"}, "both source and query, or neither"),
        ({"query": "SELECT 1"}, "go together"),
        ({"source": "a.csv", "database": {"kind": "sqlite", "file": "a"}}, "go together"),
        ({"query": "SELECT 1", "database": {"kind": "sqlite"}}, "data.database: kind = 'sqlite' needs file"),
        (
            {"query": "SELECT 1", "database": {"kind": "duckdb", "file": "a", "host": "b"}},
            "kind = 'duckdb' does not take host",
        ),
        ({"query": "SELECT 1", "database": {"kind": "postgres"}}, "needs dbname, host, user"),
        ({"query": "SELECT 1", "database": {**SERVER, "file": "a"}}, "does not take file"),
        (
            {"query": "SELECT 1", "database": {**SERVER, "password_env": "A", "password_file": "b"}},
            "give at most one",
        ),
        ({"query": "SELECT 1", "database": {**SERVER, "password": "hunter2"}}, "password: unknown key"),
        ({"query": "SELECT 1", "database": {**SERVER, "kind": "mysql"}}, "'duckdb', 'sqlite' or 'postgres'"),
    ],
)
def test_what_does_not_go_together_is_refused(source_of, data, said):
    """In one line that names the keys, and never a password that was written there."""
    with pytest.raises(ConfigError, match=said) as refused:
        source_of(**data)

    assert "hunter2" not in str(refused.value)


def test_keys_lie_beside_site_toml_unless_told_otherwise():
    """And the server's address is what it said when the site joined."""
    plain = {"site": {"id": "bank"}, "data": {"source": "a.csv"}}
    told = {**plain, "server": {"address": "fl.bank.example:9700", "pki": "/etc/lepton-fl/pki"}}

    config, other = (parse(SiteConfig, raw, file="site.toml").server for raw in (plain, told))
    assert (config.address, config.pki) == (None, "pki")
    assert (other.address, other.pki) == ("fl.bank.example:9700", "/etc/lepton-fl/pki")
    with pytest.raises(ConfigError, match=r"server\.address"):
        parse(SiteConfig, {**plain, "server": {"address": "fl.bank.example"}}, file="site.toml")


def test_large_tables_lie_beside_the_ledger_unless_told_otherwise(tmp_path):
    """Where the institution keeps what never leaves."""
    plain = {"site": {"id": "bank"}, "data": {"source": "a.csv"}}
    told = {**plain, "runtime": {"scratch": "/scratch", "memory_mib": 1}}

    room = parse(SiteConfig, plain, file="site.toml").room(tmp_path)
    other = parse(SiteConfig, told, file="site.toml").room(tmp_path)

    assert (room.memory, room.folder) == (256 << 20, tmp_path / "state")
    assert (other.memory, str(other.folder)) == (1 << 20, "/scratch")
