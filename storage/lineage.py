"""Who shows what: memories that share documents with the memory that they were forked from.

Texts and blocks lie under the memory that wrote the document, its owner, and are never copied
or moved. What a memory shows is its lineage: ascending parts, each the documents of one owner
up to a number, the last part its own. Three kinds of records keep it, all in their keys:

    INHERITED  memory, owner, last    the memory shows the owner's documents up to `last`
    LENT       owner, memory, last    the same, seen from the owner
    HIDDEN     memory, number         the memory does not show that document any more, whose
                                      records are there for others; number 0: it is deleted

So a text goes when the last memory that shows its document lets go of it, and a block when the
last one does that has its encoding, whichever that is; the catalog need not know who shares
what. The functions here take a transaction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import lmdb

from storage.keys import (
    MAX_NUMBER,
    UID_BYTES,
    KeyRange,
    Kind,
    block_key,
    document_key,
    encoding_key,
    hidden_key,
    kind_range,
    lineage_key,
    memory_range,
    number_of,
    number_range,
)
from storage.lmdb_scan import keys_in, records_in
from storage.records import Header, seal
from storage.store import EncodingId, LetGo, MemoryUid

BLOCK_KINDS = (Kind.ROUTING, Kind.CONTENT)
#: Keys held at a time while a range is deleted; it stays one transaction.
_DELETE_KEYS = 10_000


class Part(NamedTuple):
    """Documents of one owner, from `first` to `last`, both included."""

    owner: MemoryUid
    first: int
    last: int


def parts_of(transaction: lmdb.Transaction, memory: MemoryUid) -> list[Part]:
    """The lineage, ascending and without gaps; of an unforked memory its own part alone."""
    parts: list[Part] = []
    first = 1
    keys = keys_in(transaction, kind_range(memory, Kind.INHERITED))
    for last, owner in sorted((number_of(key), MemoryUid(key[17:33])) for key in keys):
        parts.append(Part(owner, first, last))
        first = last + 1
    return [*parts, Part(memory, first, MAX_NUMBER)]


def is_alone(transaction: lmdb.Transaction, memory: MemoryUid) -> bool:
    """Whether the memory shares nothing, as most do: one look instead of several."""
    cursor = transaction.cursor()
    # What keeps a lineage lies behind all else of a memory.
    found = cursor.set_range(kind_range(memory, Kind.INHERITED).first)
    return not found or bytes(cursor.key())[:UID_BYTES] != memory


def owner_of(transaction: lmdb.Transaction, memory: MemoryUid, number: int) -> MemoryUid:
    """Under whom the document's records lie."""
    return next(p.owner for p in parts_of(transaction, memory) if number <= p.last)


def is_hidden(transaction: lmdb.Transaction, memory: MemoryUid, number: int) -> bool:
    """Whether the memory does not show that document, though its records may be there."""
    hidden = (hidden_key(memory, one) for one in (number, 0))
    return any(transaction.get(key) is not None for key in hidden)


class View(NamedTuple):
    """Records of one kind that a memory shows: those in `spans`, but for the hidden numbers."""

    spans: list[KeyRange]
    hidden: frozenset[int]

    def keys(self, transaction: lmdb.Transaction) -> Iterator[bytes]:
        """Their keys, by ascending number."""
        for span in self.spans:
            keys = keys_in(transaction, span)
            if not self.hidden:
                yield from keys
                continue
            for key in keys:
                if number_of(key) not in self.hidden:
                    yield key

    def records(self, transaction: lmdb.Transaction) -> Iterator[tuple[bytes, memoryview]]:
        """As `keys`, with the values, which end with the transaction."""
        for span in self.spans:
            records = records_in(transaction, span)
            if not self.hidden:
                yield from records
                continue
            for key, value in records:
                if number_of(key) not in self.hidden:
                    yield key, value

    def after(self, key: bytes) -> View:
        """What is left behind a key of it."""
        here = next(i for i, span in enumerate(self.spans) if span.first <= key <= span.last)
        return View([self.spans[here].after(key), *self.spans[here + 1 :]], self.hidden)


def view(  # noqa: PLR0917 - a place and a range
    transaction: lmdb.Transaction,
    memory: MemoryUid,
    kind: Kind,
    encoding: EncodingId | None = None,
    first: int = 0,
    last: int | None = None,
) -> View:
    """Of the documents from `first` to `last`, both included; None is no upper end.

    A memory that has no record of an encoding shows no block of it, though another one may
    have made blocks of documents that both show.
    """
    end = MAX_NUMBER if last is None else last
    whole = number_range(memory, kind, encoding, first, end)
    had = encoding is None or transaction.get(encoding_key(memory, encoding)) is not None
    if not had or transaction.get(hidden_key(memory, 0)) is not None:
        return View([], frozenset())
    spans = [
        number_range(part.owner, kind, encoding, max(first, part.first), min(end, part.last))
        for part in parts_of(transaction, memory)
        if first <= part.last and part.first <= end
    ]
    low, high = number_of(whole.first), number_of(whole.last)
    return View(spans, _hidden(transaction, memory, low, high))


def _hidden(
    transaction: lmdb.Transaction, memory: MemoryUid, first: int, last: int
) -> frozenset[int]:
    span = number_range(memory, Kind.HIDDEN, None, first, last)
    return frozenset(map(number_of, keys_in(transaction, span)))


def lent_by(transaction: lmdb.Transaction, owner: MemoryUid) -> list[tuple[MemoryUid, int]]:
    """Who shows the owner's documents, each up to which number; the furthest first."""
    keys = keys_in(transaction, kind_range(owner, Kind.LENT))
    return sorted(
        ((MemoryUid(key[17:33]), number_of(key)) for key in keys), key=lambda lent: -lent[1]
    )


def sharing(
    transaction: lmdb.Transaction, memory: MemoryUid, numbers: Iterable[int]
) -> list[MemoryUid]:
    """See TenantStore.sharing."""
    found: set[MemoryUid] = set()
    for number in numbers:
        owner = owner_of(transaction, memory, number)
        for other, last in [(owner, MAX_NUMBER), *lent_by(transaction, owner)]:
            if number <= last and not is_hidden(transaction, other, number):
                found.add(other)
    return sorted(found)


def fork(
    transaction: lmdb.Transaction,
    memory: MemoryUid,
    child: MemoryUid,
    last: int,
    without: Iterable[int],
) -> None:
    """Writes the child's lineage; see TenantStore.fork."""
    for part in parts_of(transaction, memory):
        if part.first <= last:
            end = min(part.last, last)
            _mark(transaction, lineage_key(child, Kind.INHERITED, part.owner, end))
            _mark(transaction, lineage_key(part.owner, Kind.LENT, child, end))
    for number in _hidden(transaction, memory, 1, last).union(without):
        if number <= last:
            _mark(transaction, hidden_key(child, number))


def let_go_of(transaction: lmdb.Transaction, memory: MemoryUid, numbers: Iterable[int]) -> LetGo:
    """The memory shows these documents no more: their records go, or are hidden from it."""
    total = LetGo()
    left = [n for n in sorted(set(numbers)) if not is_hidden(transaction, memory, n)]
    for part in parts_of(transaction, memory):
        mine = [number for number in left if part.first <= number <= part.last]
        released = _release(transaction, part.owner, memory, mine)
        for number in released.shared:
            _mark(transaction, hidden_key(memory, number))
        total = _sum(total, released)
    return total


def _release(
    transaction: lmdb.Transaction, owner: MemoryUid, memory: MemoryUid, numbers: list[int]
) -> LetGo:
    """Removes what of the owner's documents nobody but `memory` shows. numbers: ascending."""
    if not numbers:
        return LetGo()
    kept = _shown_by_others(transaction, owner, memory, numbers)
    removed = _remove(transaction, owner, [n for n in numbers if n not in kept])
    there = [n for n in sorted(kept) if transaction.get(document_key(owner, n)) is not None]
    blocks = removed.blocks + sum(
        _drop_blocks(transaction, owner, memory, encoding, there)
        for encoding in _encodings_of(transaction, memory)
    )
    return LetGo(removed.texts, blocks, tuple(there))


def _encodings_of(transaction: lmdb.Transaction, memory: MemoryUid) -> list[EncodingId]:
    keys = keys_in(transaction, kind_range(memory, Kind.ENCODING))
    return [EncodingId(key[17:33]) for key in keys]


def _drop_blocks(
    transaction: lmdb.Transaction,
    owner: MemoryUid,
    memory: MemoryUid,
    encoding: EncodingId,
    numbers: list[int],
) -> int:
    """Deletes the blocks that no other memory with that encoding shows; returns how many.
    numbers: ascending.
    """
    for user, last in [*lent_by(transaction, owner), (owner, MAX_NUMBER)]:
        has = transaction.get(encoding_key(user, encoding)) is not None
        if user != memory and has and numbers:
            hidden = _hidden(transaction, user, numbers[0], numbers[-1])
            numbers = [n for n in numbers if n > last or n in hidden]
    return delete_blocks(transaction, owner, encoding, numbers)


def _sum(one: LetGo, other: LetGo) -> LetGo:
    shared = tuple(sorted(one.shared + other.shared))
    return LetGo(one.texts + other.texts, one.blocks + other.blocks, shared)


def _shown_by_others(
    transaction: lmdb.Transaction, owner: MemoryUid, memory: MemoryUid, numbers: list[int]
) -> frozenset[int]:
    """Which of the owner's documents another memory shows. numbers: ascending, not empty."""
    wanted = set(numbers)
    kept: set[int] = set()
    others = [(other, last) for other, last in lent_by(transaction, owner) if other != memory]
    if owner != memory and transaction.get(hidden_key(owner, 0)) is None:
        others.insert(0, (owner, MAX_NUMBER))
    for other, last in others:
        if not wanted:
            break
        hidden = _hidden(transaction, other, numbers[0], numbers[-1])
        kept |= {number for number in wanted if number <= last and number not in hidden}
        wanted -= kept
    return frozenset(kept)


def _remove(transaction: lmdb.Transaction, owner: MemoryUid, numbers: list[int]) -> LetGo:
    """Documents that nobody shows any more: text, blocks and who had hidden them."""
    if not numbers:
        return LetGo()
    texts = sum(transaction.delete(document_key(owner, number)) for number in numbers)
    blocks = 0
    for encoding in encodings_under(transaction, owner):
        blocks += delete_blocks(transaction, owner, encoding, numbers)
    for other, last in [(owner, MAX_NUMBER), *lent_by(transaction, owner)]:
        for number in _hidden(transaction, other, numbers[0], numbers[-1]).intersection(numbers):
            # Behind `last` the same number is another owner's document.
            if number <= last:
                transaction.delete(hidden_key(other, number))
    return LetGo(texts, blocks)


def delete_blocks(
    transaction: lmdb.Transaction, owner: MemoryUid, encoding: EncodingId, numbers: Iterable[int]
) -> int:
    """Both halves of blocks under their owner. Returns how many blocks there were."""
    halves = (
        [transaction.delete(block_key(owner, kind, encoding, number)) for kind in BLOCK_KINDS]
        for number in numbers
    )
    return sum(map(any, halves))


def encodings_under(transaction: lmdb.Transaction, owner: MemoryUid) -> list[EncodingId]:
    """Encodings of which a block lies under that memory, whoever has them."""
    found: set[EncodingId] = set()
    for kind in BLOCK_KINDS:
        rest = kind_range(owner, kind)
        while (key := next(keys_in(transaction, rest), None)) is not None:
            encoding = EncodingId(key[17:33])
            found.add(encoding)
            rest = KeyRange(number_range(owner, kind, encoding, 0, None).last + b"\x00", rest.last)
    return sorted(found)


def drop_encoding(transaction: lmdb.Transaction, memory: MemoryUid, encoding: EncodingId) -> None:
    """Removes a memory's blocks of one encoding, but for those that another memory with that
    encoding shows.
    """
    transaction.delete(encoding_key(memory, encoding))
    for part in parts_of(transaction, memory):
        numbers = _numbers(transaction, part, [encoding])
        _drop_blocks(transaction, part.owner, memory, encoding, numbers)


def drop_memory(transaction: lmdb.Transaction, memory: MemoryUid) -> LetGo:
    """The memory is deleted: what nobody else shows goes, what somebody does stays under it."""
    *inherited, own = parts_of(transaction, memory)
    total = LetGo()
    for part in inherited:
        hidden = _hidden(transaction, memory, part.first, part.last)
        numbers = [n for n in _all_numbers(transaction, part) if n not in hidden]
        total = _sum(total, _release(transaction, part.owner, memory, numbers))
        transaction.delete(lineage_key(part.owner, Kind.LENT, memory, part.last))
        owner_gone = transaction.get(hidden_key(part.owner, 0)) is not None
        if owner_gone and not lent_by(transaction, part.owner):
            total = _sum(total, _wipe(transaction, memory_range(part.owner)))
    if not lent_by(transaction, memory):
        return _sum(total, _wipe(transaction, memory_range(memory)))
    hidden = _hidden(transaction, memory, own.first, own.last)
    released = _release(transaction, memory, memory, _all_numbers(transaction, own))
    shared = tuple(number for number in released.shared if number not in hidden)
    total = _sum(total, LetGo(released.texts, released.blocks, shared))
    for kind in (Kind.ENCODING, Kind.KEYS, Kind.INHERITED, Kind.HIDDEN):
        _wipe(transaction, kind_range(memory, kind))
    _mark(transaction, hidden_key(memory, 0))
    return total


def _all_numbers(transaction: lmdb.Transaction, part: Part) -> list[int]:
    return _numbers(transaction, part, encodings_under(transaction, part.owner), texts=True)


def _numbers(
    transaction: lmdb.Transaction,
    part: Part,
    encodings: Iterable[EncodingId],
    *,
    texts: bool = False,
) -> list[int]:
    """Numbers of the documents of one part that have a block, or a text, ascending."""
    owner, first, last = part
    spans = [number_range(owner, k, e, first, last) for e in encodings for k in BLOCK_KINDS]
    if texts:
        spans.append(number_range(owner, Kind.DOCUMENT, None, first, last))
    return sorted({number_of(key) for span in spans for key in keys_in(transaction, span)})


def _wipe(transaction: lmdb.Transaction, span: KeyRange) -> LetGo:
    """Deletes a range; counts its texts and blocks."""
    kinds: Counter[int] = Counter()
    while keys := list(islice(keys_in(transaction, span), _DELETE_KEYS)):
        for key in keys:
            transaction.delete(key)
            kinds[key[16]] += 1
    return LetGo(kinds[Kind.DOCUMENT], kinds[Kind.ROUTING])


def _mark(transaction: lmdb.Transaction, key: bytes) -> None:
    """Writes a record that says all in its key."""
    transaction.put(key, seal(key, Header(Kind(key[16]), 0, 0), b""))
