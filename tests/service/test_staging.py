"""What is staged lies encrypted, is kept for a while where it should be, and goes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsvc.api_error import ApiError
from memsvc.canaries import Search
from memsvc.exporting import stage_export
from memsvc.setup import make_folders
from memsvc.staging import Incoming, Opened, Staging, StagingKey
from storage.paths import DataFolder
from tests.service.test_deletion import row_of
from tests.support.answers import eventually
from tests.support.served import Serve

TENANT = "0a" * 16
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


async def test_all_of_an_export_counts_as_its_tenants_work(
    start: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one that ends before its first pause."""
    async with start() as served:
        memory = await served.create("herons")
        await served.append(memory.name, TEXT)
        row = await row_of(served, memory.name)
        application, counted = served.server.application, []
        worked = application.limiter.turns.worked

        async def noting(uid: str, seconds: float) -> None:
            counted.append((uid, seconds))
            await worked(uid, seconds)

        monkeypatch.setattr(application.limiter.turns, "worked", noting)
        before = time.monotonic()
        await stage_export(application, row, tmp_path / "a", StagingKey(), with_blocks=True)
        assert {uid for uid, _ in counted} == {row.tenant_uid}
        assert 0 < sum(seconds for _, seconds in counted) <= time.monotonic() - before


@given(st.lists(st.binary(max_size=70), max_size=6), st.integers(0, 400))
def test_what_is_encrypted_is_read_from_anywhere(pieces: list[bytes], offset: int) -> None:
    key = StagingKey()
    lying, whole = b"".join(key.encrypted(pieces)), b"".join(pieces)
    offset = min(offset, len(whole))
    assert key.opener(offset)(lying[offset:]) == whole[offset:]


def staging_in(root: Path, keep_s: float = 60.0) -> Staging:
    data = DataFolder(root)
    data.staging.mkdir(parents=True)
    return Staging(data, keep_s)


async def test_an_import_lies_encrypted_and_reads_as_it_came(tmp_path: Path) -> None:
    staging = staging_in(tmp_path)
    async with staging.file(TENANT) as staged:
        incoming = Incoming(staged)
        for _ in range(5):
            await incoming.write(TEXT.encode() * 999)
        incoming.finish()
        assert list(Search([TEXT]).file(staged.path)) == []
        opened = Opened(staged)
        assert opened.read() == TEXT.encode() * 999 * 5
        opened.seek(len(TEXT) * 7 + 3)
        assert opened.read(10) == TEXT.encode()[3:13] and opened.tell() == len(TEXT) * 7 + 13
        opened.close()
    assert not staged.path.exists()


async def received(staging: Staging, name: str, data: bytes, keep: bool = True) -> bytes:
    """Receives data behind what is there; all there is then."""
    async with staging.file(TENANT, name) as staged:
        incoming = Incoming(staged)
        await incoming.write(data)
        incoming.finish()
        staged.keep_as = name if keep else ""
        opened = Opened(staged)
        try:
            return opened.read()
        finally:
            opened.close()


async def test_what_is_kept_is_gone_on_with(tmp_path: Path) -> None:
    staging = staging_in(tmp_path)
    assert await received(staging, "a", b"one") == b"one"
    assert await received(staging, "a", b" two") == b"one two"
    assert await received(staging, "b", b"other") == b"other"
    staging.drop(TENANT, "a")
    assert await received(staging, "a", b"anew", keep=False) == b"anew"
    assert await received(staging, "a", b"again", keep=False) == b"again"


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def _empty(folder: Path) -> bool:
    return not _names(folder)


async def test_so_many_are_kept_and_so_long(tmp_path: Path) -> None:
    staging = staging_in(tmp_path)
    for name in "abcd":
        await received(staging, name, name.encode())
    assert await received(staging, "a", b"+") == b"+"  # The oldest of the tenant's went.
    assert await received(staging, "d", b"+") == b"d+"
    staging.forget(TENANT, "")
    assert await received(staging, "d", b"+", keep=False) == b"+"
    brief = staging_in(tmp_path / "brief", keep_s=0.01)
    await received(brief, "a", b"gone soon")
    await eventually(lambda: _empty(tmp_path / "brief" / "staging"))
    never = staging_in(tmp_path / "never", keep_s=0)
    await received(never, "a", b"one")
    assert await received(never, "a", b"two") == b"two"


async def test_a_deletion_forgets_what_goes_out_of_the_memory(tmp_path: Path) -> None:
    staging = staging_in(tmp_path)
    for active in (True, False):
        async with staging.file(TENANT, "name") as staged:
            staged.path.write_bytes(b"x")
            staged.size, staged.memory_uid, staged.keep_as = 1, "m", "name"
            if active:
                staging.forget(TENANT, "m")
        staging.forget("another tenant", "m")
        staging.forget(TENANT, "another memory")
        assert staged.path.exists() is not active
    staging.forget(TENANT, "m")
    async with staging.file(TENANT, "name") as staged:
        assert staged.fresh


async def test_one_call_at_a_time_is_at_a_file(tmp_path: Path) -> None:
    staging = staging_in(tmp_path)
    async with staging.file(TENANT, "name"):
        with pytest.raises(ApiError, match="too many"):
            async with staging.file(TENANT, "name"):
                pass


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
