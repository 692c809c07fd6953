"""The fleet: a server and the agents of its sites, over gRPC with mutual TLS. See docs/fleet.md."""

import os

# Before grpc is imported, or it does not look: TLS 1.2 with authenticated encryption and fresh keys only
# (1.3 has nothing else), and no words of gRPC's own on the terminal.
os.environ.setdefault(
    "GRPC_SSL_CIPHER_SUITES",
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:"
    "ECDHE-RSA-AES128-GCM-SHA256:ECDHE-RSA-AES256-GCM-SHA384:ECDHE-RSA-CHACHA20-POLY1305",
)
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
