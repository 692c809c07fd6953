"""site.toml: what the institution's IT owns. Speed, places and names; nothing that changes a promise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lepton_fl.config import Strict, load, read_toml
from lepton_fl.data import Batch, Contract, Room
from lepton_fl.data.sources import DuckDB, Password, Postgres, Source, SQLite, file_source, open_batches
from lepton_fl.errors import ConfigError
from lepton_fl.study import Name


class _About(Strict):
    id: Name
    policy: str = "policy.toml"
    """The privacy officer's file; relative to site.toml."""
    state: str = "state"
    """Folder of the ledger and of what never leaves; relative to site.toml."""


class _Database(Strict):
    kind: Literal["duckdb", "sqlite", "postgres"]
    file: str | None = None
    """Of duckdb and sqlite; relative to site.toml."""
    host: str | None = None
    """Of postgres: a name or address, or the folder of a Unix socket."""
    port: Annotated[int, Field(ge=1, le=65535)] = 5432
    dbname: str | None = None
    user: str | None = None
    password_env: str | None = None
    """Name of the environment variable that holds the password."""
    password_file: str | None = None
    """File that holds the password, mode 0600 or stricter; relative to site.toml."""
    tls: Literal["verify-full", "off"] = "verify-full"
    ca_file: str | None = None
    """PEM file of who vouches for the server; without it, the machine's own list."""

    @model_validator(mode="after")
    def _keys_go_with_the_kind(self) -> _Database:
        of_server = {"host", "dbname", "user"}
        also = {"port", "password_env", "password_file", "tls", "ca_file"}
        needed, allowed = (of_server, of_server | also) if self.kind == "postgres" else ({"file"}, {"file"})
        given = self.model_fields_set - {"kind"}
        if missing := sorted(needed - given):
            raise ValueError(f"kind = {self.kind!r} needs {', '.join(missing)}")
        if extra := sorted(given - allowed):
            raise ValueError(f"kind = {self.kind!r} does not take {', '.join(extra)}")
        if self.password_env and self.password_file:
            raise ValueError("password_env and password_file: give at most one")
        return self

    def with_query(self, query: str, home: Path) -> DuckDB | SQLite | Postgres:
        """The source that the query on this database is."""
        if self.kind != "postgres":
            path = home / (self.file or "")
            return DuckDB(path=path, query=query) if self.kind == "duckdb" else SQLite(path=path, query=query)
        file = None if self.password_file is None else home / self.password_file
        return Postgres(
            host=self.host or "",
            port=self.port,
            dbname=self.dbname or "",
            user=self.user or "",
            password=Password(env=self.password_env, file=file) if self.password_env or file else None,
            encrypted=self.tls != "off",
            ca_file=None if self.ca_file is None else home / self.ca_file,
            query=query,
        )


class _Source(Strict):
    source: str | None = None
    """The table, a CSV or (by its suffix) a Parquet file; relative to site.toml."""
    query: str | None = None
    """One SELECT on the database, instead of a file."""
    database: _Database | None = None
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    """Of a CSV file."""
    columns: dict[str, str] = {}
    """The study's name of a column to the institution's own header, where they differ."""

    @model_validator(mode="after")
    def _one_place(self) -> _Source:
        if (self.source is None) == (self.query is None):
            raise ValueError("found both source and query, or neither; allowed: one of them")
        if (self.query is None) != (self.database is None):
            raise ValueError("query and [data.database] go together: give both or none")
        return self

    def at(self, home: Path) -> Source:
        """The source, its files relative to `home`."""
        if self.query is None or self.database is None:
            return file_source(home / (self.source or ""), delimiter=self.delimiter)
        return self.database.with_query(self.query, home)


class _Runtime(Strict):
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Two threads on small matrices cost more than one."""
    memory_mib: Annotated[int, Field(ge=1)] = 256
    """Size above which an encoded table lies in unlinked files instead."""
    scratch: str | None = None
    """Folder of those files (default: `site.state`); relative to site.toml."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where models are trained and judged; `auto` is the CPU, whatever else is there. `mps` is refused."""
    log: str | None = None
    """File for the agent's log (default: standard error); relative to site.toml."""


class _Server(Strict):
    address: Annotated[str, Field(pattern=r"^\S+:\d{1,5}$")] | None = None
    """HOST:PORT of the federation's server for agents (default: as it said when the site joined)."""
    pki: str = "pki"
    """Folder of the site's keys and certificates, mode 0700; relative to site.toml."""


class SiteConfig(Strict):
    """One institution's agent."""

    site: _About
    data: _Source
    server: _Server = _Server()
    runtime: _Runtime = _Runtime()

    def open_batches(self, contract: Contract, home: Path) -> Iterator[Batch]:
        """The site's table, batch by batch; `home` is the folder of site.toml."""
        return open_batches(self.data.at(home), contract, columns=self.data.columns)

    def room(self, home: Path) -> Room:
        """Where the encoded table is kept."""
        folder = home / (self.runtime.scratch or self.site.state)
        return Room(memory=self.runtime.memory_mib << 20, folder=folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFiles:
    """Where one institution's own files are."""

    name: str
    policy: Path
    state: Path

    @property
    def ledger(self) -> Path:
        return self.state / "ledger.db"

    @property
    def history(self) -> Path:
        """The secure rounds that the site was in: site/history.py."""
        return self.state / "rounds.db"

    @property
    def approvals(self) -> Path:
        return self.state / "approvals.jsonl"

    @property
    def split_key(self) -> Path:
        return self.state / "split.key"

    @property
    def witness(self) -> Path:
        """What the site has seen of its peers' ledgers."""
        return self.state / "witness.db"

    @property
    def replies(self) -> Path:
        """What the agent has sent, in a folder for each run."""
        return self.state / "replies"

    def check_ledger(self) -> None:
        """That the ledger of a site which has taken part in runs is still there.

        Raises:
            ConfigError: it is not; a new one would let the budget be spent a second time.
        """
        if not self.ledger.exists() and any(self.replies.glob("*/*")):
            raise ConfigError(
                f"{self.ledger}: is gone, and this site has taken part in runs: only there is recorded what "
                "they spent",
                fix="bring ledger.db back from the backup, then lepton-fl budget recover; a new one would "
                "spend the budget a second time",
            )


def files_of(place: Path) -> SiteFiles:
    """The files of the institution at `place`: a folder, or the site.toml or policy.toml in one.

    As its site.toml says, or all in one folder where there is none.
    """
    folder = place.parent if place.suffix == ".toml" else place
    config = place if place.is_file() and "site" in read_toml(place) else folder / "site.toml"
    if not config.exists():
        name, policy, state = folder.resolve().name, folder / "policy.toml", folder
    else:
        about = load_site_config(config).site
        name, policy, state = about.id, config.parent / about.policy, config.parent / about.state
    return SiteFiles(name=name, policy=policy, state=state)


def load_site_config(path: Path) -> SiteConfig:
    """The site.toml at `path`, or a ConfigError."""
    return load(SiteConfig, path)
