"""Archives over broken connections, and under a passphrase."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from memsvc.client import (
    AsyncClient,
    OffsetNotAvailableError,
    PassphraseError,
    RetryPolicy,
    SealedArchiveError,
    StreamBrokenError,
    UnavailableError,
)
from memsvc.client.archives import PIECE_BYTES, Source
from memsvc.client.sealed import sealed_archive
from memsvc.v1 import memory_service_pb2 as service
from tests.client.test_calls import names_in
from tests.support.scripted import Failure, Script, serving

ARCHIVE = random.Random(3).randbytes(5000)
LOST = Failure("FAILED_PRECONDITION", "OFFSET_NOT_AVAILABLE", {"available": "0"})


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
async def client(script: Script) -> AsyncIterator[AsyncClient]:
    async with serving(script) as address:
        policy = RetryPolicy(attempts=3, initial_s=0.001)
        async with AsyncClient(address, "key", retry=policy) as made:
            yield made


def piece(start: int, end: int, first: bool = False) -> service.ExportMemoryResponse:
    total = len(ARCHIVE) if first else 0
    return service.ExportMemoryResponse(data=ARCHIVE[start:end], total_bytes=total)


def offsets(script: Script) -> list[int]:
    found = []
    for request in script.requests:
        assert isinstance(request, service.ExportMemoryRequest)
        found.append(request.offset)
    assert len({r.request_id for r in script.requests}) == 1  # type: ignore[attr-defined]  # as above
    return found


async def test_an_export_goes_on_where_it_broke(
    client: AsyncClient, script: Script, tmp_path: Path
) -> None:
    script.messages = [
        piece(0, 2000, True),
        piece(2000, 3000),
        Failure("UNAVAILABLE"),
        piece(3000, 4000, True),
        Failure("UNAVAILABLE"),
        piece(4000, 5000, True),
    ]
    seen: list[tuple[int, int]] = []
    path = tmp_path / "a"
    note = lambda at, total: seen.append((at, total))  # noqa: E731
    assert await client.memory("anna").export_to(path, on_received=note) == 5000
    assert path.read_bytes() == ARCHIVE
    assert offsets(script) == [0, 3000, 4000]
    assert seen == [(2000, 5000), (3000, 5000), (4000, 5000), (5000, 5000)]


async def test_a_file_begins_again_when_the_server_has_let_go(
    client: AsyncClient, script: Script, tmp_path: Path
) -> None:
    script.messages = [
        piece(0, 2000, True),
        Failure("UNAVAILABLE"),
        LOST,
        piece(0, 2500, True),
        piece(2500, 5000),
    ]
    path = tmp_path / "a"
    assert await client.memory("anna").export_to(path) == 5000
    assert path.read_bytes() == ARCHIVE
    assert offsets(script) == [0, 2000, 0]


async def test_pieces_that_were_given_out_are_not_given_out_again(
    client: AsyncClient, script: Script
) -> None:
    script.messages = [piece(0, 2000, True), Failure("UNAVAILABLE"), LOST]
    parts = client.memory("anna").export()
    assert (await anext(parts)).data == ARCHIVE[:2000]
    with pytest.raises(OffsetNotAvailableError):
        await anext(parts)


async def test_a_cut_behind_the_last_byte_is_none(client: AsyncClient, script: Script) -> None:
    script.messages = [piece(0, 5000, True), Failure("UNAVAILABLE"), LOST]
    parts = [part async for part in client.memory("anna").export()]
    assert b"".join(part.data for part in parts) == ARCHIVE


async def test_an_archive_that_just_ends_is_an_error(client: AsyncClient, script: Script) -> None:
    script.messages = [piece(0, 2000, True)]
    with pytest.raises(StreamBrokenError):
        [part async for part in client.memory("anna").export()]


async def test_another_process_goes_on_with_its_file(
    client: AsyncClient, script: Script, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    script.messages = [piece(0, 2000, True), *[Failure("UNAVAILABLE")] * 3]
    with pytest.raises(UnavailableError):
        await client.memory("anna").export_to(path, request_id="mine")
    assert not path.exists()
    script.requests.clear()
    script.messages = [piece(2000, 5000, True)]
    assert await client.memory("anna").export_to(path, request_id="mine") == 5000
    assert path.read_bytes() == ARCHIVE and offsets(script) == [2000]
    assert names_in(tmp_path) == ["a"]


async def test_an_upload_goes_on_behind_what_arrived(client: AsyncClient, script: Script) -> None:
    data = random.Random(4).randbytes(3 * PIECE_BYTES + 17)
    script.keeps = True
    script.failures = [
        Failure("UNAVAILABLE"),
        Failure("FAILED_PRECONDITION", "OFFSET_NOT_AVAILABLE", {"available": "2097153"}),
        Failure("UNAVAILABLE"),
    ]
    sent: list[int] = []
    made = await client.memories.import_archive(data, on_sent=sent.append)
    headers = [header.offset for header in script.headers]
    assert headers == [0, len(data), 2097153, len(data)]
    # The last attempt asked with all of it, and all of it was there.
    assert made.memory.text_bytes == 0
    assert sent[-1] == len(data)


async def test_an_upload_that_is_lost_again_and_again_fails(
    client: AsyncClient, script: Script
) -> None:
    script.failures = [LOST] * 9
    with pytest.raises(OffsetNotAvailableError):
        await client.memories.import_archive(b"x" * 10, request_id="mine")
    assert len(script.headers) == 4


# --- under a passphrase -------------------------------------------------------------


async def test_an_export_is_sealed_here(
    client: AsyncClient, script: Script, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    script.messages = [
        piece(0, 2000, True),
        Failure("UNAVAILABLE"),
        LOST,
        piece(0, 2000, True),
        Failure("UNAVAILABLE"),
        piece(2000, 5000, True),
    ]
    passphrase = "four herons stand still"
    written = await client.memory("anna").export_to(path, passphrase=passphrase)
    lying = path.read_bytes()
    assert written == len(lying) > 5000 and ARCHIVE[:50] not in lying
    assert not any(passphrase in str(request) for request in script.requests)
    for source in (path, lying):
        made = await client.memories.import_archive(source, passphrase=passphrase)
        assert made.memory.text_bytes == 5000
        assert b"".join(script.received) == ARCHIVE


async def test_what_is_wrong_with_a_passphrase_is_said_before_anything_is_sent(
    client: AsyncClient, script: Script
) -> None:
    sealed = sealed_archive(ARCHIVE, "right")
    cases: list[tuple[bytes, str | None, type[Exception]]] = [
        (sealed, "wrong", PassphraseError),
        (sealed, "", PassphraseError),
        (sealed, None, PassphraseError),
        (ARCHIVE, "right", SealedArchiveError),
        (sealed[:60], "right", SealedArchiveError),
    ]
    for data, passphrase, error in cases:
        with pytest.raises(error):
            await client.memories.import_archive(data, passphrase=passphrase)
    with pytest.raises(PassphraseError):
        await client.memory("anna").export_to(Path("never"), passphrase="")
    assert script.headers == [] == script.requests


async def test_damage_on_the_way_is_what_is_raised(client: AsyncClient) -> None:
    data = bytearray(sealed_archive(random.Random(5).randbytes(3 * PIECE_BYTES), "right"))
    data[-100] ^= 1
    with pytest.raises(SealedArchiveError, match="Frame 47"):
        await client.memories.import_archive(bytes(data), passphrase="right")


async def test_a_source_is_read_from_anywhere() -> None:
    content = random.Random(6).randbytes(2 * PIECE_BYTES + 5)
    for data, passphrase in ((content, None), (sealed_archive(content, "right"), "right")):
        source = Source(data, passphrase)
        await source.open()
        assert source.size == len(content)
        for offset in (0, 1, 65_536, PIECE_BYTES + 7, len(content)):
            pieces: list[Any] = [one async for one in source.pieces(offset)]
            assert b"".join(pieces) == content[offset:]
            assert all(len(one) <= PIECE_BYTES for one in pieces)
        source.close()
