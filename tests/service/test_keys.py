"""Keys of some memories, rotation, and what ends when a key does."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from tests.support.cuts import cut_at_commit
from tests.support.served import Caller, Served, names_of, refused, turns

INVALID = ("UNAUTHENTICATED", "CREDENTIAL_INVALID")


async def make_key(
    served: Served, scope: admin.Scope.ValueType = admin.READ_WRITE, **fields: Any
) -> tuple[Caller, admin.ApiKey]:
    reply = await served.as_operator(
        served.admin.CreateApiKey,
        admin.CreateApiKeyRequest(
            parent="tenants/default", api_key=admin.ApiKey(scope=scope, **fields)
        ),
    )
    return Caller(reply.secret), reply.api_key


async def put(memory: str, text: str = "put") -> AsyncIterator[pb.PutDocumentsRequest]:
    kind = pb.PutDocumentsRequest
    yield kind(header=kind.Header(memory=memory))
    yield kind(document_start=kind.DocumentStart())
    yield kind(text=text)
    yield kind(end=kind.End(documents=1))


async def test_a_revoked_key_opens_nothing_also_when_who_revoked_it_left(served: Served) -> None:
    holder, key = await make_key(served)
    listing = served.memories.ListMemories, pb.ListMemoriesRequest()
    await holder(*listing)
    revoke = admin.RevokeApiKeyRequest(name=key.name)
    await cut_at_commit(
        served, "revoke_api_key", lambda: served.as_operator(served.admin.RevokeApiKey, revoke)
    )
    keys = await served.as_operator(
        served.admin.ListApiKeys, admin.ListApiKeysRequest(parent="tenants/default")
    )
    (shown,) = [one for one in keys.api_keys if one.name == key.name]
    assert shown.HasField("revoke_time")
    assert (await refused(holder(*listing))).reason == "CREDENTIAL_INVALID"


class TestSomeMemories:
    async def test_it_reaches_its_own(self, served: Served) -> None:
        mine = await served.create("mine")
        caller, key = await make_key(served, memories=[mine.name])
        assert key.memories == [mine.name]
        await caller(
            served.memories.AppendTurns, pb.AppendTurnsRequest(memory=mine.name, turns=turns("a"))
        )
        await caller(served.memories.PutDocuments, put(mine.name))
        assert await served.texts(mine.name) == ["a", "put"]
        await caller(
            served.memories.DeleteDocuments,
            pb.DeleteDocumentsRequest(parent=mine.name, names=[f"{mine.name}/documents/1"]),
        )
        updated = await caller(
            served.memories.UpdateMemory,
            pb.UpdateMemoryRequest(memory=resources.Memory(name=mine.name, display_name="M")),
        )
        assert updated.display_name == "M"
        await caller(served.memories.DeleteMemory, pb.DeleteMemoryRequest(name=mine.name))

    async def test_every_other_one_answers_as_a_missing_one(self, served: Served) -> None:
        mine, other = await served.create("mine"), await served.create("other")
        await served.append(other.name, "private", request_id="r1")
        caller, _ = await make_key(served, memories=[mine.name])

        def calls(name: str) -> list[Any]:
            memories, document = served.memories, f"{name}/documents/1"
            wanted = resources.Memory(name=name, display_name="x")
            return [
                caller(memories.GetMemory, pb.GetMemoryRequest(name=name)),
                caller(memories.UpdateMemory, pb.UpdateMemoryRequest(memory=wanted)),
                caller(memories.DeleteMemory, pb.DeleteMemoryRequest(name=name)),
                caller(
                    memories.AppendTurns, pb.AppendTurnsRequest(memory=name, turns=turns("private"))
                ),
                # The very call that was made before, whose reply is remembered.
                caller(
                    memories.AppendTurns,
                    pb.AppendTurnsRequest(memory=name, turns=turns("private"), request_id="r1"),
                ),
                caller(memories.PutDocuments, put(name)),
                caller(memories.ListDocuments, pb.ListDocumentsRequest(parent=name)),
                caller(memories.GetDocument, pb.GetDocumentRequest(name=document)),
                caller(
                    memories.DeleteDocuments,
                    pb.DeleteDocumentsRequest(parent=name, names=[document]),
                ),
                caller(memories.Query, pb.QueryRequest(memory=name, question="what?")),
                caller(memories.Retrieve, pb.RetrieveRequest(memory=name, question="what?")),
                caller(memories.WatchMemory, pb.WatchMemoryRequest(name=name)),
                caller(memories.ExportMemory, pb.ExportMemoryRequest(name=name)),
            ]

        for existing, missing in zip(calls(other.name), calls("memories/absent"), strict=True):
            answer = await refused(existing)
            assert answer == await refused(missing)
            assert answer.reason == "MEMORY_NOT_FOUND"
        assert await served.texts(other.name) == ["private"]
        await caller(
            served.memories.DeleteMemory,
            pb.DeleteMemoryRequest(name=other.name, allow_missing=True),
        )
        assert await served.texts(other.name) == ["private"]

    async def test_it_lists_its_own_page_by_page(self, served: Served) -> None:
        made = [(await served.create(f"memory-{index}")).name for index in range(5)]
        wanted = [made[0], made[2], made[4]]
        caller, _ = await make_key(served, admin.READ, memories=wanted)
        first = await caller(served.memories.ListMemories, pb.ListMemoriesRequest(page_size=2))
        token = pb.ListMemoriesRequest(page_size=2, page_token=first.next_page_token)
        second = await caller(served.memories.ListMemories, token)
        assert names_of(first.memories) + names_of(second.memories) == wanted[::-1]
        # A page token of one listing is none of another one's.
        assert (await refused(served.as_operator(served.memories.ListMemories, token))).reason == (
            "PAGE_TOKEN_INVALID"
        )

    async def test_it_makes_no_memories(self, served: Served) -> None:
        mine = await served.create("mine")
        caller, _ = await make_key(served, memories=[mine.name])

        async def archive() -> AsyncIterator[pb.ImportMemoryRequest]:
            yield pb.ImportMemoryRequest(header=pb.ImportMemoryRequest.Header())

        for call in (
            caller(served.memories.CreateMemory, pb.CreateMemoryRequest()),
            caller(served.memories.ImportMemory, archive()),
        ):
            answer = await refused(call)
            assert (answer.code, answer.reason) == ("PERMISSION_DENIED", "SCOPE_INSUFFICIENT")
            assert answer.metadata == {"scope": "ALL_MEMORIES"}

    async def test_a_later_memory_of_the_name_is_another_one(self, served: Served) -> None:
        mine = await served.create("mine")
        caller, _ = await make_key(served, memories=[mine.name])
        await served.as_operator(
            served.memories.DeleteMemory, pb.DeleteMemoryRequest(name=mine.name)
        )
        await served.create("mine")
        await served.append(mine.name, "of somebody else")
        for call in (
            caller(served.memories.GetMemory, pb.GetMemoryRequest(name=mine.name)),
            caller(
                served.memories.AppendTurns,
                pb.AppendTurnsRequest(memory=mine.name, turns=turns("x")),
            ),
        ):
            assert (await refused(call)).reason == "MEMORY_NOT_FOUND"
        page = await caller(served.memories.ListMemories, pb.ListMemoriesRequest())
        assert not page.memories

    async def test_request_ids_are_those_of_the_memory(self, served: Served) -> None:
        mine, other = await served.create("mine"), await served.create("other")
        await served.append(other.name, "private", request_id="r1")
        caller, _ = await make_key(served, memories=[mine.name])
        append = pb.AppendTurnsRequest(memory=mine.name, turns=turns("x"), request_id="r1")
        first = await caller(served.memories.AppendTurns, append)
        assert await caller(served.memories.AppendTurns, append) == first
        assert await served.texts(mine.name) == ["x"]
        append.turns[0].text = "y"
        answer = await refused(caller(served.memories.AppendTurns, append))
        assert answer.reason == "REQUEST_ID_REUSED"

    @pytest.mark.parametrize(
        ("scope", "memories", "reason", "field"),
        [
            (admin.ADMIN, ["memories/mine"], "FIELD_INVALID", "api_key.memories"),
            (admin.READ, ["mine"], "FIELD_INVALID", "api_key.memories[0]"),
            (admin.READ, ["memories/mine"] * 2, "FIELD_INVALID", "api_key.memories[1]"),
            (
                admin.READ,
                ["memories/mine", "memories/absent"],
                "MEMORY_NOT_FOUND",
                "api_key.memories[1]",
            ),
            (
                admin.READ,
                [f"memories/m{i:03}" for i in range(101)],
                "TOO_MANY_ITEMS",
                "api_key.memories",
            ),
        ],
    )
    async def test_bad_lists(
        self,
        served: Served,
        scope: admin.Scope.ValueType,
        memories: list[str],
        reason: str,
        field: str,
    ) -> None:
        await served.create("mine")
        answer = await refused(make_key(served, scope, memories=memories))
        assert (answer.reason, answer.field) == (reason, field)


async def rotated(served: Served, name: str, **fields: Any) -> admin.RotateApiKeyResponse:
    reply: admin.RotateApiKeyResponse = await served.as_operator(
        served.admin.RotateApiKey, admin.RotateApiKeyRequest(name=name, **fields)
    )
    return reply


class TestRotation:
    async def test_both_keys_work_until_the_grace_ends(
        self, served: Served, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mine = await served.create("mine")
        old, key = await make_key(served, admin.READ, memories=[mine.name], display_name="phone")
        reply = await rotated(served, key.name, grace=Duration(seconds=60))
        new = Caller(reply.secret)
        assert reply.api_key.name != key.name
        assert (reply.api_key.scope, reply.api_key.display_name) == (admin.READ, "phone")
        assert reply.api_key.memories == key.memories
        assert reply.previous.name == key.name
        grace = reply.previous.revoke_time.ToMicroseconds() / 1e6 - time.time()
        assert 30 < grace <= 60
        for caller in (old, new):
            await caller(served.memories.GetMemory, pb.GetMemoryRequest(name=mine.name))
        authenticator = served.server.application.authenticator
        monkeypatch.setattr(authenticator, "_clock", lambda: time.time() + 61)
        answer = await refused(old(served.memories.GetMemory, pb.GetMemoryRequest(name=mine.name)))
        assert (answer.code, answer.reason) == INVALID
        await new(served.memories.GetMemory, pb.GetMemoryRequest(name=mine.name))

    async def test_unset_the_grace_is_a_day_and_zero_is_none(self, served: Served) -> None:
        old, key = await make_key(served)
        reply = await rotated(served, key.name)
        grace = reply.previous.revoke_time.ToMicroseconds() / 1e6 - time.time()
        assert 86_300 < grace <= 86_400
        await old(served.memories.ListMemories, pb.ListMemoriesRequest())
        await rotated(served, key.name, grace=Duration())
        answer = await refused(old(served.memories.ListMemories, pb.ListMemoriesRequest()))
        assert (answer.code, answer.reason) == INVALID
        again = await refused(rotated(served, key.name))
        assert (again.code, again.reason) == ("FAILED_PRECONDITION", "API_KEY_NOT_ACTIVE")

    async def test_a_key_may_rotate_itself(self, served: Served) -> None:
        caller, key = await make_key(served, admin.ADMIN)
        request = admin.RotateApiKeyRequest(name=key.name, grace=Duration())
        reply = await caller(served.admin.RotateApiKey, request)
        assert (await refused(caller(served.admin.RotateApiKey, request))).reason == INVALID[1]
        await Caller(reply.secret)(served.admin.ListTenants, admin.ListTenantsRequest())

    async def test_the_operators_key_is_the_operators_alone(self, served: Served) -> None:
        page = await served.as_operator(
            served.admin.ListApiKeys, admin.ListApiKeysRequest(parent="tenants/default")
        )
        (operator,) = [key for key in page.api_keys if key.operator]
        caller, key = await make_key(served, admin.ADMIN)
        assert not key.operator
        for call in (
            caller(served.admin.RotateApiKey, admin.RotateApiKeyRequest(name=operator.name)),
            caller(served.admin.RevokeApiKey, admin.RevokeApiKeyRequest(name=operator.name)),
        ):
            answer = await refused(call)
            assert (answer.code, answer.metadata) == ("PERMISSION_DENIED", {"scope": "operator"})
        reply = await rotated(served, operator.name, grace=Duration(seconds=60))
        assert reply.api_key.operator
        await Caller(reply.secret)(
            served.admin.CreateTenant, admin.CreateTenantRequest(tenant_id="more")
        )

    @pytest.mark.parametrize(
        ("fields", "reason", "field"),
        [
            ({"grace": Duration(seconds=-1)}, "FIELD_INVALID", "grace"),
            ({"grace": Duration(nanos=-1)}, "FIELD_INVALID", "grace"),
            ({"grace": Duration(nanos=1_000_000_000)}, "FIELD_INVALID", "grace"),
            ({"grace": Duration(seconds=30 * 86_400, nanos=1)}, "FIELD_INVALID", "grace"),
            ({"expire_time": Timestamp(seconds=1)}, "FIELD_INVALID", "expire_time"),
            ({"name": "tenants/default/apiKeys/" + "0" * 16}, "API_KEY_NOT_FOUND", "name"),
            ({"name": "tenants/none/apiKeys/" + "0" * 16}, "TENANT_NOT_FOUND", "name"),
        ],
    )
    async def test_bad_calls(
        self, served: Served, fields: dict[str, Any], reason: str, field: str
    ) -> None:
        _, key = await make_key(served)
        answer = await refused(rotated(served, **{"name": key.name, **fields}))
        assert (answer.reason, answer.field) == (reason, field)
