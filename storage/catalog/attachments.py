"""Which models a memory is encoded under, who answers, and who takes over.

A memory is attached to a model when it has an encoding under it. One of its models
answers; another may be due to take over, which happens in the transaction that makes
its encoding complete (`progress.complete_encoding`). A memory follows its tenant's
default, or else the server's, unless its model was chosen for it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ColumnElement,
    Select,
    and_,
    delete,
    exists,
    false,
    literal,
    or_,
    select,
    text,
    true,
    update,
)

from storage.catalog.base import CatalogPart, writes
from storage.catalog.connections import Database, Statements
from storage.catalog.errors import ConflictError, ModelNotFoundError, NotFoundError
from storage.catalog.memories import CHANGED, NOT_DELETING, memory_row
from storage.catalog.rows import MemoryRow, TenantRow
from storage.catalog.shown import first_shown
from storage.catalog.tables import documents, encodings, memories, models, tenants


def _unencoded(model_id: str, identity: str, which: ColumnElement[bool]) -> Select[Any]:
    """Encoding rows, nothing of them encoded, for the memories chosen, not being deleted."""
    oldest = first_shown(documents.c.created_us, memories, memories.c.uid)
    zero = literal(0)
    return select(
        memories.c.uid.label("memory_uid"),
        literal(model_id).label("model_id"),
        literal(identity).label("identity"),
        zero.label("encoded_number"),
        memories.c.document_count.label("pending_documents"),
        memories.c.text_bytes.label("pending_bytes"),
        oldest.label("waiting_since_us"),
        zero.label("quarantined_documents"),
        zero.label("quarantined_bytes"),
        zero.label("tokens"),
        zero.label("bytes"),
        literal("").label("failure"),
        (memories.c.document_count == 0).label("complete"),
    ).where(which, NOT_DELETING)


async def attach(
    database: Database,
    connection: Statements,
    model_id: str,
    identity: str,
    which: ColumnElement[bool],
) -> None:
    """Makes the chosen memories wait under a model; those attached to it stay as they are."""
    fresh = _unencoded(model_id, identity, which)
    names = [column.name for column in fresh.selected_columns]
    insert = database.insert(encodings).from_select(names, fresh)
    await connection.execute(insert.on_conflict_do_nothing())


async def point_at(connection: Statements, model_id: str, which: ColumnElement[bool]) -> None:
    """Has a model, to which they are attached, answer for the chosen memories.

    At once where it answers already, is complete or none answers yet; else as soon as
    it is complete.
    """
    complete = exists().where(
        encodings.c.memory_uid == memories.c.uid,
        encodings.c.model_id == model_id,
        encodings.c.complete.is_(True),
    )
    now = or_(memories.c.default_model_id.in_(("", model_id)), complete)
    at_once = {"default_model_id": model_id, "next_model_id": ""}
    for when, values in ((now, at_once), (~now, {"next_model_id": model_id})):
        await connection.execute(
            update(memories).where(which, NOT_DELETING, when).values({**values, **CHANGED})
        )


async def keep_memories_out(database: Database, connection: Statements) -> None:
    """On PostgreSQL: waits for writers that have not seen a new default, keeps others out."""
    if not database.is_sqlite:
        await connection.execute(text("LOCK TABLE memories IN SHARE ROW EXCLUSIVE MODE"))


def followers(tenant: ColumnElement[bool]) -> ColumnElement[bool]:
    """Memories of the tenants chosen whose model was not chosen for them."""
    return and_(
        memories.c.own_model == false(),
        memories.c.tenant_uid.in_(select(tenants.c.uid).where(tenant)),
    )


class Attachments(CatalogPart):
    """Attaching models to memories and detaching them."""

    @writes
    async def attach_model(
        self, memory_uid: str, model_id: str, *, make_default: bool = False
    ) -> MemoryRow:
        """Has the memory encoded under a model too; attached already is no error.

        make_default: it answers as soon as its encoding is complete, and the memory
        follows no other default. Raises NotFoundError (memory), ModelNotFoundError.
        """
        which = memories.c.uid == memory_uid
        async with self._leading(memory_uid=memory_uid) as connection:
            await self._locked(connection, memory_uid)
            query = select(models.c.identity).where(models.c.model_id == model_id)
            identity: str | None = (await connection.execute(query)).scalar_one_or_none()
            if identity is None:
                raise ModelNotFoundError(f"no model {model_id}")
            await attach(self._database, connection, model_id, identity, which)
            if make_default:
                await connection.execute(update(memories).where(which).values(own_model=true()))
                await point_at(connection, model_id, which)
            return await self._locked(connection, memory_uid)

    @writes
    async def detach_model(self, memory_uid: str, model_id: str) -> MemoryRow:
        """Forgets the encoding, its quarantine included; its blocks are the caller's to purge.

        Not attached is no error. Raises ConflictError for the model that answers,
        NotFoundError (memory).
        """
        which = memories.c.uid == memory_uid
        async with self._leading(memory_uid=memory_uid) as connection:
            memory = await self._locked(connection, memory_uid)
            if memory.default_model_id == model_id:
                raise ConflictError(f"model {model_id} answers for memory {memory_uid}")
            await connection.execute(
                delete(encodings).where(
                    encodings.c.memory_uid == memory_uid, encodings.c.model_id == model_id
                )
            )
            due = (which, memories.c.next_model_id == model_id)
            await connection.execute(
                update(memories).where(*due).values({"next_model_id": "", **CHANGED})
            )
            return await self._locked(connection, memory_uid)

    @writes
    async def update_tenant(
        self,
        tenant_id: str,
        *,
        display_name: str | None = None,
        default_model_id: str | None = None,
        uid: str | None = None,
    ) -> TenantRow:
        """Sets what is not None. Raises NotFoundError (tenant), ModelNotFoundError.

        default_model_id: empty for the server's. Memories that follow the tenant's default
        are attached to it and switch as they are complete. uid: of the tenant that the caller
        looked at; another of its name is not touched.
        """
        which = tenants.c.tenant_id == tenant_id
        if uid is not None:
            which = and_(which, tenants.c.uid == uid)
        given = {"display_name": display_name, "default_model_id": default_model_id}
        values = {name: value for name, value in given.items() if value is not None}
        async with self._database.writing() as connection:
            if default_model_id is not None:
                found_uid = (await connection.execute(select(tenants.c.uid).where(which))).scalar()
                if found_uid is not None and self._server_uid:
                    await self._require_lease(connection, found_uid, "")
                await keep_memories_out(self._database, connection)
            found = select(tenants).where(which).with_for_update()
            if (await connection.execute(found)).first() is None:
                raise NotFoundError(f"no tenant {tenant_id}")
            if values:
                await connection.execute(update(tenants).where(which).values(values))
            if default_model_id is not None:
                await self._follow(connection, default_model_id, followers(which))
            tenant = (await connection.execute(select(tenants).where(which))).one()
        return TenantRow(**tenant._mapping)

    async def _follow(
        self, connection: Statements, model_id: str, which: ColumnElement[bool]
    ) -> None:
        wanted = models.c.model_id == model_id if model_id else models.c.is_default
        found = select(models.c.model_id, models.c.identity).where(wanted)
        model = (await connection.execute(found)).one_or_none()
        if model is not None:
            await attach(self._database, connection, model.model_id, model.identity, which)
            await point_at(connection, model.model_id, which)
        elif model_id:
            raise ModelNotFoundError(f"no model {model_id}")

    async def _locked(self, connection: Statements, memory_uid: str) -> MemoryRow:
        query = select(memories).where(memories.c.uid == memory_uid, NOT_DELETING)
        row = (await connection.execute(query.with_for_update())).one_or_none()
        if row is None:
            raise NotFoundError(f"no memory {memory_uid}")
        return memory_row(row)
