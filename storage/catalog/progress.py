"""How far encoding has come: counters kept with every write, and how they read.

Of every (memory, model) the row in `encodings` holds the watermark and, so that
no listing or backpressure check counts documents, what lies above it:

    live documents  = encoded + quarantined   (number <= encoded_number)
                    + pending                 (number >  encoded_number)

Only the functions here and in encodings.py change these counters, each in the
transaction that changes the documents. On PostgreSQL they run with the memory's
row locked, always before the encoding's, so that they cannot deadlock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Row, Select, and_, case, delete, func, select, update

from storage.catalog.base import MAX_BOUND, slices
from storage.catalog.connections import Statements
from storage.catalog.rows import DocumentRow, EncodingRow, EncodingState, MemoryRow
from storage.catalog.shown import first_shown, parts_of, shown, within
from storage.catalog.tables import documents, encodings, memories, quarantined_documents

#: Of an encoding with its memory: another model answers until this one has caught up.
BEHIND = and_(encodings.c.complete.is_(False), encodings.c.model_id != memories.c.default_model_id)


@dataclass(frozen=True)
class Removed:
    """A document that a write takes away. text_bytes: of its source text."""

    number: int
    text_bytes: int


def scaled(value: int, part: int, whole: int) -> int:
    """`value` times part/whole, rounded down; 0 of nothing."""
    return value * part // whole if whole > 0 else 0


@cache
def encoding_query() -> Select[Any]:
    """Selects encodings with their memory, and the revision that waits first. Made once: that
    takes longer than asking.
    """
    encoding = encodings.c
    first_waiting = first_shown(
        documents.c.revision_added, encodings, encoding.memory_uid, encoding.encoded_number
    )
    waiting = case((encodings.c.pending_documents > 0, first_waiting)).label("waiting_revision")
    return select(encodings, memories, waiting).join(
        memories, memories.c.uid == encodings.c.memory_uid
    )


def encoding_row(row: Row[Any]) -> EncodingRow:
    """A row of `encoding_query` as callers see it."""
    pending: int = row.pending_documents
    if pending == 0:
        state, encoded_revision = EncodingState.READY, row.revision
    else:
        state = EncodingState.FAILED if row.failure else EncodingState.ENCODING
        encoded_revision = row.waiting_revision - 1
    return EncodingRow(
        memory_uid=row.memory_uid,
        model_id=row.model_id,
        identity=row.identity,
        state=state,
        encoded_number=row.encoded_number,
        encoded_revision=encoded_revision,
        encoded_documents=row.document_count - pending - row.quarantined_documents,
        pending_documents=pending,
        quarantined_documents=row.quarantined_documents,
        tokens=row.tokens,
        bytes=row.bytes,
        failure=row.failure if state is EncodingState.FAILED else "",
        complete=row.complete,
    )


async def encodings_of(
    connection: Statements, memory_uids: Sequence[str]
) -> dict[str, list[EncodingRow]]:
    """Encodings by memory uid, each list by model id; every uid given is a key."""
    found: dict[str, list[EncodingRow]] = {uid: [] for uid in memory_uids}
    for uids in slices(list(found)):
        query = encoding_query().where(encodings.c.memory_uid.in_(uids))
        for row in await connection.execute(query.order_by(encodings.c.model_id)):
            found[row.memory_uid].append(encoding_row(row))
    return found


async def grow_pending(
    connection: Statements, memory_uid: str, count: int, text_bytes: int, first: DocumentRow
) -> None:
    """Counts new documents, the oldest of them `first`, as pending under every model."""
    await connection.execute(
        update(encodings)
        .where(encodings.c.memory_uid == memory_uid)
        .values(
            pending_documents=encodings.c.pending_documents + count,
            pending_bytes=encodings.c.pending_bytes + text_bytes,
            waiting_since_us=func.coalesce(encodings.c.waiting_since_us, first.created_us),
        )
    )


async def shrink_encodings(
    connection: Statements, memory: MemoryRow, removed: Sequence[Removed]
) -> None:
    """Takes removed documents out of every encoding's counters and quarantine.

    memory is the row after the removal. A failure is cleared when a pending
    document goes: it may have been the cause.
    """
    found = await connection.execute(
        select(encodings).where(encodings.c.memory_uid == memory.uid).with_for_update()
    )
    for encoding in found.all():
        pending = [one for one in removed if one.number > encoding.encoded_number]
        below = [one for one in removed if one.number <= encoding.encoded_number]
        set_aside = await _lift_quarantine(
            connection, encoding, [one.number for one in below if encoding.quarantined_documents]
        )
        gone_bytes = sum(one.text_bytes for one in below) - sum(one.text_bytes for one in set_aside)
        left_bytes = (
            memory.text_bytes
            - (encoding.pending_bytes - sum(one.text_bytes for one in pending))
            - (encoding.quarantined_bytes - sum(one.text_bytes for one in set_aside))
        )
        whole = left_bytes + gone_bytes
        values: dict[str, Any] = {
            "pending_documents": encoding.pending_documents - len(pending),
            "pending_bytes": encoding.pending_bytes - sum(one.text_bytes for one in pending),
            "quarantined_documents": encoding.quarantined_documents - len(set_aside),
            "quarantined_bytes": encoding.quarantined_bytes
            - sum(one.text_bytes for one in set_aside),
            "tokens": scaled(encoding.tokens, left_bytes, whole) if gone_bytes else encoding.tokens,
            "bytes": scaled(encoding.bytes, left_bytes, whole) if gone_bytes else encoding.bytes,
        }
        if pending:
            values["failure"] = ""
            values["waiting_since_us"] = await oldest_pending_us(
                connection, memory.uid, encoding.encoded_number
            )
        await set_encoding(connection, memory.uid, encoding.model_id, values)
        if not values["pending_documents"] and not encoding.complete:
            await complete_encoding(connection, memory.uid, encoding.model_id)


async def complete_encoding(connection: Statements, memory_uid: str, model_id: str) -> None:
    """The encoding has caught up: questions go to it now, if they were to when it has."""
    await set_encoding(connection, memory_uid, model_id, {"complete": True})
    waiting = (memories.c.uid == memory_uid, memories.c.next_model_id == model_id)
    await connection.execute(
        update(memories)
        .where(*waiting)
        .values(default_model_id=model_id, next_model_id="", version=memories.c.version + 1)
    )


async def _lift_quarantine(
    connection: Statements, encoding: Row[Any], numbers: Sequence[int]
) -> list[Removed]:
    """Deletes these documents' quarantine records; returns those that had one."""
    lifted: list[Removed] = []
    for start in range(0, len(numbers), MAX_BOUND):
        done = await connection.execute(
            delete(quarantined_documents)
            .where(
                quarantined_documents.c.memory_uid == encoding.memory_uid,
                quarantined_documents.c.model_id == encoding.model_id,
                quarantined_documents.c.number.in_(numbers[start : start + MAX_BOUND]),
            )
            .returning(quarantined_documents.c.number, quarantined_documents.c.text_bytes)
        )
        lifted.extend(Removed(row.number, row.text_bytes) for row in done)
    return lifted


async def oldest_pending_us(
    connection: Statements, memory_uid: str, encoded_number: int
) -> int | None:
    """created_us of the first live document above the watermark, or None."""
    columns = (documents.c.created_us,)
    oldest = await shown(connection, memory_uid, columns, encoded_number + 1, limit=1)
    return int(oldest[0].created_us) if oldest else None


async def live_between(
    connection: Statements, memory_uid: str, above: int, up_to: int
) -> tuple[int, int]:
    """Count and text bytes of the live documents in (above, up_to]."""
    count = text_bytes = 0
    sums = select(func.count(), func.coalesce(func.sum(documents.c.text_bytes), 0))
    for part in await parts_of(connection, memory_uid, above + 1, up_to):
        found = await connection.execute(sums.where(within(memory_uid, part)))
        some, some_bytes = tuple(found.one())
        count, text_bytes = count + int(some), text_bytes + int(some_bytes)
    return count, text_bytes


async def set_encoding(
    connection: Statements, memory_uid: str, model_id: str, values: dict[str, Any]
) -> None:
    """Writes values to one encoding's row."""
    which = and_(encodings.c.memory_uid == memory_uid, encodings.c.model_id == model_id)
    await connection.execute(update(encodings).where(which).values(values))
