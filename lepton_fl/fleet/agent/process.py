"""`lepton-fl client start`: the one warm process of a site, from its files to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lepton_fl.errors import ConfigError
from lepton_fl.files import lock
from lepton_fl.fleet.agent.agent import Agent
from lepton_fl.fleet.agent.local import LOCK, serve, socket_path
from lepton_fl.fleet.agent.member import EnrolledSite
from lepton_fl.fleet.agent.offers import Offered, offers_of
from lepton_fl.fleet.logs import log_to
from lepton_fl.secagg.context import History
from lepton_fl.site import Site, Surroundings, client_app, open_site
from lepton_fl.site.config import SiteConfig, SiteFiles, files_of, load_site_config
from lepton_fl.site.history import open_history
from lepton_fl.site.secure import Membership
from lepton_fl.training.device import Device, choose_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """What stands fast before the first attempt to connect, to be shown."""

    config: SiteConfig
    files: SiteFiles
    member: EnrolledSite
    site: Site[Surroundings]
    offered: Sequence[Offered]
    """The studies that the server offered before."""
    device: Device


def start(
    site_toml: Path,
    *,
    show: Callable[[Started], None],
    give_up_after: float | None = None,
    opened: Callable[[Path, Membership], Site[Surroundings]] = open_site,
    insecure_seed: bool = False,
) -> None:
    """Run the agent of the institution at `site_toml` until it is told to stop.

    Guarantee: without a policy, a ledger, a memory of rounds and the keys of an enrolled site nothing is
    started.

    Args:
        site_toml: The institution's site.toml.
        show: Called once all files are read, before the first attempt to connect.
        give_up_after: Seconds without a connection after which to end; None for never.
        opened: Opens the site, as this member; a demonstration's noise comes from elsewhere.
        insecure_seed: It does, from a known seed: the server is told.

    Raises:
        ConfigError: a file is missing or not acceptable, or another agent has the state folder.
        IdentityRefused: the site is not enrolled, its certificate is not in force, or the server refuses it.
        ConnectionFailed: no connection for `give_up_after` seconds.
        ProtocolError: the server's release does not understand this one's.
    """
    with _held(site_toml) as (config, files, device), contextlib.ExitStack() as stack:
        member = EnrolledSite.load(site_toml)
        history = stack.enter_context(contextlib.closing(open_history(files)))
        site = opened(site_toml, membership_of(member, history))
        stack.callback(site.ledger.close)
        agent = Agent(
            client_app(site),
            member.connect,
            files.state,
            device=site.device.type,
            insecure_seed=insecure_seed,
            member=member,
            give_up_after=give_up_after,
        )
        offered = offers_of(site_toml).list()
        show(Started(config=config, files=files, member=member, site=site, offered=offered, device=device))
        log_to(None if config.runtime.log is None else site_toml.parent / config.runtime.log)
        asyncio.run(_run(agent, member, files.state))


def membership_of(member: EnrolledSite, history: History) -> Membership:
    """Who this site is in a secure round."""
    identity = member.identity
    return Membership(
        name=identity.site,
        party=identity.party,
        identity=identity.identity_key,
        certificate=identity.identity_certificate.signed,
        consortium=member.consortium,
        history=history,
    )


@contextmanager
def _held(site_toml: Path) -> Iterator[tuple[SiteConfig, SiteFiles, Device]]:
    """The site's files, its state folder ours alone."""
    config, files = load_site_config(site_toml), files_of(site_toml)
    device = choose_device(config.runtime.device, file=str(site_toml))
    with own_state(files.state):
        files.check_ledger()
        yield config, files, device


async def _run(agent: Agent, member: EnrolledSite, state: Path) -> None:
    """One agent with its local socket, until `client stop`, SIGTERM or SIGINT."""

    def do(action: Callable[[], None]) -> Callable[[], dict[str, object]]:
        def command() -> dict[str, object]:
            action()
            return status()

        return command

    def status() -> dict[str, object]:
        certificate = member.identity.certificate
        return {
            **agent.status(),
            "server": member.address,
            "certificate_until": certificate.not_after.isoformat(timespec="seconds"),
        }

    loop = asyncio.get_running_loop()

    def end() -> None:
        agent.stop()
        for number in (signal.SIGINT, signal.SIGTERM):
            # A second one ends at once: what is charged and what is kept is on disk.
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    commands = {
        "status": status,
        "pause": do(agent.pause),
        "resume": do(agent.resume),
        "stop": do(agent.stop),
    }
    async with serve(state, commands):
        await agent.run()


@contextmanager
def own_state(folder: Path) -> Iterator[None]:
    """The folder, mode 0700, for this process alone while the block runs.

    Raises:
        ConfigError: it cannot be made or closed to others, or another agent has it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
        socket_path(folder)
        handle = lock(folder / LOCK)
    except OSError as error:
        raise ConfigError(
            f"{folder}: the agent's folder cannot be used: {error.strerror}",
            fix="make it the agent's own: chown it to the account that runs the agent",
        ) from None
    if handle is None:
        raise ConfigError(
            f"{folder}: another agent runs here", fix="lepton-fl client stop -c site.toml, or use that one"
        )
    try:
        yield
    finally:
        os.close(handle)
