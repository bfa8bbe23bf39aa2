"""Retries, errors and streams of the asyncio client against a scripted server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from memsvc.client import (
    AsyncClient,
    CallCancelledError,
    DeadlineExceededError,
    Done,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    RequestIdReusedError,
    ResourceExhaustedError,
    RetryPolicy,
    Role,
    StreamBrokenError,
    TextDelta,
    TextSource,
    Turn,
    UnavailableError,
)
from memsvc.v1 import errors_pb2
from memsvc.v1 import memory_service_pb2 as service
from tests.support.scripted import Failure, Script, answer, serving

QUICK = RetryPolicy(attempts=4, initial_s=0.01, ceiling_s=0.05)
HELLO = Turn(Role.USER, "hello")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
async def client(script: Script) -> AsyncIterator[AsyncClient]:
    async with serving(script) as address, AsyncClient(address, "msk_a_b", retry=QUICK) as made:
        yield made


async def test_the_key_goes_with_every_call(client: AsyncClient, script: Script) -> None:
    await client.memories.get("anna")
    assert script.metadata[0]["authorization"] == "Bearer msk_a_b"


async def test_a_write_is_retried_with_the_same_request_id(
    client: AsyncClient, script: Script
) -> None:
    script.failures = [Failure("UNAVAILABLE"), Failure("UNAVAILABLE", "DRAINING")]
    written = await client.memory("anna").append([HELLO])
    assert written.revision == 7
    assert written.documents == ("memories/anna/documents/1",)
    sent = [
        request for request in script.requests if isinstance(request, service.AppendTurnsRequest)
    ]
    assert len(sent) == 3
    assert len({request.request_id for request in sent}) == 1
    assert sent[0].request_id


async def test_two_writes_have_two_request_ids(client: AsyncClient, script: Script) -> None:
    await client.memory("anna").append([HELLO])
    await client.memory("anna").append([HELLO])
    first, second = script.requests
    assert first.request_id != second.request_id  # type: ignore[attr-defined]  # both are AppendTurnsRequest


async def test_an_upload_starts_afresh_when_retried(client: AsyncClient, script: Script) -> None:
    script.failures = [Failure("UNAVAILABLE")]
    await client.memory("anna").put([TextSource("x" * 300_000, title="Long")])
    kinds = [r.WhichOneof("message") for r in script.requests]
    assert kinds == ["header", "document_start", "text", "text", "end"] * 2


async def test_the_servers_hint_is_waited_for(client: AsyncClient, script: Script) -> None:
    script.failures = [Failure("RESOURCE_EXHAUSTED", "ENCODING_BACKLOG_FULL", retry_after_s=0.3)]
    start = time.monotonic()
    await client.memory("anna").append([HELLO])
    assert time.monotonic() - start >= 0.3


async def test_a_full_disk_is_not_retried(client: AsyncClient, script: Script) -> None:
    script.failures = [Failure("RESOURCE_EXHAUSTED", "STORAGE_FULL")]
    with pytest.raises(ResourceExhaustedError) as caught:
        await client.memory("anna").append([HELLO])
    assert caught.value.reason == "STORAGE_FULL"
    assert caught.value.retry_after_s is None
    assert len(script.requests) == 1


async def test_what_a_stopping_server_cancels_is_repeated(
    client: AsyncClient, script: Script
) -> None:
    script.failures = [Failure("CANCELLED")]
    assert (await client.memory("anna").append([HELLO])).revision == 7
    assert len(script.requests) == 2


async def test_closing_the_client_ends_its_calls_at_once(script: Script) -> None:
    script.hang = True
    async with serving(script) as address:
        client = AsyncClient(address, "key", retry=RetryPolicy(attempts=9, initial_s=5))
        call = asyncio.create_task(client.memories.get("anna"))
        async with asyncio.timeout(5):
            await script.entered.wait()
        await client.close()
        async with asyncio.timeout(3):
            with pytest.raises((CallCancelledError, asyncio.CancelledError)):
                await call
    assert len(script.requests) == 1


async def test_unsafe_calls_are_sent_once(client: AsyncClient, script: Script) -> None:
    script.failures = [Failure("UNAVAILABLE")]
    with pytest.raises(UnavailableError):
        await client.memories.delete("anna")
    script.failures = [Failure("UNAVAILABLE")]
    with pytest.raises(UnavailableError):
        await client.memories.update("anna", display_name="A", etag="e")
    assert len(script.requests) == 2


async def test_their_safe_forms_are_retried(client: AsyncClient, script: Script) -> None:
    script.failures = [Failure("UNAVAILABLE")]
    await client.memories.delete("anna", allow_missing=True)
    script.failures = [Failure("UNAVAILABLE")]
    await client.memories.update("anna", display_name="A")
    assert len(script.requests) == 4


async def test_retries_end_with_the_last_error(client: AsyncClient, script: Script) -> None:
    script.failures = [Failure("UNAVAILABLE", "WORKER_UNAVAILABLE", retry_after_s=0.0)] * 9
    with pytest.raises(UnavailableError) as caught:
        await client.memories.get("anna")
    assert caught.value.reason == "WORKER_UNAVAILABLE"
    assert len(script.requests) == QUICK.attempts


async def test_no_server_is_unavailable() -> None:
    async with AsyncClient("127.0.0.1:1", "k", retry=QUICK) as client:
        with pytest.raises(UnavailableError) as caught:
            await client.memories.get("anna")
    assert caught.value.reason == ""


async def test_field_and_metadata_come_along(client: AsyncClient, script: Script) -> None:
    script.failures = [
        Failure("INVALID_ARGUMENT", "TEXT_TOO_LONG", {"field": "turns[3].text", "limit": "262144"})
    ]
    with pytest.raises(InvalidArgumentError) as caught:
        await client.memory("anna").append([HELLO])
    assert caught.value.field == "turns[3].text"
    assert caught.value.metadata["limit"] == "262144"
    assert str(caught.value) == "TEXT_TOO_LONG: scripted"


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        ("NOT_FOUND", "MEMORY_NOT_FOUND", NotFoundError),
        ("ALREADY_EXISTS", "REQUEST_ID_REUSED", RequestIdReusedError),
        ("INTERNAL", "INTERNAL_FAULT", InternalError),
        ("UNKNOWN", "", InternalError),
    ],
)
async def test_classes(
    client: AsyncClient, script: Script, code: str, reason: str, kind: type[Exception]
) -> None:
    script.failures = [Failure(code, reason)]
    with pytest.raises(kind):
        await client.memories.get("anna")


async def test_a_reason_of_another_domain_is_not_taken(client: AsyncClient, script: Script) -> None:
    script.failures = [Failure("NOT_FOUND")]
    with pytest.raises(NotFoundError) as caught:
        await client.memories.get("anna")
    assert caught.value.reason == ""


def test_every_reason_is_a_known_name() -> None:
    # The client passes reasons through as text; the tree names those it singles out.
    from memsvc.client.errors import _BY_REASON

    assert set(_BY_REASON) <= set(errors_pb2.ErrorReason.keys())


async def test_the_deadline_holds_over_all_attempts(client: AsyncClient, script: Script) -> None:
    script.hang = True
    start = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        await client.memories.get("anna", timeout_s=0.3)
    assert time.monotonic() - start < 2


async def test_iterate_asks_for_pages_as_needed(client: AsyncClient, script: Script) -> None:
    names = []
    async for memory in client.memories.iterate():
        names.append(memory.id)
        if len(names) == 3:
            break
    assert names == ["m0", "m1", "m2"]
    assert len(script.requests) == 2
    assert [memory.id async for memory in client.memories.iterate()] == [f"m{i}" for i in range(5)]


async def test_query_gives_typed_events_and_ask_gathers_them(
    client: AsyncClient, script: Script
) -> None:
    script.messages = answer("In ", "Lisbon.")
    events = [event async for event in client.memory("anna").query("Where?")]
    assert isinstance(events[-1], Done)
    gathered = await client.memory("anna").ask("Where?")
    assert gathered.text == "In Lisbon."
    assert [citation.number for citation in gathered.citations] == [4]
    assert gathered.usage is not None
    assert gathered.done.revision == 9


async def test_a_query_is_retried_before_its_first_event(
    client: AsyncClient, script: Script
) -> None:
    script.messages = answer("yes")
    script.failures = [Failure("UNAVAILABLE", "WORKER_UNAVAILABLE", retry_after_s=0.01)]
    assert (await client.memory("anna").ask("?")).text == "yes"
    assert len(script.requests) == 2


async def test_a_query_is_never_retried_after_its_first_event(
    client: AsyncClient, script: Script
) -> None:
    script.messages = [*answer("yes")[:3], Failure("UNAVAILABLE", "WORKER_UNAVAILABLE", {}, 0.0)]
    seen = []
    with pytest.raises(UnavailableError):
        async for event in client.memory("anna").query("?"):
            seen.append(event)
    assert isinstance(seen[-1], TextDelta)
    assert len(script.requests) == 1


async def test_an_answer_without_its_end_is_an_error(client: AsyncClient, script: Script) -> None:
    script.messages = answer("yes")[:-1]
    with pytest.raises(StreamBrokenError):
        await client.memory("anna").ask("?")


async def test_an_event_of_a_newer_server_is_passed_over(
    client: AsyncClient, script: Script
) -> None:
    script.messages = [service.QueryResponse(), *answer("yes")]
    assert (await client.memory("anna").ask("?")).text == "yes"


async def test_leaving_a_stream_cancels_the_call(client: AsyncClient, script: Script) -> None:
    script.messages, script.hang = answer("a")[:1], True
    stream = client.memory("anna").query("?")
    await anext(stream)
    await stream.aclose()
    await asyncio.wait_for(script.cancelled.wait(), 5)


async def test_a_watch_is_taken_up_again(client: AsyncClient, script: Script) -> None:
    script.messages = [
        service.WatchMemoryResponse(revision=1),
        Failure("UNAVAILABLE", "DRAINING", {}, 0.0),
        service.WatchMemoryResponse(revision=2),
    ]
    assert [p.revision async for p in client.memory("anna").watch()] == [1, 2]
    assert len(script.requests) == 2


async def test_export_appears_whole_or_not_at_all(
    client: AsyncClient, script: Script, tmp_path: Path
) -> None:
    target = tmp_path / "anna.archive"
    parts = [service.ExportMemoryResponse(data=b"ab", total_bytes=4)]
    # It is taken up again, and each time refused.
    script.messages = [*parts, *[Failure("UNAVAILABLE")] * 9]
    with pytest.raises(UnavailableError):
        await client.memory("anna").export_to(target)
    assert names_in(tmp_path) == []
    script.messages = [*parts, service.ExportMemoryResponse(data=b"cd")]
    assert await client.memory("anna").export_to(target) == 4
    assert target.read_bytes() == b"abcd"
    assert names_in(tmp_path) == ["anna.archive"]


async def test_import_from_file_and_bytes(
    client: AsyncClient, script: Script, tmp_path: Path
) -> None:
    archive = tmp_path / "a"
    archive.write_bytes(b"z" * 3_000_000)
    script.failures = [Failure("UNAVAILABLE")]
    from_file = await client.memories.import_archive(archive)
    from_bytes = await client.memories.import_archive(b"z" * 10)
    assert (from_file.memory.text_bytes, from_bytes.memory.text_bytes) == (3_000_000, 10)


async def test_what_breaks_an_upload_here_is_what_is_raised(
    client: AsyncClient, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        await client.memories.import_archive(tmp_path / "none")


async def test_an_unknown_role_is_refused_before_anything_is_sent(
    client: AsyncClient, script: Script
) -> None:
    with pytest.raises(ValueError, match="narrator"):
        await client.memory("anna").append([Turn("narrator", "x")])  # type: ignore[arg-type]  # the point
    assert script.requests == []
