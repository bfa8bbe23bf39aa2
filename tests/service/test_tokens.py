"""JSON web tokens as credentials, with a real issuer's keys."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from grpc import aio

from memsvc.config import load_config
from memsvc.server import ServerStartError, open_server
from memsvc.settings import ConfigError
from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from tests.support.served import Caller, Folder, Serve, Served, names_of, refused, turns
from tests.support.tokens import AUDIENCE, ISSUER, Issuer

INVALID = ("UNAUTHENTICATED", "CREDENTIAL_INVALID")


@pytest.fixture
def issuer(tmp_path: Path) -> Issuer:
    made = Issuer(tmp_path / "jwks.json")
    made.add("k1")
    made.publish()
    return made


def settings(issuer: Issuer) -> dict[str, object]:
    return {
        "jwt_issuer": ISSUER,
        "jwt_audience": AUDIENCE,
        "jwt_jwks_file": str(issuer.file),
    }


@pytest.fixture
async def tokens(start: Serve, issuer: Issuer) -> AsyncIterator[Served]:
    async with start(**settings(issuer)) as served:
        yield served


async def lists(served: Served, token: str) -> list[str]:
    page = await Caller(token)(served.memories.ListMemories, pb.ListMemoriesRequest())
    return names_of(page.memories)


async def is_refused(served: Served, token: str) -> None:
    answer = await refused(lists(served, token))
    assert (answer.code, answer.reason) == INVALID


@pytest.mark.parametrize("algorithm", ["ES256", "RS256", "PS512", "EdDSA"])
async def test_a_sound_token_is_its_tenant(start: Serve, issuer: Issuer, algorithm: str) -> None:
    issuer.add("more", algorithm)
    issuer.publish()
    async with start(**settings(issuer)) as served:
        await served.create("mine")
        for _ in range(2):
            assert await lists(served, issuer.token("more")) == ["memories/mine"]
        # API keys go on working beside tokens.
        assert (
            len(
                (
                    await served.as_operator(served.memories.ListMemories, pb.ListMemoriesRequest())
                ).memories
            )
            == 1
        )


async def test_scopes(tokens: Served, issuer: Issuer) -> None:
    reader = Caller(issuer.token("k1", memsvc_scope="read"))
    answer = await refused(reader(tokens.memories.CreateMemory, pb.CreateMemoryRequest()))
    assert answer.metadata == {"scope": "READ_WRITE"}
    writer = Caller(issuer.token("k1"))
    await writer(tokens.memories.CreateMemory, pb.CreateMemoryRequest())
    answer = await refused(writer(tokens.admin.ListTenants, admin.ListTenantsRequest()))
    assert answer.metadata == {"scope": "ADMIN"}
    manager = Caller(issuer.token("k1", memsvc_scope="admin", operator=True, memsvc_operator=True))
    listed = await manager(tokens.admin.ListTenants, admin.ListTenantsRequest())
    assert names_of(listed.tenants) == ["tenants/default"]
    # No token makes an operator.
    answer = await refused(
        manager(tokens.admin.CreateTenant, admin.CreateTenantRequest(tenant_id="more"))
    )
    assert answer.metadata == {"scope": "operator"}


async def test_some_memories(tokens: Served, issuer: Issuer) -> None:
    await tokens.create("mine")
    await tokens.create("other")
    token = issuer.token("k1", memsvc_memories=["memories/mine", "memories/absent"])
    assert await lists(tokens, token) == ["memories/mine"]
    answer = await refused(
        Caller(token)(tokens.memories.GetMemory, pb.GetMemoryRequest(name="memories/other"))
    )
    assert answer.reason == "MEMORY_NOT_FOUND"
    assert await lists(tokens, issuer.token("k1", memsvc_memories=[])) == []


def unsigned(payload: dict[str, Any], header: dict[str, Any], signature: bytes = b"") -> str:
    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).decode().rstrip("=")

    return ".".join(
        (part(json.dumps(header).encode()), part(json.dumps(payload).encode()), part(signature))
    )


def payload_of(token: str) -> dict[str, Any]:
    part = token.split(".")[1]
    loaded: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return loaded


def confused(issuer: Issuer) -> str:
    """Signed with HMAC and the public key, which everybody has, as its secret."""
    _, key = issuer._keys["k1"]
    secret = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    payload = payload_of(issuer.token("k1"))
    body = unsigned(payload, {"alg": "HS256", "typ": "JWT", "kid": "k1"}).rpartition(".")[0]
    mac = hmac.digest(secret, body.encode(), hashlib.sha256)
    return f"{body}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"


def stripped(issuer: Issuer, algorithm: str) -> str:
    return unsigned(payload_of(issuer.token("k1")), {"alg": algorithm, "kid": "k1"})


def renamed(issuer: Issuer, algorithm: str) -> str:
    """Signed by the right key, under the name of an algorithm that is not its own."""
    _, body, signature = issuer.token("k1").split(".")
    head = unsigned({}, {"alg": algorithm, "typ": "JWT", "kid": "k1"}).split(".")[0]
    return f"{head}.{body}.{signature}"


def altered(issuer: Issuer) -> str:
    head, body, signature = issuer.token("k1", memsvc_scope="read").split(".")
    payload = payload_of(f"{head}.{body}.{signature}") | {"memsvc_scope": "admin"}
    changed = unsigned(payload, {}).split(".")[1]
    return f"{head}.{changed}.{signature}"


def of_another(issuer: Issuer) -> str:
    """Signed with a key of its own that claims to be the published one."""
    other = Issuer(issuer.file.with_name("other.json"))
    other.add("k1")
    return other.token("k1")


FORGED: dict[str, Callable[[Issuer], str]] = {
    "no signature": lambda i: stripped(i, "none"),
    "no signature, shouted": lambda i: stripped(i, "NONE"),
    "a signature taken away": lambda i: stripped(i, "ES256"),
    "the public key as a secret": confused,
    "another algorithm named": lambda i: renamed(i, "ES384"),
    "an algorithm of another kind named": lambda i: renamed(i, "RS256"),
    "an altered payload": altered,
    "another key under the name": of_another,
    "an unknown key": lambda i: i.token("k1", header={"kid": "k2"}),
    "no key": lambda i: i.token("k1", header={"kid": ""}),
    "a key by address": lambda i: i.token("k1", header={"kid": "../../etc/passwd"}),
    "a critical extension": lambda i: i.token("k1", header={"crit": ["x"], "x": 1}),
    "another issuer": lambda i: i.token("k1", iss="https://other.example"),
    "an issuer of like beginning": lambda i: i.token("k1", iss=ISSUER + ".evil.example"),
    "no issuer": lambda i: i.token("k1", iss=None),
    "another audience": lambda i: i.token("k1", aud="other"),
    "no audience": lambda i: i.token("k1", aud=None),
    "no subject": lambda i: i.token("k1", sub=None),
    "no end": lambda i: i.token("k1", exp=None),
    "ended": lambda i: i.token("k1", exp=time.time() - 31),
    "an end too far": lambda i: i.token("k1", exp=time.time() + 2 * 86_400),
    "an end that is no number": lambda i: unsigned({"exp": "soon"}, {"alg": "ES256", "kid": "k1"}),
    "an end that is true": lambda i: i.token("k1", exp=True),
    "a beginning that lies ahead": lambda i: i.token("k1", nbf=time.time() + 60),
    "a beginning that is no number": lambda i: i.token("k1", nbf="later"),
    "no tenant": lambda i: i.token("k1", memsvc_tenant=None),
    "an unknown tenant": lambda i: i.token("k1", memsvc_tenant="absent"),
    "several tenants": lambda i: i.token("k1", memsvc_tenant=["default"]),
    "no scope": lambda i: i.token("k1", memsvc_scope=None),
    "an unknown scope": lambda i: i.token("k1", memsvc_scope="operator"),
    "scopes": lambda i: i.token("k1", memsvc_scope=["admin"]),
    "memories as one text": lambda i: i.token("k1", memsvc_memories="memories/mine"),
    "memories in another form": lambda i: i.token("k1", memsvc_memories=["mine"]),
    "an admin of some memories": lambda i: i.token(
        "k1", memsvc_scope="admin", memsvc_memories=["memories/mine"]
    ),
    "too long": lambda i: i.token("k1", padding="x" * 8192),
    "two parts": lambda i: i.token("k1").rpartition(".")[0],
    "nonsense": lambda i: "a.b.c",
}


async def test_forged_tokens_open_nothing(tokens: Served, issuer: Issuer) -> None:
    opened: list[str] = []
    for name, make in FORGED.items():
        try:
            await is_refused(tokens, make(issuer))
        except pytest.fail.Exception:
            opened.append(name)
    assert opened == []
    assert await lists(tokens, issuer.token("k1")) == []


async def test_a_clock_may_be_off_by_the_leeway(tokens: Served, issuer: Issuer) -> None:
    await lists(tokens, issuer.token("k1", exp=time.time() - 20, nbf=time.time() - 100))
    await lists(tokens, issuer.token("k1", nbf=time.time() + 20))


async def test_keys_change_with_their_file(tokens: Served, issuer: Issuer) -> None:
    old = issuer.token("k1")
    await lists(tokens, old)
    issuer.add("k2", "RS256")
    issuer.publish()
    # A key that is not known yet makes the server look at once.
    await lists(tokens, issuer.token("k2"))
    await lists(tokens, old)
    issuer.drop("k1")
    issuer.publish()
    async with asyncio.timeout(10):
        while True:
            try:
                await lists(tokens, old)
            except aio.AioRpcError:
                break
            await asyncio.sleep(0.1)
    await is_refused(tokens, old)
    kept = issuer.token("k2")
    # A file that cannot be used leaves the keys as they were.
    issuer.file.write_text("{")
    await asyncio.sleep(1.1)
    await lists(tokens, kept)


async def test_a_stream_ends_with_its_token(tokens: Served, issuer: Issuer) -> None:
    memory = await tokens.create("watched")
    token = issuer.token("k1", exp=time.time() - 29)
    events = aiter(
        Caller(token)(tokens.memories.WatchMemory, pb.WatchMemoryRequest(name=memory.name))
    )
    await anext(events)
    async with asyncio.timeout(5):
        answer = await refused(events)
    assert (answer.code, answer.reason) == INVALID
    await is_refused(tokens, token)


async def test_acts_are_written_down_under_the_subject(tokens: Served, issuer: Issuer) -> None:
    for subject, actor in (
        ("anna@example.org", "jwt:anna@example.org"),
        ("Anna said hello", "jwt:sha256:" + hashlib.sha256(b"Anna said hello").hexdigest()[:32]),
    ):
        memory = await tokens.create("doomed")
        caller = Caller(issuer.token("k1", sub=subject))
        await caller(
            tokens.memories.AppendTurns,
            pb.AppendTurnsRequest(memory=memory.name, turns=turns("x")),
        )
        await caller(tokens.memories.DeleteMemory, pb.DeleteMemoryRequest(name=memory.name))
        tenant = await tokens.server.application.catalog.get_tenant("default")
        rows, _ = await tokens.server.application.catalog.list_audit(tenant.uid, 1)
        assert rows[0].actor == actor


async def test_without_the_settings_no_token_is_taken(served: Served, issuer: Issuer) -> None:
    await is_refused(served, issuer.token("k1"))


@pytest.mark.parametrize(
    "keys",
    [
        '{"keys": []}',
        "[]",
        "nonsense",
        '{"keys": [{"kty": "oct", "kid": "k", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0"}]}',
        '{"keys": [{"kty": "RSA", "kid": "k"}]}',
    ],
)
async def test_a_file_of_unusable_keys_is_refused_at_the_start(
    folder: Folder, tmp_path: Path, issuer: Issuer, keys: str
) -> None:
    issuer.file.write_text(keys)
    config = folder.copy(tmp_path / "data", **settings(issuer))
    with pytest.raises(ServerStartError, match=r"jwks\.json"):
        async with open_server(config):
            pass


async def test_unnamed_and_doubled_keys_are_refused(
    folder: Folder, tmp_path: Path, issuer: Issuer
) -> None:
    key = issuer.public("k1")
    for keys in (
        [{**key, "kid": ""}],
        [key, key],
        [key, {**key, "kid": "k2", "alg": "ES256K"}],
        [{**key, "d": "AAAA"}],
        [{**key, "use": "enc"}],
        ["a text"],
    ):
        issuer.file.write_text(json.dumps({"keys": keys}))
        config = folder.copy(tmp_path / "data", **settings(issuer))
        with pytest.raises(ServerStartError, match=r"jwks\.json"):
            async with open_server(config):
                pass


async def test_keys_for_encryption_are_left_out(start: Serve, issuer: Issuer) -> None:
    enc = {**issuer.public("k1"), "kid": "enc", "use": "enc", "alg": "ECDH-ES"}
    issuer.file.write_text(json.dumps({"keys": [enc, issuer.public("k1")]}))
    async with start(**settings(issuer)) as served:
        assert await lists(served, issuer.token("k1")) == []
        await is_refused(served, issuer.token("k1", header={"kid": "enc"}))


@pytest.mark.parametrize("missing", ["jwt_issuer", "jwt_audience", "jwt_jwks_file"])
def test_the_settings_go_together(issuer: Issuer, missing: str) -> None:
    with pytest.raises(ConfigError, match="jwt_"):
        load_config({**settings(issuer), missing: ""})
