"""What users write, and what opens their data, appears in no log, error or metric.

A canary stands in every string of every request of every call, found by walking the
descriptors, so that a new field is covered as soon as it is there. The server and its
worker run as processes of their own with logging at DEBUG, through success, through
every kind of bad request, and through faults: a worker that is killed, a catalog that
breaks, records that are damaged.
"""

from __future__ import annotations

import base64
import contextlib
import random
import re
import sqlite3
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.timestamp_pb2 import Timestamp

from memsvc.client import ApiError, Client, Role, TextSource, Turn
from memsvc.v1 import resources_pb2
from memsvc.wire import METHODS as METHODS_BY_PATH
from tests.privacy.canaries import MARK, Planter, Sender, canary
from tests.support.live import LiveServer
from tests.support.served import free_port

DEBUG = ("--set", "log_level=debug", "--set", "log_format=json")
METRICS_PORT = free_port()
METRICS = ("--set", f"metrics_listen=127.0.0.1:{METRICS_PORT}", "--set", "metrics_tenants=false")

MEMORY = f"{MARK}-memory"
TENANT = f"{MARK}-tenant"
#: Without these a call would end at its first check; they carry the mark as well.
KNOWN: Mapping[str, Any] = {
    "memory": f"memories/{MEMORY}",
    "parent": f"memories/{MEMORY}",
    "name": f"memories/{MEMORY}",
    "names": f"memories/{MEMORY}/documents/1",
    "page_token": "",
    "etag": "",
    "model": "",
    "default_model": "",
    "next_model": "",
    "paths": "display_name",
    "scope": 1,
    "seconds": 4_000_000_000,
    "nanos": 0,
    "DocumentFilter.occurred_from": Timestamp(seconds=1),
    "number": 1,
    "CreateMemoryRequest.memory_id": f"{MARK}-other",
    "GetDocumentRequest.name": f"memories/{MEMORY}/documents/1",
    "DeleteMemoryRequest.name": f"memories/{MARK}-other",
    "CreateTenantRequest.tenant_id": f"{MARK}-made",
    "GetTenantRequest.name": f"tenants/{TENANT}",
    "GetUsageRequest.name": f"tenants/{TENANT}",
    "CreateApiKeyRequest.parent": f"tenants/{TENANT}",
    "ListApiKeysRequest.parent": f"tenants/{TENANT}",
    "DeleteTenantRequest.name": f"tenants/{MARK}-made",
    "RevokeApiKeyRequest.name": f"tenants/{TENANT}/apiKeys/0123456789abcdef",
    "RotateApiKeyRequest.name": f"tenants/{TENANT}/apiKeys/0123456789abcdef",
    "GetTenantQuotasRequest.name": f"tenants/{TENANT}/quotas",
    "TenantQuotas.name": f"tenants/{TENANT}/quotas",
    "End.documents": 1,
    "view": resources_pb2.FULL,
}
LONG = "x" * 300_000
METHODS: Mapping[str, MethodDescriptor] = {m.name: m for m in METHODS_BY_PATH.values()}


class Watched:
    """A server whose log is read, and what must not be in it."""

    def __init__(self, server: LiveServer) -> None:
        self.server = server
        self.sender = Sender(server.address, server.api_key)
        self.secrets = [server.api_key]
        for file in sorted(server.folder.glob("*.key")):
            self.secrets.append(file.read_text().strip().rpartition("_")[2])

    def log(self) -> str:
        return self.server.log.read_text(errors="replace")

    def check(self) -> None:
        """Neither canaries nor secrets in what was logged or answered to failures."""
        for text in (self.log(), b"\n".join(self.sender.failures).decode(errors="replace")):
            assert_clean(text, self.secrets)


def assert_clean(text: str, secrets: list[str]) -> None:
    """The mark in any usual dress, and no secret."""
    dressed = {MARK, MARK.encode().hex(), repr(MARK.encode())[2:-1]}
    # Three alignments, without the characters that depend on the neighbours.
    dressed |= {base64.b64encode(b" " * pad + MARK.encode()).decode()[4:-4] for pad in range(3)}
    for needle in sorted(dressed) + secrets:
        at = text.lower().find(needle.lower())
        assert at < 0, f"found in: ...{text[max(0, at - 300) : at + 200]}..."


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("privacy") / "data"
    server = LiveServer(folder, options=(*DEBUG, *METRICS))
    server.start()
    try:
        server.wait_model()
        with server.client() as client:
            client.admin.create_tenant(TENANT, display_name=canary())
            fill(client)
        found = Watched(server)
        yield found
        found.sender.close()
    finally:
        server.stop()


def fill(client: Client) -> None:
    client.memories.create(MEMORY, display_name=canary(), labels={MARK: canary()})
    memory = client.memory(MEMORY)
    turns = [Turn(Role.USER, f"{canary()} likes {canary()}", speaker=canary()) for _ in range(20)]
    memory.append(turns)
    # Text that does not compress, so that it fills pages of its own.
    noise = random.Random(1).randbytes(40_000).hex()
    memory.put([TextSource(f"{canary()} {noise}", title=canary(), metadata={MARK: canary()})])


def requests(planter: Planter, method: MethodDescriptor) -> list[list[bytes]]:
    """Each one call: for a stream all messages in order, and then each alone."""
    messages = [one.SerializeToString() for one in planter.messages(method.input_type)]
    if method.client_streaming:
        return [messages, *([one] for one in messages)]
    return [[one] for one in messages]


#: Destructive calls come last.
ORDER = sorted(METHODS, key=lambda name: (name.startswith(("Delete", "Revoke")), name))

STYLES: dict[str, Callable[[], Planter]] = {
    "sound": lambda: Planter(KNOWN),
    "nothing known": lambda: Planter({}),
    "control characters": lambda: Planter(KNOWN, suffix="\x07"),
    "control characters everywhere": lambda: Planter({}, prefix="\x1b"),
    "too long": lambda: Planter(KNOWN, suffix=LONG),
    "too long everywhere": lambda: Planter({}, suffix=LONG[:9000]),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_call(watched: Watched, style: str) -> None:
    for name in ORDER:
        for call in requests(STYLES[style](), METHODS[name]):
            watched.sender.send(METHODS[name], call)
    watched.check()


def test_bytes_that_do_not_parse(watched: Watched) -> None:
    mark = MARK.encode()
    for name in ORDER:
        for sound, *rest in requests(Planter(KNOWN), METHODS[name]):
            broken = sound.replace(mark, mark[:-1] + b"\xff")
            for data in (broken, sound[:-3], mark + sound, b"\x0a\xff" + mark):
                status = watched.sender.send(METHODS[name], [data, *rest])
                assert status not in {"INTERNAL", "UNKNOWN"}
    watched.check()


def test_credentials_that_are_none(watched: Watched) -> None:
    for credential in (f"msk_{'0' * 16}_{MARK}", MARK, f"msk_{'a' * 16}_{'b' * 64}"):
        stranger = Sender(watched.server.address, credential)
        assert stranger.send(METHODS["ListMemories"], [b""]) == "UNAUTHENTICATED"
        watched.sender.failures += stranger.failures
        stranger.close()
    watched.check()


def test_success_was_among_it_and_it_was_logged(watched: Watched) -> None:
    """Else nothing above could have failed."""
    outcomes = watched.sender.outcomes
    assert outcomes.keys() == METHODS.keys()
    for name in ("CreateMemory", "AppendTurns", "Query", "Retrieve", "ExportMemory", "GetDocument"):
        assert "OK" in outcomes[name], name
    for name, seen in outcomes.items():
        assert seen - {"OK"}, f"{name} never failed"
    log = watched.log()
    assert log.count('"message": "call"') > 300
    for method in METHODS:
        assert f"/{method}" in log


def test_metrics(watched: Watched) -> None:
    url = f"http://127.0.0.1:{METRICS_PORT}/metrics"
    with urllib.request.urlopen(url, timeout=10) as reply:
        text = reply.read().decode()
    assert 'memsvc_calls_total{method="AppendTurns",outcome="OK"}' in text
    assert_clean(text, watched.secrets)
    assert TENANT not in text


def test_a_worker_that_is_killed(watched: Watched) -> None:
    for worker in watched.server.workers():
        worker.kill()
    with watched.server.client() as client:
        memory = client.memory(MEMORY)
        memory.append([Turn(Role.USER, canary())])
        for worker in watched.server.workers():
            worker.kill()
        watched.server.wait_model()
        assert memory.ask(canary()).done
    assert "worker" in watched.log()
    watched.check()


def test_a_catalog_that_breaks(watched: Watched) -> None:
    """The driver's own words quote statements and values."""
    with contextlib.closing(sqlite3.connect(watched.server.folder / "catalog.db")) as database:
        before = watched.log().count("internal fault")
        for table in ("quarantined_documents", "usage", "requests", "encodings", "audit"):
            with contextlib.suppress(sqlite3.OperationalError):
                database.execute(f"ALTER TABLE {table} RENAME TO gone_{table}")
                database.commit()
        for style in ("sound", "nothing known"):
            for name in ORDER:
                for call in requests(STYLES[style](), METHODS[name]):
                    watched.sender.send(METHODS[name], call)
        assert watched.log().count("internal fault") > before
        for table in ("quarantined_documents", "usage", "requests", "encodings", "audit"):
            with contextlib.suppress(sqlite3.OperationalError):
                database.execute(f"ALTER TABLE gone_{table} RENAME TO {table}")
                database.commit()
    watched.check()


def test_records_that_are_damaged(tmp_path: Path) -> None:
    server = LiveServer(tmp_path / "data", options=DEBUG)
    server.start()
    try:
        server.wait_model()
        with server.client() as client:
            fill(client)
            revision = client.memory(MEMORY).append([Turn(Role.USER, canary())]).revision
            client.memory(MEMORY).ask(canary(), at_least_revision=revision)
        server.stop()
        for file in server.folder.rglob("data.mdb"):
            data = bytearray(file.read_bytes())
            for page in range(4, len(data) // 4096):
                data[page * 4096 + 3000] ^= 0xFF
            file.write_bytes(data)
        server.start()
        server.wait_model()
        watched = Watched(server)
        with server.client() as client, contextlib.suppress(ApiError):
            client.memory(MEMORY).ask(canary(), timeout_s=5)
        for number in range(1, 22):
            request = f"memories/{MEMORY}/documents/{number}"
            planter = Planter({**KNOWN, "GetDocumentRequest.name": request})
            for call in requests(planter, METHODS["GetDocument"]):
                watched.sender.send(METHODS["GetDocument"], call)
        assert "DATA_LOSS" in watched.sender.outcomes["GetDocument"]
        assert re.search(r"corrupt", watched.log())
        watched.check()
        watched.sender.close()
    finally:
        server.stop()


def test_the_search_would_find_one() -> None:
    for text in (
        f"what {MARK}-000001 said",
        MARK.upper(),
        MARK.encode().hex(),
        base64.b64encode(f"a{MARK}".encode()).decode(),
        base64.b64encode(f"ab{MARK} and more".encode()).decode(),
        "key s3cret here",
    ):
        with pytest.raises(AssertionError):
            assert_clean(text, ["s3cret"])
    assert_clean("nothing of the kind", ["s3cret"])
