"""The site as an enrolled member while its agent runs: channels with the certificate of the day, renewal."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from pathlib import Path

import grpc
import grpc.aio

from lepton_fl.errors import ConfigError, ConnectionFailed, IdentityRefused, LeptonError
from lepton_fl.fleet.agent.enrol import AgentIdentity
from lepton_fl.fleet.agent.peer import explain
from lepton_fl.fleet.protocol.methods import OPTIONS, renew_method
from lepton_fl.secagg.context import Consortium
from lepton_fl.site.config import load_site_config

_CALL_S = 20.0
_REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_OPTIONS = [
    *OPTIONS,
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    # The agent has its own patience: gRPC's would keep a new attempt waiting for the last one's.
    ("grpc.use_local_subchannel_pool", 1),
]


class EnrolledSite:
    """What `enroll join` left in the pki folder, kept up to date."""

    def __init__(self, identity: AgentIdentity, address: str) -> None:
        self.identity = identity
        self.address = address
        # The certificate is renewed by the thread that talks, the roster taken by the one that works.
        self._lock = threading.Lock()
        self._consortium = Consortium(identity.consortium.roster_key, identity.roster)

    @classmethod
    def load(cls, site_toml: Path) -> EnrolledSite:
        """The member that the institution with this site.toml is.

        Raises:
            IdentityRefused: it is not enrolled.
            ConfigError: it is enrolled under another name than site.toml's, or others may read a key.
        """
        config = load_site_config(site_toml)
        identity = AgentIdentity.load(site_toml.parent / config.server.pki)
        if config.site.id != identity.site:
            raise ConfigError.at(
                str(site_toml),
                "site.id",
                found=config.site.id,
                allowed=f"{identity.site!r}, the name that this site is enrolled under",
                fix=f'set id = "{identity.site}" under [site]',
            )
        return cls(identity, config.server.address or identity.fleet_address)

    def connect(self) -> grpc.aio.Channel:
        """A channel to the fleet port, which it trusts by the consortium's root alone.

        Raises:
            IdentityRefused: the site's certificate is not in force by this machine's clock.
        """
        self.identity.certificate.check_time(datetime.now(UTC))
        return grpc.aio.secure_channel(self.address, self.identity.credentials(), options=_OPTIONS)

    @property
    def roster_version(self) -> int:
        return self.identity.roster.version

    def renewal_due(self) -> bool:
        """Whether the site's certificate is to be renewed."""
        return self.identity.certificate.renewal_due(datetime.now(UTC))

    async def renew(self, channel: grpc.aio.Channel) -> None:
        """Get a certificate for a new key; both are in one file from the same moment.

        Raises:
            IdentityRefused: the server gives none to this site.
            ConnectionFailed: it did not answer, or not as it should; to be tried again.
        """
        key, request = self.identity.renewal_request()
        try:
            reply = await renew_method(channel)(request, timeout=_CALL_S)
        except grpc.aio.AioRpcError as error:
            if error.code() in _REFUSED:
                raise IdentityRefused(
                    f"the server does not renew this site's certificate: {error.details()}",
                    fix="ask the consortium's operator for a new invitation",
                ) from None
            raise ConnectionFailed(explain(error)) from None
        try:
            with self._lock:
                self.identity = self.identity.store_renewed(key, reply, datetime.now(UTC))
        except (LeptonError, OSError) as error:
            raise ConnectionFailed(f"the renewed certificate cannot be used: {error}") from None

    def take_roster(self, signed: bytes) -> None:
        """Keep a newer roster.

        Raises:
            VerificationFailed: it is not the consortium's, or older.
        """
        with self._lock:
            self.identity = identity = self.identity.store_roster(signed)
            if identity.roster is not self._consortium.roster:
                self._consortium = Consortium(identity.consortium.roster_key, identity.roster)

    def consortium(self) -> Consortium:
        """The consortium with the newest roster that this site holds."""
        return self._consortium
