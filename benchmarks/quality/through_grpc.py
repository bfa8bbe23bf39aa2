"""The same measurement through a whole service: data folder, server, worker and client.

Every scope becomes a memory. Turns are appended (AppendTurns, one document a turn), texts are
put (PutDocuments), in the bank's order; the clock of encoding runs from the first append to
the moment when everything is encoded and durable. Questions go through Retrieve and Query,
in the row `ours` with routing alone, in the row `hybrid` with the share that the model gives
to the question's words.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.ingest import wait_encoded
from benchmarks.progress import Advance, bar
from benchmarks.quality.answers import Answer
from benchmarks.quality.banks import Bank, Document, Question, Scope
from benchmarks.quality.evaluate import HYBRID, OURS, Figures, ModelCard, Plan, choose
from benchmarks.quality.metrics import CUTOFFS
from benchmarks.quality.tally import Tally
from benchmarks.service import running
from memsvc.client import Client, Generation, MemoryHandle, TextSource, Turn
from storage import documents

#: Documents of one append or put.
WRITE = 100
#: Seconds that one write or answer may take on a busy machine.
PATIENCE_S = 600.0
#: Share of the question's words by row; None is the model's own.
WEIGHTS = {OURS: 0.0, HYBRID: None}


def measure(bank: Bank, plan: Plan, model: str, data: Path, *settings: str) -> Figures:
    """Serves `model` on a new data folder and measures the plan's rows, of those in WEIGHTS.

    settings: "name=value" of docs/configuration.md.
    """
    chosen = choose([q for q in bank.questions if q.answers], plan.answers, plan.seed)
    tallies = {row: Tally() for row in plan.rows if row in WEIGHTS}
    with running(data, model, *settings) as service, service.client() as client:
        seconds = 0.0
        for place, (name, scope) in enumerate(bank.scopes.items()):
            memory = client.memory(client.memories.create(f"scope-{place}").name)
            started = time.perf_counter()
            with bar(f"append {name}".strip(), len(scope.documents)) as advance:
                numbers = _fill(client, memory, scope, advance)
            seconds += time.perf_counter() - started
            for row, tally in tallies.items():
                _ask(memory, scope, numbers, plan, chosen, row, tally)
        return _figures(client, bank, tallies, seconds)


def _fill(client: Client, memory: MemoryHandle, scope: Scope, advance: Advance) -> dict[str, int]:
    """Writes all documents and waits for their encoding; numbers by document id."""
    numbers: dict[str, int] = {}
    revision = 0
    for batch in _batches(scope.documents):
        texts = [_text(d.source) for d in batch if isinstance(d.source, documents.TextSource)]
        if texts:
            written = memory.put(texts, timeout_s=PATIENCE_S)
        else:
            written = memory.append([turn for d in batch for turn in _turns(d.source)])
        made = [int(name.rpartition("/")[2]) for name in written.documents]
        numbers |= zip((document.id for document in batch), made, strict=True)
        revision = written.revision
        advance(len(batch))
    wait_encoded(client, memory.id, revision)
    return numbers


def _batches(scope: Sequence[Document]) -> Iterator[list[Document]]:
    """Neighbours that are written alike."""
    for _, alike in groupby(scope, key=lambda document: type(document.source)):
        group = list(alike)
        for start in range(0, len(group), WRITE):
            yield group[start : start + WRITE]


def _text(source: documents.TextSource) -> TextSource:
    return TextSource(source.text, source.title, source.occurred_at)


def _turns(source: documents.Source) -> list[Turn]:
    assert isinstance(source, documents.Conversation)
    return [
        Turn(turn.role.value, turn.text, turn.occurred_at, turn.speaker) for turn in source.turns
    ]


def _ask(
    memory: MemoryHandle,
    scope: Scope,
    numbers: dict[str, int],
    plan: Plan,
    chosen: frozenset[str],
    row: str,
    tally: Tally,
) -> None:
    weight = WEIGHTS[row]
    with bar(f"ask {row}", len(scope.questions)) as advance:
        for question in scope.questions:
            gold = {numbers[name] for name in question.gold}
            started = time.perf_counter()
            found = memory.retrieve(
                question.text, limit=CUTOFFS[-1], lexical_weight=weight
            ).documents
            seconds = time.perf_counter() - started
            tally.ranked([document.number for document in found], gold, seconds)
            if question.id in chosen:
                _answer(memory, question, gold, plan, weight, tally)
            advance(1)


def _answer(
    memory: MemoryHandle,
    question: Question,
    gold: set[int],
    plan: Plan,
    weight: float | None,
    tally: Tally,
) -> None:
    options = Generation(plan.answer_tokens, top_k=plan.documents, lexical_weight=weight)
    started = time.perf_counter()
    reply = memory.ask(question.text, options=options, timeout_s=PATIENCE_S)
    seconds = time.perf_counter() - started
    answer = Answer(reply.text, [citation.number for citation in reply.citations])
    tally.answered(question, gold, answer, seconds)


def _figures(client: Client, bank: Bank, tallies: dict[str, Tally], seconds: float) -> Figures:
    encodings = [memory.encodings[0] for memory in client.memories.iterate()]
    (model,) = client.models.list().items
    return Figures(
        rows=tallies,
        documents=bank.documents,
        refused=sum(encoding.quarantined_documents for encoding in encodings),
        tokens=sum(encoding.tokens for encoding in encodings),
        block_bytes=sum(encoding.bytes for encoding in encodings),
        encode_seconds=seconds,
        model=ModelCard(
            model.display_name,
            model.identity,
            tuple(model.layout.routed_layers),
            model.layout.pool_tokens,
        ),
    )
