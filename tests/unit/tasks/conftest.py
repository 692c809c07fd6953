"""Plug-ins without installing them: entry points that this process believes in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from lepton_fl.tasks import registry


@dataclass
class Point:
    """An entry point; an exception stands for a plug-in that cannot be imported."""

    name: str
    plugin: Any

    @property
    def value(self) -> str:
        return f"a_package:{self.name}"

    def load(self) -> Any:
        if isinstance(self.plugin, Exception):
            raise self.plugin
        return self.plugin


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`install("lepton_fl.models", name=object)`."""

    def run(into: str, **plugins: Any) -> None:
        points = [Point(name, plugin) for name, plugin in plugins.items()]
        monkeypatch.setattr(registry, "entry_points", lambda *, group: points if group == into else [])

    return run
