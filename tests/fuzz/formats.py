"""What is fuzzed of the formats that come from outside or from disk, as functions of bytes.

A target takes any bytes and returns whether they were accepted. It raises only what is a
defect: an error that the format's reader does not declare, or a value that breaks a promise.
Targets named "..., sealed" put the bytes where a checksum or hash stands before them and
make that right, so that what lies behind it is reached.
"""

from __future__ import annotations

import io
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from memsvc.client import ImportFormatError, PassphraseError, SealedArchiveError, convert
from memsvc.client.dumps import read_dump
from memsvc.client.mapping import DumpMapping, load
from memsvc.client.sealed import Cost, UnsealedFile, sealed_archive
from model_adapter.checkpoints.directory import load_directory
from model_adapter.checkpoints.errors import CheckpointError
from model_adapter.checkpoints.gguf_file import GgufFile
from storage.archive import ArchiveError, ArchiveLimits, open_archive
from storage.archive.members import Source
from storage.archive.tensors import decode_blocks, encode_blocks
from storage.block_records import (
    BlockCodecs,
    block_records,
    document_record,
    read_content,
    read_document,
    read_routing,
)
from storage.codecs import Codec
from storage.crypto import KeyTree
from storage.keys import Kind, block_key, document_key
from storage.layout_json import fingerprint
from storage.records import Header, seal
from storage.store import CorruptRecordError, ForeignRecordError
from tests.support.archives import SigningKey, repack, sample, signed, unpack
from tests.support.blocks import LAYOUTS, SHARED, encoding_id, make_block, make_document, memory_uid
from tests.support.dumps import DUMPS, encoded
from tests.support.tiny_checkpoints import tiny_config, write_directory, write_gguf

_MEMORY, _ENCODING, _NUMBER = memory_uid(1), encoding_id(1), 5
_TREE = KeyTree.grown_from(bytes(range(32)))
#: Of a passphrase's key: deriving it is not what is fuzzed.
CHEAP = Cost(4, 1, 1)
_MARK = fingerprint(_ENCODING, SHARED)
_KINDS = (Kind.DOCUMENT, Kind.ROUTING, Kind.CONTENT)
#: Tensors of a fuzzed file are read when they are no larger than this.
_SMALL_TENSOR = 1 << 12


@dataclass(frozen=True)
class Target:
    """seeds: sound inputs to start from. read: see the module. slow: it takes milliseconds."""

    name: str
    seeds: Sequence[bytes]
    read: Callable[[bytes], bool]
    slow: bool = False


@contextmanager
def targets() -> Iterator[dict[str, Target]]:
    """All of them, by name, with a scratch folder."""
    with tempfile.TemporaryDirectory(prefix="memsvc-fuzz-") as scratch:
        folder = Path(scratch)
        made = [*_records(), *_archives(folder), *_dumps(), *_checkpoints(folder)]
        yield {target.name: target for target in made}


# --- records ------------------------------------------------------------------------


def _records() -> Iterator[Target]:
    document = make_document(_NUMBER, "tea, please")
    block = make_block(SHARED, _NUMBER, 9)
    plain = [document_record(_MEMORY, document)[1]]
    encrypted = [document_record(_MEMORY, document, _TREE)[1]]
    for codec in Codec:
        for tree, seeds in ((None, plain), (_TREE, encrypted)):
            codecs = BlockCodecs(codec, codec)
            try:
                both = block_records(_MEMORY, _ENCODING, SHARED, block, codecs, tree)
            except ValueError:  # This codec is for documents alone.
                continue
            seeds += [value for _, value in both]
    yield Target("records", plain, lambda data: _read_record(data, None))
    yield Target("records, encrypted", encrypted, lambda data: _read_record(data, _TREE))
    sealed = [one[:5] + bytes([_KINDS.index(Kind(one[5]))]) + one[6:] for one in plain]
    yield Target("records, sealed", sealed, _read_sealed)


def _read_record(data: bytes, tree: KeyTree | None) -> bool:
    """As each of the kinds of record that are read from disk."""
    accepted = 0
    reads: tuple[Callable[[], object], ...] = (
        lambda: read_document(document_key(_MEMORY, _NUMBER), data, tree),
        lambda: read_routing(_block_key(Kind.ROUTING), data, _MARK, SHARED, tree),
        lambda: read_content(_block_key(Kind.CONTENT), data, _MARK, SHARED, tree),
    )
    for read in reads:
        try:
            read()
        except (CorruptRecordError, ForeignRecordError):
            continue
        accepted += 1
    assert accepted <= 1, "a record of two kinds"
    return bool(accepted)


def _block_key(kind: Kind) -> bytes:
    return block_key(_MEMORY, kind, _ENCODING, _NUMBER)


def _read_sealed(data: bytes) -> bool:
    """The bytes are a header's free fields and a payload; the checksum is made right."""
    if len(data) < 48:
        return False
    kind, codec = _KINDS[data[5] % len(_KINDS)], data[6]
    tokens, raw = struct.unpack_from("<II", data, 24)
    key = document_key(_MEMORY, _NUMBER) if kind is Kind.DOCUMENT else _block_key(kind)
    mark = bytes(16) if kind is Kind.DOCUMENT else _MARK
    return _read_record(seal(key, Header(kind, codec, raw, mark, tokens), data[48:]), None)


# --- archives -----------------------------------------------------------------------


def _archives(scratch: Path) -> Iterator[Target]:
    path = scratch / "archive"
    whole = sample()
    members = unpack(whole)
    both = [whole, signed(SigningKey(1))]
    yield Target("archive", both, lambda data: _read_archive(path, data), True)
    passphrased = [sealed_archive(one, "right", CHEAP) for one in both]
    yield Target("archive, under a passphrase", passphrased, _read_sealed_archive, True)
    inner = [bytes([number]) + content for number, (_, content) in enumerate(members)]

    def sealed(data: bytes) -> bool:
        if not data:
            return False
        chosen = data[0] % len(members)
        changed = [
            (name, data[1:] if number == chosen else content)
            for number, (name, content) in enumerate(members)
        ]
        return _read_archive(path, repack(changed, index=members[chosen][0] != "index.json"))

    yield Target("archive, sealed", inner, sealed, True)
    blocks = [
        bytes([number]) + encode_blocks(layout, [make_block(layout, n, 3) for n in (1, 5)])
        for number, layout in enumerate(LAYOUTS)
    ]
    yield Target("archive tensors", blocks, _read_blocks)


def _read_archive(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    return _open_archive(path)


def _read_sealed_archive(data: bytes) -> bool:
    """Under a passphrase; what it costs to derive the key is the header's to say, within limits."""
    if len(data) > 18 and data[17] > CHEAP.log_n:
        data = data[:17] + bytes([data[17] % (CHEAP.log_n + 1)]) + data[18:]
    try:
        return _open_archive(UnsealedFile(io.BytesIO(data), "right"))
    except (PassphraseError, SealedArchiveError):
        return False


def _open_archive(source: Path | Source) -> bool:
    try:
        with open_archive(source, ArchiveLimits()) as archive:
            for _ in archive.revisions():
                pass
            for _ in archive.documents():
                pass
            for encoding in archive.manifest.encodings:
                for block in archive.blocks(encoding.encoding_id):
                    block.validate(encoding.layout)
    except ArchiveError:
        return False
    return True


def _read_blocks(data: bytes) -> bool:
    if not data:
        return False
    layout = LAYOUTS[data[0] % len(LAYOUTS)]
    try:
        for block in decode_blocks(layout, data[1:]):
            block.validate(layout)
    except ArchiveError:
        return False
    return True


# --- dumps of other services --------------------------------------------------------


def _dumps() -> Iterator[Target]:
    for name, dump in DUMPS.items():
        mapping = load(name)
        yield Target(f"dump, {name}", [encoded(dump)], partial(_read_dump, mapping=mapping))


def _read_dump(data: bytes, mapping: DumpMapping) -> bool:
    try:
        dump = read_dump(data, mapping)
    except ImportFormatError as error:
        str(error).encode()  # It can be shown.
        return False
    for turns in dump.conversations:
        for turn in turns:
            convert.turn_to_wire(turn)
    for text in dump.texts:
        convert.text_start(text)
        text.text.encode()
    return True


# --- checkpoints --------------------------------------------------------------------


def _checkpoints(scratch: Path) -> Iterator[Target]:
    folder = scratch / "checkpoint"
    write_directory(folder, tiny_config())
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    yield Target("safetensors", [whole], lambda data: _load(folder, weights, data), True)
    path = scratch / "model.gguf"
    write_gguf(path)
    yield Target("gguf", [path.read_bytes()], lambda data: _read_gguf(path, data), True)


def _load(folder: Path, weights: Path, data: bytes) -> bool:
    weights.write_bytes(data)
    try:
        load_directory(folder)
    except CheckpointError:
        return False
    return True


def _read_gguf(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    try:
        with GgufFile(path) as file:
            for name, info in file.tensors.items():
                if info.size <= _SMALL_TENSOR:
                    file.values(name)
    except CheckpointError:
        return False
    return True
