"""An outside chat model answers from what a memory's routing finds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from examples.any_llm import ChatEndpoint, ChatError, answer
from memsvc.client import TextSource, Turn
from tests.support.chat_stub import API_KEY, ChatStub, chat_stub
from tests.support.live import LiveServer, environment, live_server

QUESTION = "Who repaired the boiler?"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("llm") / "data") as made:
        with made.client() as client:
            client.memories.create("anna")
            said = datetime(2024, 5, 3, 12, tzinfo=UTC)
            client.memory("anna").append(
                [
                    Turn("user", "Our cat is called Mittens.", speaker="Anna"),
                    Turn("user", "Olga repaired the boiler.", speaker="Anna", occurred_at=said),
                ]
            )
            client.memory("anna").put([TextSource("Platform seven at ten.", title="Night train")])
        yield made


@pytest.fixture
def stub() -> Iterator[ChatStub]:
    with chat_stub() as running:
        yield running


def test_it_answers_with_citations(server: LiveServer, stub: ChatStub) -> None:
    chat = ChatEndpoint(stub.base_url, "some-model", API_KEY)
    with server.client() as client:
        found = answer(client.memory("anna"), chat, QUESTION)
    assert "Olga repaired the boiler." in found.text
    assert [cited.document for cited in found.citations] == ["memories/anna/documents/2"], (
        "a number that was no source is no citation"
    )
    assert (found.revision, found.model) == (2, "models/fake")
    (request,) = stub.requests
    assert request["model"] == "some-model" and request["temperature"] == 0
    system, user = request["messages"]
    assert system["role"] == "system" and "[12]" in system["content"]
    assert "[2] Anna (03 May 2024): Olga repaired the boiler." in user["content"]
    assert user["content"].endswith(f"Question: {QUESTION}")
    assert "Mittens" not in user["content"], "what routing does not choose is not sent out"


def test_texts_show_their_title(server: LiveServer, stub: ChatStub) -> None:
    chat = ChatEndpoint(stub.base_url, "some-model", API_KEY)
    with server.client() as client:
        found = answer(client.memory("anna"), chat, "Which platform?", sources=1)
    assert [cited.number for cited in found.citations] == [3]
    assert "[3] Night train\nPlatform seven at ten." in stub.requests[0]["messages"][1]["content"]


def test_a_memory_that_knows_nothing(server: LiveServer, stub: ChatStub) -> None:
    chat = ChatEndpoint(stub.base_url, "some-model", API_KEY)
    with server.client() as client:
        found = answer(client.memory("anna"), chat, "Zeppelins?")
    assert found.citations == () and "(none)" in stub.requests[0]["messages"][1]["content"]


@pytest.mark.parametrize(
    "reply", [b"not json", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": 1}}]}']
)
def test_a_reply_that_is_none(stub: ChatStub, reply: bytes) -> None:
    stub.reply = reply
    with pytest.raises(ChatError):
        ChatEndpoint(stub.base_url, "some-model", API_KEY).complete("be brief", "hello")


def test_refusals(stub: ChatStub) -> None:
    chat = ChatEndpoint(stub.base_url, "some-model", "a wrong key")
    with pytest.raises(ChatError, match="401"):
        chat.complete("be brief", "hello")
    stub.status = 500
    with pytest.raises(ChatError, match="500"):
        replace(chat, api_key=API_KEY).complete("be brief", "hello")
    with pytest.raises(ChatError, match="does not answer"):
        replace(chat, base_url="http://127.0.0.1:9/v1").complete("be brief", "hello")


def test_the_command(server: LiveServer, stub: ChatStub) -> None:
    values = {
        "MEMSVC_ADDRESS": server.address,
        "MEMSVC_API_KEY": server.api_key,
        "CHAT_BASE_URL": stub.base_url,
        "CHAT_API_KEY": API_KEY,
    }
    done = subprocess.run(
        [sys.executable, "-m", "examples.any_llm", "anna", QUESTION, "--model", "some-model"],
        cwd=Path(__file__).parents[2],
        env=environment() | values,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("[2] memories/anna/documents/2: Anna")
