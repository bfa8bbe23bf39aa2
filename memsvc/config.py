"""Every setting of the server, and the one place that reads them.

A setting comes from, first match wins: the command line, a MEMSVC_* environment
variable, the TOML file, its default. docs/configuration.md lists them all; a
test fails when one is missing there.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memsvc.settings import ConfigError, check, parsed, setting
from storage import failpoints
from storage.paths import DataFolder

ENV_PREFIX = "MEMSVC_"
#: Names the TOML file itself; everything else in the environment is a setting.
ENV_FILE = "MEMSVC_CONFIG"

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class Config:
    """Settings of one server. Sizes in bytes, times in seconds, unless the name says more."""

    # Path is immutable, which the rule does not know.
    data: Path = setting(Path("memsvc-data"), "Data folder; all that is durable.")  # noqa: RUF009
    listen: str = setting("127.0.0.1:7460", "Address to serve on: host:port or unix:PATH.")
    tls_certificate: str = setting("", "PEM certificate chain file. Empty: no TLS.")
    tls_private_key: str = setting("", "PEM private key file of tls_certificate.")
    tls_client_roots: str = setting(
        "",
        "PEM certificates that must have signed the one a client shows, beside its credential. "
        "Empty: clients show none.",
    )
    jwt_issuer: str = setting("", "Issuer of the JSON web tokens to accept. Empty: none are.")
    jwt_audience: str = setting("", "Audience that a token must be for.")
    jwt_jwks_file: str = setting(
        "", "JWKS file with the issuer's public keys; read anew when it changes."
    )
    jwt_claim_prefix: str = setting(
        "memsvc_", "Before the names of the claims tenant, scope and memories."
    )
    jwt_leeway_s: float = setting(
        30.0, "How far the issuer's clock may be off this one.", low=0, high=300
    )
    jwt_max_lifetime_s: float = setting(
        86_400.0, "Tokens that end later than this from now are refused.", low=60, high=30 * 86_400
    )
    reflection: bool = setting(True, "Serve gRPC reflection.")
    database_url: str = setting(
        "",
        "Catalog: sqlite:///FILE or postgresql://... Empty: SQLite in the data folder.",
        secret=True,
    )

    encryption: bool = setting(
        True, "Encrypt what is stored. Chosen at `memsvc init`, not to be changed after."
    )
    root_key_file: str = setting(
        "", "File of root keys, mode 0600. Empty: root.key in the data folder."
    )
    root_key: str = setting(
        "",
        "Root keys themselves, base64 of 32 bytes each, instead of a file; the first wraps, "
        "all unwrap.",
        secret=True,
    )

    wipe_freed_memory: bool = setting(
        False,
        "Overwrite memory as soon as it is freed, in the server and the worker that it starts; "
        "slower (docs/operations/deletion.md).",
    )

    worker_address: str = setting(
        "",
        "Addresses of workers that run apart, separated by commas; the first one's model is the "
        "default, and workers of one model share its memories. none: workers register themselves. "
        "Empty: the server starts and supervises one.",
    )
    worker_tls_roots: str = setting(
        "",
        "PEM certificates that must have signed those of workers on TCP; with "
        "worker_tls_certificate and worker_tls_private_key, mutual TLS. Empty: no TLS.",
    )
    worker_tls_certificate: str = setting("", "PEM certificate that workers are shown.")
    worker_tls_private_key: str = setting("", "PEM private key of worker_tls_certificate.")
    worker_model: str = setting(
        "default", "Model of the supervised worker: default, fake or a path."
    )
    worker_adapter: str = setting(
        "auto", "Adapter file of the supervised worker, none, or auto: what ships with the model."
    )
    worker_device: str = setting(
        "auto", "Device of the supervised worker.", choices=("auto", "cpu", "cuda")
    )
    worker_dtype: str = setting(
        "auto", "Compute type of the supervised worker.", choices=("auto", "bf16", "fp32")
    )
    worker_threads: int = setting(
        0, "Threads of the supervised worker. 0: all cores.", low=0, high=1024
    )
    worker_routing_budget: int = setting(
        256 * MIB,
        "Bytes of routing keys the supervised worker keeps resident. 0: its own choice, by its "
        "device.",
        low=0,
    )
    worker_routing_keys: str = setting(
        "auto",
        "How routing keys lie on the supervised worker's device.",
        choices=("auto", "float", "int8", "int4", "two-stage"),
    )
    worker_content_budget: int = setting(
        1024 * MIB, "Bytes of content KV the supervised worker keeps in RAM.", low=MIB
    )
    worker_lexical_budget: int = setting(
        256 * MIB, "Bytes of full-text indexes the supervised worker keeps in RAM.", low=MIB
    )
    worker_attribute_budget: int = setting(
        64 * MIB, "Bytes of what filters look at the supervised worker keeps in RAM.", low=MIB
    )
    worker_start_timeout_s: float = setting(
        300.0, "How long a worker may take until it serves.", low=1, high=3600
    )

    encode_batch_documents: int = setting(
        128, "Most documents of one Encode call to a worker.", low=1, high=256
    )
    encode_batch_bytes: int = setting(
        256 * KIB, "Most bytes of text of one Encode call to a worker.", low=KIB, high=2 * MIB
    )
    reencode_share: float = setting(
        0.25,
        "Share of a worker's time for memories that another model answers for until this worker's "
        "model has caught up.",
        low=0.01,
        high=1,
    )
    backlog_documents: int = setting(
        50_000, "Documents that may wait for encoding before writes are refused.", low=1
    )
    backlog_bytes: int = setting(
        256 * MIB, "Bytes of text that may wait for encoding before writes are refused.", low=KIB
    )
    query_wait_s: float = setting(
        60.0,
        "How long a query without a deadline waits for its revision to be encoded.",
        low=0,
        high=3600,
    )

    max_concurrent_calls: int = setting(
        256, "Calls served at once; more are refused with OVERLOADED.", low=1, high=100_000
    )
    concurrent_work: int = setting(
        8, "Calls worked on at once; the others wait, tenants in turn.", low=5, high=10_000
    )
    tenant_work_share: float = setting(
        0.5,
        "Seconds of work in a second that a tenant's calls may take while one that uses less than "
        "half as much is about. 0: any.",
        low=0,
        high=10_000,
    )
    put_budget: int = setting(
        256 * MIB,
        "Bytes that PutDocuments streams hold in memory at once; more are refused with OVERLOADED.",
        low=64 * MIB,
    )
    failed_credentials_per_minute: int = setting(
        300,
        "Calls of one address without a valid credential; above that, credentials that the server "
        "has not seen before are refused for a moment. 0: any.",
        low=0,
    )
    server_requests_per_minute: int = setting(0, "Calls of all tenants together. 0: any.", low=0)
    server_tokens_per_minute: int = setting(
        0, "Tokens read and written by models for all tenants together. 0: any.", low=0
    )
    server_bytes_per_minute: int = setting(
        0, "Bytes received from and sent to all tenants together. 0: any.", low=0
    )
    requests_per_minute: int = setting(0, "Quota of a tenant: calls. 0: none.", low=0)
    tokens_per_minute: int = setting(
        0, "Quota of a tenant: tokens that models read and write for it. 0: none.", low=0
    )
    bytes_per_minute: int = setting(
        0, "Quota of a tenant: bytes received from it and sent to it. 0: none.", low=0
    )
    concurrent_calls: int = setting(
        0,
        "Quota of a tenant: calls at once. 0: none but its fair part of max_concurrent_calls.",
        low=0,
    )
    concurrent_queries: int = setting(
        0, "Quota of a tenant: Query and Retrieve calls at once. 0: none.", low=0
    )
    stream_seconds: int = setting(
        86_400, "Quota of a tenant: how long a stream may last. 0: none.", low=0
    )
    stream_idle_s: float = setting(
        120.0,
        "How long the client of a stream may send nothing, or read nothing of what waits for it.",
        low=0.05,
        high=86_400,
    )
    max_memories_per_tenant: int = setting(0, "Quota of a tenant. 0: none.", low=0)
    max_documents_per_memory: int = setting(0, "Quota of a tenant. 0: none.", low=0)
    max_text_bytes_per_memory: int = setting(0, "Quota of a tenant. 0: none.", low=0)
    lease_s: float = setting(
        15.0,
        "With PostgreSQL: how long a server that is not heard of keeps its tenants, unless its "
        "process is seen to have ended.",
        low=1,
        high=600,
    )
    open_environments: int = setting(
        64, "Tenants whose LMDB environment stays open.", low=1, high=4096
    )
    max_store_bytes: int = setting(
        64 * 1024 * MIB,
        "Most bytes one tenant's LMDB file may take; then writes are refused with STORAGE_FULL.",
        low=MIB,
    )
    reader_threads: int = setting(4, "Threads that read LMDB.", low=1, high=64)
    transfer_keep_s: float = setting(
        600.0,
        "How long a cut export or import that has a request_id waits to go on. 0: not at all.",
        low=0,
        high=86_400,
    )
    request_memory_s: float = setting(
        86_400.0, "How long a request_id is remembered.", low=60, high=30 * 86_400
    )

    packing: str = setting(
        "turn",
        "How appended turns become documents in a memory that does not say.",
        choices=("turn", "window", "session"),
    )

    drain_grace_s: float = setting(
        20.0, "How long calls in flight may go on after SIGTERM.", low=0, high=3600
    )
    max_connections: int = setting(
        4096, "Connections at once; more are closed at once.", low=1, high=1_000_000
    )
    keepalive_s: float = setting(
        60.0, "Idle time after which the server probes a client's connection.", low=1, high=7200
    )
    metrics_listen: str = setting(
        "", "host:port to serve Prometheus metrics on, over HTTP without TLS. Empty: none."
    )
    metrics_tenants: bool = setting(False, "Count calls by tenant in the metrics, too.")
    log_level: str = setting("info", "Log level.", choices=("debug", "info", "warning", "error"))
    log_format: str = setting(
        "text", "Log lines as key=value text or as JSON.", choices=("text", "json")
    )
    failpoint: str = setting(
        "",
        "For crash tests: NAME or NAME:N of storage/failpoints.py, where the process ends as by "
        "kill -9 when it comes by for the Nth time.",
    )

    def __post_init__(self) -> None:
        for declared in dataclasses.fields(self):
            check(declared, getattr(self, declared.name))
        if bool(self.tls_certificate) != bool(self.tls_private_key):
            raise ConfigError("tls_certificate and tls_private_key must be set together")
        if self.tls_client_roots and not self.tls_certificate:
            raise ConfigError("tls_client_roots needs tls_certificate")
        _all_or_none(self, "worker_tls_roots", "worker_tls_certificate", "worker_tls_private_key")
        _all_or_none(self, "jwt_issuer", "jwt_audience", "jwt_jwks_file")
        if not self.listen:
            raise ConfigError("listen must not be empty")
        if self.failpoint:
            try:
                failpoints.parse(self.failpoint)
            except ValueError as error:
                raise ConfigError(f"failpoint: {error}") from error

    @property
    def folder(self) -> DataFolder:
        """The data folder's layout."""
        return DataFolder(self.data)

    @property
    def catalog_url(self) -> str:
        """database_url, or SQLite in the data folder."""
        # Late: SQLAlchemy takes longer to load than a client's whole command takes.
        from storage.catalog.database import sqlite_url  # noqa: PLC0415

        return self.database_url or sqlite_url(self.folder.catalog.absolute())

    @property
    def root_key_path(self) -> Path:
        """root_key_file, or its default."""
        return Path(self.root_key_file) if self.root_key_file else self.folder.root_key

    def shown(self) -> dict[str, str]:
        """Every setting for people and logs; secrets are only said to be set."""
        values: dict[str, str] = {}
        for declared in dataclasses.fields(self):
            value = getattr(self, declared.name)
            hidden = declared.metadata["secret"] and value
            values[declared.name] = "(set)" if hidden else str(value)
        return values


def load_config(
    arguments: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Config:
    """Builds the settings. arguments: the command line's; None in it means not given.

    file: a TOML file of settings at top level; MEMSVC_CONFIG names one otherwise.
    Raises ConfigError.
    """
    environ = environ or {}
    if file is None and environ.get(ENV_FILE):
        file = Path(environ[ENV_FILE])
    values: dict[str, object] = {}
    if file is not None:
        values.update(_from_file(file))
    values.update(_from_environment(environ))
    values.update({k: v for k, v in (arguments or {}).items() if v is not None})
    settings = {declared.name: declared for declared in dataclasses.fields(Config)}
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in settings:
            raise ConfigError(f"{name}: no such setting")
        given[name] = parsed(settings[name], value)
    return Config(**given)


def _from_file(file: Path) -> dict[str, object]:
    try:
        return tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from error


def _from_environment(environ: Mapping[str, str]) -> dict[str, object]:
    """Other MEMSVC_* variables, of the client for one, are not the server's settings."""
    names = {declared.name for declared in dataclasses.fields(Config)}
    found: dict[str, object] = {}
    for variable, value in environ.items():
        name = variable.removeprefix(ENV_PREFIX).lower()
        if variable.startswith(ENV_PREFIX) and name in names:
            found[name] = value
    return found


def _all_or_none(config: Config, *names: str) -> None:
    if len({bool(getattr(config, name)) for name in names}) > 1:
        raise ConfigError(f"{', '.join(names)} must be set together")
