"""From `ca init` to a member, a renewal and a revocation, as operator and site type it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from grpc import aio

from lepton_fl.errors import ConfigError, IdentityRefused, VerificationFailed
from lepton_fl.fleet.agent.enrol import AgentIdentity, Joining
from lepton_fl.fleet.pki import certificates, sealed
from lepton_fl.fleet.pki.authority import Authority, Issuing, ServerIdentity, read_consortium
from lepton_fl.fleet.pki.credentials import enrolment_credentials, fleet_credentials
from lepton_fl.fleet.pki.joining import make_joining
from lepton_fl.fleet.pki.tokens import Token
from lepton_fl.fleet.protocol.fleet_pb2 import JoinReply, JoinRequest, RenewReply
from lepton_fl.fleet.server.config import load_server
from lepton_fl.fleet.server.database import Database
from lepton_fl.fleet.server.enrolment import MESSAGE_LIMIT, enrolment_service, renew
from lepton_fl.fleet.server.register import Register
from lepton_fl.secagg import IdentityKey, Roster

PASSPHRASE = "correct horse battery"
FLEET = "localhost:9700"


class Recorder(aio.ServerInterceptor):
    """Which methods a server was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def intercept_service(self, continuation, details):
        self.asked.append(details.method.rpartition("/")[2])
        return await continuation(details)


@contextmanager
def enrolment_port(state: Path, pki: Path, *, port: int = 0, identity=None, document_of=None, clock=None):
    """A real enrolment port on a free port of this machine: its number, and what it was asked."""
    recorder, started, loop = Recorder(), threading.Event(), asyncio.new_event_loop()
    bound: list[int] = []

    async def serve() -> None:
        database = Database(state / "server.db")
        options = [("grpc.max_receive_message_length", MESSAGE_LIMIT), ("grpc.so_reuseport", 0)]
        server = aio.server(interceptors=[recorder], options=options)
        given = {} if clock is None else {"clock": clock}
        handlers = enrolment_service(Register(database), document_of or pki, fleet_address=FLEET, **given)
        server.add_generic_rpc_handlers((handlers,))
        shown = identity or ServerIdentity.load(pki)
        bound.append(server.add_secure_port(f"127.0.0.1:{port}", enrolment_credentials(shown)))
        await server.start()
        started.set()
        await stop.wait()
        await server.stop(None)
        database.close()

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert started.wait(30)
        yield bound[0], recorder.asked
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()
        loop.close()


@pytest.fixture(autouse=True)
def quick_scrypt(monkeypatch):
    """16 MiB and milliseconds for each passphrase: what it costs is held elsewhere."""
    monkeypatch.setattr(sealed, "_LOG2_N", 14)
    monkeypatch.setattr("lepton_fl.cli.enroll.POLL_S", 0.05)
    monkeypatch.setenv("LEPTON_FL_CA_PASSPHRASE", PASSPHRASE)


@pytest.fixture
def operator(tmp_path, lepton):
    """A consortium's server.toml, its `ca init` done."""
    (tmp_path / "server.toml").write_text('[server]\nname = "banks"\n')
    done = lepton("ca", "init", "--host", "localhost", "--host", "127.0.0.1")
    assert done.code == 0, done.err
    return load_server(tmp_path / "server.toml")


@pytest.fixture
def bank(tmp_path):
    """Make a site's folder; gives its site.toml."""

    def make(name: str, folder: str | None = None) -> Path:
        home = tmp_path / (folder or name)
        home.mkdir()
        (home / "site.toml").write_text(f'[site]\nid = "{name}"\n[data]\nsource = "records.csv"\n')
        return home / "site.toml"

    return make


@pytest.fixture
def port(operator) -> Iterator[int]:
    """The operator's enrolment port, open."""
    with enrolment_port(operator.state, operator.pki) as (number, _):
        yield number


def invite(lepton, site: str) -> str:
    done = lepton("enroll", "invite", site)
    assert done.code == 0, done.err
    return done.out.strip()


def test_a_site_joins(lepton, operator, bank, port):
    """Asked, compared, approved, fetched; the keys are the site's alone."""
    config = bank("bank-1")
    token = invite(lepton, "bank-1")
    join = join_command(config, token, port)

    asked = lepton(*join)
    shown = json.loads(lepton("enroll", "list", "--json").out)
    approved = lepton("enroll", "approve", "bank-1", "--yes")
    joined = lepton(*join)

    assert (asked.code, approved.code, joined.code) == (0, 0, 0), asked.err + approved.err + joined.err
    assert shown[0]["state"] == "requested"
    assert shown[0]["keys"] in asked.err
    assert shown[0]["keys"] in approved.out
    assert "roster 1: bank-1" in approved.out
    member = AgentIdentity.load(config.parent / "pki")
    assert (member.site, member.party, member.fleet_address) == ("bank-1", 101, FLEET)
    assert stat.S_IMODE((config.parent / "pki").stat().st_mode) == 0o700
    for name in ("site.pem", "identity.pem"):
        assert stat.S_IMODE((config.parent / "pki" / name).stat().st_mode) == 0o600
    assert json.loads(lepton("enroll", "list", "--json").out)[0]["state"] == "enrolled"


def join_command(config: Path, token: str, port: int, wait: str = "--no-wait"):
    return ("enroll", "join", token, "--server", f"localhost:{port}", "-c", config, wait)


def test_a_site_waits_for_its_approval(lepton, operator, bank, port):
    """One command at the site; the operator's comes while it waits."""
    config, token = bank("bank-1"), invite(lepton, "bank-1")

    def approve() -> None:
        database = Database(operator.database)
        register = Register(database)
        authority = Authority.open(operator.pki, PASSPHRASE)
        for _ in range(1200):
            if any(row.state == "requested" for row in register.sites(datetime.now(UTC))):
                break
            time.sleep(0.05)
        register.approve(
            "bank-1", keys=register.requested("bank-1"), authority=authority, now=datetime.now(UTC)
        )
        database.close()

    thread = threading.Thread(target=approve)
    thread.start()
    done = lepton(*join_command(config, token, port, "--wait"))
    thread.join(60)

    assert done.code == 0, done.err
    assert "bank-1 is enrolled in banks as party 101" in done.out
    assert "lepton-fl enroll approve bank-1" in done.err


def test_a_site_goes_on_where_it_was(lepton, operator, bank, port):
    """Interrupted after its keys were made, it makes no others."""
    config, token = bank("bank-1"), invite(lepton, "bank-1")
    join = join_command(config, token, port)
    lepton(*join)
    before = {path.name: path.read_bytes() for path in (config.parent / "pki").iterdir()}
    lepton(*join)
    after = {path.name: path.read_bytes() for path in (config.parent / "pki").iterdir()}

    assert before == after
    assert sorted(before) == ["identity.pem", "site.csr", "site.pem"]


def test_the_token_can_come_by_standard_input(operator, bank, port, lepton):
    """Out of sight of whoever lists the processes."""
    config, token = bank("bank-1"), invite(lepton, "bank-1")
    done = lepton(*join_command(config, "-", port), typed=token + "\n")

    assert done.code == 0, done.err


def refused(done, *said: str) -> None:
    """One line, exit code 5, and these words."""
    assert done.code == 5, done.err
    assert done.last.startswith("lepton-fl: ")
    assert all(word in done.last for word in said), done.last


def flipped(token: str) -> str:
    """The token with another secret, its checksum right."""
    read = Token.read(token)
    return str(replace(read, secret=bytes(16)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flipped, "does not know this token"),
        (lambda token: token[:-7], "cut short or mistyped"),
        (lambda token: "hunter2", "a token begins with lfl1-"),
    ],
    ids=["unknown", "truncated", "none"],
)
def test_a_wrong_token_is_one_line(lepton, operator, bank, port, change, said):
    """And makes no member."""
    config, token = bank("bank-1"), invite(lepton, "bank-1")

    refused(lepton(*join_command(config, change(token), port)), said, "fix:")


def test_a_used_token_is_one_line(lepton, operator, bank, port):
    """Somebody else has asked with it first; the operator sees with which keys."""
    token = invite(lepton, "bank-1")
    thief, owner = bank("bank-1", "thief"), bank("bank-1")
    assert lepton(*join_command(thief, token, port)).code == 0

    refused(lepton(*join_command(owner, token, port)), "has been used with other keys")


def test_an_expired_token_is_one_line(lepton, operator, bank):
    """By the server's clock."""
    config = bank("bank-1")
    token = lepton("enroll", "invite", "bank-1", "--ttl", "30m").out
    with enrolment_port(
        operator.state, operator.pki, clock=lambda: datetime.now(UTC) + timedelta(minutes=31)
    ) as (port, _):
        refused(lepton(*join_command(config, token, port)), "expired at")


def test_a_token_for_another_site_is_one_line(lepton, operator, bank, port):
    """Nothing is asked of the server."""
    refused(
        lepton(*join_command(bank("bank-2"), invite(lepton, "bank-1"), port)),
        "is for bank-1",
        "site.id = 'bank-2'",
    )


def test_a_rejected_site_is_one_line(lepton, operator, bank, port):
    """When it asks again."""
    config, token = bank("bank-1"), invite(lepton, "bank-1")
    lepton(*join_command(config, token, port))
    assert lepton("enroll", "reject", "bank-1").code == 0

    refused(lepton(*join_command(config, token, port)), "the operator has rejected")


def test_a_server_that_is_down_is_one_line(lepton, operator, bank):
    """With its address."""
    config, token = bank("bank-1"), invite(lepton, "bank-1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        number = taken.getsockname()[1]

        refused(lepton(*join_command(config, token, number)), f"localhost:{number}: cannot be reached")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["closes", "speaks HTTP"])
def test_what_is_no_enrolment_port_is_one_line(lepton, operator, bank, answer):
    """A port of something else."""
    config, token = bank("bank-1"), invite(lepton, "bank-1")

    def other(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connection.sendall(answer)
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=other, args=(listener,))
        thread.start()
        done = lepton(*join_command(config, token, listener.getsockname()[1]))
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)

    assert not thread.is_alive()
    refused(done, "localhost:")


def test_the_agents_port_is_no_enrolment_port(lepton, operator, bank):
    """It asks for a certificate, which nobody has yet."""
    config, token = bank("bank-1"), invite(lepton, "bank-1")
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", fleet_credentials(ServerIdentity.load(operator.pki)))
    server.start()
    done = lepton(*join_command(config, token, port))
    server.stop(None).wait()

    refused(done, f"localhost:{port}: cannot be reached: it is no enrolment port")


def test_a_server_for_another_host_is_one_line(lepton, operator, bank, port):
    """Named with the hosts it is for."""
    assert lepton("ca", "issue", "--host", "fl.bank.example").code == 0

    refused(
        lepton(*join_command(bank("bank-1"), invite(lepton, "bank-1"), port)),
        "found one for fl.bank.example",
        "allowed: one for localhost",
        "ca issue --host localhost",
    )


@pytest.fixture
def stranger(tmp_path):
    """Another consortium, for a man in the middle."""
    Authority.create(
        tmp_path / "stranger" / "pki",
        name="banks",
        hosts=["localhost"],
        passphrase=PASSPHRASE,
        now=datetime.now(UTC),
    )
    return tmp_path / "stranger"


def test_another_consortiums_server_learns_nothing(lepton, operator, bank, stranger):
    """Wrong fingerprint: it is asked who it is, and is not sent the token."""
    config, token = bank("bank-1"), invite(lepton, "bank-1")
    with enrolment_port(stranger / "state", stranger / "pki") as (port, asked):
        done = lepton(*join_command(config, token, port))

        refused(done, "belongs to another consortium than the invitation", "nothing was sent to it")
        assert asked == ["Consortium"]


def test_a_man_in_the_middle_learns_nothing(lepton, operator, bank, stranger):
    """He passes on the right document, and cannot show a certificate under its root."""
    config, token = bank("bank-1"), invite(lepton, "bank-1")
    shown = ServerIdentity.load(stranger / "pki")
    with enrolment_port(operator.state, operator.pki, identity=shown) as (port, asked):
        done = lepton(*join_command(config, token, port))

        refused(done, "is not under the root of the invitation's consortium", "nothing was sent to it")
        assert asked == ["Consortium"]


@pytest.mark.parametrize(("days", "said"), [(-2, "not valid before"), (2, "the server's says")])
def test_a_clock_two_days_off_is_one_line(operator, bank, port, lepton, days, said):
    """Behind or ahead, both times are named."""
    joining = Joining(
        Token.read(invite(lepton, "bank-1")), f"localhost:{port}", bank("bank-1").parent / "pki"
    )
    here = datetime.now(UTC) + timedelta(days=days)

    with pytest.raises(IdentityRefused, match=said) as error:
        joining.ask(here)
    assert f"{here:%Y-%m-%d %H:%M} UTC" in error.value.message
    assert "clock" in error.value.fix


@pytest.mark.parametrize(
    "server", ["localhost", "localhost:", "localhost:70000", "http://a:1", "a b:1", ":1"]
)
def test_a_malformed_address_is_one_line(lepton, operator, bank, server):
    """Before any key is made."""
    config, token = bank("bank-1"), invite(lepton, "bank-1")

    refused(lepton("enroll", "join", token, "--server", server, "-c", config), "HOST:PORT")
    assert not (config.parent / "pki").exists()


@pytest.fixture
def enrol(operator, bank, port):
    """Take a site all the way in, without the commands; gives its site.toml."""

    def make(site: str) -> Path:
        config, now = bank(site), datetime.now(UTC)
        database = Database(operator.database)
        register, authority = Register(database), Authority.open(operator.pki, PASSPHRASE)
        token = register.invite(site, consortium=authority.consortium, life=timedelta(hours=1), now=now)
        joining = Joining(token, f"localhost:{port}", config.parent / "pki")
        assert joining.ask(now) is None
        register.approve(site, keys=joining.keys, authority=authority, now=now)
        database.close()
        assert joining.ask(now) is not None
        return config

    return make


@pytest.fixture
def member(enrol):
    """An enrolled bank-1: its site.toml."""
    return enrol("bank-1")


def test_a_taken_name_is_one_line(lepton, member):
    """To the operator who invites, and to the site that joins twice."""
    refused(lepton("enroll", "invite", "bank-1"), "a site of this name is enrolled", "enroll revoke bank-1")
    token = str(Token(site="bank-1", id=bytes(8), secret=bytes(16), fingerprint=bytes(32)))
    refused(lepton(*join_command(member, token, 9)), "enrolled already")


def test_a_revoked_site_is_out_before_the_passphrase(lepton, operator, member, monkeypatch):
    """Which comes later, for the roster; here it is wrong at first."""
    held = AgentIdentity.load(member.parent / "pki")
    monkeypatch.setenv("LEPTON_FL_CA_PASSPHRASE", "wrong one entirely")
    first = lepton("enroll", "revoke", "bank-1")
    database = Database(operator.database)
    with pytest.raises(IdentityRefused, match="was revoked"):
        Register(database).admit(held.certificate, datetime.now(UTC))
    database.close()
    monkeypatch.setenv("LEPTON_FL_CA_PASSPHRASE", PASSPHRASE)
    second = lepton("ca", "revoke", "bank-1")

    refused(first, "the passphrase is wrong")
    assert "bank-1: refused from now on" in first.out
    assert (second.code, "roster 2: no member" in second.out) == (0, True)


def test_revoked_now_the_roster_can_wait(lepton, member, monkeypatch):
    """Nobody has to be woken for the passphrase."""
    monkeypatch.delenv("LEPTON_FL_CA_PASSPHRASE")
    done = lepton("enroll", "revoke", "bank-1", "--now")

    assert (done.code, "refused from now on" in done.out) == (0, True)
    assert "enroll revoke bank-1" in done.err


def test_an_agent_renews(operator, member):
    """A new key and its certificate, in one file, before the old have ended."""
    held, now = AgentIdentity.load(member.parent / "pki"), datetime.now(UTC)
    database = Database(operator.database)
    register = Register(database)
    key, asked = held.renewal_request()
    due = now + timedelta(days=20)
    new = held.store_renewed(key, renew(register, operator.pki, held.certificate, asked, due), due)

    assert not held.certificate.renewal_due(now)
    assert held.certificate.renewal_due(due)
    assert new.certificate.serial != held.certificate.serial
    assert new.key_pem != held.key_pem
    assert AgentIdentity.load(member.parent / "pki").chain_pem == new.chain_pem
    assert register.admit(new.certificate, due) == register.admit(held.certificate, due) == 101
    database.close()


def test_a_wrong_renewal_changes_nothing(operator, member, stranger, monkeypatch):
    """Another key's certificate, another site's, another consortium's, a useless one, or a crash."""
    pki = member.parent / "pki"
    held, now = AgentIdentity.load(pki), datetime.now(UTC) + timedelta(days=20)
    before = (pki / "site.pem").read_bytes()
    issuing = Issuing.open(operator.pki)
    key, other = certificates.new_key(), certificates.new_key()
    others = {
        "do not match": issuing.issue_site(other.public_key(), "bank-1", now)[0],
        "is for bank-2": issuing.issue_site(key.public_key(), "bank-2", now)[0],
        "does not hold 2": b"",
        "not valid before": issuing.issue_site(key.public_key(), "bank-1", now + timedelta(days=1))[0],
        "ends no later": issuing.issue_site(
            key.public_key(), "bank-1", held.certificate.not_before + certificates.BACKDATED
        )[0],
    }
    for said, certificate in others.items():
        with pytest.raises((IdentityRefused, VerificationFailed), match=said):
            held.store_renewed(key, RenewReply(certificate=certificate, chain=issuing.pem), now)
    foreign = Issuing.open(stranger / "pki")
    pem, _ = foreign.issue_site(key.public_key(), "bank-1", now)
    with pytest.raises(IdentityRefused, match="not issued by this consortium"):
        held.store_renewed(key, RenewReply(certificate=pem, chain=foreign.pem), now)
    right, _ = issuing.issue_site(key.public_key(), "bank-1", now)
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="disk full"):
        held.store_renewed(key, RenewReply(certificate=right, chain=issuing.pem), now)

    assert (pki / "site.pem").read_bytes() == before


def full_disk(*_):
    raise OSError("disk full")


def test_an_agent_holds_on_to_the_newest_roster(lepton, operator, member):
    """A server that shows an older one, or none of the consortium's, is refused."""
    pki = member.parent / "pki"
    first = AgentIdentity.load(pki)
    authority = Authority.open(operator.pki, PASSPHRASE)
    newer = authority.next_roster(first.roster)
    forged = Roster.issue(
        IdentityKey.generate(),
        consortium=first.consortium.fingerprint,
        version=9,
        members=[],
        revoked=[],
    )
    second = first.store_roster(newer.signed)

    assert second.store_roster(newer.signed) is second
    assert AgentIdentity.load(pki).roster == newer
    for wrong, said in [(first.roster, "version 1 was offered"), (forged, "signature")]:
        with pytest.raises(VerificationFailed, match=said):
            second.store_roster(wrong.signed)
    assert AgentIdentity.load(pki).roster == newer


@pytest.mark.parametrize("name", ["site.pem", "identity.pem"])
def test_keys_that_others_may_read_are_not_used(member, name):
    """With the command that mends it."""
    (member.parent / "pki" / name).chmod(0o644)

    with pytest.raises(ConfigError, match=f"{name}: others may read"):
        AgentIdentity.load(member.parent / "pki")


@pytest.mark.parametrize("name", ["identity.pem", "identity.cert", "consortium.bin", "roster.bin"])
def test_parts_of_two_members_do_not_mix(enrol, stranger, name):
    """A file from another site's folder, or another consortium's."""
    ours, theirs = (enrol(site).parent / "pki" for site in ("bank-1", "bank-2"))
    if name == "roster.bin":
        forged = Authority.open(stranger / "pki", PASSPHRASE).next_roster(None)
        (theirs / name).write_bytes(forged.signed)
    if name == "consortium.bin":
        theirs = stranger / "pki"
    (ours / name).write_bytes((theirs / name).read_bytes())

    with pytest.raises((IdentityRefused, VerificationFailed)):
        AgentIdentity.load(ours)


def test_a_roster_of_another_consortium_is_refused(operator, member):
    """Though the same key has signed it."""
    key = Authority.open(operator.pki, PASSPHRASE)._roster_key
    other = Roster.issue(key, consortium=bytes(32), version=1, members=[], revoked=[])
    (member.parent / "pki" / "roster.bin").write_bytes(other.signed)

    with pytest.raises(VerificationFailed, match="another consortium"):
        AgentIdentity.load(member.parent / "pki")


def test_a_site_that_has_not_joined_is_one_line(tmp_path):
    """With what to type."""
    with pytest.raises(IdentityRefused, match="not enrolled") as error:
        AgentIdentity.load(tmp_path)

    assert "enroll join" in error.value.fix


def test_no_secret_is_logged(lepton, operator, bank, port, caplog):
    """Neither the token's, nor a key, by server or site."""
    caplog.set_level("DEBUG")
    config, token = bank("bank-1"), invite(lepton, "bank-1")
    lepton(*join_command(config, flipped(token), port))
    done = lepton(*join_command(config, token, port))

    assert "enrolment of bank-1: pending" in caplog.text
    secret = Token.read(token).secret
    for text in (caplog.text, done.out, done.err):
        assert "PRIVATE" not in text
        assert token not in text
        assert secret.hex() not in text
        assert repr(secret) not in text


def asked_with(operator, port, *, name="bank-1", **changed):
    """What the server says to a request of which something was changed after it was signed."""
    consortium = read_consortium(operator.pki)
    token = Token(site=name, id=bytes(8), secret=bytes(16), fingerprint=consortium.fingerprint)
    request = make_joining(token, IdentityKey.generate(), certificates.make_csr(certificates.new_key()))
    for field, value in changed.items():
        setattr(request, field, value)
    with grpc.secure_channel(
        f"localhost:{port}", grpc.ssl_channel_credentials(consortium.root_pem)
    ) as channel:
        call = channel.unary_unary(
            "/lepton_fl.fleet.v1.Enrolment/Join",
            request_serializer=JoinRequest.SerializeToString,
            response_deserializer=JoinReply.FromString,
        )
        with pytest.raises(grpc.RpcError) as error:
            call(request, timeout=20)
    return error.value


def test_a_stranger_writes_no_line_into_the_log(operator, port, caplog):
    """A name with line breaks is none, and is quoted."""
    error = asked_with(operator, port, name="x\nINFO bank-1: approved")

    assert error.code() == grpc.StatusCode.PERMISSION_DENIED
    assert "no site's name" in error.details()
    assert r"x\nINFO" in caplog.text
    assert "\nINFO bank-1" not in caplog.text


def test_strangers_do_not_fill_the_log(operator, port, caplog, monkeypatch):
    """Each is refused, and the first few of a minute are written down."""
    monkeypatch.setattr("lepton_fl.fleet.server.enrolment.REFUSALS_LOGGED", 3)

    for _ in range(8):
        assert asked_with(operator, port, name="x\n").code() == grpc.StatusCode.PERMISSION_DENIED

    # A minute may have ended in between.
    assert 3 <= sum("refused:" in record.getMessage() for record in caplog.records) <= 6


@pytest.mark.parametrize(
    "changed",
    [
        {"site": "bank-2"},
        {"token_id": b"y" * 8},
        {"csr": certificates.make_csr(certificates.new_key())},
        {"identity_key": IdentityKey.generate().public},
        {"identity_proof": bytes(64)},
        {"identity_proof": b""},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_request_without_proof_of_its_identity_key_is_refused(operator, port, changed):
    """Nobody has another's key certified for himself, or a TLS key beside another's identity."""
    error = asked_with(operator, port, **changed)

    assert error.code() == grpc.StatusCode.PERMISSION_DENIED
    assert "no proof" in error.details()


def test_a_large_request_is_not_read(operator, port):
    """More than an honest site ever sends."""
    error = asked_with(operator, port, csr=bytes(2 * MESSAGE_LIMIT))

    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_what_the_operator_can_look_at(lepton, operator, member):
    """In words and as JSON."""
    shown = json.loads(lepton("ca", "show", "--json").out)
    listed = json.loads(lepton("ca", "list", "--json").out)

    assert (shown["consortium"], shown["roster"], shown["members"]) == ("banks", 1, ["bank-1"])
    assert shown["fingerprint"] == read_consortium(operator.pki).fingerprint.hex()
    assert [row["kind"] for row in listed] == ["root", "issuing", "server", "site"]
    for command in (("ca", "show"), ("ca", "list"), ("enroll", "list")):
        assert "bank" in lepton(*command).out


def test_the_issuing_certificate_is_renewed_by_command(lepton, operator, member):
    """With the passphrase; members go on as they were."""
    done = lepton("ca", "renew")

    assert (done.code, "issuing certificate good until" in done.out) == (0, True)
    identity = ServerIdentity.load(operator.pki)
    held = AgentIdentity.load(member.parent / "pki")
    assert certificates.read_site(held.chain_pem, issuer=identity.issuing).site == "bank-1"


def test_a_root_kept_elsewhere_is_named(lepton, operator, bank, port, tmp_path):
    """The server's machine needs it for a command's length only."""
    (operator.pki / "root.sealed").rename(tmp_path / "stick")
    config, token = bank("bank-1"), invite(lepton, "bank-1")
    lepton(*join_command(config, token, port))
    without = lepton("enroll", "approve", "bank-1", "--yes")
    with_it = lepton("enroll", "approve", "bank-1", "--yes", "--root", tmp_path / "stick")

    assert (without.code, with_it.code) == (3, 0), with_it.err
    assert "--root FILE" in without.last


def test_the_passphrase_may_be_in_a_file(lepton, operator, tmp_path, monkeypatch):
    """Its owner's alone."""
    monkeypatch.delenv("LEPTON_FL_CA_PASSPHRASE")
    file = tmp_path / "passphrase"
    file.write_text(PASSPHRASE + "\n")
    file.chmod(0o644)
    readable = lepton("ca", "renew", "--passphrase-file", file)
    file.chmod(0o600)

    assert readable.code == 3
    assert "chmod 600" in readable.last
    assert lepton("ca", "renew", "--passphrase-file", file).code == 0
    nobody = lepton("ca", "renew")
    assert (nobody.code, "no terminal to ask" in nobody.last) == (3, True)


def test_nobody_says_yes_for_the_operator(lepton, operator, bank, port):
    """Without an answer the site is not approved."""
    config, token = bank("bank-1"), invite(lepton, "bank-1")
    lepton(*join_command(config, token, port))
    for answer in ("\n", "n\n", ""):
        assert lepton("enroll", "approve", "bank-1", typed=answer).code != 0
    assert json.loads(lepton("enroll", "list", "--json").out)[0]["state"] == "requested"
    assert lepton("enroll", "approve", "bank-1", typed="y\n").code == 0


@pytest.mark.parametrize("ttl", ["0h", "72", "h", "-1h", "31d", "1w", "1.5h"])
def test_a_malformed_time_is_refused(lepton, operator, ttl):
    """With what is allowed."""
    done = lepton("enroll", "invite", "bank-1", "--ttl", ttl)

    assert (done.code, "72h" in done.last) in {(3, True), (2, False)}


def test_a_malformed_name_is_refused(lepton, operator):
    """It becomes a part of a URI, and of file names."""
    assert lepton("enroll", "invite", "../bank").code == 3


def test_a_second_consortium_does_not_take_over_the_first(lepton, operator, member):
    """Its register would belong to neither."""
    for path in operator.pki.iterdir():
        path.unlink()
    done = lepton("ca", "init")

    assert (done.code, "an earlier consortium" in done.last) == (3, True)


@pytest.mark.parametrize(
    "command", [("ca", "init"), ("ca", "list"), ("enroll", "list"), ("enroll", "invite", "a")]
)
def test_without_a_server_toml_it_says_so(lepton, command):
    """In one line."""
    done = lepton(*command)

    assert (done.code, "server.toml: no such file" in done.last) == (3, True)


def test_without_a_site_toml_it_says_so(lepton):
    """The same."""
    token = str(Token(site="bank-1", id=bytes(8), secret=bytes(16), fingerprint=bytes(32)))
    done = lepton("enroll", "join", token, "--server", "localhost:1", "-c", "site.toml")

    assert (done.code, "site.toml: no such file" in done.last) == (3, True)


def test_a_new_server_certificate_is_shown_without_a_restart(lepton, operator, port):
    """At the next handshake."""
    before = ssl.get_server_certificate(("127.0.0.1", port), timeout=20)
    lepton("ca", "issue")
    after = ssl.get_server_certificate(("127.0.0.1", port), timeout=20)
    (operator.pki / "server.pem").write_bytes(b"half a file")
    broken = ssl.get_server_certificate(("127.0.0.1", port), timeout=20)

    assert before != after
    assert broken == after
