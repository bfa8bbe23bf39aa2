"""Documents and KV blocks for tests of what is stored."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
from hypothesis import strategies as st

from storage.codecs import to_bf16
from storage.documents import Conversation, Role, TextSource, Turn
from storage.layout import Bits, KVBlock, KVLayout
from storage.store import EncodingId, MemoryUid, StoredDocument

#: A model that routes with its content keys, and one with routing keys of its own.
SHARED = KVLayout((1, 2, 5), 2, 8, 4, "bf16", separate_routing_keys=False)
SEPARATE = KVLayout((0, 3), 1, 16, 64, "bf16", separate_routing_keys=True)
WIDE = KVLayout((7,), 3, 4, 1, "fp32", separate_routing_keys=True)
LAYOUTS = (SHARED, SEPARATE, WIDE)


def memory_uid(number: int) -> MemoryUid:
    """A memory's uid; ascending with `number`."""
    return MemoryUid(number.to_bytes(16, "big"))


def encoding_id(number: int) -> EncodingId:
    """An encoding's id; ascending with `number`."""
    return EncodingId((number + 1).to_bytes(16, "big"))


def make_document(number: int, text: str = "tea, please") -> StoredDocument:
    """A conversation of one dated turn."""
    turn = Turn(Role.USER, text, datetime(2026, 3, 1, 12, 30, 0, 7, tzinfo=UTC), "Ann", "s1")
    return StoredDocument(number, number, 1_770_000_000_000_000 + number, Conversation((turn,)))


def make_block(layout: KVLayout, number: int, tokens: int = 5, seed: int | None = None) -> KVBlock:
    """A block of normally distributed values, the same for the same arguments."""
    rng = np.random.default_rng([number, tokens, seed or 0])
    shape = (len(layout.routed_layers), layout.chunks(tokens), layout.width)

    def array() -> Bits:
        values = rng.standard_normal(shape, np.float32)
        return to_bf16(values) if layout.dtype == "bf16" else values

    key = array() if layout.separate_routing_keys else None
    return KVBlock(number, tokens, array(), key, array())


def same_bits(left: Bits | None, right: Bits | None) -> bool:
    """True for arrays that are equal bit for bit, or both absent."""
    if left is None or right is None:
        return left is right
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.tobytes() == right.tobytes()
    )


def same_block(left: KVBlock, right: KVBlock) -> bool:
    """True when two blocks are equal bit for bit."""
    return (
        (left.number, left.tokens) == (right.number, right.tokens)
        and same_bits(left.routing_key_LCE, right.routing_key_LCE)
        and same_bits(left.key_LCE, right.key_LCE)
        and same_bits(left.value_LCE, right.value_LCE)
    )


_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
_MOMENTS = st.none() | st.datetimes(
    datetime(1900, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC)
)
_METADATA = st.dictionaries(_TEXTS, _TEXTS, max_size=3)
_TURNS = st.builds(
    Turn,
    role=st.sampled_from(Role),
    text=_TEXTS,
    occurred_at=_MOMENTS,
    speaker=_TEXTS,
    session=_TEXTS,
    metadata=_METADATA,
)
SOURCES = st.builds(Conversation, st.lists(_TURNS, min_size=1, max_size=3).map(tuple)) | st.builds(
    TextSource, text=_TEXTS, title=_TEXTS, occurred_at=_MOMENTS, metadata=_METADATA
)


def documents(numbers: st.SearchStrategy[int]) -> st.SearchStrategy[StoredDocument]:
    """Any document with a number of `numbers`."""
    revisions = st.integers(0, 2**40)
    return st.builds(StoredDocument, numbers, revisions, st.integers(0, 2**52), SOURCES)


def block_arrays(blocks: Sequence[KVBlock]) -> list[Bits]:
    """The routing keys of several blocks."""
    return [block.routing_key_LCE for block in blocks]
