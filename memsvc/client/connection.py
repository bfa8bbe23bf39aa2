"""Where to connect and with which key. The one place that reads the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from memsvc.client.errors import ConfigurationError

ADDRESS_VARIABLE = "MEMSVC_ADDRESS"
API_KEY_VARIABLE = "MEMSVC_API_KEY"
#: File of PEM certificates to trust, or "system"; set, it means TLS.
TLS_VARIABLE = "MEMSVC_TLS_ROOTS"
#: PEM files of what to show to a server that asks for a client's certificate.
TLS_CERTIFICATE_VARIABLE = "MEMSVC_TLS_CLIENT_CERTIFICATE"
TLS_KEY_VARIABLE = "MEMSVC_TLS_CLIENT_KEY"


@dataclass(frozen=True)
class TLS:
    """Encrypt, and trust these. root_certificates: PEM; None: gRPC's own roots.

    certificate_chain, private_key: PEM, for a server that asks for a client's.
    """

    root_certificates: bytes | None = None
    certificate_chain: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.certificate_chain is None) != (self.private_key is None):
            raise ConfigurationError("A client's certificate and its private key go together.")

    @classmethod
    def from_environment(cls, values: Mapping[str, str]) -> TLS | None:
        """As MEMSVC_TLS_ROOTS says (empty: no TLS; "system": gRPC's own roots; else a PEM
        file), with MEMSVC_TLS_CLIENT_CERTIFICATE and MEMSVC_TLS_CLIENT_KEY, if set.
        """
        roots = values.get(TLS_VARIABLE, "")
        if not roots:
            return None
        return cls(
            None if roots == "system" else _read(roots),
            _read(values.get(TLS_CERTIFICATE_VARIABLE, "")),
            _read(values.get(TLS_KEY_VARIABLE, "")),
        )


@dataclass(frozen=True)
class Connection:
    """address: "host:port", "unix:/path", or several servers of one catalog: "ipv4:IP:port,IP:port"
    or "dns:name:port". api_key: as `memsvc init` printed it, or a token."""

    address: str
    api_key: str = field(repr=False)
    tls: TLS | None = None

    def __post_init__(self) -> None:
        if not self.address:
            raise ConfigurationError(f"No address: pass one, or set {ADDRESS_VARIABLE}.")
        if not self.api_key:
            raise ConfigurationError(f"No API key: pass one, or set {API_KEY_VARIABLE}.")
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigurationError("The API key holds characters that no key has.")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Connection:
        """As MEMSVC_ADDRESS, MEMSVC_API_KEY and MEMSVC_TLS_* say. Raises ConfigurationError."""
        values = os.environ if environment is None else environment
        return cls(
            values.get(ADDRESS_VARIABLE, ""),
            values.get(API_KEY_VARIABLE, ""),
            TLS.from_environment(values),
        )


def _read(path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"Cannot read {path}: {error.strerror}") from error
