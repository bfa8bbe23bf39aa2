"""Members that lie under right hashes: documents and blocks that are not what they should be."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from storage.archive import (
    ArchiveCorruptError,
    ArchiveForbiddenError,
    ArchiveLimits,
    open_archive,
)
from storage.document_json import encode_document
from tests.support.archives import (
    DOCUMENTS,
    blocks_member,
    change,
    change_header,
    change_lines,
    pack,
    sample,
)
from tests.support.blocks import SHARED, make_block, make_document


class TestDocuments:
    def test_a_bomb(self, attempt: Callable[[bytes], None]) -> None:
        bomb = change(DOCUMENTS, lambda _: zstandard.compress(bytes(2**28)))
        tracemalloc.start()
        with pytest.raises(ArchiveForbiddenError, match="expand"):
            attempt(bomb)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8 * 2**20

    def test_many_small_bombs(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        path.write_bytes(sample())
        with pytest.raises(ArchiveForbiddenError):
            open_archive(path, ArchiveLimits(total_text_bytes=100))

    def test_a_frame_that_hides_its_size(self, attempt: Callable[[bytes], None]) -> None:
        hide = zstandard.ZstdCompressor(write_content_size=False)
        with pytest.raises(ArchiveCorruptError):
            attempt(change(DOCUMENTS, lambda d: hide.compress(zstandard.decompress(d))))

    @pytest.mark.parametrize("data", [b"", b"x" * 50])
    def test_no_frame(self, data: bytes, attempt: Callable[[bytes], None]) -> None:
        with pytest.raises(ArchiveCorruptError):
            attempt(change(DOCUMENTS, lambda _: data))

    @pytest.mark.parametrize(
        "edit",
        [
            lambda lines: lines[::-1],
            lambda lines: [lines[0], *lines],
            lambda lines: lines[:-1],
            lambda lines: [*lines[:-1], lines[-1].strip()],
            lambda lines: [*lines, b"\n"],
            lambda lines: [*lines, b"{}\n"],
            lambda lines: [b"\xff\n", *lines[1:]],
            lambda lines: [lines[0].replace(b'"number":1', b'"number":-1'), *lines[1:]],
            lambda lines: [lines[0].replace(b'"user"', b'"root"'), *lines[1:]],
            lambda lines: [],
        ],
    )
    def test_lines_that_do_not_fit(
        self, edit: Callable[[list[bytes]], list[bytes]], attempt: Callable[[bytes], None]
    ) -> None:
        with pytest.raises(ArchiveCorruptError):
            attempt(change_lines(edit))

    def test_a_document_that_is_newer_than_its_memory(
        self, attempt: Callable[[bytes], None]
    ) -> None:
        late = encode_document(replace(make_document(5), revision=51)) + b"\n"
        with pytest.raises(ArchiveCorruptError):
            attempt(change_lines(lambda lines: [*lines[:-1], late]))


class TestBlocks:
    @pytest.mark.parametrize(
        "edit",
        [
            lambda h: h.pop("value"),
            lambda h: h.update(more=h["value"]),
            lambda h: h.update(__metadata__={}),
            lambda h: h["value"].update(dtype="F32"),
            lambda h: h["value"].update(dtype="F16"),
            lambda h: h["numbers"].update(shape=[2**62]),
            lambda h: h["numbers"].update(shape=[-2]),
            lambda h: h["numbers"].update(shape=[1, 2]),
            lambda h: h["numbers"].update(shape=[True]),
            lambda h: h["value"].update(shape=[3, 2]),
            lambda h: h["value"].update(shape=[2, 3, 16]),
            lambda h: h["value"].update(data_offsets=[0, 2**40]),
            lambda h: h["value"].update(data_offsets=h["routing_key"]["data_offsets"]),
            lambda h: h["value"].update(data_offsets=h["value"]["data_offsets"][::-1]),
            lambda h: h["value"].update(data_offsets=[0]),
            lambda h: h.update(tokens=h["numbers"]),
        ],
    )
    def test_a_header_that_lies(
        self,
        edit: Callable[[dict[str, dict[str, object]]], object],
        attempt: Callable[[bytes], None],
    ) -> None:
        with pytest.raises(ArchiveCorruptError):
            attempt(change_header(edit))

    @pytest.mark.parametrize(
        "edit",
        [
            lambda data: b"",
            lambda data: data[:7],
            lambda data: b"\xff" * 8 + data[8:],
            lambda data: (2**40).to_bytes(8, "little") + data[8:],
            lambda data: data[:-1],
            lambda data: data + b"x",
        ],
    )
    def test_bytes_that_do_not_fit(
        self, edit: Callable[[bytes], bytes], attempt: Callable[[bytes], None]
    ) -> None:
        with pytest.raises(ArchiveCorruptError):
            attempt(change(blocks_member(), edit))

    @pytest.mark.parametrize("name", ["numbers", "tokens"])
    @pytest.mark.parametrize("value", [0, -1, 2**62, 10**9])
    def test_vectors_that_lie(
        self, name: str, value: int, attempt: Callable[[bytes], None]
    ) -> None:
        def edit(data: bytes) -> bytes:
            length = 8 + int.from_bytes(data[:8], "little")
            at = length + json.loads(data[8:length])[name]["data_offsets"][0]
            return data[:at] + value.to_bytes(8, "little", signed=True) + data[at + 8 :]

        with pytest.raises(ArchiveCorruptError):
            attempt(change(blocks_member(), edit))

    def test_a_block_without_its_document(self, attempt: Callable[[bytes], None]) -> None:
        blocks = [make_block(SHARED, 1), make_block(SHARED, 2)]
        with pytest.raises(ArchiveCorruptError, match="no document"):
            attempt(pack([make_document(1)], [(SHARED, blocks)]))

    def test_blocks_out_of_order(self, attempt: Callable[[bytes], None]) -> None:
        blocks = [make_block(SHARED, 2), make_block(SHARED, 1)]
        with pytest.raises(ArchiveCorruptError, match="out of order"):
            attempt(pack([make_document(1), make_document(2)], [(SHARED, blocks)]))
