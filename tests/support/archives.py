"""Archives for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from storage.archive import ArchivedEncoding, ArchivedPacking, Manifest, write_archive
from storage.layout import KVBlock, KVLayout
from storage.store import StoredDocument
from tests.support.blocks import LAYOUTS, make_block, make_document

EMPTY = Manifest(
    created_at_us=1_770_000_000_000_000,
    display_name="Ann's memory",
    packing=ArchivedPacking("window", 8, 4096),
    revision=50,
    last_number=60,
    labels={"team": "blue", "über": "ja"},
)


def archived_encoding(layout: KVLayout, blocks: int, seed: int = 0) -> ArchivedEncoding:
    """An encoding with an identity of its own."""
    return ArchivedEncoding(f"model-{seed}", f"{seed + 1:064x}"[::-1], layout, blocks)


def pack(
    documents: Sequence[StoredDocument],
    encodings: Sequence[tuple[KVLayout, Sequence[KVBlock]]] = (),
    manifest: Manifest = EMPTY,
) -> bytes:
    """An archive of these, in one piece."""
    named = tuple(
        archived_encoding(layout, len(blocks), seed)
        for seed, (layout, blocks) in enumerate(encodings)
    )
    full = replace(manifest, documents=len(documents), encodings=named)
    blocks = {one.encoding_id: held for one, (_, held) in zip(named, encodings, strict=True)}
    return b"".join(write_archive(full, documents, blocks))


def sample() -> bytes:
    """A small archive with documents and blocks of two models."""
    documents = [make_document(number, f"text {number}") for number in (1, 2, 5)]
    encodings = [
        (layout, [make_block(layout, number, 3) for number in (1, 5)]) for layout in LAYOUTS[:2]
    ]
    return pack(documents, encodings)
