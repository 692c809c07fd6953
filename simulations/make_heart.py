"""Write lepton_fl/data/bundled/heart.csv from the four processed files of UCI Heart Disease.

    python simulations/make_heart.py FOLDER lepton_fl/data/bundled/heart.csv

FOLDER holds processed.{cleveland,hungarian,switzerland,va}.data as UCI publishes them
(https://doi.org/10.24432/C52P4X). Same input, same bytes. The changes made to the original are
listed in lepton_fl/data/bundled/ATTRIBUTION.md.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

HOSPITALS = {
    "cleveland": "cleveland",
    "hungarian": "hungary",
    "switzerland": "switzerland",
    "va": "long-beach",
}
MEASURES = (
    *("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg"),
    *("thalach", "exang", "oldpeak", "slope", "ca", "thal"),
)
NOT_MEASURED_AS_ZERO = {"trestbps", "chol"}
"""Nobody alive has a blood pressure or cholesterol of 0: the original means not measured."""


def cell(name: str, text: str) -> str:
    """A measure as it is written in heart.csv: empty if missing, 63 for 63.0, 0.7 for .7."""
    if text.strip() == "?":
        return ""
    value = float(text)
    if value == 0 and name in NOT_MEASURED_AS_ZERO:
        return ""
    return str(int(value)) if value.is_integer() else repr(value)


def main(source: Path, target: Path) -> None:
    """Write the 920 rows, hospital by hospital, in the order of the original files."""
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["hospital", *MEASURES, "disease"])
        for stem, hospital in HOSPITALS.items():
            text = (source / f"processed.{stem}.data").read_text(encoding="ascii")
            for *measures, num in csv.reader(text.splitlines()):
                cells = [cell(n, m) for n, m in zip(MEASURES, measures, strict=True)]
                writer.writerow([hospital, *cells, int(float(num) > 0)])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
