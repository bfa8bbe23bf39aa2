"""Archives: what is written comes back; a file of other tools' making can be read by them."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from storage.archive import (
    ArchivedEncoding,
    ArchiveSourceError,
    Manifest,
    export_memory,
    open_archive,
    stage_archive,
    staged_pieces,
    write,
    write_archive,
)
from storage.archive.bounds import MAX_COUNT
from storage.layout import KVBlock, KVLayout
from storage.memory_store import MemoryStore
from storage.store import StoredDocument
from tests.support.archives import EMPTY, archived_encoding, pack, sample
from tests.support.blocks import (
    LAYOUTS,
    SHARED,
    documents,
    make_block,
    make_document,
    memory_uid,
    same_block,
)

A = memory_uid(1)


def save(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@given(
    held=st.lists(documents(st.integers(1, MAX_COUNT)), max_size=6, unique_by=lambda d: d.number),
    layouts=st.lists(st.sampled_from(LAYOUTS), max_size=3),
    labels=st.dictionaries(st.text("abcä"), st.text("abcä"), max_size=3),
    tokens=st.integers(1, 200),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_round_trip(
    tmp_path: Path,
    held: list[StoredDocument],
    layouts: list[KVLayout],
    labels: dict[str, str],
    tokens: int,
) -> None:
    held = sorted(held, key=lambda d: d.number)
    encodings = [
        (layout, [make_block(layout, d.number, tokens) for d in held[::2]]) for layout in layouts
    ]
    manifest = Manifest(7, "näme", EMPTY.packing, MAX_COUNT, MAX_COUNT, labels=labels)
    path = save(tmp_path / "a.msamem", pack(held, encodings, manifest))
    with open_archive(path) as archive:
        assert list(archive.documents()) == held
        assert archive.manifest.labels == labels
        assert archive.manifest.documents == len(held)
        assert len(archive.manifest.encodings) == len(encodings)
        for named, (layout, blocks) in zip(archive.manifest.encodings, encodings, strict=True):
            assert named.layout == layout
            found = list(archive.blocks(named.encoding_id))
            assert len(found) == len(blocks)
            assert all(same_block(*pair) for pair in zip(found, blocks, strict=True))


def test_the_same_memory_gives_the_same_bytes() -> None:
    assert sample() == sample()


def test_the_manifest_comes_back_whole(tmp_path: Path) -> None:
    encodings = (archived_encoding(SHARED, 0),)
    manifest = Manifest(9, "x", EMPTY.packing, 4, 8, 0, {"a": "b"}, encodings)
    path = save(tmp_path / "a", pack([], [(SHARED, [])], manifest))
    with open_archive(path) as archive:
        assert archive.manifest == manifest
        assert list(archive.documents()) == []
        assert list(archive.blocks(encodings[0].encoding_id)) == []
        with pytest.raises(KeyError):
            archive.blocks(type(encodings[0].encoding_id)(bytes(16)))


def test_large_contents_are_cut_into_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_TEXT_BYTES", 1000)
    monkeypatch.setattr(write, "_BLOCK_BYTES", 4000)
    held = [make_document(n, "a" * 20) for n in range(1, 40)]
    blocks = [make_block(SHARED, n) for n in range(1, 40)]
    path = save(tmp_path / "a", pack(held, [(SHARED, blocks)]))
    with tarfile.open(path) as file:
        names = file.getnames()
    assert sum(name.startswith("documents/") for name in names) > 5
    assert sum(name.startswith("encodings/") for name in names) > 2
    with open_archive(path) as archive:
        assert list(archive.documents()) == held
        (encoding,) = archive.manifest.encodings
        found = list(archive.blocks(encoding.encoding_id))
    assert all(same_block(*pair) for pair in zip(found, blocks, strict=True))


def test_other_tools_read_it() -> None:
    """tar, zstd, JSON and the safetensors library, and none of our code."""
    contents: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(sample())) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            contents[member.name] = file.read()
    names = list(contents)
    assert names[0] == "manifest.json"
    assert names[-1] == "index.json"
    manifest = json.loads(contents["manifest.json"])
    assert (manifest["format"], manifest["version"]) == ("msamem", 1)
    text = zstandard.decompress(contents["documents/000000.jsonl.zst"]).decode()
    assert [json.loads(line)["number"] for line in text.splitlines()] == [1, 2, 5]
    for name, layout in zip(names[2:-1], LAYOUTS, strict=False):
        tensors = dict(deserialize(contents[name]))  # type: ignore[no-untyped-call]  # It ships no types.
        block = make_block(layout, 1, 3)
        chunks = 2 * layout.chunks(3)
        shape = [len(layout.routed_layers), chunks, layout.width]
        assert tensors["routing_key"]["shape"] == shape
        assert tensors["routing_key"]["dtype"] == "BF16"
        assert ("key" in tensors) == layout.separate_routing_keys
        first = bytes(tensors["value"]["data"])[: 2 * layout.width]
        assert first == block.value_LCE[0, 0].tobytes()


class TestExport:
    """From a store to a file and back."""

    def fill(self) -> MemoryStore:
        store = MemoryStore()
        store.put_documents(A, [make_document(n) for n in range(1, 9)])
        encoding = archived_encoding(SHARED, 0).encoding_id
        store.put_blocks(A, encoding, SHARED, [make_block(SHARED, n) for n in range(1, 7)])
        return store

    def test_takes_the_named_documents_and_their_blocks(self, tmp_path: Path) -> None:
        store = self.fill()
        encoding = archived_encoding(SHARED, 0)
        manifest = Manifest(1, "x", EMPTY.packing, 9, 9, encodings=(encoding,))
        path = tmp_path / "a"
        total = stage_archive(path, export_memory(store, A, manifest, [2, 4, 8]))
        assert total == path.stat().st_size
        with open_archive(path) as archive:
            assert archive.manifest.documents == 3
            assert archive.manifest.encodings[0].blocks == 2
            assert [d.number for d in archive.documents()] == [2, 4, 8]
            found = list(archive.blocks(encoding.encoding_id))
        assert all(same_block(block, make_block(SHARED, block.number)) for block in found)

    def test_leaves_out_blocks_that_nobody_asked_for(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        stage_archive(path, export_memory(self.fill(), A, EMPTY, [1, 2]))
        with open_archive(path) as archive:
            assert archive.manifest.encodings == ()

    @pytest.mark.parametrize("what", ["documents", "blocks"])
    def test_a_source_that_changes_is_an_error(self, what: str) -> None:
        store = self.fill()
        encoding = archived_encoding(SHARED, 0)
        manifest = Manifest(1, "x", EMPTY.packing, 9, 9, encodings=(encoding,))
        pieces = export_memory(store, A, manifest, list(range(1, 9)))
        next(pieces)
        if what == "documents":
            store.delete_documents(A, [5])
        else:
            store.delete_blocks(A, encoding.encoding_id, [5])
        with pytest.raises(ArchiveSourceError):
            list(pieces)

    def test_an_export_that_fails_leaves_no_file(self, tmp_path: Path) -> None:
        pieces = export_memory(self.fill(), A, EMPTY, [1, 77])
        with pytest.raises(ArchiveSourceError):
            stage_archive(tmp_path / "a", pieces)
        assert list(tmp_path.iterdir()) == []

    def test_pieces_fit_messages(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a", sample())
        pieces = list(staged_pieces(path, 1000))
        assert b"".join(pieces) == sample()
        assert max(map(len, pieces)) == 1000


def test_memory_stays_at_a_few_members(tmp_path: Path) -> None:
    """160 MiB go out and come back; a member has 8."""
    layout = KVLayout(tuple(range(16)), 4, 64, 8, "bf16", separate_routing_keys=False)
    array = make_block(layout, 1, 8 * 64).value_LCE
    count = 160 * 2**20 // layout.block_bytes(8 * 64)
    encoding = archived_encoding(layout, count)
    manifest = Manifest(1, "x", EMPTY.packing, count, count, count, encodings=(encoding,))
    held = (make_document(number) for number in range(1, count + 1))
    blocks = (KVBlock(number, 8 * 64, array, None, array) for number in range(1, count + 1))
    path = tmp_path / "a"
    tracemalloc.start()
    stage_archive(path, write_archive(manifest, held, {encoding.encoding_id: blocks}))
    with open_archive(path) as archive:
        assert sum(1 for _ in archive.blocks(encoding.encoding_id)) == count
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 160 * 2**20
    assert peak < 48 * 2**20


def test_identity_gives_the_encoding_id() -> None:
    encoding = ArchivedEncoding("m", "ab" * 16 + "cd" * 16, SHARED)
    assert encoding.encoding_id == bytes.fromhex("ab" * 16)
