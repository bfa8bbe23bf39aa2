"""Every RPC under hostile input: typed errors only, and the server stays up and small.

At least 2,000 calls; `python -m tests.fuzz.campaign` runs as many more as wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.campaign import MAX_GROWTH_BYTES, fuzz_method, prepare
from tests.fuzz.target import METHODS, Target
from tests.support.live import LiveServer, live_server

EXAMPLES = 85  # of each of the 24 methods


class Fuzzed:
    def __init__(self, server: LiveServer) -> None:
        self.server = server
        with server.client() as client:
            self.known = prepare(client)
        self.target = Target(server.address, server.api_key)
        self.rss_before = server.process.memory_info().rss


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    folder: Path = tmp_path_factory.mktemp("fuzz") / "data"
    with live_server(folder) as server:
        made = Fuzzed(server)
        yield made
        made.target.close()


def test_every_method_is_fuzzed_often_enough() -> None:
    assert len(METHODS) * EXAMPLES >= 2000


@pytest.mark.parametrize("name", sorted(METHODS))
def test_method(fuzzed: Fuzzed, name: str) -> None:
    outcomes = fuzz_method(fuzzed.target, fuzzed.known, METHODS[name], EXAMPLES, number=1)
    assert sum(outcomes.values()) >= EXAMPLES / 2
    assert fuzzed.server.process.is_running()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200))
def test_no_credential_of_any_form_opens_anything(fuzzed: Fuzzed, credential: str) -> None:
    metadata = (("authorization", credential.strip()),)
    outcome = fuzzed.target.call(METHODS["ListMemories"], [b""], metadata)
    assert (outcome.status, outcome.reason) == ("UNAUTHENTICATED", "CREDENTIAL_INVALID")


def test_the_server_is_up_and_small_afterwards(fuzzed: Fuzzed) -> None:
    with fuzzed.server.client() as client:
        assert client.memories.get("fuzz-memory").document_count > 0
        answer = client.memory("fuzz-memory").ask("What about tides and ferries?")
    assert answer.done.model
    grown = fuzzed.server.process.memory_info().rss - fuzzed.rss_before
    assert grown < MAX_GROWTH_BYTES
