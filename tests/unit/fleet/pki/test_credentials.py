"""What a TLS handshake of gRPC's own lets through, in both directions."""

import socket
import ssl
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import grpc
import pytest

from lepton_fl.fleet.pki import certificates
from lepton_fl.fleet.pki.authority import Authority, Issuing, ServerIdentity
from lepton_fl.fleet.pki.certificates import certificate_pem, key_pem, new_key, read_site
from lepton_fl.fleet.pki.credentials import fleet_credentials

PASSPHRASE = "correct horse battery"


@pytest.fixture
def consortium(tmp_path, quick_scrypt):
    """Make a consortium whose certificates are in force now: gRPC looks at the clock itself."""

    def make(name):
        return Authority.create(
            tmp_path / name,
            name="banks",
            hosts=["localhost"],
            passphrase=PASSPHRASE,
            now=datetime.now(UTC),
        ).consortium

    return make


@pytest.fixture
def ours(consortium):
    return consortium("ours")


@pytest.fixture
def listen():
    """A server that answers with the certificate its caller showed; gives its port."""
    servers = []

    def serve(credentials):
        def whoami(_, context):
            return context.auth_context()["x509_pem_cert"][0]

        server = grpc.server(ThreadPoolExecutor(1))
        handler = grpc.unary_unary_rpc_method_handler(whoami)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", {"whoami": handler}),))
        servers.append(server)
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        return port

    yield serve
    for server in servers:
        server.stop(None).wait()


@pytest.fixture
def port(ours, listen, tmp_path):
    return listen(fleet_credentials(ServerIdentity.load(tmp_path / "ours")))


def ask(port, credentials):
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        return channel.unary_unary("/t/whoami")(b"", timeout=20)


def site_credentials(folder, root):
    """A site's, of the consortium in `folder`; trusts `root`."""
    issuing, key = Issuing.open(folder), new_key()
    pem, _ = issuing.issue_site(key.public_key(), "bank-1", datetime.now(UTC))
    return grpc.ssl_channel_credentials(root.root_pem, key_pem(key), pem + issuing.pem)


def test_a_site_comes_in_and_is_known(port, ours, tmp_path):
    """By the certificate that gRPC hands on."""
    shown = ask(port, site_credentials(tmp_path / "ours", ours))

    issuer = ServerIdentity.load(tmp_path / "ours").issuing
    assert read_site(shown, issuer=issuer).site == "bank-1"


def test_without_a_certificate_nobody_comes_in(port, ours):
    """Not as far as a call."""
    with pytest.raises(grpc.RpcError) as refused:
        ask(port, grpc.ssl_channel_credentials(ours.root_pem))

    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


def test_with_another_consortiums_nobody_comes_in(port, ours, consortium, tmp_path):
    """Though its authorities have the same names."""
    consortium("theirs")
    with pytest.raises(grpc.RpcError) as refused:
        ask(port, site_credentials(tmp_path / "theirs", ours))

    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


def test_with_a_self_signed_one_nobody_comes_in(port, ours):
    """Though it says the right things."""
    key = new_key()
    root = certificates.make_root(key, "banks", datetime.now(UTC))
    with pytest.raises(grpc.RpcError) as refused:
        ask(port, grpc.ssl_channel_credentials(ours.root_pem, key_pem(key), certificate_pem(root)))

    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_site_does_not_pass_for_the_server(listen, ours, tmp_path):
    """Its certificate is under the root, too, and names no host."""
    issuing, key = Issuing.open(tmp_path / "ours"), new_key()
    pem, _ = issuing.issue_site(key.public_key(), "localhost", datetime.now(UTC))
    evil = listen(grpc.ssl_server_credentials([(key_pem(key), pem + issuing.pem)]))

    with pytest.raises(grpc.RpcError) as refused:
        ask(evil, site_credentials(tmp_path / "ours", ours))
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


SERVER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from lepton_fl.fleet.pki.authority import ServerIdentity
from lepton_fl.fleet.pki.credentials import enrolment_credentials
import grpc
server = grpc.server(ThreadPoolExecutor(1))
print(server.add_secure_port("127.0.0.1:0", enrolment_credentials(ServerIdentity.load(Path(sys.argv[1])))))
server.start()
sys.stdout.flush()
sys.stdin.read()
server.stop(None).wait()
"""


def test_only_authenticated_encryption_is_spoken(ours, tmp_path):
    """TLS 1.3, and of 1.2 what is as good; in a process of its own, since gRPC looks at its start."""
    program = [sys.executable, "-c", textwrap.dedent(SERVER), str(tmp_path / "ours")]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        port = int(server.stdout.readline())

        def speak(ciphers, newest=ssl.TLSVersion.TLSv1_2):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(cadata=ours.root_pem.decode())
            context.set_alpn_protocols(["h2"])
            context.set_ciphers(ciphers)
            context.maximum_version = newest
            with (
                socket.create_connection(("localhost", port), timeout=20) as plain,
                context.wrap_socket(plain, server_hostname="localhost") as wrapped,
            ):
                return wrapped.version()

        assert speak("ECDHE-ECDSA-AES128-GCM-SHA256") == "TLSv1.2"
        assert speak("DEFAULT", ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        with pytest.raises(OSError, match=r"handshake|EOF|reset"):
            speak("ECDHE-ECDSA-AES128-SHA")
        server.stdin.close()
