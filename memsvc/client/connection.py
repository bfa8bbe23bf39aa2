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


@dataclass(frozen=True)
class TLS:
    """Encrypt, and trust these. root_certificates: PEM; None: gRPC's own roots."""

    root_certificates: bytes | None = None

    @classmethod
    def from_setting(cls, roots: str) -> TLS | None:
        """Empty: no TLS. "system": gRPC's own roots. Otherwise a PEM file."""
        if not roots:
            return None
        if roots == "system":
            return cls()
        try:
            return cls(Path(roots).read_bytes())
        except OSError as error:
            raise ConfigurationError(f"Cannot read the certificates {roots}: {error}") from error


@dataclass(frozen=True)
class Connection:
    """address: "host:port" or "unix:/path". api_key: as `memsvc init` printed it."""

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
        """As MEMSVC_ADDRESS, MEMSVC_API_KEY and MEMSVC_TLS_ROOTS say. Raises ConfigurationError."""
        values = os.environ if environment is None else environment
        return cls(
            values.get(ADDRESS_VARIABLE, ""),
            values.get(API_KEY_VARIABLE, ""),
            TLS.from_setting(values.get(TLS_VARIABLE, "")),
        )
