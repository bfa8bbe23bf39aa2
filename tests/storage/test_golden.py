"""Records and archives of every format version, as they were written once, are read for ever.

The files under tests/golden/format are not made anew by any code here: when a
test of this module fails, the change broke what people have on their disks.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from memsvc.client.sealed import UnsealedFile
from storage.archive import open_archive
from storage.block_records import (
    BlockCodecs,
    block_records,
    document_record,
    encoding_record,
    read_content,
    read_document,
    read_encoding,
    read_keys,
    read_routing,
)
from storage.codecs import Codec, to_float
from storage.crypto import KeyTree
from storage.documents import Conversation, Role, TextSource, Turn
from storage.keys import Kind, parse_key
from storage.layout import Bits, KVBlock, KVLayout
from storage.layout_json import fingerprint
from storage.store import EncodingId, MemoryUid, StoredDocument
from tests.support.archives import EMPTY, SigningKey
from tests.support.blocks import same_bits, same_block

GOLDEN = Path(__file__).parent.parent / "golden" / "format"
MEMORY = MemoryUid(bytes(range(16)))
ENCODING = EncodingId(bytes(range(100, 116)))
TOKENS = 7
_NOON = datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=UTC)
DOCUMENTS = [
    StoredDocument(
        3,
        2,
        1_700_000_000_000_000,
        Conversation(
            (
                Turn(Role.USER, "Grüße, 世界 🌍", _NOON, "Ann", "s-1", {"k": "v", "a": ""}),
                Turn(Role.ASSISTANT, 'line\nbreak " \\ \u2028', None),
            )
        ),
    ),
    StoredDocument(9, 4, 1_700_000_000_000_001, TextSource("text", "title", _NOON, {"x": "y"})),
]
GOLDEN_LAYOUTS = {
    "shared": KVLayout((2, 5), 2, 4, 4, "bf16", separate_routing_keys=False),
    "separate": KVLayout((0,), 1, 8, 64, "fp32", separate_routing_keys=True),
}


def ramp(layout: KVLayout, start: int) -> Bits:
    """A [L, C, E] array of small fractions, rising."""
    shape = (len(layout.routed_layers), layout.chunks(TOKENS), layout.width)
    steps = np.arange(start, start + int(np.prod(shape)), dtype=np.float32)
    values = np.divide(steps, 8, dtype=np.float32).reshape(shape)
    if layout.dtype == "fp32":
        return values
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def ramp_block(layout: KVLayout, number: int = 9) -> KVBlock:
    """The block that the golden files hold."""
    key = ramp(layout, -3) if layout.separate_routing_keys else None
    return KVBlock(number, TOKENS, ramp(layout, 0), key, ramp(layout, -9))


def records() -> dict[str, tuple[bytes, bytes]]:
    entries = json.loads((GOLDEN / "records-v1.json").read_text())
    return {e["name"]: (bytes.fromhex(e["key"]), bytes.fromhex(e["value"])) for e in entries}


def test_there_is_one_of_each() -> None:
    names = {"document-0", "document-1"}
    for layout in GOLDEN_LAYOUTS:
        names |= {f"encoding-{layout}"}
        names |= {f"{k}-{layout}-{c.name}" for k in ("routing", "content") for c in Codec}
    assert set(records()) == names


@pytest.mark.parametrize("index", [0, 1])
def test_documents(index: int) -> None:
    key, value = records()[f"document-{index}"]
    assert parse_key(key).memory == MEMORY
    assert read_document(key, value) == DOCUMENTS[index]


@pytest.mark.parametrize("name", GOLDEN_LAYOUTS)
def test_layouts(name: str) -> None:
    key, value = records()[f"encoding-{name}"]
    assert parse_key(key).kind is Kind.ENCODING
    assert read_encoding(key, value) == GOLDEN_LAYOUTS[name]


def near(found: Bits | None, expected: Bits | None, lossy: bool) -> bool:
    if not lossy or found is None or expected is None:
        return same_bits(found, expected)
    return bool(np.allclose(to_float(found), to_float(expected), atol=0.03))


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("name", GOLDEN_LAYOUTS)
def test_blocks(name: str, codec: Codec) -> None:
    layout = GOLDEN_LAYOUTS[name]
    mark = fingerprint(ENCODING, layout)
    block = ramp_block(layout)
    lossy = codec in (Codec.INT8, Codec.INT8_ZSTD)
    key, value = records()[f"routing-{name}-{codec.name}"]
    routing = read_routing(key, value, mark, layout)
    assert (routing.number, routing.tokens) == (9, TOKENS)
    assert near(routing.routing_key_LCE, block.routing_key_LCE, lossy)
    key, value = records()[f"content-{name}-{codec.name}"]
    content = read_content(key, value, mark, layout)
    assert near(content.key_LCE, block.key_LCE, lossy)
    assert near(content.value_LCE, block.value_LCE, lossy)


def test_what_is_written_today_is_the_same() -> None:
    """zstd may pack otherwise in another release, so only what is not packed is compared."""
    stored = records()
    for name, layout in GOLDEN_LAYOUTS.items():
        assert encoding_record(MEMORY, ENCODING, layout) == stored[f"encoding-{name}"]
        for codec in (Codec.RAW, Codec.INT8):
            halves = block_records(
                MEMORY, ENCODING, layout, ramp_block(layout), BlockCodecs(codec, codec)
            )
            for kind, record in zip(("routing", "content"), halves, strict=True):
                assert record == stored[f"{kind}-{name}-{codec.name}"]
    for index, document in enumerate(DOCUMENTS):
        assert document_record(MEMORY, document)[0] == stored[f"document-{index}"][0]


def encrypted_records() -> dict[str, tuple[bytes, bytes]]:
    entries = json.loads((GOLDEN / "records-v2.json").read_text())
    return {e["name"]: (bytes.fromhex(e["key"]), bytes.fromhex(e["value"])) for e in entries}


def test_encrypted_records() -> None:
    """Version 2, under a memory whose key is the bytes 0 to 31."""
    stored, tree = encrypted_records(), KeyTree.grown_from(bytes(range(32)))
    for index, document in enumerate(DOCUMENTS):
        assert read_document(*stored.pop(f"document-{index}"), tree) == document
    for name, layout in GOLDEN_LAYOUTS.items():
        assert read_encoding(*stored.pop(f"encoding-{name}"), tree) == layout
        mark, block = fingerprint(ENCODING, layout), ramp_block(layout)
        for codec in (Codec.RAW, Codec.INT8_ZSTD):
            routing = read_routing(*stored.pop(f"routing-{name}-{codec.name}"), mark, layout, tree)
            content = read_content(*stored.pop(f"content-{name}-{codec.name}"), mark, layout, tree)
            lossy = codec is not Codec.RAW
            assert near(routing.routing_key_LCE, block.routing_key_LCE, lossy)
            assert near(content.value_LCE, block.value_LCE, lossy)
    left = read_keys(*stored.pop("keys"), bytes(range(32, 64)))
    assert left.encode() == tree.without([4]).encode()
    assert not stored


def test_archive() -> None:
    with open_archive(GOLDEN / "archive-v1.msamem") as archive:
        manifest = archive.manifest
        assert (manifest.display_name, manifest.labels) == (EMPTY.display_name, EMPTY.labels)
        assert (manifest.revision, manifest.last_number) == (50, 60)
        assert list(archive.documents()) == DOCUMENTS
        layouts = [encoding.layout for encoding in manifest.encodings]
        assert layouts == list(GOLDEN_LAYOUTS.values())
        for encoding in manifest.encodings:
            (block,) = archive.blocks(encoding.encoding_id)
            assert same_block(block, ramp_block(encoding.layout))


def test_sealed_and_signed_archive() -> None:
    file = (GOLDEN / "archive-v1-sealed.msamem").open("rb")
    with open_archive(UnsealedFile(file, "four herons")) as archive:
        archive.check_signer(SigningKey(1).public_key)
        assert list(archive.documents()) == DOCUMENTS
        assert [row.revision for row in archive.revisions()] == [2, 3, 4]
        for encoding in archive.manifest.encodings:
            (block,) = archive.blocks(encoding.encoding_id)
            assert same_block(block, ramp_block(encoding.layout))
