"""lepton_fl: one model trained on every institution's records, with no record shown to anyone."""

import os

__version__ = "0.1.0"

# Here, before any module can import flwr: it reads these at import time and would call out, install
# packages at run time and look for updates. A site's agent talks to its server and to nobody else.
for _name, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_name, _value)
