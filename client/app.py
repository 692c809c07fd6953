"""The Flower ClientApp of this deployment folder.

`[tool.flwr.app.components] clientapp = "client.app:app"` of a Flower app points here. The site's own
configuration is named by the environment variable LEPTON_FL_SITE, which is the institution's to set: no
message and no run config can. Without it, or without a policy or a ledger, this module fails to load, so
that the node answers nothing.
"""

import os
from pathlib import Path

from lepton_fl.errors import ConfigError
from lepton_fl.site import client_app, open_site

if "LEPTON_FL_SITE" not in os.environ:
    raise ConfigError("LEPTON_FL_SITE is not set", fix="export LEPTON_FL_SITE=/etc/lepton-fl/site.toml")

app = client_app(open_site(Path(os.environ["LEPTON_FL_SITE"])))
