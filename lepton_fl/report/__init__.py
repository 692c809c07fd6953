"""The report of a run: one offline HTML file, JSON, or Markdown for an issue tracker."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lepton_fl.files import write_atomic
from lepton_fl.report.html import render_html
from lepton_fl.report.text import render_markdown
from lepton_fl.results import Results, write_results

__all__ = ["Format", "render_html", "render_markdown", "write_report"]

Format = Literal["html", "json", "md"]


def write_report(results: Results, folder: Path, fmt: Format) -> Path:
    """Write report.html, report.json or report.md into `folder`, and return its path.

    Atomic: whoever has the old report open sees the old one or the whole new one.
    """
    path = folder / f"report.{fmt}"
    match fmt:
        case "html":
            write_atomic(path, render_html(results).encode("utf-8"))
        case "md":
            write_atomic(path, render_markdown(results).encode("utf-8"))
        case "json":
            write_results(results, path)
    return path
