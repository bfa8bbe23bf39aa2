"""A server with a victim and an attacker, and what a call of it comes to."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import aio

from memsvc.principal import current_principal
from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from memsvc.wire import METHODS as METHODS_BY_PATH
from tests.isolation.requests import Own
from tests.support.catalogs import model_row
from tests.support.served import Caller, Folder, Served, serve, turns

METHODS: dict[str, MethodDescriptor] = {m.name: m for m in METHODS_BY_PATH.values()}

#: In everything that is the victim's and in nothing else.
CANARY = "Zanzibar-7741"
_MAX_REPLIES = 3
_TIMEOUT_S = 20.0
_TRIES = 5
#: What gRPC's client says by itself, without an answer, when a server refuses a stream that
#: it is still writing.
_CUT_OFF = ("INTERNAL", "Internal error from Core", b"")
_MADE = re.compile(r"memories/m-[0-9a-f]{16}|apiKeys/[0-9a-f]{16}|own-[0-9]+")
_RANDOM = {
    "uid",
    "forkedFromUid",
    "etag",
    "secret",
    "createTime",
    "updateTime",
    "revokeTime",
    "data",
    "totalBytes",
}


@dataclass(frozen=True)
class Outcome:
    """All that a caller can learn of a call, and the work it made.

    status: google.rpc.Status as sent. replies: as JSON, without what is random in
    every reply. work: calls of catalog and stores, in order.
    """

    code: str
    message: str
    status: bytes
    trailers: tuple[str, ...]
    replies: tuple[str, ...]
    work: tuple[str, ...]


@dataclass
class Someone:
    """A party with things of its own."""

    name: str
    tenant: str
    admin: Caller
    own: Own
    callers: dict[str, Caller] = field(default_factory=dict)


class World:
    """The server, both parties, and the calls."""

    def __init__(self, served: Served, victim: Someone, attacker: Someone, gone: str) -> None:
        self.served = served
        self.victim = victim
        self.attacker = attacker
        #: A memory of the victim's that was deleted.
        self.gone = gone
        self._numbers = itertools.count()
        self._work: list[str] = []
        self._watch_work()

    async def call(
        self, method: str, stream: list[Message], caller: Caller | None, hide: dict[str, str]
    ) -> Outcome:
        """hide: values to be replaced in replies, which name what was asked for."""
        for _ in range(_TRIES):
            outcome = await self._call(method, stream, caller, hide)
            if (outcome.code, outcome.message, outcome.status) != _CUT_OFF:
                break
        return outcome

    async def _call(
        self, method: str, stream: list[Message], caller: Caller | None, hide: dict[str, str]
    ) -> Outcome:
        self._work.clear()
        metadata = caller.metadata if caller is not None else ()
        replies: list[Any] = []
        try:
            async for reply in self._replies(METHODS[method], stream, metadata):
                replies.append(_shown(METHODS[method], reply, hide))
        except aio.AioRpcError as error:
            trailing = list(error.trailing_metadata() or ())
            status = b"".join(v for k, v in trailing if k == "grpc-status-details-bin")
            return Outcome(
                error.code().name,
                error.details() or "",
                status,
                tuple(sorted(key for key, _ in trailing)),
                tuple(replies),
                tuple(self._work),
            )
        return Outcome("OK", "", b"", (), tuple(replies), tuple(self._work))

    async def _replies(
        self, method: MethodDescriptor, stream: list[Message], metadata: Any
    ) -> AsyncIterator[bytes]:
        path = f"/{method.containing_service.full_name}/{method.name}"
        options: Any = {"timeout": _TIMEOUT_S, "metadata": metadata}
        channel: Any = self.served.channel  # Without serializers it takes and gives bytes.
        data = [message.SerializeToString() for message in stream]

        async def requests() -> AsyncIterator[bytes]:
            for one in data:
                yield one

        if method.client_streaming:
            yield await channel.stream_unary(path)(requests(), **options)
        elif method.server_streaming:
            call = channel.unary_stream(path)(data[0], **options)
            count = 0
            async for reply in call:
                yield reply
                count += 1
                if method.name == "WatchMemory" or count == _MAX_REPLIES:
                    call.cancel()
                    return
        else:
            yield await channel.unary_unary(path)(data[0], **options)

    async def fresh(self, someone: Someone) -> Own:
        """The same things with a new memory and a new key in the place of the shared ones."""
        memory = await make_memory(self.served, someone.admin, f"own-{next(self._numbers)}", "own")
        key = await make_key(self.served, someone.admin, someone.tenant, admin.READ)
        return replace(someone.own, memory=memory, key=key[1])

    async def belongings(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every row that is the victim's, and the texts of its documents."""
        catalog = self.served.server.application.catalog
        tenant = await catalog.get_tenant(self.victim.tenant.removeprefix("tenants/"))
        rows, _ = await catalog.list_memories(tenant.uid, 1000)
        keys, _ = await catalog.list_api_keys(tenant.uid, 1000)
        texts: list[tuple[Any, ...]] = []
        for row in rows:
            page = await self.victim.admin(
                self.served.memories.ListDocuments,
                pb.ListDocumentsRequest(parent=f"memories/{row.memory_id}", view=resources.FULL),
            )
            texts += [(row.memory_id, d.SerializeToString()) for d in page.documents]
        return {"memories": [(row,) for row in rows], "keys": [(k,) for k in keys], "texts": texts}

    def _watch_work(self) -> None:
        """Counts what the calls of the attacker make catalog and stores do."""
        application = self.served.server.application
        for part in (application.catalog, application.stores):
            for name, method in inspect.getmembers(part, inspect.iscoroutinefunction):
                if not name.startswith("_"):
                    setattr(part, name, self._counted(name, method))

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        async def run(*arguments: Any, **named: Any) -> Any:
            try:
                current_principal()
                self._work.append(name)
            except LookupError:
                if name == "find_api_key":
                    self._work.append(name)
            return await method(*arguments, **named)

        return run


def _shown(method: MethodDescriptor, data: bytes, hide: dict[str, str]) -> str:
    reply = GetMessageClass(method.output_type).FromString(data)
    shown = _cleaned(json_format.MessageToDict(reply), hide)
    return str(shown)


def _cleaned(value: Any, hide: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {k: "*" if k in _RANDOM else _cleaned(v, hide) for k, v in value.items()}
    if isinstance(value, list):
        return [_cleaned(item, hide) for item in value]
    if isinstance(value, str):
        for text, other in hide.items():
            value = value.replace(text, other)
        return _MADE.sub("<made>", value)
    return value


async def make_memory(
    served: Served, caller: Caller, memory_id: str, text: str, *, revisions: int = 1
) -> str:
    """A memory with two documents, named and filled with the text, of one or two writes."""
    wanted = resources.Memory(display_name=text, labels={"of": text})
    memory = await caller(
        served.memories.CreateMemory, pb.CreateMemoryRequest(memory_id=memory_id, memory=wanted)
    )
    texts = [text] * (2 // revisions)
    for _ in range(revisions):
        request = pb.AppendTurnsRequest(memory=memory.name, turns=turns(*texts))
        await caller(served.memories.AppendTurns, request)
    name: str = memory.name
    return name


async def make_key(
    served: Served,
    caller: Caller,
    tenant: str,
    scope: admin.Scope.ValueType,
    memories: list[str] | None = None,
) -> tuple[Caller, str]:
    """A key's holder, and the key's name."""
    request = admin.CreateApiKeyRequest(
        parent=tenant, api_key=admin.ApiKey(scope=scope, memories=memories or [])
    )
    reply = await caller(served.admin.CreateApiKey, request)
    return Caller(reply.secret), reply.api_key.name


async def export(served: Served, caller: Caller, memory: str) -> bytes:
    """A memory's archive."""
    call = caller(served.memories.ExportMemory, pb.ExportMemoryRequest(name=memory))
    return b"".join([part.data async for part in call])


async def _party(served: Served, name: str, text: str) -> Someone:
    tenant = await served.as_operator(
        served.admin.CreateTenant,
        admin.CreateTenantRequest(tenant_id=name, tenant=admin.Tenant(display_name=text)),
    )
    holder, _ = await make_key(served, served.as_operator, tenant.name, admin.ADMIN)
    memory = await make_memory(served, holder, f"{name}-memory", text, revisions=2)
    await make_memory(served, holder, "twin", text)
    _, key = await make_key(served, holder, tenant.name, admin.READ)
    archive = await export(served, holder, memory)
    receipt = await make_receipts(served, holder, tenant.name)
    return Someone(name, tenant.name, holder, Own(memory, tenant.name, key, archive, receipt))


async def make_receipts(served: Served, caller: Caller, tenant: str) -> str:
    """Two deletions of a tenant that has had none; the name of the newer one's receipt."""
    for number in range(2):
        name = await make_memory(served, caller, f"deleted-{number}", "deleted")
        await caller(served.memories.DeleteMemory, pb.DeleteMemoryRequest(name=name))
    request = admin.ListDeletionReceiptsRequest(parent=tenant)
    found = (await caller(served.admin.ListDeletionReceipts, request)).deletion_receipts
    newest: str = found[0].name
    return newest


@asynccontextmanager
async def make_world(folder: Folder, target: Path) -> AsyncIterator[World]:
    """Both parties and everyone who might attack, on a server without a worker."""
    async with serve(folder.copy(target), folder.credential) as served:
        catalog = served.server.application.catalog
        for number in range(2):
            row = model_row(f"model-{number}", identity=f"{number + 1}" * 64, default=not number)
            await catalog.upsert_model(row)
        victim = await _party(served, "victim", CANARY)
        attacker = await _party(served, "attacker", "own")
        gone = await make_memory(served, victim.admin, "gone", CANARY)
        await victim.admin(served.memories.DeleteMemory, pb.DeleteMemoryRequest(name=gone))
        await _add_callers(served, victim, attacker)
        yield World(served, victim, attacker, gone)


async def _add_callers(served: Served, victim: Someone, attacker: Someone) -> None:
    own = attacker.own.memory
    for name, scope, memories in (
        ("writer", admin.READ_WRITE, None),
        ("reader", admin.READ, None),
        ("limited", admin.READ_WRITE, [own]),
    ):
        made, _ = await make_key(served, attacker.admin, attacker.tenant, scope, memories)
        attacker.callers[name] = made
    # In the victim's own tenant, for another memory than the victim's.
    neighbour = await make_memory(served, victim.admin, "neighbour", "own")
    attacker.callers["neighbour"], _ = await make_key(
        served, victim.admin, victim.tenant, admin.READ_WRITE, [neighbour]
    )
    revoked, key = await make_key(served, victim.admin, victim.tenant, admin.ADMIN)
    await victim.admin(served.admin.RevokeApiKey, admin.RevokeApiKeyRequest(name=key))
    attacker.callers["revoked"] = revoked
    for caller in attacker.callers.values():
        # From now on the server knows the key: no call differs from another by looking it up.
        with suppress(aio.AioRpcError):
            await caller(served.memories.ListMemories, pb.ListMemoriesRequest())
