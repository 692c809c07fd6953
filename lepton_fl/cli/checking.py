"""What `data check` prints."""

from __future__ import annotations

from lepton_fl.cli.terminal import print_table
from lepton_fl.data import CheckReport


def show_check(found: CheckReport) -> None:
    """A row of counts for each column; never a value."""
    rows = [
        (
            c.column,
            c.role,
            str(c.cells),
            str(c.missing),
            str(c.unreadable + c.infinite),
            str(c.out_of_range),
            str(c.out_of_vocabulary),
            "looks like an identifier" if c.distinct_ratio_flag else "",
        )
        for c in found.columns
    ]
    print_table(
        f"{found.source}: {found.rows} rows, {found.units} units, {found.positives} positive",
        ("column", "role", "cells", "missing", "not numbers", "out of range", "unknown code", ""),
        rows,
        right=(2, 3, 4, 5, 6),
    )
