"""The blocking client is the asyncio one, method for method."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from memsvc.client import Client, ConfigurationError, MemoryHandle, NotFoundError, RetryPolicy
from memsvc.client import bridge as bridge_module
from memsvc.client import sync as sync_module
from memsvc.client.aio import AsyncClient
from tests.support.scripted import Failure, Script, answer, serving

ROOT = Path(__file__).parents[2]


class Background:
    """A scripted server on a loop in another thread."""

    def __init__(self) -> None:
        self.portal = bridge_module.Portal()
        self.script = Script()
        self._server = serving(self.script)
        self.address = self.portal.run(self._server.__aenter__())

    def close(self) -> None:
        self.portal.run(self._server.__aexit__(None, None, None))
        self.portal.close()


@pytest.fixture
def server() -> Iterator[Background]:
    background = Background()
    yield background
    background.close()


@pytest.fixture
def client(server: Background) -> Iterator[Client]:
    policy = RetryPolicy(attempts=3, initial_s=0.01)
    with Client(server.address, "key", retry=policy) as made:
        yield made


def test_calls_errors_and_retries(client: Client, server: Background) -> None:
    server.script.failures = [Failure("UNAVAILABLE")]
    assert client.memories.get("anna").id == "anna"
    server.script.failures = [Failure("NOT_FOUND", "MEMORY_NOT_FOUND")]
    with pytest.raises(NotFoundError):
        client.memories.get("anna")


def test_handles_and_streams(client: Client, server: Background) -> None:
    server.script.messages = answer("a", "b")
    anna = client.memory("anna")
    assert isinstance(anna, MemoryHandle)
    assert anna.name == "memories/anna"
    assert anna.ask("?").text == "ab"
    assert len(list(anna.query("?"))) == 6
    assert [memory.id for memory in client.memories.iterate()] == [f"m{i}" for i in range(5)]


def test_leaving_a_loop_cancels_the_call(client: Client, server: Background) -> None:
    server.script.messages, server.script.hang = answer("a")[:1], True
    stream = client.memory("anna").query("?")
    next(stream)
    stream.close()

    async def cancelled() -> None:
        await asyncio.wait_for(server.script.cancelled.wait(), 5)

    server.portal.run(cancelled())


async def test_it_works_inside_a_running_loop(server: Background) -> None:
    with Client(server.address, "key") as client:
        assert client.memories.get("anna").id == "anna"


def test_threads_share_a_client(client: Client) -> None:
    names: list[str] = []

    def work(number: int) -> None:
        names.extend(client.memories.get(f"m{number}").id for _ in range(20))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names) == sorted(f"m{n}" for n in range(4) for _ in range(20))


def test_closing_ends_the_thread_and_later_calls_fail(server: Background) -> None:
    before = threading.active_count()
    client = Client(server.address, "key")
    assert threading.active_count() == before + 1
    client.close()
    client.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        client.memories.get("anna")


def test_a_refused_constructor_leaves_no_thread() -> None:
    before = threading.active_count()
    with pytest.raises(ConfigurationError):
        Client("", "key")
    assert threading.active_count() == before


def test_from_environment(server: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSVC_ADDRESS", server.address)
    monkeypatch.setenv("MEMSVC_API_KEY", "from-environment")
    with Client.from_environment() as client:
        client.memories.get("anna")
    assert server.script.metadata[-1]["authorization"] == "Bearer from-environment"


def test_every_public_member_of_the_core_is_there() -> None:
    for core, made in bridge_module._COUNTERPARTS.items():
        public = {name for name in vars(core) if not name.startswith("_")}
        assert public <= set(dir(made)), core
        for name in public:
            member = inspect.getattr_static(made, name)
            assert not inspect.iscoroutinefunction(member), (core, name)
            assert not inspect.isasyncgenfunction(member), (core, name)
    assert AsyncClient in bridge_module._COUNTERPARTS


def test_docstrings_carry_over() -> None:
    assert sync_module.Client.__doc__ == AsyncClient.__doc__
    assert sync_module.Client.memory.__doc__ == AsyncClient.memory.__doc__


def test_the_stub_is_up_to_date(tmp_path: Path) -> None:
    fresh = tmp_path / "sync.pyi"
    subprocess.run([ROOT / "scripts/client_stub", fresh], check=True, capture_output=True)
    committed = (ROOT / "memsvc/client/sync.pyi").read_text()
    assert fresh.read_text() == committed, "run scripts/client_stub"
