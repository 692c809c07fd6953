"""What is deployed from server/ and client/ is what this release reads."""

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lepton_fl.cli.texts import policy_text
from lepton_fl.fleet.server.config import load_server
from lepton_fl.site.config import load_site_config
from lepton_fl.site.policy import load_policy

ROOT = Path(__file__).parents[2]
UNITS = {"server": "lepton-fl-server.service", "client": "lepton-fl-client.service"}


def test_the_example_of_a_server_is_read_whole():
    """State and keys where the unit may write, and nothing of a demonstration."""
    files = load_server(ROOT / "server/server.toml")

    assert files.state.is_relative_to("/var/lib/lepton-fl")
    assert files.pki.is_relative_to("/var/lib/lepton-fl")
    assert not files.config.server.insecure_demo


def test_the_examples_of_a_site_are_read_whole():
    """Its policy is as strict as the one that `init` writes: the same keys, approval by a person."""
    site, policy = load_site_config(ROOT / "client/site.toml"), load_policy(ROOT / "client/policy.toml")

    assert Path(site.site.state).is_relative_to("/var/lib/lepton-fl")
    assert Path(site.server.pki).is_relative_to("/var/lib/lepton-fl")
    assert policy.require.approval == "manual"
    assert policy.release.metrics == "none"
    assert keys((ROOT / "client/policy.toml").read_text()) == keys(
        policy_text(
            data_id="x",
            epsilon_total=1.0,
            epsilon_per_study=1.0,
            delta_total=1e-5,
            privacy_unit="record",
            min_rows=1,
            min_positives=1,
            approval="manual",
        )
    )


def keys(toml):
    return re.findall(r"(?m)^(\w+) = ", toml)


@pytest.mark.parametrize("folder", UNITS)
def test_a_unit_is_closed_and_gives_up_where_a_person_must_look(folder):
    """Not restarted for ever against a configuration that is wrong."""
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str
    unit.read(ROOT / folder / UNITS[folder])
    service = unit["Service"]

    assert service["UMask"] == "0077"
    assert service["ProtectSystem"] == "strict"
    assert service["NoNewPrivileges"] == "yes"
    assert service["LimitCORE"] == "0"
    assert {"2", "3", "4", "7"} <= set(service["RestartPreventExitStatus"].split())
    assert "5" not in service["RestartPreventExitStatus"].split()


@pytest.mark.parametrize("folder", UNITS)
def test_systemd_understands_the_unit(folder, tmp_path):
    """Every key and value; only the program is one that is here."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    text = (ROOT / folder / UNITS[folder]).read_text().replace("/opt/lepton-fl/bin/lepton-fl", sys.executable)
    (tmp_path / UNITS[folder]).write_text(text)

    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / UNITS[folder])],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("folder", UNITS)
def test_an_image_is_made_of_what_is_there_and_holds_no_secret(folder):
    """Named files of the project, an ordinary user, and nothing that could be a key or a table."""
    lines = (ROOT / folder / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line]

    assert sorted(name for names in copied for name in names) == [
        "LICENSE",
        "README.md",
        "constraints.txt",
        "lepton_fl",
        "pyproject.toml",
    ]
    assert all((ROOT / name).exists() for names in copied for name in names)
    assert "USER 10001" in lines
