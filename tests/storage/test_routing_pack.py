"""Many threads decode what one does, in whose place they are asked to, and find the same damage."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import routing_pack
from storage.block_records import BlockCodecs, Record, block_records, open_block
from storage.codecs import Codec
from storage.crypto import KeyTree
from storage.keys import Kind
from storage.layout import KVLayout
from storage.layout_json import fingerprint
from storage.plain_run import Gathering
from storage.routing_pack import pack_routing, plain_room
from storage.store import CorruptRecordError, ForeignRecordError, StorageError
from tests.support.blocks import SHARED, encoding_id, make_block, memory_uid, same_bits

A, ONE = memory_uid(1), encoding_id(1)
#: Chunks of 128 bytes.
ROWS = KVLayout((1, 4, 5), 2, 32, 4, "bf16", separate_routing_keys=False)
TREE = KeyTree.grown_from(b"s" * 32)
TOKENS = [1, 9, 4, 30, 5, 5, 2, 64, 3, 1, 1, 17] * 3
BLOCKS = [make_block(SHARED, number, tokens) for number, tokens in enumerate(TOKENS, 1)]
EXPECTED = np.concatenate([block.routing_key_LCE for block in BLOCKS], axis=1)


def records_of(tree: KeyTree | None, codecs: list[Codec]) -> list[Record]:
    """The routing records of BLOCKS, their codecs in turn."""
    return [
        block_records(A, ONE, SHARED, block, BlockCodecs(codecs[n % len(codecs)]), tree)[0]
        for n, block in enumerate(BLOCKS)
    ]


PLAIN, ENCRYPTED = (records_of(tree, [Codec.RAW, Codec.ZSTD]) for tree in (None, TREE))


def views(records: list[Record]) -> Iterator[tuple[bytes, memoryview]]:
    return ((key, memoryview(value)) for key, value in records)


@pytest.fixture(params=[0, 3], ids=["alone", "helped"])
def helpers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """How many threads help, however small the work is."""
    monkeypatch.setattr(routing_pack, "_WORTH_BYTES", 0)
    monkeypatch.setattr(routing_pack, "_AT_A_TIME", 2)
    if not request.param:
        monkeypatch.setattr(routing_pack, "_helpers", lambda: (0, None))
        yield 0
        return
    with ThreadPoolExecutor(request.param) as pool:
        monkeypatch.setattr(routing_pack, "_helpers", lambda: (request.param, pool))
        yield request.param


@pytest.mark.parametrize("tree", [None, TREE], ids=["plain", "encrypted"])
def test_what_was_written_is_packed(helpers: int, tree: KeyTree | None) -> None:
    asked: list[np.ndarray] = []

    def room(size: int) -> memoryview:
        asked.append(np.zeros(size + 16, np.uint8))
        return asked[-1][:size].data

    for _ in range(5):
        records = PLAIN if tree is None else ENCRYPTED
        packed = pack_routing(views(records), ONE, SHARED, tree, room)
        assert same_bits(packed.routing_key_LCE, EXPECTED)
        assert packed.numbers_N.tolist() == [block.number for block in BLOCKS]
        assert packed.tokens_N.tolist() == TOKENS
        (memory,) = asked
        assert np.shares_memory(memory, packed.routing_key_LCE) and not memory[-16:].any()
        asked.clear()


@pytest.mark.usefixtures("helpers")
def test_every_record_is_verified() -> None:
    for tree, records in ((None, PLAIN), (TREE, ENCRYPTED)):
        for place in range(0, len(records), 5):
            key, value = records[place]
            damaged = bytearray(value)
            damaged[-1] ^= 1
            broken = [*records[:place], (key, bytes(damaged)), *records[place + 1 :]]
            with pytest.raises(CorruptRecordError, match=key.hex()):
                pack_routing(views(broken), ONE, SHARED, tree)


def in_one_map(records: list[Record], step: int = 4096) -> Iterator[tuple[bytes, memoryview]]:
    """As LMDB keeps what is large: each value behind a page's header, on pages of its own."""
    size, places = 0, []
    for _, value in records:
        places.append(size + 16)
        size += -(-(len(value) + 16) // step) * step
    memory = bytearray(size)
    for place, (_, value) in zip(places, records, strict=True):
        memory[place : place + len(value)] = value
    whole = memoryview(memory).toreadonly()
    for place, (key, value) in zip(places, records, strict=True):
        yield key, whole[place : place + len(value)]


@pytest.mark.usefixtures("helpers")
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    tokens=st.lists(st.integers(1, 200), min_size=1, max_size=9),
    order=st.randoms(use_true_random=False),
    step=st.sampled_from([4096, 1024, 80]),
)
def test_plain_records_are_gathered_from_where_they_lie(
    tokens: list[int], order: random.Random, step: int
) -> None:
    """In whole pieces where they lie in even steps, else one by one; in any order."""
    blocks = [make_block(ROWS, number, count) for number, count in enumerate(tokens, 1)]
    records = [block_records(A, ONE, ROWS, block, BlockCodecs())[0] for block in blocks]
    places = list(range(len(blocks)))
    order.shuffle(places)
    lying = dict(zip(places, in_one_map([records[place] for place in places], step), strict=True))
    packed = pack_routing((lying[place] for place in range(len(blocks))), ONE, ROWS, None)
    expected = np.concatenate([block.routing_key_LCE for block in blocks], axis=1)
    assert same_bits(packed.routing_key_LCE, expected)
    assert packed.tokens_N.tolist() == tokens
    bodies = [value[48:] for _, value in lying.values()]
    assert step == 80 or Gathering.of(bodies, 3, 128) is not None


@pytest.mark.usefixtures("helpers")
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 8), st.integers(0, 10**9))
def test_no_flipped_bit_of_a_plain_record_passes(which: int, bit: int) -> None:
    blocks = [make_block(ROWS, number, 3 * number) for number in range(1, 10)]
    records = [block_records(A, ONE, ROWS, block, BlockCodecs())[0] for block in blocks]
    key, value = records[which]
    damaged = bytearray(value)
    damaged[bit // 8 % len(value)] ^= 1 << bit % 8
    records[which] = (key, bytes(damaged))
    with pytest.raises(StorageError, match=key.hex()):
        pack_routing(in_one_map(records), ONE, ROWS, None)


@settings(max_examples=200, deadline=None)
@given(st.booleans(), st.integers(0, 3), st.integers(0, 79), st.binary(min_size=1, max_size=6))
def test_a_damaged_header_is_taken_for_what_it_is(
    encrypted: bool, place: int, start: int, patch: bytes
) -> None:
    """Whatever a header says before it is verified, no room is made for it, and it is refused
    as a whole record's opening refuses it."""
    tree, records = (TREE, ENCRYPTED) if encrypted else (None, PLAIN)
    key, value = records[place]
    damaged = value[:start] + patch + value[start + len(patch) :]
    if damaged == value:
        return
    mark, most = fingerprint(ONE, SHARED), sum(len(value) for _, value in records) * 3
    with pytest.raises((CorruptRecordError, ForeignRecordError)) as alone:
        open_block(key, damaged, Kind.ROUTING, mark, SHARED, encrypted=encrypted)

    def room(size: int) -> memoryview:
        assert size < most
        return plain_room(size)

    with pytest.raises(StorageError) as together:
        pack_routing(
            views([*records[:place], (key, damaged), *records[place + 1 :]]),
            ONE,
            SHARED,
            tree,
            room,
        )
    assert (together.type, str(together.value)) == (alone.type, str(alone.value))


def test_when_a_part_fails_nobody_works_on_and_nobody_is_left(helpers: int) -> None:
    at_work, lock = [0], threading.Lock()

    def work(part: int, _: bytearray) -> None:
        with lock:
            at_work[0] += 1
        try:
            if part == helpers:
                raise RuntimeError("a part")
        finally:
            with lock:
                at_work[0] -= 1

    with pytest.raises(RuntimeError, match="a part"):
        routing_pack._share(work, itertools.count(), 1)  # There is always another part.
    assert not at_work[0]
    done: list[int] = []
    routing_pack._share(lambda part, _: done.append(part), iter(range(100)), 1)
    assert sorted(done) == list(range(100)), "each part once, and all of them"
