"""The first member of an archive: what memory it holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from storage.archive.bounds import MAX_COUNT, MAX_TIME_US
from storage.archive.errors import ArchiveCorruptError, ArchiveForbiddenError, ArchiveVersionError
from storage.document_json import DocumentFormatError, Fields, dump_json, load_json
from storage.keys import MAX_NUMBER
from storage.layout import KVLayout
from storage.layout_json import layout_fields, parse_layout
from storage.store import EncodingId

FORMAT = "msamem"
VERSION = 1
_IDENTITY = re.compile(r"[0-9a-f]{64}")
_MAX_ENCODINGS = 64


@dataclass(frozen=True)
class ArchivedPacking:
    """How turns were made into documents. mode: "turn", "window" or "session"."""

    mode: str
    window_turns: int
    max_document_bytes: int


@dataclass(frozen=True)
class ArchivedEncoding:
    """One model's blocks. identity: SHA-256 of the model identity, 64 hex digits."""

    model_id: str
    identity: str
    layout: KVLayout
    blocks: int = 0

    @property
    def encoding_id(self) -> EncodingId:
        """The id that a store keeps these blocks under."""
        return EncodingId(bytes.fromhex(self.identity)[:16])


@dataclass(frozen=True)
class Manifest:
    """What an archive says it holds; a reader has verified that it does.

    revision: of the memory when it was exported. last_number: the highest document
    number it ever gave out, so that an import never reuses one. documents: how many.
    revisions: how many the archive tells of; None where it has none of them, as in those
    that were written before archives had any.
    """

    created_at_us: int
    display_name: str
    packing: ArchivedPacking
    revision: int
    last_number: int
    documents: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    encodings: tuple[ArchivedEncoding, ...] = ()
    revisions: int | None = None


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as canonical JSON. Raises ValueError for lone surrogates."""
    return dump_json(
        {
            "created_at_us": manifest.created_at_us,
            "documents": manifest.documents,
            "encodings": [
                {
                    "blocks": encoding.blocks,
                    "identity": encoding.identity,
                    "layout": layout_fields(encoding.layout),
                    "model_id": encoding.model_id,
                }
                for encoding in manifest.encodings
            ],
            "format": FORMAT,
            "last_number": manifest.last_number,
            "memory": {
                "display_name": manifest.display_name,
                "labels": dict(manifest.labels),
                "packing": {
                    "max_document_bytes": manifest.packing.max_document_bytes,
                    "mode": manifest.packing.mode,
                    "window_turns": manifest.packing.window_turns,
                },
            },
            "revision": manifest.revision,
            **({} if manifest.revisions is None else {"revisions": manifest.revisions}),
            "version": VERSION,
        }
    )


def decode_manifest(data: bytes) -> Manifest:
    """Raises ArchiveVersionError before it looks at more, ArchiveCorruptError."""
    try:
        value = load_json(data)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ArchiveCorruptError("manifest.json is not a msamem manifest")
        version = Fields(dict(value), "manifest").integer("version", 1, MAX_NUMBER)
        if version != VERSION:
            raise ArchiveVersionError(version)
        return _parse(Fields(value, "manifest"))
    except DocumentFormatError as error:
        raise ArchiveCorruptError(f"manifest.json: {error}") from error


def _parse(fields: Fields) -> Manifest:
    fields.text("format")
    fields.integer("version", VERSION, VERSION)
    memory = fields.child("memory")
    packing = memory.child("packing")
    manifest = Manifest(
        created_at_us=fields.integer("created_at_us", 0, MAX_TIME_US),
        display_name=memory.text("display_name"),
        labels=memory.strings("labels"),
        packing=ArchivedPacking(
            mode=packing.text("mode"),
            window_turns=packing.integer("window_turns", 0, 2**31 - 1),
            max_document_bytes=packing.integer("max_document_bytes", 0, MAX_NUMBER),
        ),
        revision=fields.integer("revision", 0, MAX_COUNT),
        last_number=fields.integer("last_number", 0, MAX_COUNT),
        documents=fields.integer("documents", 0, MAX_NUMBER),
        encodings=fields.items("encodings", _parse_encoding),
        revisions=fields.integer("revisions", 0, MAX_NUMBER) if fields.has("revisions") else None,
    )
    packing.close()
    memory.close()
    fields.close()
    if len(manifest.encodings) > _MAX_ENCODINGS:
        raise ArchiveForbiddenError(f"more than {_MAX_ENCODINGS} encodings")
    if len({encoding.encoding_id for encoding in manifest.encodings}) < len(manifest.encodings):
        raise ArchiveCorruptError("manifest.json names an encoding twice")
    return manifest


def _parse_encoding(value: object) -> ArchivedEncoding:
    fields = Fields(value, "encoding")
    identity = fields.text("identity")
    if not _IDENTITY.fullmatch(identity):
        raise DocumentFormatError("encoding.identity is no SHA-256 in hex")
    encoding = ArchivedEncoding(
        model_id=fields.text("model_id"),
        identity=identity,
        layout=parse_layout(fields.child("layout")),
        blocks=fields.integer("blocks", 0, MAX_NUMBER),
    )
    fields.close()
    return encoding
