"""What each kind of record holds, between dataclasses and (key, value) pairs.

A document's routing key and its content KV are separate records, so that content
of documents that were not selected is never read. Functions that take a KeyTree encrypt
or decrypt with it; None is for a store without encryption.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage.codecs import Codec, CodecError, Zstd, decode_arrays, encode_arrays, raw_bytes
from storage.crypto.key_tree import KeyTree
from storage.document_json import (
    DocumentFormatError,
    Fields,
    decode_document,
    dump_json,
    encode_document,
    load_json,
)
from storage.keys import Kind, block_key, document_key, encoding_key, keys_key, number_of
from storage.layout import Bits, KVBlock, KVLayout
from storage.layout_json import fingerprint, layout_fields, parse_layout
from storage.records import Buffer, Header, Sealed, look, seal, unseal
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


def _cipher(keys: KeyTree | None, number: int) -> AESGCM | None:
    return None if keys is None else keys.cipher(number)


def document_record(
    memory: MemoryUid,
    document: StoredDocument,
    keys: KeyTree | None = None,
    zstd: Zstd | None = None,
) -> Record:
    """zstd: kept for the next one.

    Raises ValueError for a document that cannot be written, KeyMissingError.
    """
    key = document_key(memory, document.number)
    raw = encode_document(document)
    header = Header(Kind.DOCUMENT, Codec.ZSTD, len(raw), revision=document.revision)
    return key, seal(key, header, (zstd or Zstd()).compress(raw), _cipher(keys, document.number))


def read_document(
    key: bytes, value: Buffer, keys: KeyTree | None = None, zstd: Zstd | None = None
) -> StoredDocument:
    """zstd: kept for the next one. Raises CorruptRecordError, ForeignRecordError."""
    header, raw = _document_json(key, value, keys, zstd)
    try:
        document = decode_document(raw)
    except DocumentFormatError as error:
        raise CorruptRecordError(f"{key.hex()}: {error}") from error
    if document.number != number_of(key):
        raise CorruptRecordError(f"{key.hex()}: holds document {document.number}")
    if keys is not None and document.revision != header.revision:
        raise CorruptRecordError(f"{key.hex()}: holds revision {document.revision}")
    return document


def read_document_json(
    key: bytes, value: Buffer, keys: KeyTree | None = None, zstd: Zstd | None = None
) -> tuple[int, bytes]:
    """Its number and its JSON as it was written, verified but not parsed.

    zstd: kept for the next one. Raises CorruptRecordError, ForeignRecordError.
    """
    return number_of(key), _document_json(key, value, keys, zstd)[1]


def _document_json(
    key: bytes, value: Buffer, keys: KeyTree | None, zstd: Zstd | None
) -> tuple[Header, bytes]:
    sealed = unseal(key, value, Kind.DOCUMENT, encrypted=keys is not None)
    payload = sealed.payload(_cipher(keys, number_of(key)))
    try:
        if sealed.header.codec != Codec.ZSTD:
            raise CodecError(f"document under codec {sealed.header.codec}")
        return sealed.header, (zstd or Zstd()).decompress(payload, sealed.header.raw_bytes)
    except CodecError as error:
        raise CorruptRecordError(f"{key.hex()}: {error}") from error


def encoding_record(
    memory: MemoryUid, encoding: EncodingId, layout: KVLayout, keys: KeyTree | None = None
) -> Record:
    """The record that keeps an encoding's layout."""
    key = encoding_key(memory, encoding)
    raw = dump_json(layout_fields(layout))
    header = Header(Kind.ENCODING, Codec.RAW, len(raw), fingerprint(encoding, layout))
    return key, seal(key, header, raw, _cipher(keys, 0))


def read_encoding(key: bytes, value: Buffer, keys: KeyTree | None = None) -> KVLayout:
    """Raises CorruptRecordError, ForeignRecordError."""
    sealed = unseal(key, value, Kind.ENCODING, encrypted=keys is not None)
    payload = sealed.payload(_cipher(keys, 0))
    try:
        return parse_layout(Fields(load_json(bytes(payload)), "layout"))
    except DocumentFormatError as error:
        raise CorruptRecordError(f"{key.hex()}: {error}") from error


def keys_record(memory: MemoryUid, generation: int, secret: bytes, keys: KeyTree) -> Record:
    """The record that keeps what is left of a memory's key tree, under the memory's own key.

    A secret encrypts this one record and nothing else.
    """
    key = keys_key(memory, generation)
    raw = keys.encode()
    header = Header(Kind.KEYS, Codec.RAW, len(raw), revision=generation)
    return key, seal(key, header, raw, AESGCM(secret))


def read_keys(key: bytes, value: Buffer, secret: bytes | bytearray) -> KeyTree:
    """Raises CorruptRecordError, ForeignRecordError."""
    sealed = unseal(key, value, Kind.KEYS, encrypted=True)
    return KeyTree.decode(bytes(sealed.payload(AESGCM(secret))))


def block_records(  # noqa: PLR0917 - what a block is made of
    memory: MemoryUid,
    encoding: EncodingId,
    layout: KVLayout,
    block: KVBlock,
    codecs: BlockCodecs,
    keys: KeyTree | None = None,
) -> tuple[Record, Record]:
    """Routing record and content record of one block. Raises LayoutError, KeyMissingError."""
    block.validate(layout)
    cipher = _cipher(keys, block.number)
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
        return key, seal(key, header, encode_arrays(codec, arrays, layout), cipher)

    return (
        record(Kind.ROUTING, codecs.routing, [block.routing_key_LCE]),
        record(Kind.CONTENT, codecs.content, content),
    )


def open_block(
    key: bytes,
    value: Buffer,
    kind: Kind,
    mark: bytes,
    layout: KVLayout,
    *,
    encrypted: bool = False,
) -> Sealed:
    """A whole record; its raw_bytes is what the layout says for the tokens.

    mark: fingerprint of the encoding and layout. Raises CorruptRecordError, ForeignRecordError.
    """
    sealed = look(key, value, kind, encrypted=encrypted)
    sealed.verify()
    check_block(sealed, mark, layout, encrypted=encrypted)
    return sealed


def check_block(sealed: Sealed, mark: bytes, layout: KVLayout, *, encrypted: bool) -> None:
    """Whether it is of that encoding, and as long as its tokens say; of use once it is verified.

    Raises CorruptRecordError, ForeignRecordError.
    """
    sealed.check(mark, encrypted=encrypted)
    header = sealed.header
    count = 1 if header.kind is Kind.ROUTING else layout.kinds() - 1
    expected = raw_bytes(count, layout.chunks(header.tokens), layout)
    fits = header.codec != Codec.RAW or sealed.payload_bytes == expected
    if header.tokens < 1 or header.raw_bytes != expected or not fits:
        raise CorruptRecordError(f"{sealed.key.hex()}: lengths do not fit {header.tokens} tokens")


def block_arrays(sealed: Sealed, payload: memoryview, layout: KVLayout) -> list[Bits]:
    """New [L, C, E] arrays of an opened record. Raises CorruptRecordError."""
    header = sealed.header
    count = 1 if header.kind is Kind.ROUTING else layout.kinds() - 1
    try:
        return decode_arrays(header.codec, payload, count, layout.chunks(header.tokens), layout)
    except CodecError as error:
        raise CorruptRecordError(f"{sealed.key.hex()}: {error}") from error


def read_routing(
    key: bytes, value: Buffer, mark: bytes, layout: KVLayout, keys: KeyTree | None = None
) -> RoutingPart:
    """Raises CorruptRecordError, ForeignRecordError."""
    sealed = open_block(key, value, Kind.ROUTING, mark, layout, encrypted=keys is not None)
    payload = sealed.payload(_cipher(keys, number_of(key)))
    array = block_arrays(sealed, payload, layout)[0]
    return RoutingPart(number_of(key), sealed.header.tokens, array)


def read_content(
    key: bytes, value: Buffer, mark: bytes, layout: KVLayout, keys: KeyTree | None = None
) -> ContentPart:
    """Raises CorruptRecordError, ForeignRecordError."""
    sealed = open_block(key, value, Kind.CONTENT, mark, layout, encrypted=keys is not None)
    payload = sealed.payload(_cipher(keys, number_of(key)))
    arrays = block_arrays(sealed, payload, layout)
    return ContentPart(number_of(key), arrays[0] if len(arrays) > 1 else None, arrays[-1])
