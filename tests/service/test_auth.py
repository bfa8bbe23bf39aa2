from __future__ import annotations

from pathlib import Path

import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from memsvc.auth import SCOPES, ServerKey, ServerKeyError, load_server_key, make_server_key
from memsvc.limits import Attempts
from memsvc.limits.attempts import address
from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from memsvc.wire import METHODS
from storage.catalog import Scope
from tests.support.served import Caller, Serve, Served, refused, turns

READS = {
    "GetMemory",
    "ListMemories",
    "ListDocuments",
    "ListRevisions",
    "GetDocument",
    "Query",
    "Retrieve",
    "WatchMemory",
    "ExportMemory",
    "ListModels",
}


def test_every_call_has_a_scope() -> None:
    assert set(SCOPES) == set(METHODS)
    for path, scope in SCOPES.items():
        _, service, call = path.split("/")
        if service.endswith(("AdminService", "WorkerRegistryService")):
            assert scope is Scope.ADMIN
        else:
            assert scope is (Scope.READ if call in READS else Scope.READ_WRITE)


async def make_key(
    served: Served, scope: admin.Scope.ValueType, tenant: str = "default", **fields: object
) -> tuple[Caller, admin.ApiKey]:
    reply = await served.as_operator(
        served.admin.CreateApiKey,
        admin.CreateApiKeyRequest(
            parent=f"tenants/{tenant}",
            api_key=admin.ApiKey(scope=scope, **fields),  # type: ignore[arg-type]  # by name
        ),
    )
    return Caller(reply.secret), reply.api_key


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer "),),
        (("authorization", "Bearer nonsense"),),
        (("authorization", "Basic dXNlcjpwYXNz"),),
        (("authorization", "Bearer msk_0123456789abcdef_" + "0" * 64),),
        (("authorization-bin", b"\xff\xfe"),),
    ],
)
async def test_without_a_valid_key_no_call_is_served(served: Served, metadata: object) -> None:
    for method, request in (
        (served.memories.GetMemory, pb.GetMemoryRequest(name="memories/any1")),
        (served.memories.WatchMemory, pb.WatchMemoryRequest(name="memories/any1")),
        (served.admin.ListTenants, admin.ListTenantsRequest()),
    ):
        refusal = await refused(method(request, metadata=metadata))
        assert (refusal.code, refusal.reason) == ("UNAUTHENTICATED", "CREDENTIAL_INVALID")
        assert refusal.retry_s is None


async def test_two_credentials_are_none(served: Served) -> None:
    doubled = served.as_operator.metadata * 2
    refusal = await refused(
        served.memories.ListMemories(pb.ListMemoriesRequest(), metadata=doubled)
    )
    assert refusal.reason == "CREDENTIAL_INVALID"


async def test_a_right_key_id_with_a_wrong_secret_is_refused(served: Served) -> None:
    ((_, value),) = served.as_operator.metadata
    wrong = value[:-1] + ("0" if value[-1] != "0" else "1")
    refusal = await refused(
        served.memories.ListMemories(pb.ListMemoriesRequest(), metadata=(("authorization", wrong),))
    )
    assert refusal.reason == "CREDENTIAL_INVALID"


WRONG = (("authorization", "Bearer msk_0123456789abcdef_" + "0" * 64),)


async def test_failed_credentials_of_one_address_are_bounded(start: Serve) -> None:
    async with start(failed_credentials_per_minute=3) as served:
        asked = pb.ListMemoriesRequest()
        await served.as_operator(served.memories.ListMemories, asked)
        unseen, _ = await make_key(served, admin.READ)
        for _ in range(3):
            refusal = await refused(served.memories.ListMemories(asked, metadata=WRONG))
            assert refusal.reason == "CREDENTIAL_INVALID"
        for metadata in (WRONG, unseen.metadata, ()):
            refusal = await refused(served.memories.ListMemories(asked, metadata=metadata))
            assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "CREDENTIAL_ATTEMPTS")
            assert refusal.metadata == {"limit": "failed_credentials_per_minute"}
            assert refusal.retry_s is not None
            assert 0 < refusal.retry_s <= 20
        # Who was here before is not locked out by who shares the address.
        await served.as_operator(served.memories.ListMemories, asked)
        clock = served.server.application.authenticator._attempts._clock
        later = clock() + 60
        served.server.application.authenticator._attempts._clock = lambda: later
        await unseen(served.memories.ListMemories, asked)


def test_an_address_is_a_peer_without_its_port() -> None:
    assert address("ipv4:127.0.0.1:50000") == "ipv4:127.0.0.1"
    assert address("ipv6:%5B::1%5D:50000") == "ipv6:%5B::1%5D"
    assert address("unix:") == "unix:"
    attempts = Attempts(1)
    attempts.failed("ipv4:127.0.0.1:1")
    assert attempts.wait_s("ipv4:127.0.0.1:2") > 0
    assert attempts.wait_s("ipv4:127.0.0.2:1") == 0


async def test_scopes(served: Served) -> None:
    memory = await served.create("scoped")
    append = pb.AppendTurnsRequest(memory=memory.name, turns=turns("x"))
    reader, _ = await make_key(served, admin.READ)
    await reader(served.memories.GetMemory, pb.GetMemoryRequest(name=memory.name))
    for method, request in (
        (served.memories.AppendTurns, append),
        (served.memories.CreateMemory, pb.CreateMemoryRequest()),
        (served.memories.DeleteMemory, pb.DeleteMemoryRequest(name=memory.name)),
        (served.memories.UpdateMemory, pb.UpdateMemoryRequest(memory=memory)),
        (served.memories.DeleteDocuments, pb.DeleteDocumentsRequest(parent=memory.name)),
    ):
        refusal = await refused(reader(method, request))
        assert (refusal.code, refusal.reason) == ("PERMISSION_DENIED", "SCOPE_INSUFFICIENT")
        assert refusal.metadata == {"scope": "READ_WRITE"}
    writer, _ = await make_key(served, admin.READ_WRITE)
    await writer(served.memories.AppendTurns, append)
    refusal = await refused(writer(served.admin.ListTenants, admin.ListTenantsRequest()))
    assert refusal.metadata == {"scope": "ADMIN"}


async def test_revoking_is_immediate_and_may_be_repeated(served: Served) -> None:
    caller, key = await make_key(served, admin.READ)
    await caller(served.memories.ListMemories, pb.ListMemoriesRequest())
    for _ in range(2):
        revoked = await served.as_operator(
            served.admin.RevokeApiKey, admin.RevokeApiKeyRequest(name=key.name)
        )
        assert revoked.HasField("revoke_time")
        refusal = await refused(caller(served.memories.ListMemories, pb.ListMemoriesRequest()))
        assert refusal.reason == "CREDENTIAL_INVALID"


async def test_a_key_expires(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from google.protobuf.timestamp_pb2 import Timestamp

    soon = Timestamp(seconds=int(time.time()) + 60)
    caller, _ = await make_key(served, admin.READ, expire_time=soon)
    await caller(served.memories.ListMemories, pb.ListMemoriesRequest())
    authenticator = served.server.application.authenticator
    monkeypatch.setattr(authenticator, "_clock", lambda: time.time() + 61)
    refusal = await refused(caller(served.memories.ListMemories, pb.ListMemoriesRequest()))
    assert refusal.reason == "CREDENTIAL_INVALID"
    await served.as_operator(served.memories.ListMemories, pb.ListMemoriesRequest())


async def test_another_tenants_memory_answers_as_a_missing_one(served: Served) -> None:
    await served.as_operator(
        served.admin.CreateTenant, admin.CreateTenantRequest(tenant_id="other")
    )
    stranger, _ = await make_key(served, admin.READ_WRITE, "other")
    memory = await served.create("private")
    await served.append(memory.name, "mine")
    mine, absent = f"{memory.name}/documents/1", "memories/absent/documents/1"
    for method, ours, missing in (
        (
            served.memories.GetMemory,
            pb.GetMemoryRequest(name=memory.name),
            pb.GetMemoryRequest(name="memories/absent"),
        ),
        (
            served.memories.GetDocument,
            pb.GetDocumentRequest(name=mine),
            pb.GetDocumentRequest(name=absent),
        ),
        (
            served.memories.ListDocuments,
            pb.ListDocumentsRequest(parent=memory.name),
            pb.ListDocumentsRequest(parent="memories/absent"),
        ),
        (
            served.memories.AppendTurns,
            pb.AppendTurnsRequest(memory=memory.name, turns=turns("x")),
            pb.AppendTurnsRequest(memory="memories/absent", turns=turns("x")),
        ),
        (
            served.memories.DeleteMemory,
            pb.DeleteMemoryRequest(name=memory.name),
            pb.DeleteMemoryRequest(name="memories/absent"),
        ),
        (
            served.memories.UpdateMemory,
            pb.UpdateMemoryRequest(memory=resources.Memory(name=memory.name)),
            pb.UpdateMemoryRequest(memory=resources.Memory(name="memories/absent")),
        ),
    ):
        answer = await refused(stranger(method, ours))
        assert answer == await refused(stranger(method, missing))
        assert answer.reason == "MEMORY_NOT_FOUND"
    page = await stranger(served.memories.ListMemories, pb.ListMemoriesRequest())
    assert not page.memories
    assert await served.texts(memory.name) == ["mine"]
    # The name is free in the other tenant, and so is the request id.
    again = await stranger(
        served.memories.CreateMemory, pb.CreateMemoryRequest(memory_id="private")
    )
    assert again.uid != memory.uid


async def test_a_page_token_is_good_for_its_tenant_only(served: Served) -> None:
    await served.as_operator(
        served.admin.CreateTenant, admin.CreateTenantRequest(tenant_id="other")
    )
    stranger, _ = await make_key(served, admin.READ, "other")
    for name in ("one1", "two2"):
        await served.create(name)
    page = await served.as_operator(
        served.memories.ListMemories, pb.ListMemoriesRequest(page_size=1)
    )
    refusal = await refused(
        stranger(
            served.memories.ListMemories,
            pb.ListMemoriesRequest(page_token=page.next_page_token),
        )
    )
    assert refusal.reason == "PAGE_TOKEN_INVALID"


async def test_health_and_reflection_are_open(served: Served) -> None:
    health = health_pb2_grpc.HealthStub(served.channel)
    for service in ("", "memsvc.v1.MemoryService", "memsvc.v1.AdminService"):
        reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = stub.ServerReflectionInfo()
    await call.write(request)
    await call.done_writing()
    listed = await call.read()
    assert listed is not aio.EOF
    assert {s.name for s in listed.list_services_response.service} >= {
        "memsvc.v1.MemoryService",
        "memsvc.v1.AdminService",
        "grpc.health.v1.Health",
    }


def test_the_server_key_file(tmp_path: Path) -> None:
    path = tmp_path / "server.key"
    with pytest.raises(ServerKeyError, match="memsvc init"):
        load_server_key(path)
    key = make_server_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert make_server_key(path) == key
    assert key.derive("api keys") != key.derive("page tokens")
    path.chmod(0o640)
    with pytest.raises(ServerKeyError, match="0600"):
        load_server_key(path)
    path.chmod(0o600)
    for content in ("", "zz", "00" * 16):
        path.write_text(content)
        with pytest.raises(ServerKeyError):
            load_server_key(path)
    assert ServerKey(bytes(32)).derive("a") != ServerKey(bytes(31) + b"\1").derive("a")


async def test_no_credential_is_stored(served: Served) -> None:
    ((_, value),) = served.as_operator.metadata
    secret = value.rsplit("_", 1)[1]
    await served.create("some")
    for path in served.server.application.data.root.rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path
