"""Fuzzes every RPC of both public services.

    python -m tests.fuzz.campaign --examples 20000 [--seed N] [--json]

pytest runs the same with fewer examples (tests/fuzz/test_fuzz.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from memsvc.client import Client, Role, TextSource, Turn
from tests.fuzz.generate import Generator, Values
from tests.fuzz.target import METHODS, Target
from tests.support.live import LiveServer, live_server

#: Requests of one call at most, for client streams.
_MAX_MESSAGES = 6
#: What the server may grow by while it is fuzzed.
MAX_GROWTH_BYTES = 200 << 20


def prepare(client: Client) -> dict[str, Values]:
    """Puts something on the server, and says by field name what is sound there."""
    client.memories.create("fuzz-memory")
    memory = client.memory("fuzz-memory")
    turns = [Turn(Role.USER, f"Fact number {n} about topic {n % 3}.") for n in range(300)]
    documents = list(memory.append(turns).documents)
    documents += memory.put([TextSource("A note on tides and ferries.", title="Note")]).documents
    archive = b"".join(part.data for part in memory.export(without_blocks=True))
    client.admin.create_tenant("fuzz-tenant")
    names = ["memories/fuzz-memory"]
    return {
        "memory": names,
        "parent": names,
        "name": names,
        "names": documents[3:],
        "memory_id": ["", "fuzz-other", "fuzz-third"],
        "question": ["What is fact number 3?", "Which topic?"],
        "model": ["", "models/fake"],
        "request_id": ["", "", "", "once"],
        "page_token": [""],
        "etag": [""],
        "paths": ["display_name", "labels"],
        "key": ["colour", "a.b"],
        "nanos": [0, 999_999_999],
        "window_turns": [0, 2, 64],
        "max_document_bytes": [0, 512, 65_536],
        "at_least_revision": [0, 1],
        "data": [archive, archive[: len(archive) // 2], archive[len(archive) // 2 :]],
        "GetDocumentRequest.name": documents[:3],
        "GetTenantRequest.name": ["tenants/default", "tenants/fuzz-tenant"],
        "GetUsageRequest.name": ["tenants/default"],
        "GetTenantQuotasRequest.name": ["tenants/default/quotas"],
        # Never those of the tenant that the fuzzer itself comes from.
        "TenantQuotas.name": ["tenants/fuzz-tenant/quotas"],
        "CreateApiKeyRequest.parent": ["tenants/fuzz-tenant"],
        "ApiKey.seconds": [4_000_000_000],
        "ListApiKeysRequest.parent": ["tenants/default", "tenants/fuzz-tenant"],
        # Never the tenant that the fuzzer itself comes from.
        "DeleteTenantRequest.name": ["tenants/fuzz-gone", "tenants/fuzz-other"],
        "CreateTenantRequest.tenant_id": ["", "fuzz-gone", "fuzz-other"],
        "RevokeApiKeyRequest.name": ["tenants/fuzz-tenant/apiKeys/0123456789abcdef"],
        # The memory that other calls need stays.
        "DeleteMemoryRequest.name": ["memories/fuzz-other", "memories/fuzz-third"],
    }


def calls(known: Mapping[str, Values], method: MethodDescriptor) -> st.SearchStrategy[list[bytes]]:
    """Requests of one call as bytes: sound, hostile, or no message at all."""
    sound = Generator(known, sound=True)
    typed = sound.message(method.input_type).map(_serialized)
    hostile = Generator(known, sound=False).message(method.input_type).map(_serialized)
    # A message with a tail of garbage parses in part.
    spoiled = st.tuples(typed, st.binary(min_size=1, max_size=8)).map(b"".join)
    one = st.one_of(typed, hostile, spoiled, st.binary(max_size=300))
    if not method.client_streaming:
        return st.one_of(typed, typed, one).map(lambda request: [request])
    ordered = sound.stream(method.input_type).map(lambda messages: list(map(_serialized, messages)))
    return st.one_of(ordered, ordered, st.lists(one, max_size=_MAX_MESSAGES))


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


def fuzz_method(
    target: Target,
    known: Mapping[str, Values],
    method: MethodDescriptor,
    examples: int,
    number: int,
) -> Counter[str]:
    """Runs `examples` calls of one method; how often each outcome came."""
    outcomes: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls(known, method))
    def run(requests: list[bytes]) -> None:
        outcome = target.call(method, requests)
        outcomes[outcome.reason or outcome.status] += 1

    run()
    return outcomes


def campaign(server: LiveServer, examples: int, number: int) -> dict[str, object]:
    """Fuzzes all methods in turn; figures. Raises UnsoundAnswerError, AssertionError."""
    with server.client() as client:
        known = prepare(client)
    target = Target(server.address, server.api_key)
    process = server.process
    before = process.memory_info().rss
    started = time.monotonic()
    outcomes: dict[str, dict[str, int]] = {}
    each = -(-examples // len(METHODS))
    try:
        for name, method in METHODS.items():
            outcomes[name] = dict(fuzz_method(target, known, method, each, number))
    finally:
        target.close()
    assert process.is_running(), "the server went down"
    grown = process.memory_info().rss - before
    assert grown < MAX_GROWTH_BYTES, f"the server grew by {grown} bytes"
    with server.client() as client:
        assert client.memories.get("fuzz-memory").state == "active"
    return {
        "calls": sum(sum(counts.values()) for counts in outcomes.values()),
        "seconds": round(time.monotonic() - started, 1),
        "rss_before": before,
        "rss_growth": grown,
        "outcomes": outcomes,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.campaign")
    parser.add_argument("--examples", type=int, default=20_000, help="calls in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="memsvc-fuzz-") as folder,
        live_server(Path(folder) / "data") as server,
    ):
        figures = campaign(server, options.examples, options.seed)
    if options.json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return 0
    for name, counts in figures.pop("outcomes").items():  # type: ignore[attr-defined]  # a dict of dicts
        shown = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
        sys.stdout.write(f"{name}: {shown}\n")
    sys.stdout.write(f"{figures}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
