"""What is staged lies encrypted, or is overwritten."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsvc.canaries import Search
from memsvc.exporting import stage_export
from memsvc.setup import make_folders
from memsvc.staging import Staging, StagingKey, destroy
from storage.paths import DataFolder
from tests.service.test_deletion import row_of
from tests.support.served import Serve

TEXT = "the canary text of a staged heron"


@given(st.lists(st.binary(max_size=70), max_size=6), st.integers(1, 50))
def test_what_is_encrypted_comes_back_in_other_pieces(pieces: list[bytes], size: int) -> None:
    key = StagingKey()
    lying = b"".join(key.encrypted(pieces))
    opener = key.opener()
    read = b"".join(opener(lying[i : i + size]) for i in range(0, len(lying), size))
    assert read == b"".join(pieces)


def test_every_file_has_its_own_stream() -> None:
    key = StagingKey()
    assert b"".join(key.encrypted([bytes(64)])) != b"".join(key.encrypted([bytes(64)]))


async def test_an_export_lies_encrypted(start: Serve, tmp_path: Path) -> None:
    async with start() as served:
        memory = await served.create("herons", display_name=TEXT)
        await served.append(memory.name, TEXT)
        row = await row_of(served, memory.name)
        path, key = tmp_path / "staged", StagingKey()
        application = served.server.application
        total = await stage_export(application, row, path, key, with_blocks=True)
        lying = path.read_bytes()
        assert len(lying) == total
        assert list(Search([TEXT, "manifest.json"]).file(path)) == []
        assert key.opener()(lying).startswith(b"manifest.json")


async def test_a_staged_file_is_overwritten_before_it_goes(tmp_path: Path) -> None:
    data = DataFolder(tmp_path)
    data.staging.mkdir()
    async with Staging(data).path("0a" * 16) as path:
        path.write_bytes(TEXT.encode() * 50_000)
        held = path.open("rb")
    assert not path.exists()
    with held:
        assert held.read().strip(b"\0") == b""
    destroy(path)


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 5])
def test_what_a_crash_left_is_overwritten_too(tmp_path: Path, size: int) -> None:
    data = DataFolder(tmp_path)
    data.staging.mkdir()
    left = data.staging / "left.msamem"
    left.write_bytes(os.urandom(size))
    with left.open("rb") as held:
        make_folders(data)
        assert held.read() == bytes(size)
    assert list(data.staging.iterdir()) == []
