"""The institution's side of a run: its policy, its ledger and its data, round Flower's ClientApp."""

from lepton_fl.site.app import SiteApp, client_app
from lepton_fl.site.config import SiteConfig
from lepton_fl.site.deployed import open_site
from lepton_fl.site.policy import Policy
from lepton_fl.site.site import Deployed, Simulated, Site, SiteData, StockFlower, Surroundings

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
