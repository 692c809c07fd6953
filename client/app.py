"""The Flower ClientApp of this deployment folder.

The site's own configuration is named by the environment variable LEPTON_FL_SITE, which is the institution's
to set: no message and no run config can. Without it, or without a policy or a ledger, there is no app.
"""

import os
from pathlib import Path

from lepton_fl.errors import ConfigError
from lepton_fl.site import Deployed, SiteApp, client_app, open_site


def app() -> SiteApp[Deployed]:
    """The agent's app, made by the process that the institution started.

    A function, so that stock Flower cannot load it: there the app comes from the server, and a site's own
    table must not be within its reach.
    """
    if "LEPTON_FL_SITE" not in os.environ:
        raise ConfigError("LEPTON_FL_SITE is not set", fix="export LEPTON_FL_SITE=/etc/lepton-fl/site.toml")
    return client_app(open_site(Path(os.environ["LEPTON_FL_SITE"])))
