"""Keys: their width, their order, and what is no key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.keys import (
    KEY_BYTES,
    MAX_NUMBER,
    Kind,
    block_key,
    document_key,
    encoding_key,
    kind_range,
    memory_range,
    number_of,
    number_range,
    parse_key,
)
from storage.store import EncodingId, MemoryUid

UIDS = st.binary(min_size=16, max_size=16)
MEMORIES = UIDS.map(MemoryUid)
ENCODINGS = UIDS.filter(any).map(EncodingId)
NUMBERS = st.integers(1, MAX_NUMBER)
BLOCK_KINDS = st.sampled_from([Kind.ROUTING, Kind.CONTENT])


@given(MEMORIES, BLOCK_KINDS, ENCODINGS, NUMBERS)
def test_keys_are_parsed_back(
    memory: MemoryUid, kind: Kind, encoding: EncodingId, number: int
) -> None:
    key = block_key(memory, kind, encoding, number)
    parsed = parse_key(key)
    assert (parsed.memory, parsed.kind, parsed.encoding, parsed.number) == (
        memory,
        kind,
        encoding,
        number,
    )
    assert len(key) == len(document_key(memory, number)) == KEY_BYTES
    assert number_of(key) == number_of(document_key(memory, number)) == number
    assert parse_key(document_key(memory, number)).kind is Kind.DOCUMENT
    assert parse_key(encoding_key(memory, encoding)).encoding == encoding


@given(MEMORIES, ENCODINGS, NUMBERS, NUMBERS)
def test_byte_order_is_number_order(
    memory: MemoryUid, encoding: EncodingId, left: int, right: int
) -> None:
    keys = [block_key(memory, Kind.ROUTING, encoding, n) for n in (left, right)]
    assert (keys[0] < keys[1]) == (left < right)


@given(MEMORIES, MEMORIES, BLOCK_KINDS, ENCODINGS, NUMBERS, NUMBERS)
def test_ranges_hold_their_own_and_no_others(
    memory: MemoryUid, other: MemoryUid, kind: Kind, encoding: EncodingId, number: int, end: int
) -> None:
    key = block_key(memory, kind, encoding, number)
    span = number_range(memory, kind, encoding, 0, end)
    assert (span.first <= key <= span.last) == (number <= end)
    for span in (kind_range(memory, kind), memory_range(memory)):
        assert span.first <= key <= span.last
        stranger = block_key(other, kind, encoding, number)
        assert (span.first <= stranger <= span.last) == (memory == other)
    documents = kind_range(memory, Kind.DOCUMENT)
    assert not documents.first <= key <= documents.last


def test_a_range_may_be_empty() -> None:
    memory = MemoryUid(bytes(16))
    for first, last in ((5, 4), (MAX_NUMBER + 1, None), (3, 0), (1, -1)):
        span = number_range(memory, Kind.DOCUMENT, None, first, last)
        assert span.last < span.first


def test_the_rest_of_a_range_begins_behind_a_key() -> None:
    memory = MemoryUid(bytes(16))
    rest = number_range(memory, Kind.DOCUMENT, None, 0, 9).after(document_key(memory, 4))
    assert document_key(memory, 4) < rest.first <= document_key(memory, 5) <= rest.last


@pytest.mark.parametrize(
    "key",
    [
        b"",
        bytes(40),
        bytes(42),
        bytes(KEY_BYTES),  # Kind 0.
        bytes(16) + b"\x09" + b"\x01" * 24,  # An unknown kind.
        bytes(16) + b"\x01" + b"\x01" * 24,  # A document with an encoding.
        bytes(16) + b"\x01" + bytes(24),  # Document 0.
        bytes(16) + b"\x03" + bytes(23) + b"\x01",  # A block without an encoding.
        bytes(16) + b"\x02" + b"\x01" * 24,  # An encoding with a number.
        bytes(16) + b"\x01" + bytes(16) + b"\xff" * 8,  # Beyond the largest number.
    ],
)
def test_what_is_no_key_is_refused(key: bytes) -> None:
    with pytest.raises(ValueError):
        parse_key(key)
