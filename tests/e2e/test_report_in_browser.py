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


def opened(path: Path, profile: Path) -> tuple[str, str]:
    """The document after its scripts have run, and what the browser logged."""
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
            # Any name that the page looked up would be an error of the console.
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr",
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
    return re.sub(r"<script>.*?</script>", "", page, flags=re.S), done.stderr.decode("utf-8", "replace")


def dom_of(path: Path, profile: Path) -> str:
    return opened(path, profile)[0]


def charts(dom: str) -> dict[str, str]:
    """What was drawn, by the id of the chart."""
    parts = re.split(r'<div class="chart[^>]*? id="([^"]+)"', dom)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_chart_is_drawn(tmp_path):
    """plotly draws all nine charts from the file alone, under the page's own security policy."""
    path = write_report(read_results(HOSPITALS), tmp_path, "html")

    dom, log = opened(path, tmp_path / "profile")
    drawn = charts(dom)

    assert list(drawn) == [
        "by-site",
        "precision-recall",
        "roc",
        "against-epsilon",
        "recall-at",
        "calibration-before",
        "calibration-after",
        "epsilon-by-round",
        "time-line",
    ]
    assert all('class="main-svg"' in chart for chart in drawn.values())
    assert drawn["by-site"].count('class="trace bars"') == 4
    assert drawn["recall-at"].count('class="trace bars"') == 4
    assert [drawn[name].count('class="trace scatter') for name in ("precision-recall", "roc")] == [4, 5]
    assert "100&nbsp;%" in drawn["roc"]
    assert "fill: rgb(31, 91, 158)" in drawn["by-site"]
    assert "CONSOLE" not in log
    assert "net::" not in log


def test_console_error_would_be_seen(tmp_path):
    """The log that the test above searches holds what a page says and what it fails to load."""
    page = tmp_path / "page.html"
    page.write_text("<script>console.error('amiss')</script><img src='https://bank.example/a.png'>")

    _, log = opened(page, tmp_path / "profile")

    assert "CONSOLE" in log
    assert "amiss" in log


def test_hostile_name_is_drawn_as_text(tmp_path):
    """A site called like a tag is an axis label in the chart, and no script ran."""
    evil = "<script>document.title=1</script><a href=x>b</a>"
    text = HOSPITALS.read_text(encoding="utf-8").replace("long-beach", evil)
    path = write_report(Results.model_validate_json(text), tmp_path, "html")

    dom = dom_of(path, tmp_path / "profile")

    assert "<title>heart-disease-2026" in dom
    assert "&lt;script&gt;document.title" in charts(dom)["by-site"].split("</svg>")[0]
    assert not re.search(r"<a [^>]*href=\W*x", dom)
