"""What gRPC itself enforces on connections, before any call is looked at."""

from __future__ import annotations

from memsvc.config import Config
from memsvc.validation import MAX_REQUEST_BYTES

_METADATA_BYTES = 16 * 1024
_HANDSHAKE_MS = 20_000
_PING_MS = 5_000
_KEEPALIVE_TIMEOUT_MS = 20_000

Options = tuple[tuple[str, int], ...]


def grpc_options(config: Config) -> Options:
    """Arguments of the server's channel."""
    return (
        # Above the API's own limit, so that the gate can say what is wrong.
        ("grpc.max_receive_message_length", 2 * MAX_REQUEST_BYTES),
        ("grpc.max_send_message_length", 2 * MAX_REQUEST_BYTES),
        ("grpc.max_metadata_size", _METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", _METADATA_BYTES),
        # Above what the gate lets in, which refuses in words; gRPC just drops the stream.
        ("grpc.max_concurrent_streams", 2 * config.max_concurrent_calls),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        # A connection that does not get as far as HTTP/2 is closed.
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        # A client that is gone without a word is noticed.
        ("grpc.keepalive_time_ms", round(config.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        # A client may probe, also one without a call, but not more often than this:
        # at the third ping too many its connection is closed.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _PING_MS),
        ("grpc.http2.max_ping_strikes", 2),
        # A second server on the same port is a mistake, not a cluster.
        ("grpc.so_reuseport", 0),
    )
