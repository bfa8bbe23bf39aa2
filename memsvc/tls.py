"""TLS for both sides: what is shown to whom, and whom to trust. Files are PEM."""

from __future__ import annotations

from pathlib import Path

import grpc

from memsvc.config import Config


def server_credentials(config: Config) -> grpc.ServerCredentials | None:
    """For the server's own port; None without TLS. Raises OSError.

    With tls_client_roots a client without a certificate that these have signed is not
    spoken to, whatever its API key.
    """
    if not config.tls_certificate:
        return None
    roots = Path(config.tls_client_roots).read_bytes() if config.tls_client_roots else None
    pair = (_read(config.tls_private_key), _read(config.tls_certificate))
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=roots is not None)


def worker_credentials(config: Config) -> grpc.ChannelCredentials | None:
    """For workers that run apart; None without TLS. Raises OSError."""
    if not config.worker_tls_roots:
        return None
    return grpc.ssl_channel_credentials(
        _read(config.worker_tls_roots),
        _read(config.worker_tls_private_key),
        _read(config.worker_tls_certificate),
    )


def _read(path: str) -> bytes:
    return Path(path).read_bytes()
