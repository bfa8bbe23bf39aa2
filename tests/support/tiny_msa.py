"""A tiny MSA engine on the golden checkpoint, and answers by script."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from model_adapter.checkpoints import load_directory
from model_adapter.engine import DocumentText, Event, Generate, Generation, MemoryView
from model_adapter.msa.config import LoadedModel
from model_adapter.msa.engine import MsaEngine, limits_of
from model_adapter.msa.forward import Attend, run
from model_adapter.msa.generate import Session
from model_adapter.msa.memory import InMemoryView
from model_adapter.msa.prompt import Answering
from tests.support.golden_checkpoint import write_checkpoint

TEXTS = {
    1: "The river city opened a museum in 1903.",
    2: "A painter was born in the old city and wrote a poem about a bridge. " * 12,
    3: "x",
    4: "The captain sold the boat. " * 5,
    7: "Winter garden by the north valley, 1984. " * 4,
}


@cache
def _loaded() -> LoadedModel:
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "tiny", torch.float32)
        return load_directory(Path(folder) / "tiny")


def tiny_model(answering: Answering = Answering.INTERLEAVE, **msa: Any) -> LoadedModel:
    model = _loaded()
    return replace(
        model,
        weights=dict(model.weights),
        config=model.config.with_msa(**{"top_k": 3, **msa}),
        template=replace(model.template, answering=answering),
    )


def tiny_engine(
    answering: Answering = Answering.INTERLEAVE,
    limits: Mapping[str, int] | None = None,
    injection: Attend = Attend.CAUSAL,
    **msa: Any,
) -> MsaEngine:
    model = tiny_model(answering, **msa)
    bounds = replace(limits_of(model), **(limits or {}))
    return MsaEngine(model, limits=bounds, injection=injection)


def tokenizer() -> Tokenizer:
    return _loaded().tokenizer


def remember(
    engine: MsaEngine, texts: Mapping[int, str] = TEXTS, slab_chunks: int = 0
) -> InMemoryView:
    encoded = engine.encode([DocumentText(number, text) for number, text in texts.items()])
    assert not encoded.failures
    return InMemoryView(engine.description.layout, encoded.blocks, texts, slab_chunks)


def finish(engine: MsaEngine, *generations: Generation) -> dict[int, list[Event]]:
    """Events by place, all generations stepped together to their ends."""
    events: dict[int, list[Event]] = {place: [] for place in range(len(generations))}
    while running := [place for place, one in enumerate(generations) if not one.done]:
        for place, result in zip(
            running, engine.step([generations[place] for place in running]), strict=True
        ):
            assert result.error is None
            events[place] += result.events
    return events


def answer(engine: MsaEngine, request: Generate, memory: MemoryView) -> list[Event]:
    return finish(engine, engine.start(request, memory))[0]


def scripted(
    engine: MsaEngine, session: Generation, script: Sequence[str], memory: MemoryView
) -> tuple[list[Event], list[str]]:
    """Runs a session as the engine does, but with the script's text as its answers.

    A script entry is a run of text with control tokens by name. Returns the events and
    the text of every segment that was run.
    """
    assert isinstance(session, Session)
    model = engine._model
    tokens = [t for part in script for t in tokenizer().encode(part, add_special_tokens=False).ids]
    events: list[Event] = []
    ran: list[str] = []
    with torch.inference_mode():
        while not session.done and tokens:
            segment = session.segment()
            ran.append(str(tokenizer().decode(list(segment.ids), skip_special_tokens=False)))
            outcome = run(model.decoder, [segment])
            assert outcome.logits is not None
            logits_V = torch.zeros_like(outcome.logits[0])
            logits_V[tokens[0]] = 1.0
            before = session.counts.answer_tokens
            events += session.accept(logits_V, outcome.routings[0])
            if session.done or session.counts.answer_tokens > before:
                tokens.pop(0)
    return events, ran
