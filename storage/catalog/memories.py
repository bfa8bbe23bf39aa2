"""Memories: create, look up, list, change, delete."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    and_,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from storage.catalog.base import CatalogPart, new_uid, reads, writes
from storage.catalog.connections import Statements
from storage.catalog.errors import AlreadyExistsError, ConflictError, NotFoundError
from storage.catalog.rows import (
    MemoryRow,
    MemoryState,
    Packing,
    PackingMode,
    RequestRecord,
)
from storage.catalog.shown import leave
from storage.catalog.tables import encodings, memories, models, tenants

NOT_DELETING = memories.c.state != MemoryState.DELETING.value
#: Deleted, and left for what forks show of it: nothing but shown.py knows of it.
NOT_PURGED = memories.c.purged_us.is_(None)
CHANGED = {"version": memories.c.version + 1}


def memory_row(row: Row[Any]) -> MemoryRow:
    """A row of the memories table as callers see it; further columns are ignored."""
    return MemoryRow(
        uid=row.uid,
        tenant_uid=row.tenant_uid,
        memory_id=row.memory_id,
        display_name=row.display_name,
        labels=json.loads(row.labels),
        packing=Packing(PackingMode(row.packing_mode), row.window_turns, row.max_document_bytes),
        state=MemoryState(row.state),
        revision=row.revision,
        last_number=row.last_number,
        deletion_epoch=row.deletion_epoch,
        document_count=row.document_count,
        text_bytes=row.text_bytes,
        created_us=row.created_us,
        updated_us=row.updated_us,
        version=row.version,
        default_model_id=row.default_model_id,
        retention_s=row.retention_s,
        next_model_id=row.next_model_id,
        own_model=row.own_model,
        forked_from=row.forked_from or "",
        forked_revision=row.forked_revision or 0,
    )


def memory_values(row: MemoryRow) -> dict[str, Any]:
    """What of a row is inserted for it, in whole."""
    values = {**vars(row), "labels": _labels(row.labels), "state": row.state.value}
    packing = values.pop("packing")
    return {
        **values,
        "packing_mode": packing.mode.value,
        "window_turns": packing.window_turns,
        "max_document_bytes": packing.max_document_bytes,
        "forked_from": row.forked_from or None,
        "forked_revision": row.forked_revision if row.forked_from else None,
    }


def default_model_query(tenant_uid: str) -> Select[Any]:
    """Selects model_id and identity of the tenant's default model, else of the server's."""
    own = select(tenants.c.default_model_id).where(tenants.c.uid == tenant_uid).scalar_subquery()
    return (
        select(models.c.model_id, models.c.identity)
        .where(or_(models.c.model_id == own, models.c.is_default))
        .order_by((models.c.model_id == own).desc())
        .limit(1)
    )


def _labels(labels: Mapping[str, str]) -> str:
    return json.dumps(dict(labels), sort_keys=True, ensure_ascii=False)


async def first_memory(
    connection: Statements, query: Select[Any], memory_id: str, only: Iterable[str] | None
) -> MemoryRow:
    """The living one of those found, or the newest. Raises NotFoundError.

    only: uids that count as there.
    """
    if only is not None:
        query = query.where(memories.c.uid.in_(list(only)))
    alive_first = (NOT_DELETING.desc(), memories.c.created_us.desc(), memories.c.uid.desc())
    row = (await connection.execute(query.order_by(*alive_first).limit(1))).first()
    if row is None:
        raise NotFoundError(f"no memory {memory_id}")
    return memory_row(row)


def _named(tenant_uid: str, memory_id: str, uid: str | None) -> ColumnElement[bool]:
    """The living memory of that name; at most one. uid: of the only one that will do."""
    named = and_(
        memories.c.tenant_uid == tenant_uid, memories.c.memory_id == memory_id, NOT_DELETING
    )
    return named if uid is None else and_(named, memories.c.uid == uid)


class Memories(CatalogPart):
    """Memories, but not what is in them."""

    @writes
    async def create_memory(  # noqa: PLR0917 - a memory's fields
        self,
        tenant_uid: str,
        memory_id: str,
        display_name: str,
        labels: Mapping[str, str],
        packing: Packing,
        state: MemoryState,
        request: RequestRecord | None,
        *,
        uid: str | None = None,
        created_us: int | None = None,
        retention_s: int | None = None,
        most: int = 0,
    ) -> MemoryRow:
        """Makes an empty memory, attached to its tenant's or the server's default model.

        uid and created_us may be given by a caller whose recorded reply holds them. most: how
        many the tenant may have with it; 0 is no limit. Raises AlreadyExistsError if the name
        is taken by a memory that is not being deleted, NotFoundError (tenant),
        LimitReachedError, RequestRepeatedError, RequestIdReusedError.
        """
        now = created_us if created_us is not None else self._clock_us()
        values = {
            "uid": uid if uid is not None else new_uid(),
            "tenant_uid": tenant_uid,
            "memory_id": memory_id,
            "display_name": display_name,
            "labels": _labels(labels),
            "packing_mode": packing.mode.value,
            "window_turns": packing.window_turns,
            "max_document_bytes": packing.max_document_bytes,
            "retention_s": retention_s,
            "state": state.value,
            "revision": 0,
            "last_number": 0,
            "deletion_epoch": 0,
            "document_count": 0,
            "text_bytes": 0,
            "created_us": now,
            "updated_us": now,
            "version": 1,
            "next_model_id": "",
            "own_model": False,
        }
        async with self._leading(tenant_uid=tenant_uid) as connection:
            await self._keep_default_still(connection)
            await self._keep_tenant(connection, tenant_uid, alone=bool(most))
            default = (await connection.execute(default_model_query(tenant_uid))).first()
            values["default_model_id"] = default.model_id if default is not None else ""
            # First, so that a repeated call finds its reply and not its own memory.
            await self._record_request(connection, tenant_uid, request)
            await self._refuse_more(connection, tenant_uid, most)
            try:
                made = await connection.execute(insert(memories).values(values).returning(memories))
            except IntegrityError as error:
                raise AlreadyExistsError(f"memory {memory_id} exists") from error
            row = memory_row(made.one())
            if default is not None:
                counters = dict.fromkeys(ENCODING_COUNTERS, 0)
                encoding = {"memory_uid": row.uid, **default._mapping, **counters}
                await connection.execute(
                    insert(encodings).values({**encoding, "failure": "", "complete": True})
                )
        return row

    @reads
    async def get_memory(
        self,
        tenant_uid: str,
        memory_id: str,
        *,
        include_deleting: bool = False,
        only: Iterable[str] | None = None,
    ) -> MemoryRow:
        """The memory of that name. Raises NotFoundError.

        include_deleting: if there is no living one, the newest that is being deleted.
        only: uids that count as there.
        """
        query = select(memories).where(
            memories.c.tenant_uid == tenant_uid, memories.c.memory_id == memory_id, NOT_PURGED
        )
        if not include_deleting:
            query = query.where(NOT_DELETING)
        async with self._database.reading() as connection:
            return await first_memory(connection, query, memory_id, only)

    async def settled_memory(self, tenant_uid: str, memory_id: str) -> MemoryRow:
        """As get_memory, once no transaction that changes the row is under way: a commit whose
        connection broke may land after its caller was told that it failed.
        """
        memory = await self.get_memory(tenant_uid, memory_id)
        # Transactions of SQLite end with their callers.
        return memory if self._database.is_sqlite else await self._settled(memory.uid)

    @writes
    async def _settled(self, uid: str) -> MemoryRow:
        query = select(memories).where(memories.c.uid == uid, NOT_DELETING)
        async with self._database.writing() as connection:
            row = (await connection.execute(query.with_for_update())).one_or_none()
        if row is None:
            raise NotFoundError(f"no memory {uid}")
        return memory_row(row)

    @reads
    async def get_memory_by_uid(self, uid: str) -> MemoryRow:
        """The memory, in whatever state. Raises NotFoundError."""
        async with self._database.reading() as connection:
            query = select(memories).where(memories.c.uid == uid, NOT_PURGED)
            row = (await connection.execute(query)).first()
        if row is None:
            raise NotFoundError(f"no memory {uid}")
        return memory_row(row)

    @reads
    async def memory_uids(self, tenant_uid: str, memory_ids: Iterable[str]) -> frozenset[str]:
        """Uids of the tenant's living memories that have one of these names now."""
        named = memories.c.memory_id.in_(list(memory_ids))
        query = select(memories.c.uid).where(memories.c.tenant_uid == tenant_uid, named)
        async with self._database.reading() as connection:
            return frozenset((await connection.execute(query.where(NOT_DELETING))).scalars())

    @reads
    async def memories_with_retention(self) -> list[MemoryRow]:
        """Active memories whose documents expire, of every tenant that this server leads."""
        active = memories.c.state == MemoryState.ACTIVE.value
        led = self._led(memories.c.tenant_uid)
        query = select(memories).where(active, memories.c.retention_s.is_not(None), led)
        async with self._database.reading() as connection:
            found = await connection.execute(query.order_by(memories.c.created_us, memories.c.uid))
            return [memory_row(row) for row in found]

    @reads
    async def memories_in_state(self, state: MemoryState, tenant_uid: str = "") -> list[MemoryRow]:
        """Memories in that state, oldest first, of one tenant or of every one that this server
        leads; for reconciling.
        """
        which = (
            memories.c.tenant_uid == tenant_uid if tenant_uid else self._led(memories.c.tenant_uid)
        )
        query = select(memories).where(memories.c.state == state.value, NOT_PURGED, which)
        async with self._database.reading() as connection:
            found = await connection.execute(query.order_by(memories.c.created_us, memories.c.uid))
            return [memory_row(row) for row in found]

    @writes
    async def update_memory(
        self,
        tenant_uid: str,
        memory_id: str,
        display_name: str | None,
        labels: Mapping[str, str] | None,
        expected_version: int | None,
        *,
        retention_s: int | None = None,
        uid: str | None = None,
    ) -> MemoryRow:
        """Sets what is not None; a retention of 0 ends one. Raises NotFoundError, and
        ConflictError on a stale version.

        uid: of the memory that the caller looked at; another of its name is not touched.
        """
        values: dict[str, Any] = {**CHANGED, "updated_us": self._clock_us()}
        if display_name is not None:
            values["display_name"] = display_name
        if labels is not None:
            values["labels"] = _labels(labels)
        if retention_s is not None:
            values["retention_s"] = retention_s or None
        which = _named(tenant_uid, memory_id, uid)
        return await self._change(tenant_uid, which, values, expected_version)

    @writes
    async def begin_delete_memory(
        self,
        tenant_uid: str,
        memory_id: str,
        expected_version: int | None,
        *,
        uid: str | None = None,
        state: MemoryState | None = None,
    ) -> MemoryRow:
        """Makes the memory unfindable and its name free, in one step.

        uid: as in update_memory. state: the only one in which it is deleted. Raises
        NotFoundError, and ConflictError on a stale version.
        """
        values = {
            **CHANGED,
            "state": MemoryState.DELETING.value,
            "deletion_epoch": memories.c.deletion_epoch + 1,
            "updated_us": self._clock_us(),
        }
        which = _named(tenant_uid, memory_id, uid)
        if state is not None:
            which = and_(which, memories.c.state == state.value)
        return await self._change(tenant_uid, which, values, expected_version)

    async def _change(
        self,
        tenant_uid: str,
        which: ColumnElement[bool],
        values: dict[str, Any],
        expected_version: int | None,
    ) -> MemoryRow:
        guards = [] if expected_version is None else [memories.c.version == expected_version]
        async with self._leading(tenant_uid=tenant_uid) as connection:
            done = await connection.execute(
                update(memories).where(which, *guards).values(values).returning(memories)
            )
            row = done.one_or_none()
            if row is not None:
                return memory_row(row)
            found = (await connection.execute(select(memories.c.version).where(which))).first()
        if found is None:
            raise NotFoundError("no such memory")
        raise ConflictError(f"the memory is at version {found.version}, not {expected_version}")

    @writes
    async def finish_delete_memory(self, uid: str) -> None:
        """Removes the rows of a memory that is being deleted; gone already is no error.

        Raises ConflictError if it is not being deleted.
        """
        found = select(memories.c.state).where(memories.c.uid == uid, NOT_PURGED)
        async with self._leading(memory_uid=uid) as connection:
            await self._keep_default_still(connection)
            state = (await connection.execute(found.with_for_update())).scalar_one_or_none()
            if state is None:
                return
            if state != MemoryState.DELETING.value:
                raise ConflictError(f"memory {uid} is not being deleted")
            await leave(connection, uid, self._clock_us())


ENCODING_COUNTERS = (
    "encoded_number",
    "pending_documents",
    "pending_bytes",
    "quarantined_documents",
    "quarantined_bytes",
    "tokens",
    "bytes",
)
