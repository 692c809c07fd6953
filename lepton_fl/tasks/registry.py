"""Built-in and installed plug-ins, one table for each kind.

A plug-in is a Python package that the institution installed on purpose; nothing is ever loaded from a
message. Its name in a study selects among what is installed, and policy.toml may still refuse it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import TypeVar

from lepton_fl.errors import ConfigError

T = TypeVar("T")


def registered(group: str, builtin: dict[str, T], kind: type[T]) -> dict[str, T]:
    """`builtin` and the objects of type `kind` under entry point group `group`, by name.

    Raises:
        ConfigError: a plug-in takes a built-in name, cannot be imported, or is of another type.
    """
    found = dict(builtin)
    for point in _installed(entry_points, group):
        if point.name in builtin:
            raise ConfigError(f"plug-in {point.value!r}: the name {point.name!r} is built in")
        try:
            plugin = point.load()
        except Exception as error:  # noqa: BLE001 - whatever a plug-in raises, it is named
            raise ConfigError(f"plug-in {point.value!r} ({group}) cannot be loaded: {error}") from None
        if not isinstance(plugin, kind):
            raise ConfigError(f"plug-in {point.value!r} ({group}) is no {kind.__name__}")
        found[point.name] = plugin
    return found


@lru_cache(maxsize=8)
def _installed(find: Callable[..., EntryPoints], group: str) -> tuple[EntryPoint, ...]:
    """Looked up once a process: it opens the metadata of every package that is installed."""
    return tuple(find(group=group))
