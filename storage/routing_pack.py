"""Routing keys of many records, verified, decrypted and copied into one array."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from storage.block_records import block_arrays, open_block
from storage.codecs import Codec
from storage.crypto.key_tree import KeyTree
from storage.keys import Kind, number_of
from storage.layout import NUMPY_DTYPE, Bits, KVLayout
from storage.layout_json import fingerprint
from storage.records import Sealed
from storage.store import CorruptRecordError, EncodingId, PackedRouting


def pack_routing(
    records: Iterable[tuple[bytes, memoryview]],
    encoding: EncodingId,
    layout: KVLayout,
    tree: KeyTree | None,
) -> PackedRouting:
    """Copies routing keys out of records whose views stay valid meanwhile."""
    mark = fingerprint(encoding, layout)
    # Verified and sized first, so that one array takes all.
    found = [
        open_block(key, value, Kind.ROUTING, mark, layout, encrypted=tree is not None)
        for key, value in records
    ]
    chunks_N = [layout.chunks(sealed.header.tokens) for sealed in found]
    shape = (len(layout.routed_layers), sum(chunks_N), layout.width)
    packed: Bits = (
        np.empty(shape, np.uint16) if layout.dtype == "bf16" else np.empty(shape, np.float32)
    )
    scratch = memoryview(bytearray(max((s.payload_bytes for s in found), default=0)))
    start = 0
    for sealed, count in zip(found, chunks_N, strict=True):
        cipher = None if tree is None else tree.cipher(number_of(sealed.key))
        payload = sealed.payload(cipher, scratch[: sealed.payload_bytes])
        _copy_routing(sealed, payload, packed[:, start : start + count], layout)
        start += count
    return PackedRouting(
        numbers_N=np.array([number_of(sealed.key) for sealed in found], np.int64),
        tokens_N=np.array([sealed.header.tokens for sealed in found], np.int64),
        routing_key_LCE=packed,
    )


def _copy_routing(sealed: Sealed, payload: memoryview, target: Bits, layout: KVLayout) -> None:
    if sealed.header.codec != Codec.RAW:
        target[...] = block_arrays(sealed, payload, layout)[0]
    elif len(payload) == target.nbytes:
        target[...] = np.frombuffer(payload, NUMPY_DTYPE[layout.dtype]).reshape(target.shape)
    else:
        raise CorruptRecordError(f"{sealed.key.hex()}: payload does not fit the layout")
