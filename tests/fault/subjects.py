"""What a corruption campaign damages, and how it tells what came of it. Run in a child.

A subject has files, sound to begin with, and knows all that was written to them. After
damage it opens them as memsvc does and reads everything: an error of ours or a finding
of `check` is damage detected, all as written is harmless, anything else is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from storage.archive import ArchiveError, open_archive
from storage.check import require_sound_structure
from storage.crypto import RootKeyError
from storage.lmdb_env import DATA_FILE
from storage.lmdb_store import LmdbStore
from storage.store import MemoryUid, StorageError, StoredDocument
from tests.support.archives import EMPTY, pack
from tests.support.blocks import (
    SEPARATE,
    SHARED,
    encoding_id,
    make_block,
    make_document,
    memory_uid,
    same_bits,
    same_block,
)
from tests.support.keys import TENANT, key_path, tenant_keys

DETECTED, HARMLESS, WRONG = "detected", "harmless", "wrong"

MEMORIES = (memory_uid(1), memory_uid(2))
ENCODING = encoding_id(1)
NUMBERS = range(1, 33)
DELETED = (5, 17, 18)
LIVE = [number for number in NUMBERS if number not in DELETED]
_LATER = 1000
_TOKENS = 60


class Subject(Protocol):
    """Files and what they hold. name: of what is damaged."""

    name: str

    def make(self, folder: Path) -> Path:
        """Writes the sound files into an empty folder; returns the one to be damaged."""

    def judge(self, folder: Path) -> str:
        """DETECTED, HARMLESS, or WRONG and what is."""


class StoreSubject:
    """A tenant's LMDB file, or its key file. Two memories, big and small values, free pages."""

    def __init__(self, *, encrypted: bool, keys: bool = False) -> None:
        self.name = "keys" if keys else "store" if encrypted else "store-plain"
        self._encrypted = encrypted
        self._keys = keys

    def make(self, folder: Path) -> Path:
        """See Subject."""
        store = self._open(folder)
        for memory in MEMORIES:
            for start in range(NUMBERS.start, NUMBERS.stop, 8):
                some = range(start, start + 8)
                store.put_documents(memory, [_document(number) for number in some])
                blocks = [make_block(SHARED, number, _TOKENS) for number in some]
                store.put_blocks(memory, ENCODING, SHARED, blocks)
            store.delete_documents(memory, DELETED)
        store.close()
        return key_path(folder) if self._keys else folder / TENANT / DATA_FILE

    def judge(self, folder: Path) -> str:
        """See Subject. As a server does: the structure first, then every record."""
        try:
            require_sound_structure(folder / TENANT)
            store = self._open(folder)
        except (StorageError, RootKeyError):
            return DETECTED
        try:
            outcomes = {_outcome(look) for look in _looks(store)}
            outcomes.update(DETECTED for _ in store.check())
            store.put_documents(MEMORIES[0], [_document(_LATER)])
            store.delete_documents(MEMORIES[1], [LIVE[0]])
            outcomes |= {_outcome(look) for look in _looks(store, after=True)}
        except StorageError:
            outcomes.add(DETECTED)
        finally:
            store.close()
        return _worst(outcomes)

    def _open(self, folder: Path) -> LmdbStore:
        keys = tenant_keys(folder) if self._encrypted else None
        return LmdbStore(folder / TENANT, keys=keys)


class ArchiveSubject:
    """An export with blocks of two models."""

    name = "archive"
    _LAYOUTS = (SHARED, SEPARATE)

    def make(self, folder: Path) -> Path:
        """See Subject."""
        documents = [_document(number) for number in LIVE]
        blocks = [
            (layout, [make_block(layout, number, _TOKENS) for number in LIVE])
            for layout in self._LAYOUTS
        ]
        path = folder / "archive.msamem"
        path.write_bytes(pack(documents, blocks))
        return path

    def judge(self, folder: Path) -> str:
        """See Subject."""
        try:
            with open_archive(folder / "archive.msamem") as archive:
                manifest = archive.manifest
                same = [document == _document(document.number) for document in archive.documents()]
                read = len(same)
                for encoding, layout in zip(manifest.encodings, self._LAYOUTS, strict=True):
                    for block in archive.blocks(encoding.encoding_id):
                        same.append(same_block(block, make_block(layout, block.number, _TOKENS)))
        except ArchiveError:
            return DETECTED
        whole = read == len(LIVE) and len(same) == read * (1 + len(self._LAYOUTS))
        told = (manifest.display_name, manifest.labels, manifest.revision, manifest.last_number)
        expected = (EMPTY.display_name, EMPTY.labels, EMPTY.revision, EMPTY.last_number)
        if not (whole and all(same) and told == expected):
            return f"{WRONG}: the archive reads otherwise"
        return HARMLESS


SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        StoreSubject(encrypted=True),
        StoreSubject(encrypted=False),
        StoreSubject(encrypted=True, keys=True),
        ArchiveSubject(),
    )
}

#: Reads something and says what came: HARMLESS, WRONG, or DETECTED when numbers are missing,
#: which the catalog, who knows them, tells.
Look = Callable[[], str]


def _looks(store: LmdbStore, *, after: bool = False) -> Iterator[Look]:
    """Every way to read all that is there. after: the write that follows the first look."""
    for memory in MEMORIES:
        live = LIVE[1:] if after and memory == MEMORIES[1] else LIVE
        documents = [*live, _LATER] if after and memory == MEMORIES[0] else live
        yield partial(_same_numbers, store.document_numbers, memory, documents)
        yield partial(_same_numbers, store.block_numbers, memory, ENCODING, live)
        yield partial(_same_routing, store, memory, live)
        for number in live:
            yield partial(_same_document, store, memory, number)
            yield partial(_same_content, store, memory, number)


def _outcome(look: Look) -> str:
    try:
        return look()
    except StorageError:
        return DETECTED


def _worst(outcomes: set[str]) -> str:
    wrong = sorted(outcome for outcome in outcomes if outcome.startswith(WRONG))
    return wrong[0] if wrong else DETECTED if DETECTED in outcomes else HARMLESS


def _same_numbers(read: Callable[..., list[int]], *arguments: Any) -> str:
    *place, expected = arguments
    return HARMLESS if read(*place) == expected else DETECTED


def _same_document(store: LmdbStore, memory: MemoryUid, number: int) -> str:
    same = store.get_document(memory, number) == _document(number)
    return HARMLESS if same else f"{WRONG}: document {number}"


def _same_content(store: LmdbStore, memory: MemoryUid, number: int) -> str:
    content = store.get_content(memory, ENCODING, SHARED, number)
    written = make_block(SHARED, number, _TOKENS)
    same = content.key_LCE is None and same_bits(content.value_LCE, written.value_LCE)
    return HARMLESS if same else f"{WRONG}: content {number}"


def _same_routing(store: LmdbStore, memory: MemoryUid, live: list[int]) -> str:
    packed = store.load_routing(memory, ENCODING, SHARED)
    numbers = packed.numbers_N.tolist()
    written = [make_block(SHARED, number, _TOKENS).routing_key_LCE for number in numbers]
    expected = np.concatenate(written, axis=1).tobytes() if written else b""
    if packed.routing_key_LCE.tobytes() != expected:
        return f"{WRONG}: routing keys"
    return HARMLESS if numbers == live else DETECTED


@cache
def _document(number: int) -> StoredDocument:
    """Every seventh is of several pages."""
    return make_document(number, f"fact {number} " * (900 if number % 7 == 0 else 1))
