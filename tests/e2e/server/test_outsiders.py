"""What those who have no certificate can cost the server's machine."""

import datetime as dt
import gzip
import os
import resource
import socket
import ssl
import struct
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

import lepton_fl.fleet  # noqa: F401 - before grpc: it sets what gRPC reads at import

# isort: split
import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

ALLOWED_MIB = 256
CALLERS = 1200
"""More than the server lets in at once."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, CONTINUATION = 0, 1, 4, 9
END_STREAM, END_HEADERS = 1, 4


def frame(kind, flags, stream, payload):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name, value):
    """A header, not indexed, not compressed."""
    return b"\x00" + _string(name) + _string(value)


def _string(text):
    size = len(text)
    if size < 127:
        return bytes([size]) + text
    size, out = size - 127, bytearray([127])
    while size >= 128:
        out.append(size % 128 + 128)
        size //= 128
    return bytes(out) + bytes([size]) + text


REQUEST = b"".join(
    literal(name, value)
    for name, value in (
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":path", b"/lepton_fl.fleet.v1.Enrolment/Join"),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    )
)
START = PREFACE + frame(SETTINGS, 0, 0, b"")


def _split(message, stream):
    parts = [message[at : at + 16_000] for at in range(0, len(message), 16_000)]
    return b"".join(frame(DATA, END_STREAM * (part is parts[-1]), stream, part) for part in parts)


def _bomb(size):
    packed = gzip.compress(bytes(size))
    headers = REQUEST + literal(b"grpc-encoding", b"gzip")
    message = struct.pack(">BI", 1, len(packed)) + packed
    return START + b"".join(
        frame(HEADERS, END_HEADERS, stream, headers) + _split(message, stream) for stream in (1, 3, 5, 7)
    )


AFTER_TLS = {
    "silence": b"",
    "an HTTP/2 preface": START,
    "headers that never end": START
    + frame(HEADERS, 0, 1, REQUEST)
    + b"".join(frame(CONTINUATION, 0, 1, literal(b"x%d" % n, bytes(15_000))) for n in range(4)),
    "giant metadata": START + frame(HEADERS, END_HEADERS, 1, REQUEST + literal(b"x", b"v" * 12_000)),
    "many streams with half a message each": START
    + b"".join(
        frame(HEADERS, END_HEADERS, stream, REQUEST)
        + frame(DATA, 0, stream, struct.pack(">BI", 0, 16_000) + bytes(15_000))
        for stream in range(1, 201, 2)
    ),
    "a gzip bomb below the limit of a message": _bomb(14 << 20),
    "a gzip bomb above it": _bomb(60 << 20),
}


def _context():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


def _long_certificate(path):
    """One of its own making, of 88 kB; a TLS library takes 100."""
    key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    name = x509.Name([])
    names = x509.SubjectAlternativeName([x509.DNSName("a" * 60 + ".example")] * 1250)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + dt.timedelta(days=1))
    pem = builder.add_extension(names, critical=False).sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    path.write_bytes(pem + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


def _unfinished(context):
    """A TLS handshake up to the end of the client's certificate, and then nothing."""

    def attack(connection):
        got, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(got, sent)
        while True:
            try:
                tls.do_handshake()
                connection.sendall(sent.read()[:-200])
                return
            except ssl.SSLWantReadError:
                connection.sendall(sent.read())
                data = connection.recv(1 << 16)
                if not data:
                    raise ConnectionError from None
                got.write(data)

    return attack


@pytest.mark.slow
def test_outsiders_cost_at_most_256_mib_and_keep_nobody_out(fleet, until, tmp_path):
    """Connections, handshakes, headers and messages that are endless, silent, wrong or compressed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4 * CALLERS:
        pytest.skip(f"a process may have {hard} files open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4 * CALLERS, hard))
    server = fleet.start()
    agents, strangers = (_where(address) for address in (server.fleet, server.enrolment))
    before, peak = _resident(server.pid), 0
    context = _context()

    def attack(stack, where, do, callers=CALLERS):
        nonlocal peak
        for number in range(callers):
            with suppress(OSError):
                connection = stack.enter_context(socket.create_connection(where, timeout=1.0))
                connection.settimeout(1.0)
                do(stack, connection)
            if number % 50 == 0:
                peak = max(peak, _resident(server.pid))
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            peak = max(peak, _resident(server.pid))
            time.sleep(0.1)

    def send(data):
        return lambda _, connection: connection.sendall(data)

    def send_in_tls(data):
        def do(stack, connection):
            tls = stack.enter_context(context.wrap_socket(connection))
            tls.sendall(data)

        return do

    with_certificate = _context()
    with_certificate.load_cert_chain(_long_certificate(tmp_path / "long.pem"))
    unfinished = _unfinished(with_certificate)
    try:
        for where in (agents, strangers):
            for data in (b"", os.urandom(100_000), b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc" + bytes(12_000)):
                with ExitStack() as stack:
                    attack(stack, where, send(data))
        for data in AFTER_TLS.values():
            with ExitStack() as stack:
                attack(stack, strangers, send_in_tls(data), callers=200)
        with ExitStack() as stack:
            # The two that cost most, at one time.
            attack(stack, strangers, send_in_tls(AFTER_TLS["headers that never end"]), callers=200)
            attack(stack, agents, lambda _, connection: unfinished(connection))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    site = fleet.enrol("a")
    fleet.connect(site)
    until(lambda: site.sessions, "an honest site is let in")

    assert peak - before < ALLOWED_MIB


@pytest.mark.slow
def test_a_stranger_who_asks_nothing_is_sent_away(fleet, until):
    """It answers pings, as gRPC does, and would keep its place among a hundred for ever."""
    address = fleet.start().enrolment
    trust = ssl.get_server_certificate(_where(address)).encode()
    seen = []
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(trust)) as channel:
        channel.subscribe(seen.append, try_to_connect=True)
        until(lambda: grpc.ChannelConnectivity.READY in seen, "a connection")

        until(lambda: seen[-1] is grpc.ChannelConnectivity.IDLE, "its end")


def _where(address):
    host, _, port = address.rpartition(":")
    return host, int(port)


def _resident(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024
