from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from grpc import StatusCode, aio

from memsvc.logs import JsonFormatter, TextFormatter, configure_logging
from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from memsvc.wire import METHODS, explain
from tests.support.served import Caller, Serve, Served, refusal, refused, turns

BAD = b"\xff\xfe"


def broken(message: Any, good: bytes) -> bytes:
    """A message's bytes with one string in it replaced by as many that are not UTF-8."""
    data: bytes = message.SerializeToString()
    assert data.count(good) == 1
    return data.replace(good, BAD * (len(good) // 2))


CASES = [
    (
        "CreateMemory",
        broken(pb.CreateMemoryRequest(memory=resources.Memory(display_name="QQ")), b"QQ"),
        "memory.display_name",
    ),
    (
        "CreateMemory",
        broken(pb.CreateMemoryRequest(memory=resources.Memory(labels={"a": "QQ"})), b"QQ"),
        "memory.labels",
    ),
    ("GetMemory", broken(pb.GetMemoryRequest(name="QQQQ"), b"QQQQ"), "name"),
    (
        "AppendTurns",
        broken(pb.AppendTurnsRequest(memory="m", turns=turns("a", "b", "QQ")), b"QQ"),
        "turns[2].text",
    ),
    (
        "DeleteDocuments",
        broken(pb.DeleteDocumentsRequest(parent="p", names=["a", "QQ"]), b"QQ"),
        "names[1]",
    ),
    ("Query", broken(pb.QueryRequest(memory="m", question="QQ"), b"QQ"), "question"),
]


def raw(served: Served, call: str) -> Any:
    """A method that sends bytes as they are."""
    path = f"/memsvc.v1.MemoryService/{call}"
    method = METHODS[path]
    if method.client_streaming:
        return served.channel.stream_unary(path)
    return (served.channel.unary_stream if method.server_streaming else served.channel.unary_unary)(
        path
    )


@pytest.mark.parametrize(("call", "data", "field"), CASES)
async def test_invalid_utf8_names_its_field(
    served: Served, call: str, data: bytes, field: str
) -> None:
    answer = await refused(served.as_operator(raw(served, call), data))
    assert (answer.code, answer.reason, answer.field) == (
        "INVALID_ARGUMENT",
        "TEXT_NOT_CLEAN",
        field,
    )
    await served.create("still-up")


async def test_invalid_utf8_in_a_stream(served: Served) -> None:
    async def stream() -> AsyncIterator[bytes]:
        yield pb.PutDocumentsRequest(
            header=pb.PutDocumentsRequest.Header(memory="memories/here")
        ).SerializeToString()
        yield broken(pb.PutDocumentsRequest(text="QQ"), b"QQ")

    answer = await refused(served.as_operator(raw(served, "PutDocuments"), stream()))
    assert (answer.reason, answer.field) == ("TEXT_NOT_CLEAN", "text")


@pytest.mark.parametrize("data", [b"\x0a\xff", b"\x08", b"\xff\xff\xff", b"\x0a\x02\x0a"])
async def test_bytes_that_are_no_message(served: Served, data: bytes) -> None:
    answer = await refused(served.as_operator(raw(served, "CreateMemory"), data))
    assert (answer.code, answer.reason, answer.field) == (
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        "request",
    )


async def test_a_request_above_the_limit(served: Served) -> None:
    big = pb.AppendTurnsRequest(memory="memories/here", turns=turns(*["x" * 262_144] * 17))
    answer = await refused(served.as_operator(served.memories.AppendTurns, big))
    assert (answer.reason, answer.field) == ("TEXT_TOO_LONG", "request")
    assert answer.metadata["limit"] == "4194304"


def test_depth_of_nesting_is_bounded() -> None:
    data = b"\x1a\x02\xff\xfe"
    assert explain(pb.DESCRIPTOR.message_types_by_name["QueryRequest"], data * 1000)


async def test_an_unknown_call_is_unimplemented(served: Served) -> None:
    call: Any = served.channel.unary_unary("/memsvc.v1.MemoryService/Nonsense")
    with pytest.raises(aio.AioRpcError) as caught:
        await served.as_operator(call, b"")
    assert caught.value.code() is StatusCode.UNIMPLEMENTED


class Hanging:
    """A PutDocuments stream that stays open until told to end."""

    def __init__(self, served: Served, memory: str) -> None:
        self.end = asyncio.Event()
        self.sent = asyncio.Event()
        self._memory = memory
        self.call = served.as_operator(served.memories.PutDocuments, self._messages())

    async def _messages(self) -> AsyncIterator[pb.PutDocumentsRequest]:
        kind = pb.PutDocumentsRequest
        yield kind(header=kind.Header(memory=self._memory))
        yield kind(document_start=kind.DocumentStart())
        yield kind(text="streamed")
        self.sent.set()
        await self.end.wait()
        yield kind(end=kind.End(documents=1))


async def inside(served: Served, calls: int) -> None:
    """Returns when that many calls are in the server."""
    async with asyncio.timeout(5):
        while served.server._gate.calls != calls:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.005)


async def test_too_many_calls_at_once(start: Serve) -> None:
    async with start(max_concurrent_calls=2) as served:
        memory = await served.create("crowded")
        hanging = [Hanging(served, memory.name) for _ in range(2)]
        await inside(served, 2)
        answer = await refused(served.create())
        assert (answer.code, answer.reason) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
        assert answer.retry_s
        for stream in hanging:
            stream.end.set()
            await stream.call
        await served.create()


async def test_draining_lets_calls_inside_finish(start: Serve) -> None:
    async with start() as served:
        memory = await served.create("last-words")
        hanging = Hanging(served, memory.name)
        await inside(served, 1)
        drain = asyncio.create_task(served.server.drain(10))
        await asyncio.sleep(0.05)
        answer = await refused(served.create())
        assert (answer.code, answer.reason) == ("UNAVAILABLE", "DRAINING")
        assert answer.retry_s
        assert not drain.done()
        hanging.end.set()
        reply = await hanging.call
        assert reply.revision == 1
        await drain
    async with start() as served:
        assert await served.texts(memory.name) == ["streamed"]


@pytest.mark.parametrize("hurry", [False, True])
async def test_draining_ends_with_its_grace(start: Serve, hurry: bool) -> None:
    async with start() as served:
        memory = await served.create("endless")
        hanging = Hanging(served, memory.name)
        await inside(served, 1)
        async with asyncio.timeout(8):
            drain = asyncio.create_task(served.server.drain(60 if hurry else 0.1))
            await asyncio.sleep(0.05)
            if hurry:
                served.server.hurry()
            await drain
        with pytest.raises(aio.AioRpcError):
            await hanging.call
        assert served.server._gate.calls == 0
    async with start() as served:
        assert await served.texts(memory.name) == []


async def test_a_fault_is_internal_with_an_incident_and_leaks_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise RuntimeError("what the user wrote")

    monkeypatch.setattr(served.server.application.catalog, "show_memory", fail)
    with caplog.at_level(logging.ERROR):
        answer = await refused(
            served.as_operator(served.memories.GetMemory, pb.GetMemoryRequest(name="memories/here"))
        )
    assert (answer.code, answer.reason) == ("INTERNAL", "INTERNAL_FAULT")
    assert "wrote" not in answer.message
    (record,) = [r for r in caplog.records if getattr(r, "incident", "")]
    assert record.__dict__["incident"] == answer.metadata["incident"]
    for formatter in (JsonFormatter(), TextFormatter()):
        line = formatter.format(record)
        assert "RuntimeError" in line
        assert answer.metadata["incident"] in line
        assert "wrote" not in line
        assert "\n" not in line


async def test_calls_are_logged_by_outcome_and_without_content(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    memory = await served.create("spoken")
    with caplog.at_level(logging.DEBUG, "memsvc"):
        await served.append(memory.name, "a private matter")
        await refused(served.append(memory.name, "another \x07"))
        watching = served.as_operator(
            served.memories.WatchMemory, pb.WatchMemoryRequest(name=memory.name)
        )
        await watching.read()
        watching.cancel()
        await inside(served, 0)
    calls = [r.__dict__ for r in caplog.records if r.message == "call"]
    assert [(c["method"].rsplit("/")[-1], c["outcome"]) for c in calls] == [
        ("AppendTurns", "OK"),
        ("AppendTurns", "TEXT_NOT_CLEAN"),
        ("WatchMemory", "LEFT"),
    ]
    lines = "\n".join(JsonFormatter().format(record) for record in caplog.records)
    ((_, credential),) = served.as_operator.metadata
    for secret in ("private", "another", credential):
        assert secret not in lines


def test_other_peoples_code_does_not_log_what_it_handles() -> None:
    names = ("memsvc", "storage", "sqlalchemy.engine", "asyncpg", "grpc")
    root = logging.getLogger()
    before = root.level, root.handlers[:], [logging.getLogger(n).level for n in names]
    try:
        configure_logging("debug", "json")
        levels = {name: logging.getLogger(name).getEffectiveLevel() for name in names}
    finally:
        root.setLevel(before[0])
        root.handlers[:] = before[1]
        for name, level in zip(names, before[2], strict=True):
            logging.getLogger(name).setLevel(level)
    assert levels.pop("memsvc") == levels.pop("storage") == logging.DEBUG
    assert set(levels.values()) == {logging.WARNING}


def test_log_lines_parse() -> None:
    record = logging.makeLogRecord(
        {"name": "memsvc.x", "levelname": "INFO", "msg": "said %s", "args": ('a "b"\n',), "n": 3}
    )
    line = json.loads(JsonFormatter().format(record))
    assert (line["message"], line["n"], line["logger"]) == ('said a "b"\n', 3, "memsvc.x")
    assert TextFormatter().format(record).endswith('memsvc.x "said a \\"b\\"\\n" n=3')


async def test_a_cancelled_call_leaves(served: Served) -> None:
    memory = await served.create("left")
    hanging = Hanging(served, memory.name)
    await inside(served, 1)
    hanging.call.cancel()
    await inside(served, 0)
    assert await served.texts(memory.name) == []


async def test_a_stream_whose_reader_leaves_ends_at_once(served: Served) -> None:
    memory = await served.create("watched")
    call = served.as_operator(served.memories.WatchMemory, pb.WatchMemoryRequest(name=memory.name))
    await call.read()
    progress = served.server.application.progress
    assert progress.subscribers == 1
    call.cancel()
    await inside(served, 0)
    assert progress.subscribers == 0


async def test_errors_decode(served: Served) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await served.as_operator(served.memories.GetMemory, pb.GetMemoryRequest())
    assert refusal(caught.value).message == "name is required"


async def in_line(served: Served, calls: int) -> None:
    """Returns when that many calls wait for their turn."""
    async with asyncio.timeout(5):
        while served.server.application.limiter.turns.waiting != calls:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.005)


async def test_a_write_whose_key_ends_while_it_waits_for_its_turn_is_refused(
    served: Served,
) -> None:
    memory = await served.create("kept")
    made = await served.as_operator(
        served.admin.CreateApiKey,
        admin.CreateApiKeyRequest(
            parent="tenants/default", api_key=admin.ApiKey(scope=admin.READ_WRITE)
        ),
    )
    line = served.server.application.limiter.turns
    (tenant,) = line._tenants
    async with contextlib.AsyncExitStack() as places:
        # All places that one tenant may have.
        for _ in range(7):
            await places.enter_async_context(line.turn(tenant))
        delete = pb.DeleteMemoryRequest(name=memory.name)
        late = asyncio.ensure_future(
            refused(Caller(made.secret)(served.memories.DeleteMemory, delete))
        )
        await in_line(served, 1)
        # As RevokeApiKey does, which would need a place of the tenant, too.
        key_id = made.api_key.name.rpartition("/")[2]
        served.server.application.authenticator.calls.end_key(key_id, 0)
    assert (await late).reason == "CREDENTIAL_INVALID"
    assert await served.as_operator(
        served.memories.GetMemory, pb.GetMemoryRequest(name=memory.name)
    )


async def test_calls_wait_for_a_place_and_are_all_served(start: Serve) -> None:
    async with start(concurrent_work=5) as served:
        memory = await served.create("busy")
        replies = await asyncio.gather(
            *(served.append(memory.name, f"turn {number}") for number in range(40))
        )
        assert sorted(reply.revision for reply in replies) == list(range(1, 41))


async def test_refusals_of_a_caller_that_heeds_none_come_slower(start: Serve) -> None:
    async with start(requests_per_minute=1) as served:
        held = served.server._gate._refusals
        for _ in range(100):
            held.delay_s("default")
        await served.create("only")
        late = asyncio.ensure_future(refused(served.create("another")))
        async with asyncio.timeout(5):
            while not held._held:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.005)
        assert not late.done()
        late.cancel()
        async with asyncio.timeout(5):
            while held._held:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.005)
