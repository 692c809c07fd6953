"""Who is let in, by certificate: each is wrong in one thing, and is refused within one call or one look."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import socket
import ssl
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from fleet_harness import (
    LARGE,
    PARTY,
    Consortium,
    Credentials,
    Front,
    Puppet,
    channel,
    make_study,
    once,
    request,
    sites_at,
    until,
)

from lepton_fl.errors import IdentityRefused
from lepton_fl.fleet.agent.agent import Agent
from lepton_fl.fleet.pki import certificates
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.methods import renew_method
from lepton_fl.messages import TRAIN
from lepton_fl.site import client_app

DAY = dt.timedelta(days=1)
Maker = Callable[[Consortium], Credentials | None]


def _revoked(consortium: Consortium) -> Credentials:
    name = f"revoked-{id(object())}"
    credentials = consortium.enrol(name)
    consortium.revoke(name)
    return credentials


MATRIX: dict[str, Maker] = {
    "none": lambda _: None,
    "another authority's": lambda c: c.forge("bank", signed_by="another"),
    "self-signed": lambda c: c.forge("bank", signed_by="itself"),
    "expired": lambda c: c.forge("bank", start=-2 * DAY, end=-DAY),
    "of the day after tomorrow": lambda c: c.forge("bank", start=2 * DAY, end=3 * DAY),
    "without extended key usage": lambda c: c.forge("bank", usage=None),
    "a server's": lambda c: c.forge("bank", usage=ExtendedKeyUsageOID.SERVER_AUTH),
    "an authority's": lambda c: c.forge("bank", ca=True),
    "naming no site": lambda c: c.forge("bank", uri="https://bank.example"),
    "naming another site than it was issued to": lambda c: c.forge("bank", uri="lepton-fl://site/clinic"),
    "never issued": lambda c: c.forge("unheard-of"),
    "revoked": _revoked,
}


@pytest.mark.parametrize("made", MATRIX.values(), ids=MATRIX)
def test_who_has_no_good_certificate_is_refused(consortium: Consortium, tmp_path: Path, made: Maker) -> None:
    """Neither a stream nor a renewal; no session comes of it, and an enrolled site is let in beside it."""

    async def main() -> None:
        credentials = made(consortium)
        async with (
            Front(consortium, tmp_path) as front,
            Puppet(consortium, "bank", front.port) as good,
            channel(consortium, credentials, front.port) as wire,
            Puppet(consortium, "bank", front.port, wire=wire) as stranger,
        ):
            await good.hello()
            csr = certificates.make_csr(certificates.new_key())
            with pytest.raises(grpc.aio.AioRpcError) as renewal:
                await renew_method(wire)(pb.RenewRequest(csr=csr), timeout=20.0)
            with pytest.raises((EOFError, grpc.aio.AioRpcError)):
                await stranger.hello()

            assert renewal.value.code() in (
                grpc.StatusCode.UNAVAILABLE,  # TLS itself has refused it.
                grpc.StatusCode.UNAUTHENTICATED,
            )
            assert all(said.goodbye.code == pb.Goodbye.REFUSED for said in stranger.heard)
            assert front.connected("bank")()

    once(main)


def test_a_stream_ends_when_its_certificate_expires(consortium: Consortium, tmp_path: Path) -> None:
    """gRPC goes on serving; the server looks again, and says why it stops."""

    async def main() -> None:
        credentials = consortium.forge("bank", end=dt.timedelta(seconds=2))
        async with (
            Front(consortium, tmp_path) as front,
            Puppet(consortium, "bank", front.port, credentials=credentials) as bank,
        ):
            await bank.hello()
            goodbye = await bank.farewell()
            await until(front.connected())

            assert goodbye.code == pb.Goodbye.REFUSED
            assert "expired" in goodbye.reason

    once(main)


def test_a_stream_ends_when_its_site_is_revoked(consortium: Consortium, tmp_path: Path) -> None:
    """What it says from then on counts for nothing, and the certificate opens nothing any more."""

    async def main() -> None:
        name = "revoked-in-mid-stream"
        credentials = consortium.enrol(name)
        async with (
            Front(consortium, tmp_path) as front,
            Puppet(consortium, name, front.port, credentials=credentials) as site,
            Puppet(consortium, name, front.port, credentials=credentials) as again,
        ):
            await site.hello()
            consortium.revoke(name)
            front.gate.changed()
            goodbye = await site.farewell()
            with pytest.raises(EOFError):
                await again.hello()
            await until(front.connected())

            assert goodbye.code == again.heard[0].goodbye.code == pb.Goodbye.REFUSED
            assert "revoked" in goodbye.reason

    once(main)


def test_who_does_not_listen_is_cut_off_when_it_is_revoked(consortium: Consortium, tmp_path: Path) -> None:
    """It cannot hear a goodbye: it is disconnected, its answer is not taken, and nobody waits for it."""

    async def main() -> None:
        name, exchange = "revoked-and-deaf", bytes(range(16))
        credentials = consortium.enrol(name)
        study = make_study(model=LARGE)
        async with (
            Front(consortium, tmp_path) as front,
            Puppet(consortium, name, front.port, credentials=credentials) as deaf,
        ):
            party = (await deaf.hello()).party
            PARTY[name] = party
            ended = front.ask(name, request(study, TRAIN, number=1), exchange=exchange)
            # Four chunks that are never read: more than a connection buffers.
            await deaf.say(accept=pb.Accept(exchange=exchange))
            await deaf.say(heartbeat=pb.Heartbeat(state="asked"))
            await until(lambda: front.hub.sessions[party].state == "asked")
            session = front.hub.sessions[party]
            consortium.revoke(name)
            front.gate.changed()
            await until(lambda: session.over)
            with contextlib.suppress(grpc.aio.AioRpcError):
                await deaf.say(result=pb.Result(exchange=exchange, error_code=1, error_reason="too late"))
            await until(lambda: front.streams == 0)

            assert (await ended).lost
            assert front.connected()()

    once(main)


def test_nothing_but_modern_tls_is_spoken(consortium: Consortium, tmp_path: Path) -> None:
    """1.1 is refused; of 1.2, suites without forward secrecy or without authenticated encryption are."""

    def attempt(port: int, version: ssl.TLSVersion, ciphers: str) -> str:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = version
        context.set_ciphers(ciphers)
        context.load_cert_chain(pair)
        try:
            with (
                socket.create_connection(("127.0.0.1", port), timeout=10.0) as raw,
                context.wrap_socket(raw, server_hostname="localhost") as wrapped,
            ):
                return wrapped.version() or ""
        except (ssl.SSLError, ConnectionError):
            return "refused"

    bank, pair = consortium.site("bank"), tmp_path / "bank.pem"
    pair.write_bytes(bank.key + bank.certificate)

    async def main() -> None:
        async with Front(consortium, tmp_path) as front:
            tried = [
                await asyncio.to_thread(attempt, front.port, version, ciphers)
                for version, ciphers in (
                    (ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0"),
                    (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES128-SHA:ECDHE-ECDSA-AES128-SHA256"),
                    (ssl.TLSVersion.TLSv1_2, "AES128-GCM-SHA256:AES128-SHA"),
                    (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES128-GCM-SHA256"),
                    (ssl.TLSVersion.TLSv1_3, "ALL"),
                )
            ]

        assert tried == ["refused", "refused", "refused", "TLSv1.2", "TLSv1.3"]

    once(main)


@pytest.mark.parametrize("days", [-2, 2])
def test_an_agent_whose_clock_is_two_days_off_ends_and_says_so(
    consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """The server's time is in its first word; the agent names both times and does not try again."""
    clock = SimpleNamespace(time=lambda: time.time() + days * 86_400, monotonic=time.monotonic)
    monkeypatch.setattr("lepton_fl.fleet.agent.peer.time", clock)

    async def main() -> None:
        with sites_at(tmp_path / "sites", ("bank",)) as sites:
            async with Front(consortium, tmp_path / "server") as front:
                agent = Agent(
                    client_app(sites["bank"]),
                    lambda: channel(consortium, consortium.site("bank"), front.port),
                    tmp_path / "state",
                    insecure_seed=True,
                )
                with pytest.raises(IdentityRefused, match=r"this machine's clock says .* the server's says"):
                    await agent.run()

    once(main)
