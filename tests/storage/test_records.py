"""The envelope: nothing that was altered, cut, moved or made for another model gets through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.block_records import (
    BlockCodecs,
    Record,
    block_records,
    document_record,
    encoding_record,
    keys_record,
    read_content,
    read_document,
    read_encoding,
    read_keys,
    read_routing,
)
from storage.codecs import Codec
from storage.crypto import KeyTree
from storage.keys import Kind, block_key, document_key
from storage.layout_json import fingerprint
from storage.records import ENCRYPTED_VERSION, HEADER_BYTES, MAGIC, Header, seal, unseal
from storage.store import CorruptRecordError, ForeignRecordError
from tests.support.blocks import (
    SEPARATE,
    SHARED,
    encoding_id,
    make_block,
    make_document,
    memory_uid,
    same_bits,
)

A, ONE = memory_uid(1), encoding_id(1)
MARK = fingerprint(ONE, SHARED)
Reader = Callable[[bytes, bytes], object]


TREE = KeyTree.grown_from(bytes(range(32)))


def samples(keys: KeyTree | None) -> dict[str, tuple[Record, Reader]]:
    """One record of each kind and codec, with what reads it; encrypted when there are keys."""

    def routing(key: bytes, value: bytes) -> object:
        return read_routing(key, value, MARK, SHARED, keys)

    def content(key: bytes, value: bytes) -> object:
        return read_content(key, value, MARK, SHARED, keys)

    found: dict[str, tuple[Record, Reader]] = {
        "document": (
            document_record(A, make_document(7), keys),
            lambda key, value: read_document(key, value, keys),
        ),
        "encoding": (
            encoding_record(A, ONE, SHARED, keys),
            lambda key, value: read_encoding(key, value, keys),
        ),
    }
    for codec in Codec:
        block = make_block(SHARED, 7)
        halves = block_records(A, ONE, SHARED, block, BlockCodecs(codec, codec), keys)
        found[f"routing-{codec.name}"] = (halves[0], routing)
        found[f"content-{codec.name}"] = (halves[1], content)
    if keys is not None:
        own = keys_record(A, 3, SECRET, keys.without([1]))
        found["keys"] = (own, lambda key, value: read_keys(key, value, SECRET))
        return {f"{name}-encrypted": sample for name, sample in found.items()}
    return found


def routing(key: bytes, value: bytes) -> object:
    return read_routing(key, value, MARK, SHARED)


SECRET = b"s" * 32
SAMPLES = samples(None) | samples(TREE)
NAMES = st.sampled_from(sorted(SAMPLES))


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_every_single_bit_flip_is_detected(name: str) -> None:
    (key, value), read = SAMPLES[name]
    read(key, value)
    for bit in range(8 * len(value)):
        damaged = bytearray(value)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((CorruptRecordError, ForeignRecordError)):
            read(key, bytes(damaged))


@given(NAMES, st.integers(0, 2000))
def test_every_truncation_is_detected(name: str, length: int) -> None:
    (key, value), read = SAMPLES[name]
    if length < len(value):
        with pytest.raises(CorruptRecordError):
            read(key, value[:length])


@given(NAMES, st.binary(min_size=1, max_size=20))
def test_bytes_added_are_detected(name: str, more: bytes) -> None:
    (key, value), read = SAMPLES[name]
    with pytest.raises(CorruptRecordError):
        read(key, value + more)


@given(NAMES, st.integers(0, 8 * 41 - 1))
def test_a_record_under_another_key_is_detected(name: str, bit: int) -> None:
    (key, value), read = SAMPLES[name]
    other = bytearray(key)
    other[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptRecordError):
        read(bytes(other), value)


@settings(max_examples=300)
@given(NAMES, st.data())
def test_random_damage_is_detected(name: str, data: st.DataObject) -> None:
    (key, value), read = SAMPLES[name]
    start = data.draw(st.integers(0, len(value) - 1))
    patch = data.draw(st.binary(min_size=1, max_size=64))
    damaged = value[:start] + patch + value[start + len(patch) :]
    if damaged != value:
        with pytest.raises((CorruptRecordError, ForeignRecordError)):
            read(key, damaged)


@given(st.binary(max_size=200))
def test_any_bytes_are_no_record(value: bytes) -> None:
    key = document_key(A, 1)
    with pytest.raises((CorruptRecordError, ForeignRecordError)):
        read_document(key, value)


def test_another_version_is_foreign() -> None:
    (key, value), read = SAMPLES["document"]
    newer = MAGIC + bytes([ENCRYPTED_VERSION + 1]) + value[5:]
    with pytest.raises(ForeignRecordError):
        read(key, newer)


def test_another_model_or_layout_is_foreign() -> None:
    (key, value), _ = SAMPLES["routing-RAW"]
    for mark in (fingerprint(ONE, SEPARATE), fingerprint(encoding_id(2), SHARED)):
        with pytest.raises(ForeignRecordError):
            read_routing(key, value, mark, SHARED)


def test_lengths_that_lie_under_a_right_checksum_are_detected() -> None:
    key = block_key(A, Kind.ROUTING, ONE, 7)
    size = SHARED.block_bytes(5) // 2
    for header, payload in (
        (Header(Kind.ROUTING, Codec.RAW, size, MARK, 0), bytes(size)),
        (Header(Kind.ROUTING, Codec.RAW, size, MARK, 2**32 - 1), bytes(size)),
        (Header(Kind.ROUTING, Codec.RAW, size, MARK, 5), bytes(size - 1)),
        (Header(Kind.ROUTING, Codec.RAW, size + 2, MARK, 5), bytes(size + 2)),
        (Header(Kind.ROUTING, 99, size, MARK, 5), bytes(size)),
        (Header(Kind.ROUTING, Codec.ZSTD, size, MARK, 5), bytes(size)),
        (Header(Kind.CONTENT, Codec.RAW, size, MARK, 5), bytes(size)),
    ):
        with pytest.raises(CorruptRecordError):
            routing(key, seal(key, header, payload))


def test_a_document_under_a_right_checksum_is_still_parsed_strictly() -> None:
    key = document_key(A, 8)
    (_, value), _ = SAMPLES["document"]
    sealed = unseal(document_key(A, 7), value, Kind.DOCUMENT)
    header, payload = sealed.header, sealed.payload(None)
    with pytest.raises(CorruptRecordError, match="holds document 7"):
        read_document(key, seal(key, header, bytes(payload)))
    with pytest.raises(CorruptRecordError):
        read_document(key, seal(key, Header(Kind.DOCUMENT, Codec.RAW, 2), b"{}"))
    with pytest.raises(CorruptRecordError):
        read_document(key, seal(key, header._replace(raw_bytes=5), bytes(payload)))


def test_too_long_a_payload_is_refused() -> None:
    with pytest.raises(ValueError):
        seal(document_key(A, 1), Header(Kind.DOCUMENT, Codec.RAW, 2**32), b"")


def test_payloads_begin_on_a_cache_line() -> None:
    lmdb_page_header = 16
    assert (lmdb_page_header + HEADER_BYTES) % 64 == 0


def test_blocks_are_read_back_under_lossless_codecs() -> None:
    block = make_block(SHARED, 7)
    for codec in (Codec.RAW, Codec.ZSTD):
        (key, value), _ = SAMPLES[f"routing-{codec.name}"]
        part = read_routing(key, value, MARK, SHARED)
        assert (part.number, part.tokens) == (7, 5)
        assert same_bits(part.routing_key_LCE, block.routing_key_LCE)
