"""Archives for tests."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace

import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from storage.archive import (
    ArchivedEncoding,
    ArchivedPacking,
    ArchivedRevision,
    Manifest,
    write_archive,
)
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


class SigningKey:
    """An Ed25519 key whose seed is one byte, repeated."""

    def __init__(self, seed: int) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)

    @property
    def public_key(self) -> str:
        return self._key.public_key().public_bytes_raw().hex()

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)


HISTORY = [
    ArchivedRevision(1, 1_770_000_000_000_001, 1, 0, 1),
    ArchivedRevision(2, 1_770_000_000_000_002, 2, 0, 3),
    ArchivedRevision(4, 1_770_000_000_000_003, 0, 1, 3),
    ArchivedRevision(5, 1_770_000_000_000_004, 2, 0, 5),
]
#: (number, revision) of what is left.
LEFT = ((1, 1), (2, 2), (5, 5))


def signed(
    key: SigningKey | None = None,
    history: Sequence[ArchivedRevision] = HISTORY,
    documents: Sequence[tuple[int, int]] = LEFT,
    manifest: Manifest = EMPTY,
) -> bytes:
    made = [replace(make_document(number), revision=revision) for number, revision in documents]
    manifest = replace(manifest, documents=len(made), revisions=len(history))
    return b"".join(write_archive(manifest, made, {}, revisions=history, signer=key))


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


MANIFEST, INDEX, DOCUMENTS = "manifest.json", "index.json", "documents/000000.jsonl.zst"
Members = list[tuple[str, bytes]]


def unpack(data: bytes) -> Members:
    members: Members = []
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            members.append((member.name, file.read()))
    return members


def repack(members: Members, index: bool = True) -> bytes:
    """An archive of these members whose hashes are right: damage with the lock picked."""
    out = io.BytesIO()
    if index:
        listed = [
            {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            for name, data in members
            if name != INDEX
        ]
        text = json.dumps({"members": listed}).encode()
        members = [(name, text if name == INDEX else data) for name, data in members]
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def change(name: str, edit: Callable[[bytes], bytes]) -> bytes:
    members = unpack(sample())
    assert name in dict(members)
    return repack([(one, edit(data) if one == name else data) for one, data in members])


def change_manifest(**fields: object) -> bytes:
    return change(MANIFEST, lambda data: json.dumps(json.loads(data) | fields).encode())


def change_lines(edit: Callable[[list[bytes]], list[bytes]]) -> bytes:
    def inner(data: bytes) -> bytes:
        lines = zstandard.decompress(data).splitlines(keepends=True)
        return zstandard.compress(b"".join(edit(lines)))

    return change(DOCUMENTS, inner)


def blocks_member() -> str:
    return next(name for name, _ in unpack(sample()) if name.startswith("encodings/"))


def change_header(edit: Callable[[dict[str, dict[str, object]]], object]) -> bytes:
    """Changes a blocks member's safetensors header."""

    def inner(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return change(blocks_member(), inner)


def insert(name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """A sound archive with one member more, behind the manifest."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = len(data) if kind == tarfile.REGTYPE else 0
    more = info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)
    whole = sample()
    at = 512 + -(-len(dict(unpack(whole))[MANIFEST]) // 512) * 512
    return whole[:at] + (more if kind == tarfile.REGTYPE else more[:512]) + whole[at:]
