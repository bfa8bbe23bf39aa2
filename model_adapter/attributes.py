"""What filters look at, of one memory: when, in which role, by whom, with which metadata.

One row per turn, in columns, so that a filter is a few vector operations over all of them.
Strings are kept as 64-bit keyed hashes under a key of the index's own: equal strings are
equal, no text of the memory lies in it, and two different strings are taken for equal once in
2^64. Meaning: storage/filters.py, which the tests compare this with.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt

from storage.documents import Role, Source
from storage.filters import DocumentFilter, attributes

Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_TURN = np.dtype([("number", "<i8"), ("occurred_us", "<i8"), ("speaker", "<u8"), ("role", "u1")])
#: turn: row of the turn. pair: hash of key and value together.
_ENTRY = np.dtype([("turn", "<i8"), ("key", "<u8"), ("pair", "<u8")])
_ROLES = {None: 0, Role.USER: 1, Role.ASSISTANT: 2, Role.SYSTEM: 3, Role.TOOL: 4}
#: Of a turn of which it is not known when it was said: before every range.
_UNKNOWN_US = np.iinfo(np.int64).min
_NOBODY = 0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_FEWEST_ROWS = 16


class AttributeIndex:
    """Attributes of one memory's documents, which come with ascending numbers.

    For one thread at a time.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(16)
        self._turns = _Rows(_TURN)
        self._entries = _Rows(_ENTRY)
        self.last_number = 0

    @property
    def bytes(self) -> int:
        """Of the columns, spare rows included."""
        return self._turns.bytes + self._entries.bytes

    def add(self, documents: Iterable[tuple[int, Source]]) -> None:
        """(number, source) of documents above last_number, ascending."""
        turns: list[tuple[int, int, int, int]] = []
        entries: list[tuple[int, int, int]] = []
        for number, source in documents:
            assert number > self.last_number
            for turn in attributes(source):
                row = self._turns.count + len(turns)
                speaker = self._hash(turn.speaker) if turn.speaker else _NOBODY
                turns.append((number, _microseconds(turn.occurred_at), speaker, _ROLES[turn.role]))
                entries += [
                    (row, self._hash(key), self._hash(key, value))
                    for key, value in turn.metadata.items()
                ]
            self.last_number = number
        self._turns.append(turns)
        self._entries.append(entries)

    def matching(self, wanted: DocumentFilter) -> Numbers:
        """Numbers of the documents that match, ascending."""
        turns = self._turns.used
        keep = np.ones(len(turns), np.bool_)
        if wanted.occurred_from is not None:
            keep &= turns["occurred_us"] >= _microseconds(wanted.occurred_from)
        if wanted.occurred_before is not None:
            keep &= turns["occurred_us"] < _microseconds(wanted.occurred_before)
            keep &= turns["occurred_us"] != _UNKNOWN_US
        if wanted.roles:
            keep &= np.isin(turns["role"], [_ROLES[role] for role in wanted.roles])
        if wanted.speakers:
            keep &= np.isin(turns["speaker"], _hashes(self._hash(name) for name in wanted.speakers))
        for condition in wanted.metadata:
            keep &= self._with_metadata(condition.key, condition.values)
        return np.unique(turns["number"][keep])

    def _with_metadata(self, key: str, values: frozenset[str]) -> Mask:
        """Of every turn, whether its metadata has the key, with one of the values if any."""
        entries = self._entries.used
        if values:
            found = np.isin(entries["pair"], _hashes(self._hash(key, value) for value in values))
        else:
            found = entries["key"] == np.uint64(self._hash(key))
        has = np.zeros(self._turns.count, np.bool_)
        has[entries["turn"][found]] = True
        return has

    def wipe(self) -> None:
        """Overwrites with zeros, and frees. Nothing else may be called afterwards."""
        self._turns.wipe()
        self._entries.wipe()
        self._key = b""

    def _hash(self, *parts: str) -> int:
        """Never that of nobody."""
        keyed = hashlib.blake2b(digest_size=8, key=self._key)
        for part in parts:
            data = part.encode()
            keyed.update(len(data).to_bytes(4) + data)
        return int.from_bytes(keyed.digest()) or 1


class _Rows:
    """Rows that are only ever added; half as many again are made room for at a time."""

    def __init__(self, kind: np.dtype[np.void]) -> None:
        self._rows = np.zeros(0, kind)
        self.count = 0

    @property
    def bytes(self) -> int:
        return self._rows.nbytes

    @property
    def used(self) -> npt.NDArray[np.void]:
        return self._rows[: self.count]

    def append(self, rows: Sequence[tuple[int, ...]]) -> None:
        if not rows:
            return
        end = self.count + len(rows)
        if end > len(self._rows):
            larger = np.zeros(max(end + end // 2, _FEWEST_ROWS), self._rows.dtype)
            larger[: self.count] = self.used
            self._rows.fill(0)
            self._rows = larger
        self._rows[self.count : end] = rows
        self.count = end

    def wipe(self) -> None:
        self._rows.fill(0)
        self._rows, self.count = self._rows[:0].copy(), 0


def _microseconds(moment: datetime | None) -> int:
    return int(_UNKNOWN_US) if moment is None else (moment - _EPOCH) // _MICROSECOND


def _hashes(values: Iterable[int]) -> npt.NDArray[np.uint64]:
    return np.fromiter(values, np.uint64)
