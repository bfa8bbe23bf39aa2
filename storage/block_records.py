"""What each kind of record holds, between dataclasses and (key, value) pairs.

A document's routing key and its content KV are separate records, so that content
of documents that were not selected is never read.
"""

from __future__ import annotations

from dataclasses import dataclass

from storage.codecs import Codec, CodecError, decode_arrays, encode_arrays, raw_bytes
from storage.codecs import compress as _compress
from storage.codecs import decompress as _decompress
from storage.document_json import (
    DocumentFormatError,
    Fields,
    decode_document,
    dump_json,
    encode_document,
    load_json,
)
from storage.keys import Kind, block_key, document_key, encoding_key, number_of
from storage.layout import Bits, KVBlock, KVLayout
from storage.layout_json import fingerprint, layout_fields, parse_layout
from storage.records import Buffer, Header, seal, unseal
from storage.store import (
    ContentPart,
    CorruptRecordError,
    EncodingId,
    MemoryUid,
    RoutingPart,
    StoredDocument,
)

Record = tuple[bytes, bytes]


@dataclass(frozen=True)
class BlockCodecs:
    """Codecs that new blocks are written with. Each record names its own, so they may change."""

    routing: Codec = Codec.RAW
    content: Codec = Codec.RAW


def document_record(memory: MemoryUid, document: StoredDocument) -> Record:
    """Raises ValueError for a document that cannot be written."""
    key = document_key(memory, document.number)
    raw = encode_document(document)
    return key, seal(key, Header(Kind.DOCUMENT, Codec.ZSTD, len(raw)), _compress(raw))


def read_document(key: bytes, value: Buffer) -> StoredDocument:
    """Raises CorruptRecordError, ForeignRecordError."""
    header, payload = unseal(key, value, Kind.DOCUMENT)
    try:
        if header.codec != Codec.ZSTD:
            raise CodecError(f"document under codec {header.codec}")
        document = decode_document(_decompress(payload, header.raw_bytes))
    except (CodecError, DocumentFormatError) as error:
        raise CorruptRecordError(f"{key.hex()}: {error}") from error
    if document.number != number_of(key):
        raise CorruptRecordError(f"{key.hex()}: holds document {document.number}")
    return document


def encoding_record(memory: MemoryUid, encoding: EncodingId, layout: KVLayout) -> Record:
    """The record that keeps an encoding's layout."""
    key = encoding_key(memory, encoding)
    raw = dump_json(layout_fields(layout))
    header = Header(Kind.ENCODING, Codec.RAW, len(raw), fingerprint(encoding, layout))
    return key, seal(key, header, raw)


def read_encoding(key: bytes, value: Buffer) -> KVLayout:
    """Raises CorruptRecordError, ForeignRecordError."""
    _, payload = unseal(key, value, Kind.ENCODING)
    try:
        return parse_layout(Fields(load_json(bytes(payload)), "layout"))
    except DocumentFormatError as error:
        raise CorruptRecordError(f"{key.hex()}: {error}") from error


def block_records(
    memory: MemoryUid,
    encoding: EncodingId,
    layout: KVLayout,
    block: KVBlock,
    codecs: BlockCodecs,
) -> tuple[Record, Record]:
    """Routing record and content record of one block. Raises LayoutError."""
    block.validate(layout)
    content = [block.value_LCE] if block.key_LCE is None else [block.key_LCE, block.value_LCE]

    def record(kind: Kind, codec: Codec, arrays: list[Bits]) -> Record:
        key = block_key(memory, kind, encoding, block.number)
        header = Header(
            kind,
            codec,
            sum(array.nbytes for array in arrays),
            fingerprint(encoding, layout),
            block.tokens,
        )
        return key, seal(key, header, encode_arrays(codec, arrays, layout))

    return (
        record(Kind.ROUTING, codecs.routing, [block.routing_key_LCE]),
        record(Kind.CONTENT, codecs.content, content),
    )


def open_block(
    key: bytes, value: Buffer, kind: Kind, mark: bytes, layout: KVLayout
) -> tuple[Header, memoryview]:
    """Verified header and payload; raw_bytes is what the layout says for the tokens.

    mark: fingerprint of the encoding and layout. Raises CorruptRecordError, ForeignRecordError.
    """
    header, payload = unseal(key, value, kind, mark)
    count = 1 if kind is Kind.ROUTING else layout.kinds() - 1
    expected = raw_bytes(count, layout.chunks(header.tokens), layout)
    if header.tokens < 1 or header.raw_bytes != expected:
        raise CorruptRecordError(f"{key.hex()}: lengths do not fit {header.tokens} tokens")
    return header, payload


def _arrays(key: bytes, header: Header, payload: memoryview, layout: KVLayout) -> list[Bits]:
    count = 1 if header.kind is Kind.ROUTING else layout.kinds() - 1
    try:
        return decode_arrays(header.codec, payload, count, layout.chunks(header.tokens), layout)
    except CodecError as error:
        raise CorruptRecordError(f"{key.hex()}: {error}") from error


def routing_array(key: bytes, header: Header, payload: memoryview, layout: KVLayout) -> Bits:
    """New [L, C, E] array of an opened routing record. Raises CorruptRecordError."""
    return _arrays(key, header, payload, layout)[0]


def read_routing(key: bytes, value: Buffer, mark: bytes, layout: KVLayout) -> RoutingPart:
    """Raises CorruptRecordError, ForeignRecordError."""
    header, payload = open_block(key, value, Kind.ROUTING, mark, layout)
    array = routing_array(key, header, payload, layout)
    return RoutingPart(number_of(key), header.tokens, array)


def read_content(key: bytes, value: Buffer, mark: bytes, layout: KVLayout) -> ContentPart:
    """Raises CorruptRecordError, ForeignRecordError."""
    header, payload = open_block(key, value, Kind.CONTENT, mark, layout)
    arrays = _arrays(key, header, payload, layout)
    return ContentPart(number_of(key), arrays[0] if len(arrays) > 1 else None, arrays[-1])
