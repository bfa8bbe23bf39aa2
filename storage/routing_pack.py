"""Routing keys of many documents into one array, with one copy of each.

What headers say is read first, by the caller alone. Then a few threads verify, decrypt and copy
records side by side, a few at a time: nearly all of that is done with the interpreter released,
and whoever needs it for long would stop the others. With one core, or little to do, the caller
does all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import cast

import numpy as np

from storage.block_records import block_arrays, check_block
from storage.codecs import Codec, raw_bytes
from storage.crypto.key_tree import KeyTree
from storage.keys import Kind, number_of
from storage.layout import NUMPY_DTYPE, Bits, KVLayout
from storage.layout_json import fingerprint
from storage.records import Sealed, look
from storage.store import EncodingId, PackedRouting, Room, StorageError

#: Threads that decode, the callers' own not counted. On 16 cores more of them took longer: each
#: needs the interpreter twice a record, and is slow to wake up when another one has it.
_MOST_THREADS = 2
#: Records that a thread takes at a time, and bytes of records from which on threads pay.
_AT_A_TIME = 8
_WORTH_BYTES = 2**20


def plain_room(size: int) -> memoryview:
    """A Room of new memory."""
    return np.empty(size, np.uint8).data


def pack_routing(
    records: Iterable[tuple[bytes, memoryview]],
    encoding: EncodingId,
    layout: KVLayout,
    tree: KeyTree | None,
    room: Room | None = None,
) -> PackedRouting:
    """Copies routing keys out of records, whose views stay valid meanwhile, into `room`, by
    default new memory.

    Raises CorruptRecordError, ForeignRecordError, KeyMissingError; what `room` gave then holds
    nothing of worth.
    """
    mark = fingerprint(encoding, layout)
    found = [_look(key, value, mark, layout, tree is not None) for key, value in records]
    ciphers = [None if tree is None else tree.cipher(number_of(s.key)) for s in found]
    tokens_N = [sealed.header.tokens for sealed in found]
    ends_N1 = np.cumsum([0, *map(layout.chunks, tokens_N)]).tolist()
    size = raw_bytes(1, ends_N1[-1], layout)
    flat = np.frombuffer((room or plain_room)(size), NUMPY_DTYPE[layout.dtype])
    packed_LCE = cast(Bits, flat.reshape(len(layout.routed_layers), ends_N1[-1], layout.width))

    def decode(first: int, scratch: bytearray) -> None:
        last = min(first + _AT_A_TIME, len(found))
        there, arrays = memoryview(scratch), list[Bits]()
        for sealed, cipher in zip(found[first:last], ciphers[first:last], strict=True):
            sealed.verify()
            payload = sealed.payload(cipher, there[: sealed.payload_bytes])
            arrays.append(_keys(sealed, payload, layout))
            there = there[sealed.payload_bytes :]
        np.concatenate(arrays, axis=1, out=packed_LCE[:, ends_N1[first] : ends_N1[last]])

    starts = range(0, len(found), _AT_A_TIME)
    opened = [sum(s.payload_bytes for s in found[n : n + _AT_A_TIME]) for n in starts]
    scratch_bytes = 0 if tree is None else max(opened, default=0)
    _share(decode, iter(starts), size, scratch_bytes)
    return PackedRouting(
        numbers_N=np.array([number_of(sealed.key) for sealed in found], np.int64),
        tokens_N=np.array(tokens_N, np.int64),
        routing_key_LCE=packed_LCE,
    )


def _look(key: bytes, value: memoryview, mark: bytes, layout: KVLayout, encrypted: bool) -> Sealed:
    """A record that is what it should be as far as it says so itself, and is as long as its
    keys; its bytes are verified where that is not so, or it does not say how long it has to be.
    """
    sealed = look(key, value, Kind.ROUTING, encrypted=encrypted)
    if sealed.header.codec != Codec.RAW:
        sealed.verify()
    try:
        check_block(sealed, mark, layout, encrypted=encrypted)
    except StorageError:
        sealed.verify()  # What is damaged may say anything.
        raise
    return sealed


def _keys(sealed: Sealed, payload: memoryview, layout: KVLayout) -> Bits:
    """[L, C, E], the payload itself where it is not coded."""
    if sealed.header.codec != Codec.RAW:
        return block_arrays(sealed, payload, layout)[0]
    raw = np.frombuffer(payload, NUMPY_DTYPE[layout.dtype])
    return cast(Bits, raw.reshape(len(layout.routed_layers), -1, layout.width))


@cache
def _helpers() -> tuple[int, ThreadPoolExecutor | None]:
    """How many threads help, all callers together, and they; none on one core."""
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)) - 1)
    return threads, ThreadPoolExecutor(threads, "decode") if threads else None


def _share(
    work: Callable[[int, bytearray], None], parts: Iterator[int], size: int, scratch_bytes: int = 0
) -> None:
    """Does all parts, with what threads there are; all have let go of the work at return.

    size: bytes that it makes. scratch_bytes: what each thread gets to decrypt into. Raises what
    a part has raised; parts not begun by then are left.
    """
    failed = False

    def drain() -> None:
        nonlocal failed
        scratch = bytearray(scratch_bytes)
        for part in parts:
            if failed:
                return
            try:
                work(part, scratch)
            except BaseException:
                failed = True
                raise

    threads, helpers = _helpers()
    asked = []
    if helpers is not None and size >= _WORTH_BYTES:
        asked = [helpers.submit(drain) for _ in range(threads)]
    try:
        drain()
    finally:
        begun = [future for future in asked if not future.cancel()]
        wait(begun)
    for future in begun:
        future.result()
