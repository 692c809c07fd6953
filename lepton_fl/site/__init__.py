"""The institution's side of a run: its policy, its ledger and its data, round Flower's ClientApp."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lepton_fl.site.app import SiteApp, client_app
    from lepton_fl.site.config import SiteConfig
    from lepton_fl.site.deployed import open_site
    from lepton_fl.site.policy import Policy
    from lepton_fl.site.site import Deployed, Simulated, Site, SiteData, StockFlower, Surroundings

# Loaded when first used: a command that only reads site.toml must not wait for torch, Flower and Opacus.
_HOME = {
    "Deployed": "site",
    "Policy": "policy",
    "Simulated": "site",
    "Site": "site",
    "SiteApp": "app",
    "SiteConfig": "config",
    "SiteData": "site",
    "StockFlower": "site",
    "Surroundings": "site",
    "client_app": "app",
    "open_site": "deployed",
}

__all__ = [
    "Deployed",
    "Policy",
    "Simulated",
    "Site",
    "SiteApp",
    "SiteConfig",
    "SiteData",
    "StockFlower",
    "Surroundings",
    "client_app",
    "open_site",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
