"""Models that workers have served."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from sqlalchemy import Row, delete, select, update

from storage.catalog.attachments import attach, followers, keep_memories_out, point_at
from storage.catalog.base import MAX_BOUND, CatalogPart, page_size, reads, writes
from storage.catalog.connections import Statements
from storage.catalog.errors import NotFoundError
from storage.catalog.memories import default_model_query
from storage.catalog.rows import Cursor, ModelRow
from storage.catalog.tables import encodings, memories, models, tenants
from storage.layout import KVLayout


def _model(row: Row[Any]) -> ModelRow:
    layout = json.loads(row.layout)
    return ModelRow(
        model_id=row.model_id,
        display_name=row.display_name,
        identity=row.identity,
        layout=KVLayout(**{**layout, "routed_layers": tuple(layout["routed_layers"])}),
        max_document_tokens=row.max_document_tokens,
        max_question_tokens=row.max_question_tokens,
        max_answer_tokens=row.max_answer_tokens,
        default=row.is_default,
        last_seen_us=row.last_seen_us,
    )


class Models(CatalogPart):
    """The models' own rows."""

    @writes
    async def upsert_model(self, model: ModelRow) -> None:
        """Records a model; a default one takes that place from any other.

        Memories that follow the server's default are attached to a new one, and switch
        as they are complete. A model that came back with another identity starts over
        in every memory attached to it: blocks of the old one are foreign.
        """
        values = asdict(model)
        values["is_default"] = values.pop("default")
        values["layout"] = json.dumps(values["layout"], sort_keys=True)
        async with self._database.writing() as connection:
            query = select(models.c.identity, models.c.is_default)
            query = query.where(models.c.model_id == model.model_id).with_for_update()
            known = (await connection.execute(query)).one_or_none()
            replaced = known is not None and known.identity != model.identity
            promoted = model.default and (known is None or not known.is_default)
            if replaced or promoted:
                await keep_memories_out(self._database, connection)
            if model.default:
                others = (models.c.is_default, models.c.model_id != model.model_id)
                await connection.execute(update(models).where(*others).values(is_default=False))
            insert = self._database.insert(models).values(values)
            changes = {name: insert.excluded[name] for name in values if name != "model_id"}
            await connection.execute(
                insert.on_conflict_do_update(index_elements=["model_id"], set_=changes)
            )
            if replaced:
                await self._start_over(connection, model.model_id, model.identity)
            if promoted:
                which = followers(tenants.c.default_model_id == "")
                await attach(self._database, connection, model.model_id, model.identity, which)
                await point_at(connection, model.model_id, which)

    async def _start_over(self, connection: Statements, model_id: str, identity: str) -> None:
        """Gives memories an unencoded encoding in place of the one of another identity."""
        foreign = (encodings.c.model_id == model_id, encodings.c.identity != identity)
        held = select(encodings.c.memory_uid).where(*foreign)
        uids = list((await connection.execute(held)).scalars())
        await connection.execute(delete(encodings).where(*foreign))
        for start in range(0, len(uids), MAX_BOUND):
            which = memories.c.uid.in_(uids[start : start + MAX_BOUND])
            await attach(self._database, connection, model_id, identity, which)

    @reads
    async def list_models(
        self, limit: int, after: Cursor | None = None
    ) -> tuple[list[ModelRow], Cursor | None]:
        """One page of models by model id, and where the next one starts."""
        limit = page_size(limit)
        query = select(models).order_by(models.c.model_id).limit(limit + 1)
        if after is not None:
            query = query.where(models.c.model_id > after[1])
        async with self._database.reading() as connection:
            rows = [_model(row) for row in await connection.execute(query)]
        return rows[:limit], (0, rows[limit - 1].model_id) if len(rows) > limit else None

    @reads
    async def get_model(self, model_id: str) -> ModelRow:
        """The model of that id. Raises NotFoundError."""
        query = select(models).where(models.c.model_id == model_id)
        async with self._database.reading() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise NotFoundError(f"no model {model_id}")
        return _model(row)

    @reads
    async def models_of(self, identity: str) -> list[ModelRow]:
        """Models of that identity, by model id."""
        query = select(models).where(models.c.identity == identity).order_by(models.c.model_id)
        async with self._database.reading() as connection:
            return [_model(row) for row in await connection.execute(query)]

    @reads
    async def default_model_of(self, tenant_uid: str) -> ModelRow | None:
        """The tenant's default model, else the server's, or None."""
        which = default_model_query(tenant_uid).with_only_columns(models)
        async with self._database.reading() as connection:
            row = (await connection.execute(which)).first()
        return _model(row) if row is not None else None

    @reads
    async def default_model(self) -> ModelRow | None:
        """The server's default model, or None."""
        async with self._database.reading() as connection:
            row = (await connection.execute(select(models).where(models.c.is_default))).first()
        return _model(row) if row is not None else None
