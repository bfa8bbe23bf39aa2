"""What a key has open ends when the key does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from tests.service.test_keys import INVALID, make_key, rotated
from tests.support.served import Caller, Served, refused


async def open_put(memory: str, sent: asyncio.Event) -> AsyncIterator[pb.PutDocumentsRequest]:
    """A stream whose client has more to say and never says it."""
    yield pb.PutDocumentsRequest(header=pb.PutDocumentsRequest.Header(memory=memory))
    sent.set()
    await asyncio.Event().wait()


def watching(served: Served, caller: Caller, memory: str) -> AsyncIterator[Any]:
    replies: AsyncIterator[Any] = aiter(
        caller(served.memories.WatchMemory, pb.WatchMemoryRequest(name=memory))
    )
    return replies


async def refused_soon(call: Any) -> tuple[str, str]:
    async with asyncio.timeout(5):
        answer = await refused(call)
    assert answer.retry_s is None
    return answer.code, answer.reason


class TestOpenStreams:
    async def test_revoking_ends_a_watch_and_a_put(self, served: Served) -> None:
        memory = await served.create("watched")
        caller, key = await make_key(served)
        other, _ = await make_key(served)
        watch = watching(served, caller, memory.name)
        kept = watching(served, other, memory.name)
        sent = asyncio.Event()
        upload = caller(served.memories.PutDocuments, open_put(memory.name, sent))
        await anext(watch)
        await anext(kept)
        await sent.wait()
        await served.as_operator(
            served.admin.RevokeApiKey, admin.RevokeApiKeyRequest(name=key.name)
        )
        assert await refused_soon(watch) == INVALID
        assert await refused_soon(upload) == INVALID
        # Another key's stream goes on, and the server counts nobody twice.
        await served.append(memory.name, "news")
        async with asyncio.timeout(5):
            assert (await anext(kept)).revision == 1
        assert await served.texts(memory.name) == ["news"]

    async def test_a_stream_ends_when_its_key_expires(self, served: Served) -> None:
        memory = await served.create("watched")
        soon = Timestamp()
        soon.FromMicroseconds(round((time.time() + 1) * 1e6))
        caller, _ = await make_key(served, admin.READ, expire_time=soon)
        watch = watching(served, caller, memory.name)
        await anext(watch)
        assert await refused_soon(watch) == INVALID

    async def test_a_stream_ends_with_the_grace_of_its_key(self, served: Served) -> None:
        memory = await served.create("watched")
        caller, key = await make_key(served, admin.READ)
        watch = watching(served, caller, memory.name)
        await anext(watch)
        await rotated(served, key.name, grace=Duration(nanos=300_000_000))
        await served.append(memory.name, "still heard")
        assert (await anext(watch)).revision == 1
        assert await refused_soon(watch) == INVALID

    async def test_deleting_a_tenant_ends_its_streams(self, served: Served) -> None:
        await served.as_operator(
            served.admin.CreateTenant, admin.CreateTenantRequest(tenant_id="doomed")
        )
        reply = await served.as_operator(
            served.admin.CreateApiKey,
            admin.CreateApiKeyRequest(
                parent="tenants/doomed", api_key=admin.ApiKey(scope=admin.READ_WRITE)
            ),
        )
        caller = Caller(reply.secret)
        memory = await caller(served.memories.CreateMemory, pb.CreateMemoryRequest())
        watch = watching(served, caller, memory.name)
        await anext(watch)
        await served.as_operator(
            served.admin.DeleteTenant, admin.DeleteTenantRequest(name="tenants/doomed")
        )
        assert await refused_soon(watch) == INVALID

    async def test_a_question_that_waits_ends_with_its_key(self, served: Served) -> None:
        memory = await served.create("asked")
        await served.append(memory.name, "waits for a worker that never comes")
        caller, key = await make_key(served, admin.READ)
        asking = [
            caller(served.memories.Retrieve, pb.RetrieveRequest(memory=memory.name, question="?")),
            caller(served.memories.Query, pb.QueryRequest(memory=memory.name, question="?")),
        ]
        async with asyncio.timeout(5):
            while served.server._gate.calls != len(asking):  # noqa: ASYNC110 - no event for it
                await asyncio.sleep(0.005)
        await served.as_operator(
            served.admin.RevokeApiKey, admin.RevokeApiKeyRequest(name=key.name)
        )
        for call in asking:
            assert await refused_soon(call) == INVALID
        assert served.server._gate.calls == 0

    async def test_a_revocation_during_authentication_is_not_missed(
        self, served: Served, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        catalog = served.server.application.catalog
        caller, key = await make_key(served, admin.READ)
        memory = await served.create("watched")
        find = catalog.find_api_key
        looked, go_on = asyncio.Event(), asyncio.Event()

        async def slow(key_id: str, tenant_uid: str | None = None) -> Any:
            row = await find(key_id, tenant_uid)
            if key.name.endswith(key_id) and not looked.is_set():
                looked.set()
                await go_on.wait()
            return row

        monkeypatch.setattr(catalog, "find_api_key", slow)
        watch = watching(served, caller, memory.name)
        ending = asyncio.ensure_future(refused_soon(watch))
        await looked.wait()
        await served.as_operator(
            served.admin.RevokeApiKey, admin.RevokeApiKeyRequest(name=key.name)
        )
        go_on.set()
        assert await ending == INVALID
