"""From a verified token to who calls."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256

from memsvc.names import RESOURCE_ID
from memsvc.principal import Principal
from memsvc.tokens import Claims, TokenError, TokenVerifier
from storage.catalog import Catalog, NotFoundError

_CACHED_TOKENS = 4096


@dataclass(frozen=True)
class _Known:
    """A verified token. generation: of the keys. principal: without the memories it reaches.

    memory_ids: of the memories that it names; None for all of the tenant's.
    """

    generation: int
    principal: Principal
    memory_ids: tuple[str, ...] | None


class TokenAuthenticator:
    """Finds the tenant and the memories that a token names. Tokens never make an operator.

    A token costs its signature and a query once, until the keys change. One that names
    memories costs a query a call: which memories have these names changes.
    """

    def __init__(
        self, catalog: Catalog, verifier: TokenVerifier, clock: Callable[[], float] = time.time
    ) -> None:
        self._catalog = catalog
        self._verifier = verifier
        self._clock = clock
        self._cache: OrderedDict[bytes, _Known] = OrderedDict()
        self._forgotten = 0

    def seen(self, token: str) -> bool:
        """Whether it was good before, as far as is remembered."""
        return sha256(token.encode()).digest() in self._cache

    async def authenticate(self, token: str) -> Principal:
        """Raises TokenError."""
        self._verifier.refresh()
        digest = sha256(token.encode()).digest()
        known = self._cache.get(digest)
        if known is None or known.generation != self._verifier.generation:
            known = await self._verified(digest, token)
        principal = known.principal
        assert principal.ends_us is not None
        if principal.ends_us <= self._clock() * 1e6:
            raise TokenError("has ended")
        if known.memory_ids is None:
            return principal
        uids = await self._catalog.memory_uids(principal.tenant_uid, known.memory_ids)
        return replace(principal, memories=uids)

    def forget_tenant(self, tenant_uid: str) -> None:
        """The tenant is being deleted; a later one of its name is another one."""
        self._forgotten += 1
        of_tenant = [
            digest
            for digest, known in self._cache.items()
            if known.principal.tenant_uid == tenant_uid
        ]
        for digest in of_tenant:
            del self._cache[digest]

    async def _verified(self, digest: bytes, token: str) -> _Known:
        claims = self._verifier.verify(token)
        generation, forgotten = self._verifier.generation, self._forgotten
        known = _Known(generation, await self._principal(claims), _memory_ids(claims))
        # What was found of a tenant that was forgotten meanwhile is not remembered.
        if forgotten == self._forgotten:
            self._cache[digest] = known
            if len(self._cache) > _CACHED_TOKENS:
                self._cache.popitem(last=False)
        return known

    async def _principal(self, claims: Claims) -> Principal:
        try:
            tenant = await self._catalog.get_tenant(claims.tenant_id)
        except NotFoundError as error:
            raise TokenError("names no tenant") from error
        if tenant.deleting_us is not None:
            raise TokenError("names a tenant that is being deleted")
        return Principal(
            tenant.uid,
            tenant.tenant_id,
            claims.scope,
            False,
            claims.actor,
            ends_us=claims.ends_us,
        )


def _memory_ids(claims: Claims) -> tuple[str, ...] | None:
    """Those that a memory can have."""
    if claims.memories is None:
        return None
    return tuple(filter(RESOURCE_ID.fullmatch, claims.memories))
