"""The report in a real browser: does it draw without a network?"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lepton_fl.report import write_report
from lepton_fl.results import Results, read_results

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSPITALS = Path(__file__).parents[1] / "unit" / "report" / "hospitals.json"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine"),
]


def dom_of(path: Path, profile: Path) -> str:
    """The document after its scripts have run."""
    done = subprocess.run(
        [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
            "--virtual-time-budget=10000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        timeout=120,
        check=True,
    )
    page = done.stdout.decode("utf-8")
    # plotly.js mentions its own class names: only what it drew counts.
    return re.sub(r"<script>.*?</script>", "", page, flags=re.S)


def charts(dom: str) -> dict[str, str]:
    """What was drawn, by the id of the chart."""
    parts = re.split(r'<div class="chart[^>]*? id="([^"]+)"', dom)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_chart_is_drawn(tmp_path):
    """plotly draws all four charts from the file alone, under the page's own security policy."""
    path = write_report(read_results(HOSPITALS), tmp_path, "html")

    drawn = charts(dom_of(path, tmp_path / "profile"))

    assert list(drawn) == ["by-site", "against-epsilon", "epsilon-by-round", "time-line"]
    assert all('class="main-svg"' in chart for chart in drawn.values())
    assert drawn["by-site"].count('class="trace bars"') == 4
    assert "fill: rgb(31, 91, 158)" in drawn["by-site"]


def test_hostile_name_is_drawn_as_text(tmp_path):
    """A site called like a tag is an axis label in the chart, and no script ran."""
    evil = "<script>document.title=1</script><a href=x>b</a>"
    text = HOSPITALS.read_text(encoding="utf-8").replace("long-beach", evil)
    path = write_report(Results.model_validate_json(text), tmp_path, "html")

    dom = dom_of(path, tmp_path / "profile")

    assert "<title>heart-disease-2026" in dom
    assert "&lt;script&gt;document.title" in charts(dom)["by-site"].split("</svg>")[0]
    assert not re.search(r"<a [^>]*href=\W*x", dom)
