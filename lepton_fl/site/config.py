"""site.toml: what the institution's IT owns. Speed, places and names; nothing that changes a promise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from lepton_fl.config import Strict, load, read_toml
from lepton_fl.study import Name


class _About(Strict):
    id: Name
    policy: str = "policy.toml"
    """The privacy officer's file; relative to site.toml."""
    state: str = "state"
    """Folder of the ledger and of what never leaves; relative to site.toml."""


class _Source(Strict):
    source: str
    """The table, a CSV file; relative to site.toml."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    columns: dict[str, str] = {}
    """The study's name of a column to the institution's own header, where they differ."""


class _Runtime(Strict):
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Two threads on small matrices cost more than one."""


class SiteConfig(Strict):
    """One institution's agent."""

    site: _About
    data: _Source
    runtime: _Runtime = _Runtime()


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFiles:
    """Where one institution's own files are."""

    name: str
    policy: Path
    ledger: Path
    approvals: Path
    split_key: Path


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
    return SiteFiles(
        name=name,
        policy=policy,
        ledger=state / "ledger.db",
        approvals=state / "approvals.jsonl",
        split_key=state / "split.key",
    )


def load_site_config(path: Path) -> SiteConfig:
    """The site.toml at `path`, or a ConfigError."""
    return load(SiteConfig, path)
