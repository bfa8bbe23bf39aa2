"""What every TenantStore must do. Subclasses give a `store` fixture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from storage.codecs import to_bf16
from storage.document_json import encode_document
from storage.documents import Conversation, TextSource
from storage.layout import KVBlock, KVLayout, LayoutError
from storage.store import (
    ForeignRecordError,
    RecordNotFoundError,
    StorageError,
    StoredDocument,
    TenantStore,
)
from tests.support.blocks import (
    LAYOUTS,
    SEPARATE,
    SHARED,
    encoding_id,
    make_block,
    make_document,
    memory_uid,
    same_bits,
)

A, B = memory_uid(1), memory_uid(2)
ONE, TWO = encoding_id(1), encoding_id(2)


class StoreContract:
    """Shared by the oracle and LMDB, so that one stands for the other."""

    def test_a_new_store_is_empty(self, store: TenantStore) -> None:
        assert store.memories() == []
        assert store.encodings(A) == []
        assert store.document_numbers(A) == []
        assert store.block_numbers(A, ONE) == []
        assert list(store.iter_documents(A)) == []
        assert list(store.iter_routing(A, ONE, SHARED)) == []
        assert list(store.check()) == []

    def test_what_is_not_there_is_named_so(self, store: TenantStore) -> None:
        with pytest.raises(RecordNotFoundError):
            store.get_document(A, 1)
        with pytest.raises(RecordNotFoundError):
            store.get_content(A, ONE, SHARED, 1)
        with pytest.raises(RecordNotFoundError):
            store.encoding_layout(A, ONE)

    def test_documents_come_back_equal_and_ascending(self, store: TenantStore) -> None:
        numbers = [300, 2, 70_000, 1, 255, 256]
        size = store.put_documents(A, [make_document(n, f"text {n}") for n in numbers])
        assert size > 0
        assert list(store.iter_documents(A)) == [
            make_document(n, f"text {n}") for n in sorted(numbers)
        ]
        assert store.document_numbers(A) == sorted(numbers)
        assert store.document_numbers(A, 2, 256) == [2, 255, 256]
        assert store.document_numbers(A, 301) == [70_000]
        assert store.get_document(A, 256) == make_document(256, "text 256")
        assert [d.number for d in store.iter_documents(A, 2, 256)] == [2, 255, 256]
        assert [d.number for d in store.iter_documents(A, 3)] == [255, 256, 300, 70_000]
        assert list(store.iter_document_json(A, 3)) == [
            (d.number, encode_document(d)) for d in store.iter_documents(A, 3)
        ]
        assert list(store.iter_documents(A, 5, 4)) == []

    def test_a_long_scan_ends_with_its_last_document(self, store: TenantStore) -> None:
        store.put_documents(A, [make_document(n) for n in range(1, 701)])
        store.put_documents(B, [make_document(1)])
        assert [d.number for d in store.iter_documents(A)] == list(range(1, 701))

    def test_putting_replaces(self, store: TenantStore) -> None:
        store.put_documents(A, [make_document(1, "before")])
        store.put_documents(A, [make_document(1, "after")])
        assert store.get_document(A, 1) == make_document(1, "after")
        store.put_blocks(A, ONE, SHARED, [make_block(SHARED, 1, 5)])
        replacement = make_block(SHARED, 1, 9)
        store.put_blocks(A, ONE, SHARED, [replacement])
        (part,) = store.iter_routing(A, ONE, SHARED)
        assert part.tokens == 9
        assert same_bits(part.routing_key_LCE, replacement.routing_key_LCE)

    def test_memories_do_not_mix(self, store: TenantStore) -> None:
        store.put_documents(A, [make_document(1, "a")])
        store.put_documents(B, [make_document(1, "b"), make_document(2, "b2")])
        store.put_blocks(B, ONE, SHARED, [make_block(SHARED, 2)])
        assert store.memories() == [A, B]
        assert list(store.iter_documents(A)) == [make_document(1, "a")]
        assert store.block_numbers(A, ONE) == []
        assert store.encodings(A) == []
        assert store.encodings(B) == [ONE]

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_blocks_come_back_bit_for_bit(self, store: TenantStore, layout: KVLayout) -> None:
        blocks = [make_block(layout, n, tokens) for n, tokens in ((3, 200), (1, 1), (2, 65))]
        assert store.put_blocks(A, ONE, layout, blocks) > 0
        assert store.block_numbers(A, ONE) == [1, 2, 3]
        assert store.encoding_layout(A, ONE) == layout
        parts = list(store.iter_routing(A, ONE, layout))
        for part, block in zip(parts, sorted(blocks, key=lambda b: b.number), strict=True):
            assert (part.number, part.tokens) == (block.number, block.tokens)
            assert same_bits(part.routing_key_LCE, block.routing_key_LCE)
            content = store.get_content(A, ONE, layout, block.number)
            assert content.number == block.number
            assert same_bits(content.key_LCE, block.key_LCE)
            assert same_bits(content.value_LCE, block.value_LCE)
        run = list(store.iter_content(A, ONE, layout, 2))
        assert [part.number for part in run] == [2, 3]
        assert same_bits(run[1].value_LCE, blocks[0].value_LCE)
        assert same_bits(run[1].key_LCE, blocks[0].key_LCE)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_loading_gives_what_iterating_gives(self, store: TenantStore, layout: KVLayout) -> None:
        store.put_blocks(A, ONE, layout, [make_block(layout, n, 3 * n) for n in range(1, 30)])
        for first, last in ((0, None), (5, 20), (29, 29), (30, None), (9, 3)):
            packed = store.load_routing(A, ONE, layout, first, last)
            parts = list(store.iter_routing(A, ONE, layout, first, last))
            assert packed.numbers_N.tolist() == [part.number for part in parts]
            assert packed.tokens_N.tolist() == [part.tokens for part in parts]
            assert packed.routing_key_LCE.shape[::2] == (len(layout.routed_layers), layout.width)
            joined = [part.routing_key_LCE for part in parts]
            chunks = sum(array.shape[1] for array in joined)
            assert packed.routing_key_LCE.shape[1] == chunks
            if joined:
                assert packed.routing_key_LCE.dtype == joined[0].dtype
                assert np.array_equal(packed.routing_key_LCE, np.concatenate(joined, axis=1))

    def test_arrays_belong_to_the_caller(self, store: TenantStore) -> None:
        block = make_block(SHARED, 1)
        store.put_blocks(A, ONE, SHARED, [block])
        block.value_LCE[:] = 0
        first = store.get_content(A, ONE, SHARED, 1)
        assert same_bits(first.value_LCE, make_block(SHARED, 1).value_LCE)
        first.value_LCE[:] = 1
        next(iter(store.iter_routing(A, ONE, SHARED))).routing_key_LCE[:] = 1
        store.load_routing(A, ONE, SHARED).routing_key_LCE[:] = 1
        again = store.load_routing(A, ONE, SHARED)
        assert same_bits(again.routing_key_LCE, make_block(SHARED, 1).routing_key_LCE)

    def test_another_layout_is_refused(self, store: TenantStore) -> None:
        store.put_blocks(A, ONE, SHARED, [make_block(SHARED, 1)])
        with pytest.raises(ForeignRecordError):
            list(store.iter_routing(A, ONE, SEPARATE))
        with pytest.raises(ForeignRecordError):
            store.load_routing(A, ONE, SEPARATE)
        with pytest.raises(ForeignRecordError):
            store.get_content(A, ONE, SEPARATE, 1)
        with pytest.raises(ForeignRecordError):
            list(store.iter_content(A, ONE, SEPARATE))
        with pytest.raises(ForeignRecordError):
            store.put_blocks(A, ONE, SEPARATE, [make_block(SEPARATE, 2)])
        assert store.block_numbers(A, ONE) == [1]

    def test_a_block_that_does_not_fit_leaves_nothing(self, store: TenantStore) -> None:
        good, other = make_block(SHARED, 1), make_block(SEPARATE, 2)
        with pytest.raises(LayoutError):
            store.put_blocks(A, ONE, SHARED, [good, other])
        wrong = KVBlock(2, 50, good.routing_key_LCE, None, good.value_LCE)
        with pytest.raises(LayoutError):
            store.put_blocks(A, ONE, SHARED, [good, wrong])
        for worst in (np.nan, np.inf, -np.inf):
            value_LCE = good.value_LCE.copy()
            value_LCE[0, 0, :1] = to_bf16(np.array([worst], np.float32))
            with pytest.raises(LayoutError):
                store.put_blocks(A, ONE, SHARED, [replace(good, number=2, value_LCE=value_LCE)])
        assert store.block_numbers(A, ONE) == []
        assert store.memories() == []

    def test_a_document_that_cannot_be_written_leaves_nothing(self, store: TenantStore) -> None:
        for source in (TextSource("\ud800"), Conversation(())):
            with pytest.raises(ValueError):
                store.put_documents(A, [make_document(1), StoredDocument(2, 1, 0, source)])
        with pytest.raises(ValueError):
            store.put_documents(A, [make_document(1), make_document(0)])
        assert store.memories() == []

    def test_no_blocks_of_another_layout_are_no_error(self, store: TenantStore) -> None:
        store.put_blocks(A, ONE, SHARED, [make_block(SHARED, 1)])
        assert store.put_blocks(A, ONE, SEPARATE, []) == 0

    def test_nothing_put_is_nothing_there(self, store: TenantStore) -> None:
        assert store.put_documents(A, []) == 0
        assert store.put_blocks(A, ONE, SHARED, []) == 0
        assert store.memories() == []
        assert store.encodings(A) == []

    def test_deleting_documents_takes_their_blocks(self, store: TenantStore) -> None:
        store.put_documents(A, [make_document(n) for n in (1, 2, 3)])
        store.put_blocks(A, ONE, SHARED, [make_block(SHARED, n) for n in (1, 2)])
        store.put_blocks(A, TWO, SEPARATE, [make_block(SEPARATE, 1)])
        store.delete_documents(A, [1, 3, 99])
        assert store.document_numbers(A) == [2]
        assert store.block_numbers(A, ONE) == [2]
        assert store.encodings(A) == [ONE]
        with pytest.raises(RecordNotFoundError):
            store.get_content(A, TWO, SEPARATE, 1)
        assert list(store.check()) == []

    def test_deleting_blocks_leaves_documents(self, store: TenantStore) -> None:
        store.put_documents(A, [make_document(1), make_document(2)])
        store.put_blocks(A, ONE, SHARED, [make_block(SHARED, n) for n in (1, 2)])
        store.delete_blocks(A, ONE, [2, 7])
        assert store.block_numbers(A, ONE) == [1]
        store.delete_blocks(A, ONE, [1])
        assert store.encodings(A) == []
        assert store.document_numbers(A) == [1, 2]
        store.put_blocks(A, ONE, SEPARATE, [make_block(SEPARATE, 1)])
        assert store.encoding_layout(A, ONE) == SEPARATE

    def test_deleting_an_encoding_leaves_the_other(self, store: TenantStore) -> None:
        store.put_documents(A, [make_document(1)])
        store.put_blocks(A, ONE, SHARED, [make_block(SHARED, 1)])
        store.put_blocks(A, TWO, SEPARATE, [make_block(SEPARATE, 1)])
        store.delete_encoding(A, ONE)
        store.delete_encoding(A, ONE)
        assert store.encodings(A) == [TWO]
        assert store.block_numbers(A, TWO) == [1]

    def test_deleting_a_memory_leaves_its_neighbours(self, store: TenantStore) -> None:
        for memory in (A, B, memory_uid(3)):
            store.put_documents(memory, [make_document(1)])
            store.put_blocks(memory, ONE, SHARED, [make_block(SHARED, 1)])
        store.delete_memory(B)
        store.delete_memory(B)
        assert store.memories() == [A, memory_uid(3)]
        assert store.document_numbers(B) == []
        assert store.block_numbers(B, ONE) == []
        assert store.encodings(B) == []
        assert list(store.check()) == []

    def test_names_of_the_wrong_length_are_refused(self, store: TenantStore) -> None:
        short = memory_uid(1)[:15]
        with pytest.raises(ValueError):
            store.put_documents(type(A)(short), [])
        with pytest.raises(ValueError):
            store.block_numbers(A, encoding_id(-1))
        with pytest.raises(ValueError):
            store.get_document(A, 0)

    def test_a_block_without_its_document_is_reported(self, store: TenantStore) -> None:
        store.put_blocks(A, ONE, SHARED, [make_block(SHARED, 1)])
        assert [finding.problem for finding in store.check()] == ["no-document"]

    def test_a_closed_store_says_so(self, store: TenantStore) -> None:
        store.close()
        store.close()
        with pytest.raises(StorageError):
            store.document_numbers(A)
        with pytest.raises(StorageError):
            store.put_documents(A, [make_document(1)])
