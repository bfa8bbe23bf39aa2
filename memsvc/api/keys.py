"""API keys: made, listed, rotated, revoked."""

from __future__ import annotations

import time

from google.protobuf.duration_pb2 import Duration

from memsvc import errors, names, validation
from memsvc.api.administering import find_tenant
from memsvc.api.memories import cursor
from memsvc.application import Application
from memsvc.convert import api_key_to_wire, scope_from_wire
from memsvc.principal import current_principal
from memsvc.v1 import admin_service_pb2 as pb
from storage.catalog import ApiKeyRow, ConflictError, NotFoundError, Scope, TenantRow

_MAX_MEMORIES = 100
_DEFAULT_GRACE_S, _MAX_GRACE_S = 86_400, 30 * 86_400


class KeysHandler:
    """API keys of the tenants that the caller may manage."""

    def __init__(self, application: Application) -> None:
        self._app = application
        self._catalog = application.catalog

    async def create_api_key(self, request: pb.CreateApiKeyRequest) -> pb.CreateApiKeyResponse:
        """The secret is in this reply and nowhere else."""
        wanted = request.api_key
        scope = scope_from_wire("api_key.scope", wanted.scope)
        display_name = validation.check_display_name("api_key.display_name", wanted.display_name)
        expires_us = _moment_us(
            "api_key.expire_time", wanted if wanted.HasField("expire_time") else None
        )
        memory_ids = _memory_ids(wanted, scope)
        tenant = await find_tenant(self._app, "parent", request.parent)
        memories = await self._memories(tenant, memory_ids) if memory_ids else None
        minted = self._app.authenticator.mint()
        try:
            row = await self._catalog.create_api_key(
                minted.key_id,
                tenant.uid,
                display_name,
                scope,
                operator=False,
                digest=minted.digest,
                expires_us=expires_us,
                memories=memories,
            )
        except NotFoundError as error:
            raise errors.tenant_not_found("parent") from error
        wire = api_key_to_wire(row)
        return pb.CreateApiKeyResponse(api_key=wire, secret=minted.credential)

    async def list_api_keys(self, request: pb.ListApiKeysRequest) -> pb.ListApiKeysResponse:
        """Newest first, revoked ones included."""
        limit = validation.check_page_size(request.page_size)
        tenant = await find_tenant(self._app, "parent", request.parent)
        binding = (current_principal().tenant_uid, "ListApiKeys", tenant.uid)
        position = self._app.page_tokens.open(binding, request.page_token)
        rows, after = await self._catalog.list_api_keys(tenant.uid, limit, cursor(position))
        return pb.ListApiKeysResponse(
            api_keys=[api_key_to_wire(row) for row in rows],
            next_page_token=self._app.page_tokens.issue(binding, after) if after else "",
        )

    async def revoke_api_key(self, request: pb.RevokeApiKeyRequest) -> pb.ApiKey:
        """At once: later calls are refused, open streams and reads end."""
        tenant, key = await self._find(request.name)
        try:
            row = await self._catalog.revoke_api_key(tenant.uid, key.key_id)
        finally:  # Also where the caller left, or the database, at the commit.
            self._app.authenticator.look_again(key)
        self._app.authenticator.revoked(row)
        return api_key_to_wire(row)

    async def rotate_api_key(self, request: pb.RotateApiKeyRequest) -> pb.RotateApiKeyResponse:
        """A new key of the same rights; the old one ends after the grace time."""
        grace_us = _grace_us(request)
        expires_us = _moment_us("expire_time", request if request.HasField("expire_time") else None)
        tenant, old = await self._find(request.name)
        minted = self._app.authenticator.mint()
        try:
            row, previous = await self._catalog.rotate_api_key(
                tenant.uid,
                old.key_id,
                new_key_id=minted.key_id,
                digest=minted.digest,
                grace_us=grace_us,
                expires_us=expires_us,
            )
        except ConflictError as error:
            raise errors.api_key_not_active() from error
        except NotFoundError as error:
            raise errors.api_key_not_found() from error
        finally:
            self._app.authenticator.look_again(old)
        self._app.authenticator.revoked(previous)
        return pb.RotateApiKeyResponse(
            api_key=api_key_to_wire(row),
            secret=minted.credential,
            previous=api_key_to_wire(previous),
        )

    async def _find(self, name: str) -> tuple[TenantRow, ApiKeyRow]:
        """The key, if the caller may end it: an operator's is the operator's alone."""
        tenant_id, key_id = names.parse_api_key("name", name)
        name_of_tenant = names.tenant_name(tenant_id)
        tenant = await find_tenant(self._app, "name", name_of_tenant, to_change=True)
        row = await self._catalog.find_api_key(key_id, tenant.uid)
        if row is None:
            raise errors.api_key_not_found()
        if row.operator and not current_principal().operator:
            raise errors.scope_insufficient("operator")
        return tenant, row

    async def _memories(self, tenant: TenantRow, memory_ids: list[str]) -> dict[str, str]:
        """Ids by uid: the key is for these memories and not for later ones of their names."""
        found: dict[str, str] = {}
        for index, memory_id in enumerate(memory_ids):
            try:
                memory = await self._catalog.get_memory(tenant.uid, memory_id)
            except NotFoundError as error:
                raise errors.memory_not_found(f"api_key.memories[{index}]") from error
            found[memory.uid] = memory_id
        return found


def _memory_ids(wanted: pb.ApiKey, scope: Scope) -> list[str]:
    field = "api_key.memories"
    validation.check_count(field, len(wanted.memories), low=0, high=_MAX_MEMORIES)
    if wanted.memories and scope is Scope.ADMIN:
        raise errors.field_invalid(field, "must be empty for the scope ADMIN")
    ids = [names.parse_memory(f"{field}[{i}]", name) for i, name in enumerate(wanted.memories)]
    for index, memory_id in enumerate(ids):
        if memory_id in ids[:index]:
            raise errors.field_invalid(f"{field}[{index}]", "names a memory a second time")
    return ids


def _moment_us(field: str, holder: pb.ApiKey | pb.RotateApiKeyRequest | None) -> int | None:
    """expire_time of a message that has one, in UTC microseconds."""
    if holder is None:
        return None
    moment = validation.check_time(field, holder.expire_time)
    if moment.timestamp() <= time.time():
        raise errors.field_invalid(field, "must lie in the future")
    return round(moment.timestamp() * 1_000_000)


def _grace_us(request: pb.RotateApiKeyRequest) -> int:
    grace = request.grace if request.HasField("grace") else Duration(seconds=_DEFAULT_GRACE_S)
    # Nanoseconds of either sign are refused where they do not go with the seconds.
    whole = 0 <= grace.seconds <= _MAX_GRACE_S and 0 <= grace.nanos < 1_000_000_000
    if not whole or (grace.seconds == _MAX_GRACE_S and grace.nanos):
        raise errors.field_invalid("grace", "must be between 0 and 30 days")
    return grace.seconds * 1_000_000 + grace.nanos // 1000
