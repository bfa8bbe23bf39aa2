"""What is read of a memory for one batch, and what of it is written."""

from __future__ import annotations

import pytest

from memsvc.encoding.texts import Target, Texts, has_text, read_texts, write_live_blocks
from storage.documents import render
from storage.memory_store import MemoryStore
from tests.support.blocks import SHARED, encoding_id, make_block, make_document, memory_uid

MEMORY = memory_uid(1)
TARGET = Target(MEMORY, encoding_id(1), SHARED)
ONE_TEXT = len(render(make_document(1).source).encode())


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    store.put_documents(MEMORY, [make_document(number) for number in (1, 2, 4, 5, 6)])
    return store


@pytest.mark.parametrize("at_once", [1, 2, 6])
def test_a_batch_is_the_same_however_it_is_read(store: MemoryStore, at_once: int) -> None:
    store.put_blocks(MEMORY, TARGET.encoding, SHARED, [make_block(SHARED, 2, tokens=7)])
    texts, numbers, room = Texts(3 * ONE_TEXT), [1, 2, 3, 4, 5, 6], True
    while numbers and room:
        part, numbers = numbers[:at_once], numbers[at_once:]
        room = read_texts(store, TARGET, part, texts)
    assert [one.number for one in texts.documents] == [1, 4, 5]
    assert (texts.done, texts.missing, texts.up_to, room) == ({2: 7}, [3], 5, False)


def test_a_text_larger_than_a_batch_is_a_batch(store: MemoryStore) -> None:
    texts = Texts(max_bytes=1)
    assert not read_texts(store, TARGET, [1, 2], texts)
    assert ([one.number for one in texts.documents], texts.up_to) == ([1], 1)


def test_blocks_of_texts_that_went_are_not_written(store: MemoryStore) -> None:
    blocks = [make_block(SHARED, number) for number in (2, 3, 5)]
    store.delete_documents(MEMORY, [5])
    _, written = write_live_blocks(store, TARGET, blocks)
    assert [block.number for block in written] == [2]
    assert store.block_numbers(MEMORY, TARGET.encoding) == [2]
    assert [has_text(store, MEMORY, number) for number in (2, 3, 5)] == [True, False, False]
    assert write_live_blocks(store, TARGET, blocks[1:]) == (0, [])
