"""site.toml: what the institution's IT owns. Speed, places and names; nothing that changes a promise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from lepton_fl.config import Strict, load
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


def load_site_config(path: Path) -> SiteConfig:
    """The site.toml at `path`, or a ConfigError."""
    return load(SiteConfig, path)
