"""What those who watch the server may see: counts and durations, in clear, on this machine only."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lepton_fl.fleet.server.hub import Session

LATE_S = 5.0
"""Seconds without a tick of the server's loop after which it is not well."""


class Telemetry:
    """The server's figures."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._ticked = time.monotonic()
        self.trouble = ""
        """Why the server cannot do its work, though it runs; empty if it can."""
        own = self.registry
        self.sites = Gauge("lepton_fl_sites_connected", "Agents that are connected", registry=own)
        self.exchanges = Gauge("lepton_fl_exchanges_open", "Requests that await an answer", registry=own)
        self.bytes = Counter("lepton_fl_payload_bytes", "Bytes of payloads", ["direction"], registry=own)
        self.rounds = Counter("lepton_fl_rounds", "Rounds that have ended", ["outcome"], registry=own)
        self.round_seconds = Histogram(
            "lepton_fl_round_seconds",
            "Duration of a round",
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3600),
            registry=own,
        )
        self.refusals = Counter(
            "lepton_fl_refusals", "Callers that were not let in", ["reason"], registry=own
        )
        self.runs = Gauge("lepton_fl_runs", "Runs by their state", ["state"], registry=own)

    def tick(self) -> None:
        """The server's loop is alive."""
        self._ticked = time.monotonic()

    def count(self, session: Session) -> None:
        """The bytes that a session has carried since the last time."""
        received, sent = session.counted
        self.bytes.labels("in").inc(session.received - received)
        self.bytes.labels("out").inc(session.sent - sent)
        session.counted = (session.received, session.sent)

    def states(self, counts: Mapping[str, int]) -> None:
        """How many runs are in each state."""
        self.runs.clear()
        for state, count in counts.items():
            self.runs.labels(state).set(count)

    def health(self) -> str:
        """What is wrong; empty if nothing is."""
        if time.monotonic() - self._ticked > LATE_S:
            return "the server's loop stands still"
        return self.trouble


class StatusServer:
    """Plain HTTP in a thread of its own, so that it answers also when the server's loop does not."""

    def __init__(self, telemetry: Telemetry, host: str, port: int) -> None:
        """Raises OSError where the port cannot be had."""

        class Handler(BaseHTTPRequestHandler):
            timeout = 10.0

            def do_GET(self) -> None:
                if self.path == "/metrics":
                    content = generate_latest(telemetry.registry)
                    self._answer(HTTPStatus.OK, content, "text/plain; version=0.0.4; charset=utf-8")
                elif self.path == "/healthz":
                    wrong = telemetry.health()
                    status = HTTPStatus.SERVICE_UNAVAILABLE if wrong else HTTPStatus.OK
                    self._answer(status, (wrong or "ok").encode() + b"\n", "text/plain; charset=utf-8")
                else:
                    self._answer(HTTPStatus.NOT_FOUND, b"/metrics or /healthz\n", "text/plain")

            def _answer(self, status: HTTPStatus, content: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                """Not logged: they come every few seconds."""

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

            def server_bind(self) -> None:
                # Not HTTPServer's, which asks the DNS for this machine's name.
                socketserver.TCPServer.server_bind(self)
                self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

            def handle_error(self, request: object, client_address: object) -> None:
                """Whoever asked has gone away."""

        self._server = Quiet((host, port), Handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="status", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
