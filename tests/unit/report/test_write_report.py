from __future__ import annotations

from pathlib import Path

import pytest

from lepton_fl import results as results_module
from lepton_fl.report import write_report
from lepton_fl.results import read_results

SCHEMA = Path(__file__).parents[3] / "docs" / "results.schema.json"


@pytest.mark.parametrize("fmt", ["html", "json", "md"])
def test_report_is_written_under_its_format(hospitals, tmp_path, fmt):
    """One file, report.FORMAT, and no temporary left beside it."""
    path = write_report(hospitals, tmp_path, fmt)

    assert path == tmp_path / f"report.{fmt}"
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_size > 0


def test_json_round_trips(hospitals, tmp_path):
    """report.json read again is the same results."""
    assert read_results(write_report(hospitals, tmp_path, "json")) == hospitals


def test_schema_in_the_docs_is_current():
    """docs/results.schema.json is what the models say."""
    assert SCHEMA.read_text(encoding="utf-8") == results_module.schema()
