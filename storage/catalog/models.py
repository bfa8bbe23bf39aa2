"""Models that workers have served."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from sqlalchemy import Row, Select, delete, literal, select, text, update

from storage.catalog.base import CatalogPart, page_size, reads, writes
from storage.catalog.connections import Statements
from storage.catalog.errors import NotFoundError
from storage.catalog.memories import NOT_DELETING
from storage.catalog.progress import LIVE
from storage.catalog.rows import Cursor, ModelRow
from storage.catalog.tables import documents, encodings, memories, models
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


def _unencoded(model_id: str, identity: str) -> Select[Any]:
    """Encoding rows, nothing of them encoded, for every memory not being deleted."""
    oldest = (
        select(documents.c.created_us)
        .where(documents.c.memory_uid == memories.c.uid, LIVE)
        .order_by(documents.c.number)
        .limit(1)
        .correlate(memories)
        .scalar_subquery()
    )
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
    ).where(NOT_DELETING)


class Models(CatalogPart):
    """The models' own rows."""

    @writes
    async def upsert_model(self, model: ModelRow) -> None:
        """Records a model; a default one takes that place from any other.

        A model that is new, or came back with another identity, makes every memory
        wait under it: blocks of the old identity are foreign.
        """
        values = asdict(model)
        values["is_default"] = values.pop("default")
        values["layout"] = json.dumps(values["layout"], sort_keys=True)
        async with self._database.writing() as connection:
            query = select(models.c.identity).where(models.c.model_id == model.model_id)
            known = (await connection.execute(query.with_for_update())).scalar_one_or_none()
            if known != model.identity and not self._database.is_sqlite:
                # Waits for writers that have not seen this model, keeps others out.
                await connection.execute(text("LOCK TABLE memories IN SHARE ROW EXCLUSIVE MODE"))
            if model.default:
                others = (models.c.is_default, models.c.model_id != model.model_id)
                await connection.execute(update(models).where(*others).values(is_default=False))
            insert = self._database.insert(models).values(values)
            changes = {name: insert.excluded[name] for name in values if name != "model_id"}
            await connection.execute(
                insert.on_conflict_do_update(index_elements=["model_id"], set_=changes)
            )
            if known != model.identity:
                await self._start_over(connection, model.model_id, model.identity)

    async def _start_over(self, connection: Statements, model_id: str, identity: str) -> None:
        """Gives every memory an unencoded encoding, in place of any of another identity."""
        foreign = (encodings.c.model_id == model_id, encodings.c.identity != identity)
        await connection.execute(delete(encodings).where(*foreign))
        fresh = _unencoded(model_id, identity)
        names = [column.name for column in fresh.selected_columns]
        insert = self._database.insert(encodings).from_select(names, fresh)
        await connection.execute(insert.on_conflict_do_nothing())

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
    async def default_model(self) -> ModelRow | None:
        """The default model, or None."""
        async with self._database.reading() as connection:
            row = (await connection.execute(select(models).where(models.c.is_default))).first()
        return _model(row) if row is not None else None
