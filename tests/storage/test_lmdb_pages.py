"""The prefetch finds what a range holds in the file, reads no more, and harms nothing."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest

from storage.keys import KeyRange, Kind, memory_range, number_range
from storage.layout import KVLayout
from storage.lmdb_pages import _File, prefetch
from storage.lmdb_store import LmdbReader, LmdbStore
from storage.records import MAGIC
from tests.support.blocks import encoding_id, make_block, make_document, memory_uid

#: Blocks of 20 KiB and more: several pages each.
LAYOUT = KVLayout(tuple(range(10)), 4, 64, 8, "bf16", separate_routing_keys=False)
ONE = encoding_id(1)
COUNT = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three memories written in turns, so that their pages lie mixed, and one was rewritten."""
    path = tmp_path_factory.mktemp("pages") / "tenant"
    store = LmdbStore(path)
    for start in range(1, COUNT, 10):
        for memory in (memory_uid(1), memory_uid(2), memory_uid(3)):
            numbers = range(start, start + 10)
            store.put_documents(memory, [make_document(n) for n in numbers])
            store.put_blocks(memory, ONE, LAYOUT, [make_block(LAYOUT, n) for n in numbers])
    store.delete_memory(memory_uid(2))
    store.put_blocks(memory_uid(3), ONE, LAYOUT, [make_block(LAYOUT, n, 9) for n in range(1, 80)])
    store.close()
    return path


def routing(first: int = 0, last: int | None = None) -> KeyRange:
    return number_range(memory_uid(1), Kind.ROUTING, ONE, first, last)


@pytest.fixture
def uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_File, "cached", lambda self, extent: False)


def test_extents_are_where_the_values_lie(folder: Path) -> None:
    descriptor = os.open(folder / "data.mdb", os.O_RDONLY)
    file = _File(descriptor)
    leaves = list(file.leaves(file.root(), routing()))
    extents = [extent for leaf in leaves for extent in file.extents(leaf)]
    values = [os.pread(descriptor, size, offset)[16:] for offset, size in extents]
    os.close(descriptor)
    assert all(value.startswith(MAGIC) for value in values)
    reader = LmdbReader(folder)
    expected = {
        value for key, value in reader.iter_raw() if routing().first <= key <= routing().last
    }
    reader.close()
    assert len(expected) == COUNT
    assert expected <= set(values)
    # A leaf at either end holds some of the neighbours.
    assert len(values) < COUNT + 120


def test_it_reads_the_range_and_little_else(folder: Path, uncached: None) -> None:
    size = (folder / "data.mdb").stat().st_size
    one = COUNT * (LAYOUT.block_bytes(5) // 2)
    assert one <= prefetch(folder, routing()) < size
    assert prefetch(folder, routing(1, 10)) < prefetch(folder, routing())
    assert prefetch(folder, memory_range(memory_uid(1))) >= 2 * one


def test_what_is_cached_is_not_read_again(folder: Path) -> None:
    (folder / "data.mdb").read_bytes()
    if prefetch(folder, routing()):
        pytest.skip("this filesystem cannot say what is cached")
    assert prefetch(folder, routing()) == 0


def test_a_cold_file_is_loaded_whole(folder: Path) -> None:
    descriptor = os.open(folder / "data.mdb", os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    reader = LmdbReader(folder)
    packed = reader.load_routing(memory_uid(1), ONE, LAYOUT)
    assert packed.numbers_N.tolist() == list(range(1, COUNT + 1))
    reader.close()


def test_nothing_to_read(folder: Path, tmp_path: Path, uncached: None) -> None:
    assert prefetch(tmp_path, routing()) == 0
    assert prefetch(folder, routing(9, 3)) == 0
    LmdbStore(tmp_path / "new").close()
    assert prefetch(tmp_path / "new", routing()) == 0


def test_pages_that_point_at_themselves_end(tmp_path: Path, folder: Path, uncached: None) -> None:
    data = bytearray((folder / "data.mdb").read_bytes())
    for page in range(2, len(data) // 4096):
        start = page * 4096
        number, flags = struct.unpack_from("<Q2xH", data, start)
        if (number, flags) == (page, 1):  # A branch: every child is the page itself.
            for slot in range(
                start + 16, start + int.from_bytes(data[start + 12 :][:2], "little"), 2
            ):
                node = start + int.from_bytes(data[slot : slot + 2], "little")
                data[node : node + 6] = page.to_bytes(6, "little")
    (tmp_path / "data.mdb").write_bytes(data)
    assert prefetch(tmp_path, memory_range(memory_uid(1))) == 0


def test_any_bytes_do_no_harm(folder: Path, tmp_path: Path, uncached: None) -> None:
    """The writer may reuse a page while it is walked: then it holds anything."""
    chance = random.Random(5)
    whole = (folder / "data.mdb").read_bytes()[: 400 * 4096]
    path = tmp_path / "data.mdb"
    for _ in range(30):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 400)):
            page = chance.randrange(len(data) // 4096) * 4096
            data[page + chance.randrange(48)] = chance.randrange(256)
        path.write_bytes(data[: chance.randrange(len(data))])
        assert prefetch(tmp_path, memory_range(memory_uid(1))) <= 2 * len(data)
    path.write_bytes(b"")
    assert prefetch(tmp_path, routing()) == 0
