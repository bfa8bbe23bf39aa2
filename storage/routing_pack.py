"""Routing keys of many documents into one array, with one copy of each.

What headers say is read first, by the caller alone. Of plain, uncoded records (`storage.plain_run`)
a few threads then verify many at a time, and gather the rows of all, some layers at a time: they
hardly ever need the interpreter. Others are verified, decrypted and copied side by side, a few at
a time: nearly all of that is done with the interpreter released, but more threads would wait for
it. With one core, or little to do, the caller does all.
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
from storage.plain_run import Gathering, PlainRun
from storage.records import Sealed, look
from storage.store import EncodingId, PackedRouting, Room, StorageError

#: Threads that decrypt, the callers' own not counted. On 16 cores more of them took longer: each
#: needs the interpreter twice a record, and is slow to wake up when another one has it.
_DECODERS = 2
#: Threads that verify and gather plain records.
_GATHERERS = 4
#: Records that a thread takes at a time, and bytes of records from which on threads pay.
_AT_A_TIME = 8
#: Bytes that a thread gathers, and records that it verifies, at a time.
_GATHERED_BYTES = 8 * 2**20
_VERIFIED = 32
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
    records = list(records)
    run = PlainRun.of(records, mark, layout) if tree is None else None
    if run is not None:
        return _pack_run(run, layout, room or plain_room)
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


def _pack_run(run: PlainRun, layout: KVLayout, room: Room) -> PackedRouting:
    """Raises CorruptRecordError."""
    layers, chunk_bytes = len(layout.routed_layers), raw_bytes(1, 1, layout)
    chunks_N = layout.chunks_of(run.tokens_N)
    packed = np.frombuffer(room(int(chunks_N.sum()) * chunk_bytes), np.uint8)
    packed_LB, sums = packed.reshape(layers, -1), run.sums()
    gathering = Gathering.of(sums.bodies, layers, chunk_bytes // layers)
    step = max(1, _GATHERED_BYTES // packed_LB.shape[1])
    gathered = -(-layers // step) if gathering is not None else 0
    verified = -(-len(run.keys) // _VERIFIED)

    def work(part: int, _: bytearray) -> None:
        if gathering is not None and part < gathered:
            gathering.copy(packed_LB, part * step, min((part + 1) * step, layers))
        else:
            first = (part - gathered) * _VERIFIED
            sums.verify(first, first + _VERIFIED)

    _share(work, iter(range(gathered + verified)), packed.size, most=_GATHERERS)
    if gathering is None:
        arrays = [np.frombuffer(body, np.uint8).reshape(layers, -1) for body in sums.bodies]
        np.concatenate(arrays, axis=1, out=packed_LB)
    dtype = NUMPY_DTYPE[layout.dtype]
    return PackedRouting(
        numbers_N=np.array(list(map(number_of, run.keys)), np.int64),
        tokens_N=run.tokens_N,
        routing_key_LCE=cast(Bits, packed.view(dtype).reshape(layers, -1, layout.width)),
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
    threads = min(_GATHERERS, len(os.sched_getaffinity(0)) - 1)
    return threads, ThreadPoolExecutor(threads, "decode") if threads else None


def _share(
    work: Callable[[int, bytearray], None],
    parts: Iterator[int],
    size: int,
    scratch_bytes: int = 0,
    most: int = _DECODERS,
) -> None:
    """Does all parts, with what threads there are; all have let go of the work at return.

    size: bytes that it makes. scratch_bytes: what each thread gets to decrypt into. most: threads
    that help. Raises what a part has raised; parts not begun by then are left.
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
        asked = [helpers.submit(drain) for _ in range(min(threads, most))]
    try:
        drain()
    finally:
        begun = [future for future in asked if not future.cancel()]
        wait(begun)
    for future in begun:
        future.result()
