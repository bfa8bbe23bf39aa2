"""Encodings: the queue that is derived from the documents, and its watermarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Row, delete, func, insert, not_, select, true, update

from storage.catalog.base import MAX_PAGE, CatalogPart, page_size, reads, slices, writes
from storage.catalog.connections import Statements
from storage.catalog.errors import ConflictError, NotFoundError
from storage.catalog.memories import NOT_DELETING, memory_row
from storage.catalog.progress import (
    BEHIND,
    complete_encoding,
    encoding_query,
    encoding_row,
    encodings_of,
    live_between,
    oldest_pending_us,
    scaled,
    set_encoding,
)
from storage.catalog.rows import EncodingRow, MemoryRow, MemoryState
from storage.catalog.shown import MAX_NUMBER, shown
from storage.catalog.tables import documents, encodings, memories, quarantined_documents
from storage.catalog.usage import count_usage


class Encodings(CatalogPart):
    """Encoding progress of every memory under every model."""

    async def ensure_encoding(self, memory_uid: str, model_id: str, identity: str) -> EncodingRow:
        """The encoding under that model identity, made or started over as needed.

        An encoding of another identity of the model starts over: its blocks are
        foreign now. Raises NotFoundError (memory).
        """
        current = await self.get_encoding(memory_uid, model_id)
        if current is not None and current.identity == identity:
            return current
        return await self._make_encoding(memory_uid, model_id, identity)

    @writes
    async def _make_encoding(self, memory_uid: str, model_id: str, identity: str) -> EncodingRow:
        async with self._leading(memory_uid=memory_uid) as connection:
            memory = await self._lock_memory(connection, memory_uid)
            which = (encodings.c.memory_uid == memory_uid, encodings.c.model_id == model_id)
            found = select(encodings.c.identity).where(*which)
            existing = (await connection.execute(found)).scalar_one_or_none()
            if existing != identity:
                # Takes its quarantine records with it.
                await connection.execute(delete(encodings).where(*which))
                values = {
                    "memory_uid": memory_uid,
                    "model_id": model_id,
                    "identity": identity,
                    "encoded_number": 0,
                    "pending_documents": memory.document_count,
                    "pending_bytes": memory.text_bytes,
                    "waiting_since_us": await oldest_pending_us(connection, memory_uid, 0),
                    **dict.fromkeys(("quarantined_documents", "quarantined_bytes"), 0),
                    **dict.fromkeys(("tokens", "bytes"), 0),
                    "failure": "",
                    "complete": not memory.document_count,
                }
                await connection.execute(insert(encodings).values(values))
            return await self._read(connection, memory_uid, model_id)

    @reads
    async def get_encoding(self, memory_uid: str, model_id: str) -> EncodingRow | None:
        """The encoding, or None where the memory has none under that model."""
        query = encoding_query().where(
            encodings.c.memory_uid == memory_uid, encodings.c.model_id == model_id
        )
        async with self._database.reading() as connection:
            row = (await connection.execute(query)).one_or_none()
        return encoding_row(row) if row is not None else None

    async def list_encodings(self, memory_uid: str) -> list[EncodingRow]:
        """The memory's encodings by model id."""
        return (await self.list_encodings_for([memory_uid]))[memory_uid]

    @reads
    async def list_encodings_for(self, memory_uids: Sequence[str]) -> dict[str, list[EncodingRow]]:
        """Encodings by memory uid, each list by model id; every uid given is a key."""
        async with self._database.reading() as connection:
            return await encodings_of(connection, memory_uids)

    @reads
    async def backlog(
        self, model_id: str, limit: int, *, behind: bool = False
    ) -> list[tuple[str, MemoryRow, EncodingRow]]:
        """Active memories with documents to encode, the longest waiting document first.

        Each as (tenant_uid, memory, encoding). When there are more than `limit`, tenants
        take turns: first the longest waiting memory of each, and so on. behind: those that
        another model answers for until this one has caught up, instead of those that wait
        for this one. Failed encodings are left out until `resume_encodings`, a rewind, or
        the deletion of what waits.
        """
        limit = page_size(limit)
        waiting = (
            encodings.c.model_id == model_id,
            encodings.c.pending_documents > 0,
            encodings.c.failure == "",
            BEHIND if behind else not_(BEHIND),
            memories.c.state == MemoryState.ACTIVE.value,
            self._led(memories.c.tenant_uid),
        )
        age = (encodings.c.waiting_since_us, encodings.c.memory_uid)
        query = encoding_query().where(*waiting).order_by(*age).limit(limit)
        async with self._database.reading() as connection:
            rows = (await connection.execute(query)).all()
            if len(rows) == limit:
                # Only now, as it looks at every waiting memory.
                turn = func.row_number().over(partition_by=memories.c.tenant_uid, order_by=age)
                fair = encoding_query().where(*waiting).order_by(turn, *age).limit(limit)
                rows = (await connection.execute(fair)).all()
        return [(row.tenant_uid, memory_row(row), encoding_row(row)) for row in rows]

    @reads
    async def pending_by_tenant(self, model_id: str) -> dict[str, tuple[int, int]]:
        """Documents and text bytes that wait under the model, failed encodings included.

        Those of memories that another model answers for meanwhile do not count.
        """
        query = (
            select(
                memories.c.tenant_uid,
                func.sum(encodings.c.pending_documents),
                func.sum(encodings.c.pending_bytes),
            )
            .join_from(encodings, memories)
            .where(
                encodings.c.model_id == model_id,
                encodings.c.pending_documents > 0,
                not_(BEHIND),
                NOT_DELETING,
                self._led(memories.c.tenant_uid),
            )
            .group_by(memories.c.tenant_uid)
        )
        async with self._database.reading() as connection:
            rows = (await connection.execute(query)).all()
        return {uid: (int(count), int(text_bytes)) for uid, count, text_bytes in map(tuple, rows)}

    @reads
    async def next_numbers(self, memory_uid: str, model_id: str, limit: int) -> list[int]:
        """The next live documents above the watermark, ascending, at most `limit`."""
        query = select(encodings.c.encoded_number).where(
            encodings.c.memory_uid == memory_uid, encodings.c.model_id == model_id
        )
        async with self._database.reading() as connection:
            above: int | None = (await connection.execute(query)).scalar_one_or_none()
            if above is None:
                return []
            number, size = (documents.c.number,), page_size(limit)
            rows = await shown(connection, memory_uid, number, above + 1, limit=size)
        return [row.number for row in rows]

    @writes
    async def commit_encoded(  # noqa: PLR0917 - a batch's outcome has that many parts
        self,
        memory_uid: str,
        model_id: str,
        identity: str,
        up_to_number: int,
        documents: int,
        tokens: int,
        bytes: int,  # noqa: A002 - the wire's and the table's word
        quarantined: Mapping[int, str],
        above_number: int = 0,
        spent_tokens: int = 0,
    ) -> EncodingRow:
        """Moves the watermark to up_to_number, after the blocks below it are durable.

        An encoding is complete when nothing waits under it, or no more than under the
        model that answers; if it was to take over from that one, it does now.
        documents, tokens, bytes: of the blocks this batch made. quarantined: number
        to reason of the documents it set aside. Documents deleted meanwhile count no
        more. above_number: the watermark that the batch began at; 0 for one of all documents.
        spent_tokens: added to what the tenant has had encoded.
        Raises ConflictError if the encoding has another identity, has moved on, or was
        rewound so that documents wait which the batch does not cover; NotFoundError (memory
        or encoding).
        """
        async with self._leading(memory_uid=memory_uid) as connection:
            memory = await self._lock_memory(connection, memory_uid)
            encoding = await self._lock_encoding(connection, memory_uid, model_id)
            above = encoding.encoded_number
            if encoding.identity != identity:
                raise ConflictError(f"model {model_id} now has another identity")
            if above < above_number:
                raise ConflictError(f"watermark {above} was put back from {above_number}")
            if not above < up_to_number <= memory.last_number:
                raise ConflictError(
                    f"watermark {above} cannot move to {up_to_number} of {memory.last_number}"
                )
            covered, covered_bytes = await live_between(connection, memory_uid, above, up_to_number)
            if covered > documents + len(quarantined):
                raise ConflictError(f"{covered} documents wait up to {up_to_number}")
            aside, aside_bytes = await self._set_aside(
                connection, encoding, up_to_number, quarantined
            )
            values = {
                "encoded_number": up_to_number,
                "pending_documents": encoding.pending_documents - covered,
                "pending_bytes": encoding.pending_bytes - covered_bytes,
                "waiting_since_us": await oldest_pending_us(connection, memory_uid, up_to_number),
                "quarantined_documents": encoding.quarantined_documents + aside,
                "quarantined_bytes": encoding.quarantined_bytes + aside_bytes,
                "tokens": encoding.tokens + tokens,
                "bytes": encoding.bytes + bytes,
                "failure": "",
            }
            await set_encoding(connection, memory_uid, model_id, values)
            if not encoding.complete and await self._caught_up(
                connection, memory, model_id, encoding.pending_documents - covered
            ):
                await complete_encoding(connection, memory_uid, model_id)
            if spent_tokens:
                await count_usage(
                    self._database, connection, memory.tenant_uid, {"encoded_tokens": spent_tokens}
                )
            return await self._read(connection, memory_uid, model_id)

    async def _caught_up(
        self, connection: Statements, memory: MemoryRow, model_id: str, pending: int
    ) -> bool:
        """pending: documents that wait under a model of the memory."""
        if not pending or model_id == memory.default_model_id:
            return not pending
        query = select(encodings.c.pending_documents).where(
            encodings.c.memory_uid == memory.uid, encodings.c.model_id == memory.default_model_id
        )
        answering: int | None = (await connection.execute(query)).scalar_one_or_none()
        return answering is not None and pending <= answering

    async def _set_aside(
        self,
        connection: Statements,
        encoding: Row[Any],
        up_to_number: int,
        quarantined: Mapping[int, str],
    ) -> tuple[int, int]:
        """Records quarantined documents that are live still: their count and text bytes."""
        numbers = sorted(quarantined)
        if not numbers:
            return 0, 0
        if not (encoding.encoded_number < numbers[0] and numbers[-1] <= up_to_number):
            raise ValueError("a quarantined document lies outside the batch")
        live: list[dict[str, Any]] = []
        for some in slices(numbers):
            chosen = documents.c.number.in_(some)
            columns = (documents.c.number, documents.c.text_bytes)
            uid, last = encoding.memory_uid, some[-1]
            rows = await shown(connection, uid, columns, some[0], last, chosen)
            key = {"memory_uid": uid, "model_id": encoding.model_id}
            live.extend({**key, **r._mapping, "reason": quarantined[r.number]} for r in rows)
        for few in slices(live, MAX_PAGE):
            await connection.execute(insert(quarantined_documents).values(few))
        return len(live), sum(row["text_bytes"] for row in live)

    @writes
    async def fail_encoding(self, memory_uid: str, model_id: str, failure: str) -> None:
        """Stops an encoding; nothing happens if no document waits. Raises ValueError if empty."""
        if not failure:
            raise ValueError("a failure needs a reason")
        waiting = encodings.c.pending_documents > 0
        async with self._leading(memory_uid=memory_uid) as connection:
            await connection.execute(
                update(encodings)
                .where(
                    encodings.c.memory_uid == memory_uid, encodings.c.model_id == model_id, waiting
                )
                .values(failure=failure)
            )

    @writes
    async def resume_encodings(self, model_id: str) -> int:
        """Lets the model's failed encodings be tried again; returns how many."""
        mine = select(memories.c.uid).where(self._led(memories.c.tenant_uid))
        failed = (
            encodings.c.model_id == model_id,
            encodings.c.failure != "",
            encodings.c.memory_uid.in_(mine) if self._server_uid else true(),
        )
        async with self._database.writing() as connection:
            done = await connection.execute(update(encodings).where(*failed).values(failure=""))
            return done.rowcount

    @writes
    async def rewind_encoding(self, memory_uid: str, model_id: str, below_number: int) -> None:
        """Puts the watermark below that number: it and all later documents wait again.

        Moves deletion_epoch on, because blocks below a memory's last number are about
        to be made again. Their quarantine and a failure are lifted. An encoding whose
        watermark lies lower keeps it. Raises NotFoundError, ValueError (below_number < 1).
        """
        if below_number < 1:
            raise ValueError(f"document numbers start at 1, not at {below_number}")
        async with self._leading(memory_uid=memory_uid) as connection:
            memory = await self._lock_memory(connection, memory_uid)
            encoding = await self._lock_encoding(connection, memory_uid, model_id)
            watermark = min(encoding.encoded_number, below_number - 1)
            waiting, waiting_bytes = await live_between(
                connection, memory_uid, watermark, MAX_NUMBER
            )
            aside, aside_bytes = await self._quarantined_up_to(connection, encoding, watermark)
            before = memory.text_bytes - encoding.pending_bytes - encoding.quarantined_bytes
            after = memory.text_bytes - waiting_bytes - aside_bytes
            values = {
                "encoded_number": watermark,
                "pending_documents": waiting,
                "pending_bytes": waiting_bytes,
                "waiting_since_us": await oldest_pending_us(connection, memory_uid, watermark),
                "quarantined_documents": aside,
                "quarantined_bytes": aside_bytes,
                "tokens": scaled(encoding.tokens, after, before),
                "bytes": scaled(encoding.bytes, after, before),
                "failure": "",
            }
            await set_encoding(connection, memory_uid, model_id, values)
            await connection.execute(
                update(memories)
                .where(memories.c.uid == memory_uid)
                .values(deletion_epoch=memories.c.deletion_epoch + 1)
            )

    async def _quarantined_up_to(
        self, connection: Statements, encoding: Row[Any], watermark: int
    ) -> tuple[int, int]:
        """Lifts the quarantine above the watermark; counts what stays, with text bytes."""
        table = quarantined_documents.c
        which = (table.memory_uid == encoding.memory_uid, table.model_id == encoding.model_id)
        await connection.execute(
            delete(quarantined_documents).where(*which, table.number > watermark)
        )
        query = select(func.count(), func.coalesce(func.sum(table.text_bytes), 0)).where(*which)
        count, text_bytes = tuple((await connection.execute(query)).one())
        return int(count), int(text_bytes)

    @reads
    async def quarantined(self, memory_uid: str, model_id: str) -> dict[int, str]:
        """Live documents that were set aside, by ascending number, with the reasons."""
        table = quarantined_documents.c
        query = (
            select(table.number, table.reason)
            .where(table.memory_uid == memory_uid, table.model_id == model_id)
            .order_by(table.number)
        )
        async with self._database.reading() as connection:
            return {row.number: row.reason for row in await connection.execute(query)}

    async def _lock_memory(self, connection: Statements, memory_uid: str) -> MemoryRow:
        query = select(memories).where(memories.c.uid == memory_uid, NOT_DELETING)
        row = (await connection.execute(query.with_for_update())).one_or_none()
        if row is None:
            raise NotFoundError(f"no memory {memory_uid}")
        return memory_row(row)

    async def _lock_encoding(
        self, connection: Statements, memory_uid: str, model_id: str
    ) -> Row[Any]:
        query = select(encodings).where(
            encodings.c.memory_uid == memory_uid, encodings.c.model_id == model_id
        )
        row = (await connection.execute(query.with_for_update())).one_or_none()
        if row is None:
            raise NotFoundError(f"memory {memory_uid} has no encoding under {model_id}")
        return row

    async def _read(self, connection: Statements, memory_uid: str, model_id: str) -> EncodingRow:
        query = encoding_query().where(
            encodings.c.memory_uid == memory_uid, encodings.c.model_id == model_id
        )
        return encoding_row((await connection.execute(query)).one())
