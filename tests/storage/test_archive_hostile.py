"""Archives that lie: each is refused by its own error, whatever else is right about it."""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.archive import (
    ArchiveCorruptError,
    ArchiveError,
    ArchiveForbiddenError,
    ArchiveLimits,
    ArchiveTruncatedError,
    ArchiveVersionError,
    open_archive,
)
from storage.layout import KVBlock
from storage.store import StoredDocument
from tests.support.archives import (
    DOCUMENTS,
    INDEX,
    MANIFEST,
    change,
    change_manifest,
    insert,
    pack,
    repack,
    sample,
    unpack,
)
from tests.support.blocks import make_document, same_block


def test_repacking_alone_does_no_harm(attempt: Callable[[bytes], None]) -> None:
    """So each refusal below is of the change."""
    attempt(sample())
    attempt(repack(unpack(sample())))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "documents/../x", "a\\..\\b", "x" * 90])
def test_names_that_are_paths_elsewhere(name: str, attempt: Callable[[bytes], None]) -> None:
    with pytest.raises(ArchiveForbiddenError):
        attempt(insert(name))


@pytest.mark.parametrize(
    "name",
    ["more.json", "documents/1.jsonl.zst", "encodings/zz/000000.safetensors", "MANIFEST.JSON"],
)
def test_unknown_members(name: str, attempt: Callable[[bytes], None]) -> None:
    with pytest.raises(ArchiveForbiddenError):
        attempt(insert(name))


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
        tarfile.CONTTYPE,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_SPARSE,
    ],
)
def test_members_that_are_no_files(kind: bytes, attempt: Callable[[bytes], None]) -> None:
    with pytest.raises(ArchiveForbiddenError):
        attempt(insert("documents/000001.jsonl.zst", kind=kind, link="/etc/passwd"))


@pytest.mark.parametrize("name", [MANIFEST, DOCUMENTS, INDEX])
def test_duplicate_members(name: str, attempt: Callable[[bytes], None]) -> None:
    members = unpack(sample())
    again = next(one for one in members if one[0] == name)
    with pytest.raises(ArchiveForbiddenError):
        attempt(repack([*members[:-1], again, members[-1], again]))


def test_an_encoding_that_the_manifest_does_not_name(attempt: Callable[[bytes], None]) -> None:
    with pytest.raises(ArchiveForbiddenError):
        attempt(change_manifest(encodings=[]))


def test_numbers_that_are_none(attempt: Callable[[bytes], None]) -> None:
    """They would spoil every answer that is computed beside theirs."""
    members = unpack(sample())
    name = next(name for name, _ in members if name.endswith(".safetensors"))
    nan = b"\xc0\x7f"  # The high half of a NaN, in either type.
    changed = [(n, d[:-2] + nan if n == name else d) for n, d in members]
    with pytest.raises(ArchiveCorruptError):
        attempt(repack(changed))


def test_members_out_of_order_or_missing(attempt: Callable[[bytes], None]) -> None:
    members = unpack(sample())
    swapped = [members[0], members[2], members[1], *members[3:]]
    gap = [(n.replace("documents/000000", "documents/000001"), d) for n, d in members]
    for changed in (swapped, gap):
        with pytest.raises(ArchiveCorruptError):
            attempt(repack(changed))
    with pytest.raises(ArchiveCorruptError):
        attempt(repack(members[1:]))
    with pytest.raises(ArchiveTruncatedError):
        attempt(repack(members[:-1]))


@pytest.mark.parametrize("version", [2, 99, 2**62])
def test_a_newer_version(version: int, attempt: Callable[[bytes], None]) -> None:
    data = change_manifest(version=version, more="fields that version 1 does not know")
    with pytest.raises(ArchiveVersionError) as caught:
        attempt(data)
    assert caught.value.version == version


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 0},
        {"version": "1"},
        {"format": "other"},
        {"more": 1},
        {"revision": -1},
        {"documents": 4},
        {"documents": 2},
        {"last_number": 4},
        {"revision": 3},
        {"memory": {}},
        {"encodings": [{}]},
        {"encodings": 1},
    ],
)
def test_a_manifest_that_lies(fields: dict[str, object], attempt: Callable[[bytes], None]) -> None:
    with pytest.raises(ArchiveCorruptError):
        attempt(change_manifest(**fields))


def test_a_manifest_that_names_an_encoding_twice(attempt: Callable[[bytes], None]) -> None:
    encodings = json.loads(dict(unpack(sample()))[MANIFEST])["encodings"]
    with pytest.raises(ArchiveCorruptError):
        attempt(change_manifest(encodings=[encodings[0], encodings[0]]))
    with pytest.raises(ArchiveForbiddenError):
        many = [encodings[0] | {"identity": f"{n:064x}"} for n in range(100)]
        attempt(change_manifest(encodings=many))
    with pytest.raises(ArchiveCorruptError):
        attempt(change_manifest(encodings=[encodings[0] | {"identity": "AB" * 32}, encodings[1]]))


def test_a_manifest_that_says_another_layout(attempt: Callable[[bytes], None]) -> None:
    encodings = json.loads(dict(unpack(sample()))[MANIFEST])["encodings"]
    for field, value in (("dtype", "fp32"), ("head_dim", 4), ("separate_routing_keys", True)):
        changed = encodings[0] | {"layout": encodings[0]["layout"] | {field: value}}
        with pytest.raises(ArchiveCorruptError):
            attempt(change_manifest(encodings=[changed, encodings[1]]))


def test_a_giant_manifest(attempt: Callable[[bytes], None]) -> None:
    with pytest.raises(ArchiveForbiddenError):
        attempt(change(MANIFEST, lambda data: data + b" " * 2**20))


@pytest.mark.parametrize("name", [MANIFEST, INDEX])
@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"[" * 9999, b"\xff", b'{"a":1,"a":1}'])
def test_json_that_is_none(name: str, text: bytes, attempt: Callable[[bytes], None]) -> None:
    members = [(one, text if one == name else data) for one, data in unpack(sample())]
    with pytest.raises(ArchiveCorruptError):
        attempt(repack(members, index=name != INDEX))


def test_a_hash_that_is_not_the_members(attempt: Callable[[bytes], None]) -> None:
    members = unpack(sample())
    index = json.loads(dict(members)[INDEX])
    for field, value in (("sha256", "0" * 64), ("size", 1), ("name", "other")):
        changed = [dict(one) for one in index["members"]]
        changed[1][field] = value
        text = json.dumps({"members": changed}).encode()
        with pytest.raises(ArchiveCorruptError):
            attempt(repack([*members[:-1], (INDEX, text)], index=False))


def test_every_truncation(tmp_path: Path) -> None:
    data = sample()
    for length in [*range(0, len(data), 97), *range(len(data) - 1025, len(data))]:
        path = tmp_path / "a"
        path.write_bytes(data[:length])
        with pytest.raises(ArchiveTruncatedError):
            open_archive(path)


@pytest.mark.parametrize("tail", [b"x", bytes(11_000), bytes(100) + b"x", b"\0" * 512 + b"x" * 512])
def test_something_behind_the_end(tail: bytes, attempt: Callable[[bytes], None]) -> None:
    with pytest.raises(ArchiveCorruptError):
        attempt(sample() + tail)


def test_too_many_members(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(sample())
    with pytest.raises(ArchiveForbiddenError):
        open_archive(path, ArchiveLimits(members=3))
    with pytest.raises(ArchiveForbiddenError):
        open_archive(path, ArchiveLimits(member_bytes=100))


def test_a_file_that_changes_after_it_was_verified(tmp_path: Path) -> None:
    path = tmp_path / "a"
    data = pack([make_document(n, random.Random(n).randbytes(999).hex()) for n in range(1, 50)])
    path.write_bytes(data)
    with open_archive(path) as archive, path.open("r+b") as file:
        file.seek(len(data) // 2)
        file.write(b"changed")
        file.flush()
        with pytest.raises(ArchiveCorruptError, match="changed while"):
            list(archive.documents())


def contents(path: Path) -> tuple[object, list[StoredDocument], list[KVBlock]]:
    with open_archive(path) as archive:
        found = [list(archive.blocks(e.encoding_id)) for e in archive.manifest.encodings]
        return archive.manifest, list(archive.documents()), [b for run in found for b in run]


def test_random_damage_is_refused_or_does_no_harm(tmp_path: Path) -> None:
    """Thousands of mutations: an ArchiveError, or the very contents that were written."""
    chance = random.Random(11)
    whole = sample()
    path = tmp_path / "a"
    path.write_bytes(whole)
    manifest, documents, blocks = contents(path)
    refused = 0
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[at] ^= 1 << chance.randrange(8)
                case 1:
                    data[at : at + chance.randint(1, 40)] = chance.randbytes(chance.randint(0, 40))
                case 2:
                    start = chance.randrange(len(data))
                    data[at : at + 512] = data[start : start + 512]
                case 3:
                    del data[at : at + 512 * chance.randint(1, 4)]
        path.write_bytes(data)
        try:
            found = contents(path)
        except ArchiveError:
            refused += 1
            continue
        assert found[:2] == (manifest, documents)
        pairs = zip(found[2], blocks, strict=True)
        assert all(same_block(left, right) for left, right in pairs)
    assert refused > 2000
