"""API keys and who calls.

A credential is "msk_<key id>_<secret>". The key id finds the row, the secret is
32 random bytes; the catalog holds HMAC-SHA-256 of the credential under the
server key, so a stolen catalog alone opens nothing. The secret is random, hence
no slow hash.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from memsvc import errors
from memsvc.api_error import ApiError
from memsvc.limits.attempts import Attempts
from memsvc.open_calls import OpenCalls
from memsvc.principal import Principal
from memsvc.token_auth import TokenAuthenticator
from memsvc.tokens import TokenError
from storage.catalog import ApiKeyRow, Catalog, Scope
from storage.files import write_new

log = logging.getLogger(__name__)

_CREDENTIAL = re.compile(r"msk_([0-9a-f]{16})_([0-9a-f]{64})")
_KEY_BYTES = 32
_CACHED_KEYS = 4096
_NO_DIGEST = bytes(_KEY_BYTES)

_M, _A = "/memsvc.v1.MemoryService/", "/memsvc.v1.AdminService/"

#: The scope each call needs. A call that is not here is refused.
SCOPES: Mapping[str, Scope] = {
    _M + "CreateMemory": Scope.READ_WRITE,
    _M + "GetMemory": Scope.READ,
    _M + "ListMemories": Scope.READ,
    _M + "UpdateMemory": Scope.READ_WRITE,
    _M + "DeleteMemory": Scope.READ_WRITE,
    _M + "AppendTurns": Scope.READ_WRITE,
    _M + "PutDocuments": Scope.READ_WRITE,
    _M + "ListDocuments": Scope.READ,
    _M + "ListRevisions": Scope.READ,
    _M + "GetDocument": Scope.READ,
    _M + "DeleteDocuments": Scope.READ_WRITE,
    _M + "Query": Scope.READ,
    _M + "Retrieve": Scope.READ,
    _M + "WatchMemory": Scope.READ,
    _M + "ExportMemory": Scope.READ,
    _M + "ImportMemory": Scope.READ_WRITE,
    _M + "ForkMemory": Scope.READ_WRITE,
    _M + "RestoreMemory": Scope.READ_WRITE,
    _M + "AttachModel": Scope.READ_WRITE,
    _M + "DetachModel": Scope.READ_WRITE,
    _M + "ListModels": Scope.READ,
    _A + "CreateTenant": Scope.ADMIN,
    _A + "GetTenant": Scope.ADMIN,
    _A + "UpdateTenant": Scope.ADMIN,
    _A + "ListTenants": Scope.ADMIN,
    _A + "DeleteTenant": Scope.ADMIN,
    _A + "CreateApiKey": Scope.ADMIN,
    _A + "ListApiKeys": Scope.ADMIN,
    _A + "RevokeApiKey": Scope.ADMIN,
    _A + "RotateApiKey": Scope.ADMIN,
    _A + "ListWorkers": Scope.ADMIN,
    _A + "GetUsage": Scope.ADMIN,
    _A + "GetTenantQuotas": Scope.ADMIN,
    _A + "UpdateTenantQuotas": Scope.ADMIN,
    "/model_adapter.v1.WorkerRegistryService/Register": Scope.ADMIN,
    _A + "ListAuditEvents": Scope.ADMIN,
    _A + "GetDeletionReceipt": Scope.ADMIN,
    _A + "ListDeletionReceipts": Scope.ADMIN,
}

#: Calls about the tenant as a whole: not for a key of some memories only.
WHOLE_TENANT = frozenset({_M + "CreateMemory", _M + "ImportMemory", _M + "ForkMemory"})

#: Served without a credential: they tell nothing about any tenant.
OPEN_SERVICES = frozenset(
    {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "grpc.reflection.v1.ServerReflection",
    }
)


class ServerKeyError(Exception):
    """The server key file is missing, damaged or readable by others."""


@dataclass(frozen=True)
class ServerKey:
    """The root secret of one server; every use gets a key of its own."""

    secret: bytes

    def derive(self, purpose: str) -> bytes:
        """32 bytes for one purpose."""
        return hmac.digest(self.secret, b"memsvc " + purpose.encode(), hashlib.sha256)


def make_server_key(path: Path) -> ServerKey:
    """Makes the key file, mode 0600. An existing one is loaded instead."""
    with suppress(FileExistsError):
        write_new(path, f"{secrets.token_hex(_KEY_BYTES)}\n".encode())
    return load_server_key(path)


def load_server_key(path: Path) -> ServerKey:
    """Raises ServerKeyError."""
    try:
        if path.stat().st_mode & 0o077:
            raise ServerKeyError(f"{path} is readable by others; its mode must be 0600")
        secret = bytes.fromhex(path.read_text().strip())
    except FileNotFoundError as error:
        raise ServerKeyError(f"{path} is missing; run `memsvc init`") from error
    except ValueError as error:
        raise ServerKeyError(f"{path} does not hold a server key") from error
    if len(secret) != _KEY_BYTES:
        raise ServerKeyError(f"{path} does not hold a server key")
    return ServerKey(secret)


@dataclass(frozen=True)
class NewKey:
    """A minted credential. It is shown once; digest is what is stored."""

    key_id: str
    credential: str
    digest: bytes


class Authenticator:
    """Mints credentials and finds out whose one is.

    Keys of tenants that this server leads are cached, so that a call costs no query:
    revoking is done by the server that leads the tenant, and drops the key from the cache.
    calls: those in flight, which end with their credential.
    """

    def __init__(
        self,
        catalog: Catalog,
        server_key: ServerKey,
        tokens: TokenAuthenticator | None = None,
        clock: Callable[[], float] = time.time,
        *,
        attempts: Attempts | None = None,
        leads: Callable[[str], bool] = lambda _: True,
    ) -> None:
        """tokens: accepts JSON web tokens beside keys; None for keys alone.

        attempts: bounds failed ones by address; None for no bound. leads: whether this server
        leads a tenant.
        """
        self._attempts = attempts or Attempts(0)
        self._leads = leads
        self._catalog = catalog
        self._tokens = tokens
        self._hmac_key = server_key.derive("api keys")
        self._clock = clock
        # By digest: a wrong secret costs a query whether or not its key exists.
        self._cache: OrderedDict[bytes, ApiKeyRow] = OrderedDict()
        self._generation = 0
        self._closed_tenants: set[str] = set()
        self.calls = OpenCalls(clock)

    def mint(self) -> NewKey:
        """A new credential; the caller stores its digest."""
        key_id = secrets.token_hex(8)
        credential = f"msk_{key_id}_{secrets.token_hex(_KEY_BYTES)}"
        return NewKey(key_id, credential, self._digest(credential))

    async def authenticate(
        self, metadata: Iterable[tuple[str, str | bytes]] | None, peer: str = ""
    ) -> Principal:
        """metadata, peer: the call's. Raises CREDENTIAL_INVALID, the same for every cause, and
        CREDENTIAL_ATTEMPTS.

        A credential that was good before is looked at whatever its address did meanwhile, so
        that nobody is locked out by who shares the address.
        """
        credential = _bearer(metadata or ())
        key = _CREDENTIAL.fullmatch(credential)
        digest = self._digest(credential) if key is not None else b""
        seen = digest in self._cache or (self._tokens is not None and self._tokens.seen(credential))
        if not seen and (wait_s := self._attempts.wait_s(peer)):
            raise errors.credential_attempts(wait_s)
        try:
            if key is not None:
                return await self._by_key(key[1], digest)
            return await self._by_token(credential)
        except ApiError:
            self._attempts.failed(peer)
            raise

    async def _by_key(self, key_id: str, digest: bytes) -> Principal:
        row = await self._find(key_id, digest)
        # Compared even for an unknown key, so that time tells nothing.
        right = hmac.compare_digest(row.digest if row is not None else _NO_DIGEST, digest)
        if row is None or not right or not self._is_live(row):
            raise errors.credential_invalid()
        return Principal(
            row.tenant_uid,
            row.tenant_id,
            row.scope,
            row.operator,
            row.key_id,
            frozenset(row.memories) if row.memories is not None else None,
            min((end for end in (row.expires_us, row.revoked_us) if end is not None), default=None),
        )

    async def _by_token(self, credential: str) -> Principal:
        if self._tokens is None or not credential:
            raise errors.credential_invalid()
        try:
            principal = await self._tokens.authenticate(credential)
        except TokenError as error:
            log.debug("a token was refused", extra={"why": str(error)})
            raise errors.credential_invalid() from error
        if not self._leads(principal.tenant_uid):
            self._tokens.forget_tenant(principal.tenant_uid)
        if principal.tenant_uid in self._closed_tenants:
            raise errors.credential_invalid()
        return principal

    def look_again(self, row: ApiKeyRow) -> None:
        """The key may have changed: what is remembered of it counts no longer."""
        self._generation += 1
        self._cache.pop(row.digest, None)

    def revoked(self, row: ApiKeyRow) -> None:
        """The key was revoked, now or for later: what it has open ends with it.

        row: the key as it is now.
        """
        self.look_again(row)
        if row.revoked_us is not None:
            self.calls.end_key(row.key_id, row.revoked_us)

    def close_tenant(self, tenant_uid: str) -> None:
        """The tenant is being deleted: none of its keys opens anything any more."""
        self._generation += 1
        self._closed_tenants.add(tenant_uid)
        if self._tokens is not None:
            self._tokens.forget_tenant(tenant_uid)
        self.calls.end_tenant(tenant_uid)

    def _digest(self, credential: str) -> bytes:
        return hmac.digest(self._hmac_key, credential.encode(), hashlib.sha256)

    def _is_live(self, row: ApiKeyRow) -> bool:
        now_us = self._clock() * 1e6
        ended = any(end is not None and end <= now_us for end in (row.expires_us, row.revoked_us))
        return not ended and row.tenant_uid not in self._closed_tenants

    async def _find(self, key_id: str, digest: bytes) -> ApiKeyRow | None:
        row = self._cache.get(digest)
        if row is not None and self._leads(row.tenant_uid):
            self._cache.move_to_end(digest)
            return row
        while True:
            generation = self._generation
            row = await self._catalog.find_api_key(key_id)
            # A revocation during the query makes its answer stale.
            if generation == self._generation:
                break
        if row is not None and self._leads(row.tenant_uid):
            self._cache[row.digest] = row
            if len(self._cache) > _CACHED_KEYS:
                self._cache.popitem(last=False)
        return row


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The bearer credential, empty when there is none or more than one."""
    values = [value for key, value in metadata if key == "authorization"]
    if len(values) != 1 or not isinstance(values[0], str):
        return ""
    kind, _, credential = values[0].partition(" ")
    return credential if kind.lower() == "bearer" else ""
