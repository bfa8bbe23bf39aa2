"""Which documents a memory shows: its own, and those that it inherits from other memories.

A document has one row, under the memory that wrote it, its owner, however many forks show it.
A row of `lineages` says that a memory shows the owner's documents from one number to another;
it is made with the fork and never changed. What no such row covers is the memory's own.
`revision_removed` of a row under a memory is of that memory alone:

    NULL       the memory shows it, if the number is its own
    a number   removed by that revision; its text may still lie in the store
    SETTLED    removed, and nothing of it is left in the store that is the memory's

A fork that removes an inherited document is given a row of its own for that number, which says
so. The owner's row goes when the last memory that shows it lets go, and with it those rows.
A memory that is deleted while forks show its documents leaves its row in `memories`, without
a name, and those of its documents; nothing finds it (`purged_us`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    FromClause,
    Row,
    ScalarSelect,
    and_,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)

from storage.catalog.base import MAX_BOUND, slices
from storage.catalog.connections import Statements
from storage.catalog.tables import documents, encodings, lineages, memories, revisions

#: Highest document number a BIGINT holds.
MAX_NUMBER = 2**63 - 1
#: `revision_removed` of what the store has let go of.
SETTLED = 0

LIVE = documents.c.revision_removed.is_(None)
#: What the store may still hold. The first half is the index's condition.
REMOVED = and_(documents.c.revision_removed.is_not(None), documents.c.revision_removed > SETTLED)
_SETTLED = and_(documents.c.revision_removed.is_not(None), documents.c.revision_removed == SETTLED)
_COVERED = documents.c.number.between(lineages.c.first_number, lineages.c.last_number)
_own = documents.alias("own")


class Part(NamedTuple):
    """Documents of one owner, from `first` to `last`, both included."""

    owner_uid: str
    first: int
    last: int


async def parts_of(
    connection: Statements, memory_uid: str, first: int = 1, last: int = MAX_NUMBER
) -> list[Part]:
    """Whose documents the memory shows between two numbers, ascending; its own behind all
    that it inherits.
    """
    columns = (lineages.c.first_number, lineages.c.last_number, lineages.c.owner_uid)
    query = select(*columns).where(
        lineages.c.memory_uid == memory_uid,
        lineages.c.first_number <= last,
        lineages.c.last_number >= first,
    )
    parts: list[Part] = []
    for begin, end, owner in sorted(map(tuple, await connection.execute(query))):
        parts.append(Part(owner, max(begin, first), min(end, last)))
        first = end + 1
    return [*parts, Part(memory_uid, first, last)] if first <= last else parts


def within(memory_uid: str, part: Part) -> ColumnElement[bool]:
    """The rows of a part that the memory shows."""
    whose = documents.c.memory_uid == part.owner_uid
    number = documents.c.number
    lower = [number >= part.first] if part.first > 1 else []
    upper = [number <= part.last] if part.last < MAX_NUMBER else []
    here = LIVE if part.owner_uid == memory_uid else ~_removed_by(literal(memory_uid))
    return and_(whose, *lower, *upper, here)


def _removed_by(memory_uid: ColumnElement[str]) -> ColumnElement[bool]:
    """Whether a memory that inherits the document has a row of its own for it."""
    mark = exists().where(_own.c.memory_uid == memory_uid, _own.c.number == documents.c.number)
    return mark.correlate_except(_own)


async def shown(
    connection: Statements,
    memory_uid: str,
    columns: Sequence[ColumnElement[Any]],
    first: int = 1,
    last: int = MAX_NUMBER,
    *where: ColumnElement[bool],
    limit: int | None = None,
) -> list[Row[Any]]:
    """Columns of the live documents between two numbers, ascending; the first `limit`."""
    rows: list[Row[Any]] = []
    for part in await parts_of(connection, memory_uid, first, last):
        query = select(*columns).where(within(memory_uid, part), *where)
        left = None if limit is None else limit - len(rows)
        query = query.order_by(documents.c.number).limit(left)
        rows.extend(await connection.execute(query))
        if len(rows) == limit:
            break
    return rows


def first_shown(
    column: ColumnElement[Any], of: FromClause, memory_uid: Any, above: Any = 0
) -> ColumnElement[Any]:
    """SQL for a column of a memory's first live document above a number.

    of: the table of the enclosing statement in which memory_uid and above are.
    """
    begin = case((lineages.c.first_number > above, lineages.c.first_number), else_=above + 1)
    inherited = (
        select(column)
        .join_from(lineages, documents, documents.c.memory_uid == lineages.c.owner_uid)
        .where(
            lineages.c.memory_uid == memory_uid,
            lineages.c.last_number > above,
            documents.c.number.between(begin, lineages.c.last_number),
            ~_removed_by(lineages.c.memory_uid),
        )
        .order_by(lineages.c.first_number, documents.c.number)
    )
    mine = (
        select(column)
        .where(documents.c.memory_uid == memory_uid, documents.c.number > above, LIVE)
        .order_by(documents.c.number)
    )

    def one(query: Any) -> ScalarSelect[Any]:
        found: ScalarSelect[Any] = query.limit(1).correlate(of).scalar_subquery()
        return found

    return func.coalesce(one(inherited), one(mine))


async def inherit(
    connection: Statements, parent_uid: str, child_uid: str, last_number: int
) -> None:
    """Has a new memory show what its parent shows up to a number."""
    parts = await parts_of(connection, parent_uid, 1, last_number)
    names = ("memory_uid", "owner_uid", "first_number", "last_number")
    rows = [dict(zip(names, (child_uid, *part), strict=True)) for part in parts]
    for some in slices(rows, MAX_BOUND // len(names)):
        await connection.execute(insert(lineages).values(some))
    there = _own.c.memory_uid == lineages.c.owner_uid, _own.c.number == documents.c.number
    covered = exists().where(lineages.c.memory_uid == child_uid, _COVERED, *there)
    columns = ("number", "revision_added", "created_us", "text_bytes")
    removed = select(
        literal(child_uid), literal(SETTLED), *(documents.c[name] for name in columns)
    ).where(
        documents.c.memory_uid == parent_uid,
        documents.c.revision_removed.is_not(None),
        documents.c.number <= last_number,
        covered.correlate(documents),
    )
    into = ["memory_uid", "revision_removed", *columns]
    await connection.execute(insert(documents).from_select(into, removed))


async def mark_removed(
    connection: Statements, memory_uid: str, numbers: Sequence[int], revision: int
) -> list[Row[Any]]:
    """Removes those of these documents that are live; number and text_bytes of each.
    numbers: ascending, not empty, MAX_BOUND at most.
    """
    removed: list[Row[Any]] = []
    columns = (documents.c.number, documents.c.text_bytes)
    for part in await parts_of(connection, memory_uid, numbers[0], numbers[-1]):
        which = (within(memory_uid, part), documents.c.number.in_(numbers))
        if part.owner_uid == memory_uid:
            mark = update(documents).where(*which).values(revision_removed=revision)
            removed.extend(await connection.execute(mark.returning(*columns)))
            continue
        copied = (*columns, documents.c.revision_added, documents.c.created_us)
        marks = select(literal(memory_uid), literal(revision), *copied).where(*which)
        into = ["memory_uid", "revision_removed", *(column.name for column in copied)]
        made = insert(documents).from_select(into, marks).returning(*columns)
        removed.extend(await connection.execute(made))
    return removed


async def settle(connection: Statements, memory_uid: str, numbers: Sequence[int]) -> None:
    """The store has let go of these documents of the memory: drops their rows, or keeps what
    others show. numbers: as of mark_removed; those that are live or unknown are left alone.
    """
    which = and_(documents.c.number.in_(numbers), REMOVED)
    mine = (documents.c.memory_uid == memory_uid, which)
    shares = or_(lineages.c.memory_uid == memory_uid, lineages.c.owner_uid == memory_uid)
    if (await connection.execute(select(lineages.c.memory_uid).where(shares).limit(1))).first():
        await connection.execute(update(documents).where(*mine).values(revision_removed=SETTLED))
        for part in await parts_of(connection, memory_uid, numbers[0], numbers[-1]):
            some = [number for number in numbers if part.first <= number <= part.last]
            purged = await _is_purged(connection, part.owner_uid)
            chosen = documents.c.number.in_(some)
            await _drop_unshown(connection, part.owner_uid, chosen, purged=purged)
            left = select(documents.c.number).where(
                documents.c.memory_uid == part.owner_uid, chosen
            )
            there = set((await connection.execute(left)).scalars())
            await _drop_marks(connection, part.owner_uid, [n for n in some if n not in there])
    else:
        await connection.execute(delete(documents).where(*mine))


async def leave(connection: Statements, memory_uid: str, now_us: int) -> None:
    """Removes a memory that is being deleted. Of what forks show the rows stay, and go with
    the last of them.
    """
    inherited = [p for p in await parts_of(connection, memory_uid) if p.owner_uid != memory_uid]
    uids = sorted({memory_uid, *(part.owner_uid for part in inherited)})
    # Of two memories that are the last to show something the later one finds the other gone.
    lock = select(memories.c.uid).where(memories.c.uid.in_(uids)).order_by(memories.c.uid)
    await connection.execute(lock.with_for_update())
    await connection.execute(delete(lineages).where(lineages.c.memory_uid == memory_uid))
    if await _is_lent(connection, memory_uid):
        await _strip(connection, memory_uid, inherited, now_us)
    else:
        await connection.execute(delete(memories).where(memories.c.uid == memory_uid))
    for part in inherited:
        purged = await _is_purged(connection, part.owner_uid)
        if purged and not await _is_lent(connection, part.owner_uid):
            await connection.execute(delete(memories).where(memories.c.uid == part.owner_uid))
            continue
        which = documents.c.number.between(part.first, part.last)
        await _drop_unshown(connection, part.owner_uid, which, purged=purged)


async def _is_lent(connection: Statements, memory_uid: str) -> bool:
    query = select(lineages.c.memory_uid).where(lineages.c.owner_uid == memory_uid).limit(1)
    return (await connection.execute(query)).first() is not None


async def _is_purged(connection: Statements, memory_uid: str) -> bool:
    query = select(memories.c.purged_us).where(memories.c.uid == memory_uid)
    return (await connection.execute(query)).scalar_one() is not None


async def _strip(
    connection: Statements, memory_uid: str, inherited: Sequence[Part], now_us: int
) -> None:
    """Leaves of a memory what others show of it."""
    nameless = {"memory_id": "", "display_name": "", "labels": "{}", "forked_from": None}
    values = {**nameless, "document_count": 0, "text_bytes": 0, "purged_us": now_us}
    await connection.execute(update(memories).where(memories.c.uid == memory_uid).values(values))
    for table in (encodings, revisions):
        await connection.execute(delete(table).where(table.c.memory_uid == memory_uid))
    last = inherited[-1].last if inherited else 0
    marks = (documents.c.memory_uid == memory_uid, documents.c.number <= last)
    await connection.execute(delete(documents).where(*marks))
    await _drop_unshown(connection, memory_uid, documents.c.number > last, purged=True)


async def _drop_unshown(
    connection: Statements, owner_uid: str, which: ColumnElement[bool], *, purged: bool = False
) -> None:
    """Drops rows of documents that the owner removed, or any when it is gone (purged), and that
    nobody else shows.
    """
    lent = exists().where(
        lineages.c.owner_uid == owner_uid, _COVERED, ~_removed_by(lineages.c.memory_uid)
    )
    unshown = [documents.c.memory_uid == owner_uid, which, ~lent]
    dropped = delete(documents).where(*unshown, *([] if purged else [_SETTLED]))
    numbers = (await connection.execute(dropped.returning(documents.c.number))).scalars().all()
    await _drop_marks(connection, owner_uid, numbers)


async def _drop_marks(connection: Statements, owner_uid: str, numbers: Sequence[int]) -> None:
    """Drops what says of the owner's documents, which are gone, that a memory removed them."""
    inherits = exists().where(
        lineages.c.owner_uid == owner_uid, lineages.c.memory_uid == documents.c.memory_uid, _COVERED
    )
    for some in slices(numbers, MAX_BOUND):
        which = (documents.c.number.in_(some), _SETTLED, inherits)
        await connection.execute(delete(documents).where(*which))
