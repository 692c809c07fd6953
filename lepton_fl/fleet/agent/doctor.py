"""`lepton-fl client doctor`: what stands between this site and its first round, one line each.

Nothing is changed, no record is shown, and a running agent is not disturbed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypeVar

import grpc.aio

from lepton_fl import __version__
from lepton_fl.data import Contract
from lepton_fl.data.sources import CsvFile, ParquetFile, open_batches
from lepton_fl.errors import ConfigError, ConnectionFailed, LeptonError
from lepton_fl.fleet.agent.member import EnrolledSite
from lepton_fl.fleet.agent.offers import offers_of
from lepton_fl.fleet.agent.peer import check_clock, check_release, explain, obey
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.methods import PROTOCOL, connect_method
from lepton_fl.privacy import Ledger
from lepton_fl.privacy.ledger.chain import Custody
from lepton_fl.secure_rounds import what_hides
from lepton_fl.site.config import SiteConfig, SiteFiles, files_of, load_site_config
from lepton_fl.site.history import DiskHistory, check_history
from lepton_fl.site.policy import load_policy
from lepton_fl.training.bookkeeping import tried_on
from lepton_fl.training.device import choose_device

PATIENCE_S = 10.0
DISK_LEAST, DISK_WARN = 256 << 20, 2 << 30
CLOCK_WARN_S = 60.0
_PACKAGES = ("torch", "opacus", "flwr", "grpcio", "cryptography")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    about: str
    verdict: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""
    exit_code: int = 0
    """3: configuration; 5: identity or connection; 0: not failed."""

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def examine(site_toml: Path) -> list[Check]:
    """Look at everything that the agent of this site.toml needs, in the order in which it needs it."""
    return list(_examine(site_toml))


def _examine(site_toml: Path) -> Iterator[Check]:
    config, failed = _try("site.toml", lambda: load_site_config(site_toml))
    if config is None:
        yield from failed
        return
    files = files_of(site_toml)
    yield _ok("site.toml", f"{site_toml}: site {config.site.id}")
    yield _checked("policy", lambda: _policy(files))
    yield _checked("state folder", lambda: _state(files))
    yield _checked("ledger", lambda: _ledger(files))
    yield _checked("rounds", lambda: _history(files))
    member, failed = _try("identity", lambda: EnrolledSite.load(site_toml))
    yield from failed
    if member is not None:
        yield _ok("identity", f"{member.identity.site}, party {member.identity.party}, keys closed to others")
        yield _checked("certificate", lambda: _certificate(member))
        yield from _way(member)
    yield _versions()
    yield _checked("device", lambda: _device(config, site_toml))
    yield from _disk(config, files, site_toml.parent)
    yield _checked("data", lambda: _data(config, site_toml))
    yield from _studies(site_toml)


def _studies(site_toml: Path) -> Iterator[Check]:
    """What this site gets of secure aggregation in each study that it takes part in, or may."""
    for offered in offers_of(site_toml).list():
        if offered.state != "refused":
            yield _ok(f"study {offered.study.study.name}", what_hides(offered.study))


def _try(about: str, action: Callable[[], T]) -> tuple[T | None, list[Check]]:
    """What `action` gives, or the failed check that it is."""
    try:
        return action(), []
    except LeptonError as error:
        code = 3 if error.exit_code == ConfigError.exit_code else 5
        failed = Check(about=about, verdict="fail", found=error.message, fix=error.fix, exit_code=code)
        return None, [failed]


def _checked(about: str, action: Callable[[], Check]) -> Check:
    found, failed = _try(about, action)
    return found or failed[0]


def _ok(about: str, found: str) -> Check:
    return Check(about=about, verdict="ok", found=found)


def _warn(about: str, found: str, fix: str) -> Check:
    return Check(about=about, verdict="warn", found=found, fix=fix)


# Files


def _policy(files: SiteFiles) -> Check:
    policy = load_policy(files.policy)
    mode = stat.S_IMODE(files.policy.stat().st_mode)
    if mode & 0o022:
        return _warn(
            "policy", f"{files.policy}: mode {mode:04o}, others may change it", f"chmod 644 {files.policy}"
        )
    if os.access(files.policy, os.W_OK) and os.geteuid() != 0:
        return _warn(
            "policy",
            f"{files.policy}: the agent's own account may change it",
            "let the privacy officer's account own it",
        )
    require = policy.require
    if not require.secure_aggregation:
        return _warn(
            "policy",
            f"{files.policy}: allows studies in which the server sees each update of this site",
            "set require.secure_aggregation = true",
        )
    return _ok(
        "policy",
        f"{files.policy}: updates leave in sums over at least {require.min_sites} sites only, with at least "
        f"{require.colluders} assumed to collude with the server",
    )


def _state(files: SiteFiles) -> Check:
    if not files.state.exists():
        return _ok("state folder", f"{files.state}: not there yet; the first start makes it, mode 0700")
    mode = stat.S_IMODE(files.state.stat().st_mode)
    if not os.access(files.state, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(f"{files.state}: not this account's", fix=f"chown it to {_account()}")
    if mode & 0o077:
        return _warn("state folder", f"{files.state}: mode {mode:04o}", f"chmod 700 {files.state}")
    return _ok("state folder", f"{files.state}: mode 0700")


def _account() -> str:
    return f"uid {os.geteuid()}"


def _ledger(files: SiteFiles) -> Check:
    if not files.ledger.exists() and Custody(files.ledger).of_a_ledger() is None:
        files.check_ledger()
        return _ok("ledger", f"{files.ledger}: none yet; the first start makes it")
    policy = load_policy(files.policy)
    ledger = Ledger(files.ledger)
    try:
        spent = ledger.spent(policy.data.id, policy.budget.delta_total)
        entries = ledger.head().counter
    finally:
        ledger.close()
    total, delta = policy.budget.epsilon_total, policy.budget.delta_total
    units = ", ".join(policy.require.privacy_units)
    found = (
        f"{files.ledger}: {entries} entries verified, epsilon {spent:.3f} of {total:g} spent at delta "
        f"{delta:g}, per unit ({units})"
    )
    return _ok("ledger", found)


def _history(files: SiteFiles) -> Check:
    check_history(files)
    if not files.history.exists():
        return _ok("rounds", f"{files.history}: none yet; the first start makes it")
    DiskHistory(files.history).close()
    return _ok("rounds", f"{files.history}: the secure rounds that this site was in, whole")


# Identity and the way to the server


def _certificate(member: EnrolledSite) -> Check:
    now = datetime.now(UTC)
    member.identity.certificate.check_time(now)
    until = member.identity.certificate.not_after
    found = f"good until {until:%Y-%m-%d %H:%M} UTC, {(until - now).days} days"
    if member.renewal_due():
        return _warn(
            "certificate", f"{found}; to be renewed", "lepton-fl client start -c site.toml renews it"
        )
    return _ok("certificate", found)


def _way(member: EnrolledSite) -> Iterator[Check]:
    """To the server and back; what comes after the first failure would fail for the same reason."""
    host, _, port = member.address.rpartition(":")
    host = host.strip("[]")
    steps: list[tuple[str, Callable[[], list[Check]]]] = [
        ("DNS", lambda: [_resolve(host)]),
        ("TCP", lambda: [_reach(host, int(port))]),
        ("TLS", lambda: _welcome(member)),
    ]
    for about, step in steps:
        found, failed = _try(about, step)
        yield from found or failed
        if failed:
            return


def _resolve(host: str) -> Check:
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise ConnectionFailed(
            f"{host}: cannot be resolved: {error.strerror}", fix="check [server] address in site.toml"
        ) from None
    return _ok("DNS", f"{host} is {', '.join(sorted(found))}")


def _reach(host: str, port: int) -> Check:
    try:
        socket.create_connection((host, port), timeout=PATIENCE_S).close()
    except OSError as error:
        raise ConnectionFailed(
            f"{host}:{port}: cannot be reached: {error.strerror or error}",
            fix="on the server: lepton-fl server start -c server.toml; else ask who runs the firewall",
        ) from None
    return _ok("TCP", f"{host}:{port} answers")


def _welcome(member: EnrolledSite) -> list[Check]:
    try:
        welcome = asyncio.run(asyncio.wait_for(_probe(member), PATIENCE_S))
    except TimeoutError:
        raise ConnectionFailed(f"{member.address}: no answer within {PATIENCE_S:.0f} s") from None
    tls = _ok("TLS", f"{member.address} proves to be this consortium's, and lets this site in")
    return [tls, _checked("clock", lambda: _clock(welcome)), _checked("release", lambda: _release(welcome))]


async def _probe(member: EnrolledSite) -> pb.Welcome:
    """The server's welcome, for one who asks for no more: an agent that is connected stays so."""
    hello = pb.Hello(
        protocol=PROTOCOL,
        release=__version__,
        site=member.identity.site,
        instance=os.urandom(16),
        probe=True,
    )
    async with member.connect() as channel:
        stream = connect_method(channel)()
        try:
            with contextlib.suppress(grpc.aio.AioRpcError):
                # Refused before it was read, perhaps: what the server said is there all the same.
                await stream.write(pb.FromAgent(hello=hello))
            async for message in stream:
                if message.HasField("welcome"):
                    return message.welcome
                if message.HasField("goodbye"):
                    obey(message.goodbye)
        except grpc.aio.AioRpcError as error:
            raise ConnectionFailed(f"{member.address}: {explain(error)}") from None
        finally:
            stream.cancel()
    raise ConnectionFailed(f"{member.address}: ended the connection without a word")


def _clock(welcome: pb.Welcome) -> Check:
    if not welcome.time:
        return _warn("clock", "the server does not tell its time", "")
    offset = check_clock(welcome.time)
    found = f"{abs(offset):.0f} s {'behind' if offset > 0 else 'ahead of'} the server's"
    if abs(offset) > CLOCK_WARN_S:
        return _warn("clock", found, "set the clock of both machines")
    return _ok("clock", found)


def _release(welcome: pb.Welcome) -> Check:
    check_release(welcome.release)
    return _ok("release", f"the server runs lepton_fl {welcome.release}, this site {__version__}")


# The machine


def _versions() -> Check:
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return _ok("versions", f"lepton_fl {__version__}, Python {platform.python_version()}, {packages}")


def _device(config: SiteConfig, site_toml: Path) -> Check:
    device = choose_device(config.runtime.device, file=str(site_toml))
    return _ok("device", f"{device.said}; {tried_on(device.torch)}")


def _disk(config: SiteConfig, files: SiteFiles, home: Path) -> Iterator[Check]:
    folders = {"disk (state)": files.state, "disk (scratch)": config.room(home).folder or files.state}
    for about, folder in folders.items():
        there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        free = shutil.disk_usage(there).free
        found = f"{folder}: {free / (1 << 30):.1f} GiB free"
        fix = "make room, or name another folder in site.toml"
        if free < DISK_LEAST:
            yield Check(about=about, verdict="fail", found=found, fix=fix, exit_code=3)
        else:
            yield _ok(about, found) if free >= DISK_WARN else _warn(about, found, fix)


def _data(config: SiteConfig, site_toml: Path) -> Check:
    """That the table opens; where a study is offered, that it has the study's columns. No cell is shown."""
    source = config.data.at(site_toml.parent)
    offered = offers_of(site_toml).list()
    if not offered:
        if isinstance(source, CsvFile | ParquetFile):
            _can_read(source.path)
        return _ok("data", f"{source}: columns are checked once a study is offered")
    study = offered[0].study
    rows = open_batches(source, Contract.of(study), columns=config.data.columns, batch_rows=1)
    next(rows, None)
    return _ok("data", f"{source}: has the columns of {study.study.name}")


def _can_read(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}", fix="set [data] source in site.toml"
        ) from None
