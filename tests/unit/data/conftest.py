"""A small study and tables on it: three features, a unit, no time column."""

import datetime as dt
import ipaddress
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lepton_fl.config import parse
from lepton_fl.data import Batch, Contract, Table, load_table
from lepton_fl.study import Study

COLUMNS = {
    "age": {"type": "float", "range": [20, 90]},
    "cp": {"type": "category", "vocabulary": [1, 2, 3], "missing": "flag"},
    "chol": {"type": "float", "range": [80, 600], "missing": "flag"},
}

MakeContract = Callable[..., Contract]
Encode = Callable[..., list[float]]


@pytest.fixture
def make_contract() -> MakeContract:
    """The contract of a study with these columns; `privacy` and the rest replace whole tables."""

    def make(columns: Mapping[str, Any] = COLUMNS, **tables: Any) -> Contract:
        raw = {
            "study": {"name": "test"},
            "task": {"kind": "binary", "target": "ill"},
            "privacy": {"noise": "none"},
            "train": {"rounds": 10, "sample_rate": 0.1, "lr": 0.1},
            "features": {"columns": dict(columns)},
        }
        return Contract.of(parse(Study, {**raw, **tables}, file="study.toml"))

    return make


@pytest.fixture
def by_patient() -> dict[str, Any]:
    return {"noise": "none", "unit": "patient"}


@pytest.fixture
def contract(make_contract: MakeContract) -> Contract:
    return make_contract()


@pytest.fixture
def encode(make_contract: MakeContract) -> Encode:
    """Features of the cells of one column, declared as said, one list for each cell."""

    def run(column: Mapping[str, Any], *cells: str) -> Any:
        contract = make_contract({"c": column})
        batch = Batch({"c": cells, "ill": ["0"] * len(cells)})
        return contract.encode(batch).x_BF.tolist()

    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A file with this content."""

    def run(content: str | bytes, name: str = "table.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return run


@pytest.fixture
def make_table(make_contract: MakeContract) -> Callable[..., Table]:
    """A table of labels, with units and times where given; the only feature is the row's number."""

    def run(
        labels: Sequence[int],
        *,
        units: Sequence[object] | None = None,
        times: Sequence[object] | None = None,
    ) -> Table:
        rows = len(labels)
        tables: dict[str, Any] = {}
        number = {"type": "float", "range": [0, max(rows, 1)], "identifier": "allow"}
        cells = {"row": [str(i) for i in range(rows)], "ill": [str(y) for y in labels]}
        if units is not None:
            tables["privacy"] = {"noise": "none", "unit": "patient"}
            cells["patient"] = [str(u) for u in units]
        if times is not None:
            tables["evaluation"] = {"split": "time", "time_column": "seen", "cutoff": 0}
            cells["seen"] = [str(t) for t in times]
        contract = make_contract({"row": number}, **tables)
        return load_table(contract, [Batch(cells)], source="test")

    return run


@pytest.fixture(scope="session")
def write_certificate() -> Callable[[Path, str], tuple[Path, Path]]:
    """A certificate of localhost or 127.0.0.1, signed by itself, and its key: two files in a folder."""

    def run(folder: Path, host: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
        ours = x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host)
        now, day = dt.datetime.now(dt.UTC), dt.timedelta(days=1)
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(x509.SubjectAlternativeName([ours]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        certificate, secret = folder / "server.crt", folder / "server.key"
        certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        secret.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
        secret.chmod(0o600)
        return certificate, secret

    return run
