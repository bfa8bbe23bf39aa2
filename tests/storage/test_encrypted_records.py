"""Encrypted records: nothing opens but with its own key, in its own place, unaltered."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from storage.block_records import Record, document_record, read_document
from storage.codecs import Codec
from storage.crypto import KeyTree
from storage.keys import Kind, document_key
from storage.records import ENCRYPTED_HEADER_BYTES, Header, seal, unseal
from storage.store import (
    CorruptRecordError,
    ForeignRecordError,
    KeyMissingError,
    WrongKeyError,
)
from tests.support.blocks import make_document, memory_uid

A, B = memory_uid(1), memory_uid(2)
SECRET = bytes(range(32))
TREE, OTHER = KeyTree.grown_from(SECRET), KeyTree.grown_from(bytes(32))
CANARY = "the heron waits by the third lock"
SECRETS = st.binary(min_size=32, max_size=32)
PAYLOADS = st.binary(max_size=300)


def sealed(number: int, payload: bytes, tree: KeyTree = TREE, revision: int = 1) -> Record:
    key = document_key(A, number)
    header = Header(Kind.DOCUMENT, Codec.RAW, len(payload), revision=revision)
    return key, seal(key, header, payload, tree.cipher(number))


def opened(key: bytes, value: bytes, number: int, tree: KeyTree = TREE) -> bytes:
    record = unseal(key, value, Kind.DOCUMENT, encrypted=True)
    return bytes(record.payload(tree.cipher(number)))


def with_right_checksum(key: bytes, value: bytearray) -> bytes:
    """As a forger, who needs no secret for it, would write."""
    seed = xxh3_64_intdigest(key + value[:56])
    value[56:64] = xxh3_64_intdigest(bytes(value[64:]), seed).to_bytes(8, "little")
    return bytes(value)


@given(st.integers(1, 2**63 - 1), PAYLOADS)
@settings(deadline=None)
def test_what_is_sealed_opens(number: int, payload: bytes) -> None:
    key, value = sealed(number, payload)
    assert opened(key, value, number) == payload
    assert len(value) == ENCRYPTED_HEADER_BYTES + len(payload) + 16


@given(PAYLOADS, SECRETS, st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None)
def test_another_key_opens_nothing(payload: bytes, secret: bytes, number: int, other: int) -> None:
    key, value = sealed(number, payload)
    if (secret, other) != (SECRET, number):
        with pytest.raises(WrongKeyError):
            opened(key, value, other, KeyTree.grown_from(secret))


@given(PAYLOADS, st.integers(0, 8 * 400))
@settings(deadline=None, max_examples=300)
def test_a_forged_bit_is_noticed_without_a_checksum(payload: bytes, bit: int) -> None:
    key, value = sealed(5, payload)
    forged = bytearray(value)
    place = bit // 8 % len(value)
    forged[place] ^= 1 << bit % 8
    if 56 <= place < 64:
        return  # The checksum itself: made right below.
    try:
        found = opened(key, with_right_checksum(key, forged), 5)
    except (CorruptRecordError, ForeignRecordError):
        return
    raise AssertionError(f"opened to {found!r}")


@given(st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None)
def test_records_cannot_change_places(first: int, second: int) -> None:
    key, value = sealed(first, b"one")
    for place in (document_key(A, second), document_key(B, first)):
        if place != key:
            moved = with_right_checksum(place, bytearray(value))
            with pytest.raises(WrongKeyError):
                opened(place, moved, first)


def test_a_plain_record_is_not_taken_for_an_encrypted_one_nor_the_other_way() -> None:
    key, value = document_record(A, make_document(1))
    with pytest.raises(WrongKeyError):
        read_document(key, value, TREE)
    key, value = document_record(A, make_document(1), TREE)
    with pytest.raises(KeyMissingError):
        read_document(key, value)


def test_nonces_differ_and_text_is_nowhere() -> None:
    values = {document_record(A, make_document(1, CANARY), TREE)[1] for _ in range(500)}
    assert len({value[44:56] for value in values}) == 500
    assert not any(CANARY.encode() in value or b"heron" in value for value in values)


def test_the_revision_is_bound() -> None:
    key, value = sealed(3, b"text", revision=8)
    assert unseal(key, value, Kind.DOCUMENT, encrypted=True).header.revision == 8
    other = bytearray(value)
    other[36] = 9
    with pytest.raises(WrongKeyError):
        opened(key, with_right_checksum(key, other), 3)


def test_a_destroyed_key_opens_nothing_that_is_left() -> None:
    key, value = document_record(A, make_document(4, CANARY), TREE)
    left = KeyTree.decode(TREE.without([4]).encode())
    with pytest.raises(KeyMissingError):
        read_document(key, value, left)
    with pytest.raises(WrongKeyError):
        read_document(key, value, left.with_new([4]))
