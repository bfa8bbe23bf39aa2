"""From a verified token to who calls."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256

from memsvc.names import RESOURCE_ID
from memsvc.principal import Principal
from memsvc.tokens import Claims, TokenError, TokenVerifier
from storage.catalog import Catalog, NotFoundError

_CACHED_TOKENS = 4096


class TokenAuthenticator:
    """Finds the tenant and the memories that a token names. Tokens never make an operator.

    A token costs its signature and a query once, until the keys change.
    """

    def __init__(
        self, catalog: Catalog, verifier: TokenVerifier, clock: Callable[[], float] = time.time
    ) -> None:
        self._catalog = catalog
        self._verifier = verifier
        self._clock = clock
        self._cache: OrderedDict[bytes, tuple[int, Principal]] = OrderedDict()

    def seen(self, token: str) -> bool:
        """Whether it was good before, as far as is remembered."""
        return sha256(token.encode()).digest() in self._cache

    async def authenticate(self, token: str) -> Principal:
        """Raises TokenError."""
        self._verifier.refresh()
        digest = sha256(token.encode()).digest()
        generation, principal = self._cache.get(digest, (-1, None))
        if principal is None or generation != self._verifier.generation:
            claims = self._verifier.verify(token)
            generation = self._verifier.generation
            principal = await self._principal(claims)
            self._cache[digest] = (generation, principal)
            if len(self._cache) > _CACHED_TOKENS:
                self._cache.popitem(last=False)
        assert principal.ends_us is not None
        if principal.ends_us <= self._clock() * 1e6:
            raise TokenError("has ended")
        return principal

    def forget_tenant(self, tenant_uid: str) -> None:
        """The tenant is being deleted; a later one of its name is another one."""
        for digest in [d for d, (_, p) in self._cache.items() if p.tenant_uid == tenant_uid]:
            del self._cache[digest]

    async def _principal(self, claims: Claims) -> Principal:
        try:
            tenant = await self._catalog.get_tenant(claims.tenant_id)
        except NotFoundError as error:
            raise TokenError("names no tenant") from error
        memories = None
        if claims.memories is not None:
            memories = await self._memories(tenant.uid, claims.memories)
        return Principal(
            tenant.uid,
            tenant.tenant_id,
            claims.scope,
            False,
            claims.actor,
            memories,
            claims.ends_us,
        )

    async def _memories(self, tenant_uid: str, ids: tuple[str, ...]) -> frozenset[str]:
        """Uids of those that exist; what does not is not reached."""
        found: set[str] = set()
        for memory_id in filter(RESOURCE_ID.fullmatch, ids):
            try:
                found.add((await self._catalog.get_memory(tenant_uid, memory_id)).uid)
            except NotFoundError:
                continue
        return frozenset(found)
