"""`python -m lepton_fl` is `lepton-fl`."""

from lepton_fl.cli import main

main()
