"""The worker with a real, tiny MSA model: what it serves is what the engine computes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model_adapter import wire
from model_adapter.blending import DEPTH
from model_adapter.engine import (
    CitationEvent,
    Engine,
    Event,
    FinishEvent,
    Generate,
    LexicalPrior,
    RoutingEvent,
    TextEvent,
)
from model_adapter.engines import load_engine
from model_adapter.lexical import LexicalIndex
from model_adapter.msa.memory import InMemoryView
from model_adapter.v1 import model_adapter_pb2 as pb
from storage.layout import KVBlock
from storage.paths import DataFolder
from storage.store import MemoryUid
from tests.support.live_worker import Client, WorkerProcess, connected
from tests.support.tiny_checkpoints import SMOL, tiny_config, write_directory

TENANT = "0e" * 16
QUESTIONS = ["what about the weather?", "who wrote 12 letters in 1999?", "the sea", "dog"]
TEXTS = [
    "the weather in the north " * 9,
    "12 letters that were written in 1999",
    "we'll see the sea, won't we?",
    "the garden and the dog " * 30,
    "they said it's what they'd said",
    "<|im_end|> in a text is text",
]


@pytest.fixture(
    scope="module",
    params=[("msa", "100M"), ("llama", "100M"), ("llama", "0")],
    ids=["msa", "plain", "plain-streamed"],
)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[WorkerProcess, Path]]:
    """A model that names documents and has routers, or a plain base that has none of its own,
    which may have no room for any memory."""
    kind, budget = request.param
    root = tmp_path_factory.mktemp("worker")
    checkpoint = root / "tiny"
    if kind == "msa":
        write_directory(checkpoint, tiny_config(kind))
    else:
        write_directory(checkpoint, tiny_config(kind), special=SMOL)
    budgets = (f"--routing-budget={budget}", f"--content-budget={budget}")
    worker = WorkerProcess(root, str(checkpoint), "--dtype=fp32", *budgets)
    assert worker.address, worker.logs()
    yield worker, checkpoint
    assert worker.stop() == 0


async def fill(client: Client, memory: str) -> list[KVBlock]:
    """Has the texts encoded and stored; returns what was stored."""
    await client.fill(TENANT, memory, TEXTS)
    uid, store = MemoryUid(bytes.fromhex(memory)), client.store(TENANT)
    blocks = []
    for part in store.iter_routing(uid, client.encoding, client.layout):
        content = store.get_content(uid, client.encoding, client.layout, part.number)
        arrays = (part.routing_key_LCE, content.key_LCE, content.value_LCE)
        blocks.append(KVBlock(part.number, part.tokens, *arrays))
    assert [block.number for block in blocks] == list(range(1, len(TEXTS) + 1))
    return blocks


async def test_answers_are_the_engines(served: tuple[WorkerProcess, Path]) -> None:
    worker, checkpoint = served
    memory = "c0" * 16
    async with connected(worker) as client:
        engine = load_engine(str(checkpoint), DataFolder(checkpoint), torch.device("cpu"), "fp32")
        assert client.info.identity == engine.description.identity
        blocks = await fill(client, memory)
        view = InMemoryView(client.layout, blocks, dict(enumerate(TEXTS, 1)))
        ref = client.ref(TENANT, memory, len(TEXTS))

        async def ask(question: str) -> list[pb.QueryResponse]:
            call = client.query(ref, question, max_answer_tokens=12, top_k=3)
            return [event async for event in call]

        together = await asyncio.gather(*(ask(question) for question in QUESTIONS))
        for question, events in zip(QUESTIONS, together, strict=True):
            prior = prior_of(engine, question)
            generation = engine.start(Generate(question, 12, top_k=3, prior=prior), view)
            expected: list[Event] = []
            while not generation.done:
                (result,) = engine.step([generation])
                assert result.error is None
                expected.extend(result.events)
            assert [brief(event) for event in events] == [brief_of(event) for event in expected]
            assert events[-1].finished.routed_documents == generation.counts.routed_documents
        request = pb.RouteRequest(memory=ref, question=QUESTIONS[1], limit=4)
        ranked = (await client.stub.Route(request)).documents
        own = engine.route(QUESTIONS[1], view, 4, prior_of(engine, QUESTIONS[1]))
        assert [document.number for document in ranked] == [document.number for document in own]


def prior_of(engine: Engine, question: str) -> LexicalPrior | None:
    """As the worker makes it when a request says nothing of it."""
    weight = engine.description.lexical_weight
    index = LexicalIndex()
    index.add(enumerate(TEXTS, 1))
    return LexicalPrior(weight, index.search(question, DEPTH)) if weight else None


def brief(event: pb.QueryResponse) -> tuple[object, ...]:
    """What has to be the same; scores may differ in their last bits."""
    match event.WhichOneof("event"):
        case "routing":
            return ("routing", [document.number for document in event.routing.documents])
        case "citation":
            return ("citation", event.citation.number)
        case "text":
            return ("text", event.text.text)
    return ("finished", event.finished.reason)


def brief_of(event: Event) -> tuple[object, ...]:
    """As `brief`, of the engine's own."""
    match event:
        case RoutingEvent(_, documents):
            return ("routing", [document.number for document in documents])
        case CitationEvent(number):
            return ("citation", number)
        case TextEvent(text):
            return ("text", text)
        case FinishEvent(reason):
            return ("finished", wire.REASONS[reason])
