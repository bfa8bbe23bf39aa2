"""Mutual TLS of a worker that listens on TCP."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True)
class TlsFiles:
    """PEM files. client_roots: who must have signed the certificate that memsvc shows."""

    certificate: Path
    private_key: Path
    client_roots: Path

    def credentials(self) -> grpc.ServerCredentials:
        """A caller without such a certificate is not spoken to. Raises OSError."""
        pair = (self.private_key.read_bytes(), self.certificate.read_bytes())
        return grpc.ssl_server_credentials(
            [pair], self.client_roots.read_bytes(), require_client_auth=True
        )
