"""Metrics over HTTP: what is counted, and what is not told."""

from __future__ import annotations

import asyncio
import urllib.request
from collections import Counter

import pytest

from memsvc.metrics import Metrics
from memsvc.server import ServerStartError
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.wire import METHODS
from tests.support.served import Serve, Served, refused

ON = "127.0.0.1:0"


async def scrape(served: Served) -> str:
    url = f"http://127.0.0.1:{served.server.metrics_port}/metrics"

    def read() -> str:
        with urllib.request.urlopen(url, timeout=10) as reply:
            text: str = reply.read().decode()
            return text

    return await asyncio.to_thread(read)


async def test_calls_are_counted_by_outcome(start: Serve) -> None:
    async with start(metrics_listen=ON) as served:
        memory = await served.create("counted")
        await served.append(memory.name, "a private matter")
        await refused(served.append(memory.name, "another \x07"))
        watching = served.as_operator(
            served.memories.WatchMemory, pb.WatchMemoryRequest(name=memory.name)
        )
        await watching.read()
        text = await scrape(served)
        watching.cancel()
    lines = text.splitlines()
    assert 'memsvc_calls_total{method="AppendTurns",outcome="OK"} 1.0' in lines
    assert 'memsvc_calls_total{method="AppendTurns",outcome="TEXT_NOT_CLEAN"} 1.0' in lines
    assert 'memsvc_call_seconds_count{method="AppendTurns"} 2.0' in lines
    assert "memsvc_calls_inside 1.0" in lines
    for private in ("private", "another", "counted", "default", "tenant"):
        assert private not in text


async def test_tenants_are_a_label_when_asked_for(start: Serve) -> None:
    async with start(metrics_listen=ON, metrics_tenants=True) as served:
        await served.create()
        await refused(served.memories.ListMemories(pb.ListMemoriesRequest()))
        text = await scrape(served)
    assert 'method="CreateMemory",outcome="OK",tenant="default"' in text
    assert 'outcome="CREDENTIAL_INVALID",tenant="other"' in text


async def test_they_are_off_by_default(served: Served) -> None:
    assert served.server.metrics_port == 0


@pytest.mark.parametrize("listen", ["127.0.0.1:x", "256.0.0.1:1", "nonsense"])
async def test_an_address_that_is_none_stops_the_start(start: Serve, listen: str) -> None:
    with pytest.raises(ServerStartError, match="metrics"):
        async with start(metrics_listen=listen):
            pass


def test_labels_are_bounded() -> None:
    metrics = Metrics(by_tenant=True)
    for number in range(3000):
        metrics.call(next(iter(METHODS)), "OK", 0.1, f"tenant-{number}")
    seen = Counter(
        sample.labels["tenant"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "memsvc_calls_total"
    )
    assert len(seen) == 1001
    assert seen["other"] == 1


def test_waiting_documents_are_looked_up() -> None:
    metrics = Metrics()
    metrics.watch(lambda: (3, {"fake": 7}))
    assert metrics.registry.get_sample_value("memsvc_calls_inside") == 3
    assert metrics.registry.get_sample_value("memsvc_waiting_documents", {"model": "fake"}) == 7
