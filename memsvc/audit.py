"""Writes down administrative and destructive acts, before and after they happen.

An act has an entry with the outcome STARTED before anything is done and one with how it
ended (OK, LEFT or an ErrorReason): what a crash cut short has the first alone. An act
that cannot be written down is not done. Entries name a key, an action and a resource,
and hold nothing that a user wrote: a name that is none is left out.

A call of such an act, or of any other administrative one, that the caller's key has too small
a scope for has one entry, with the outcome SCOPE_INSUFFICIENT. A key can make only so many of
them: a trail is never cut, and whoever holds a stolen key must not be able to fill the disk.

An entry belongs to the tenant it is about; the making and the deletion of tenants belong
to the trail of the operator who did it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from memsvc import names
from memsvc.api_error import ApiError
from memsvc.auth import SCOPES, ServerKey
from memsvc.limits.bucket import Bucket
from memsvc.principal import Principal, current_principal
from memsvc.v1.errors_pb2 import ErrorReason
from storage.catalog import Catalog, CatalogError, NotFoundError, Scope

log = logging.getLogger(__name__)

SCOPE_INSUFFICIENT = ErrorReason.Name(ErrorReason.SCOPE_INSUFFICIENT)
STARTED, OK, LEFT, FAILED = "STARTED", "OK", "LEFT", "FAILED"

_M, _A = "/memsvc.v1.MemoryService/", "/memsvc.v1.AdminService/"


def _created_tenant(request: Any) -> str:
    return names.tenant_name(request.tenant_id)


def _changes_retention(request: Any) -> bool:
    """Whether documents may go by it that would have stayed."""
    return request.memory.HasField("retention") or "retention" in request.update_mask.paths


@dataclass(frozen=True)
class Audited:
    """resource: what a request is about. made: what a reply says was made, if anything.
    meant: whether a request is such an act.
    """

    resource: Callable[[Any], str]
    made: Callable[[Any], str] = lambda _: ""
    meant: Callable[[Any], bool] = lambda _: True


#: The acts that are written down. A test goes through all calls that are not reads.
AUDITED: Mapping[str, Audited] = {
    _M + "UpdateMemory": Audited(lambda request: request.memory.name, meant=_changes_retention),
    _M + "DeleteMemory": Audited(lambda request: request.name),
    _M + "DeleteDocuments": Audited(lambda request: request.parent),
    _M + "ExportMemory": Audited(lambda request: request.name),
    _M + "ForkMemory": Audited(lambda request: request.name),
    _M + "RestoreMemory": Audited(lambda request: request.name),
    _M + "DetachModel": Audited(lambda request: request.memory),
    _A + "CreateTenant": Audited(_created_tenant),
    _A + "UpdateTenant": Audited(lambda request: request.tenant.name),
    _A + "DeleteTenant": Audited(lambda request: request.name),
    _A + "CreateApiKey": Audited(lambda request: request.parent, lambda reply: reply.api_key.name),
    _A + "RotateApiKey": Audited(lambda request: request.name, lambda reply: reply.api_key.name),
    _A + "RevokeApiKey": Audited(lambda request: request.name),
    _A + "UpdateTenantQuotas": Audited(lambda request: request.quotas.name),
}

#: Refusals of one key that are written down in a minute; the others are in the log.
REFUSALS_PER_MINUTE = 30
_KEYS_KEPT = 4096

#: Acts whose entries belong to who did them and not to the tenant they are about.
_OF_THE_OPERATOR = {_A + "CreateTenant", _A + "DeleteTenant"}


@dataclass(frozen=True)
class _Act:
    tenant_uid: str
    actor: str
    action: str
    resource: str


class AuditTrail:
    """Adds to the trail of one server."""

    def __init__(self, catalog: Catalog, server_key: ServerKey) -> None:
        self._catalog = catalog
        self._key = audit_key(server_key)
        self._refusals: OrderedDict[str, Bucket] = OrderedDict()

    def unary(
        self, method: str, run: Callable[[Any, Any], Awaitable[Any]]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        """The handler of an audited call, with its entries."""

        async def audited(request: Any, context: Any) -> Any:
            if not AUDITED[method].meant(request):
                return await run(request, context)
            act = await self._begin(method, request)
            try:
                reply = await run(request, context)
            except BaseException as error:
                await self._end(act, _outcome(error))
                raise
            await self._end(act, OK, AUDITED[method].made(reply))
            return reply

        return audited

    def streaming(
        self, method: str, run: Callable[[Any, Any], AsyncIterator[Any]]
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        """As `unary`, for a call that streams its reply."""

        async def audited(request: Any, context: Any) -> AsyncIterator[Any]:
            act = await self._begin(method, request)
            try:
                async with aclosing(run(request, context)) as replies:  # type: ignore[type-var]  # generators
                    async for reply in replies:
                        yield reply
            except BaseException as error:
                await self._end(act, _outcome(error))
                raise
            await self._end(act, OK)

        return audited

    async def refused(self, method: str, caller: Principal) -> None:
        """The caller's scope was too small for a call. What it named was not looked at."""
        if method not in AUDITED and SCOPES[method] is not Scope.ADMIN:
            return
        action = method.rpartition("/")[2]
        if not self._may_add(caller.key_id):
            log.warning("a scope was too small, again", extra={"action": action})
            return
        try:
            await self._add(
                _Act(caller.tenant_uid, caller.key_id, action, ""), SCOPE_INSUFFICIENT, ""
            )
        except CatalogError:
            # The call is refused all the same.
            log.exception("a refusal was not written down", extra={"action": action})

    def _may_add(self, key_id: str) -> bool:
        now = time.monotonic()
        bucket = self._refusals.setdefault(key_id, Bucket(REFUSALS_PER_MINUTE, now))
        self._refusals.move_to_end(key_id)
        if len(self._refusals) > _KEYS_KEPT:
            self._refusals.popitem(last=False)
        if bucket.wait_s(now):
            return False
        bucket.spend(1, now)
        return True

    async def _begin(self, method: str, request: Any) -> _Act:
        caller, resource = current_principal(), names.clean(AUDITED[method].resource(request))
        tenant = await self._tenant(method, caller, resource)
        act = _Act(tenant, caller.key_id, method.rpartition("/")[2], resource)
        await self._add(act, STARTED, resource)
        return act

    async def _end(self, act: _Act, outcome: str, made: str = "") -> None:
        """What was done is done: a trail that cannot be written now is the operator's to see."""
        try:
            await self._add(act, outcome, made or act.resource)
        except CatalogError:
            log.exception("an act's end was not written down", extra={"action": act.action})

    async def _add(self, act: _Act, outcome: str, resource: str) -> None:
        await self._catalog.add_audit(
            self._key, act.tenant_uid, act.actor, act.action, resource=resource, outcome=outcome
        )

    async def _tenant(self, method: str, caller: Principal, resource: str) -> str:
        """Uid of the tenant whose trail it is; the operator acts on others too."""
        collection, _, rest = resource.partition("/")
        elsewhere = caller.operator and collection == "tenants" and method not in _OF_THE_OPERATOR
        if not elsewhere:
            return caller.tenant_uid
        try:
            return (await self._catalog.get_tenant(rest.partition("/")[0])).uid
        except NotFoundError:
            return caller.tenant_uid


def audit_key(server_key: ServerKey) -> bytes:
    """The key of the chain's digests."""
    return server_key.derive("audit")


def _outcome(error: BaseException) -> str:
    if isinstance(error, ApiError):
        return ErrorReason.Name(error.reason)
    return LEFT if isinstance(error, asyncio.CancelledError | GeneratorExit) else FAILED
