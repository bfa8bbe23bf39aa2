"""Recall of the turns that a question needs, by the policy that packs turns into documents.

    python -m benchmarks.packing --bank locomo --data DIR --json

DIR holds mem_{bank}_turns.{corpus,questions}.jsonl.zst: one dialogue turn per line of the
corpus, with its conversation, session and date, and questions with the ids of the turns that
answer them. A question is asked over its own conversation alone. Turns are packed, rendered,
encoded and routed by the code that serves; the ranking is the one that combines all routed
layers. A gold turn is found when a returned document contains it.

Policies return documents of different sizes, so beside recall at 5 and 10 documents stand the
tokens that those documents have, and recall within the same number of tokens: documents are
taken best first until the next would not fit (the best one always counts).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.quality.banks import occurred_at, rows
from memsvc.packing import pack, policy
from model_adapter.checkpoints import load_engine_source
from model_adapter.engine import DocumentText, RankedDocument
from model_adapter.msa.engine import MsaEngine
from model_adapter.msa.memory import InMemoryView
from storage.catalog import Packing, PackingMode
from storage.documents import Conversation, Role, Turn, render
from storage.paths import DataFolder

POLICIES: dict[str, Packing] = {
    "TURN": policy(PackingMode.TURN),
    "WINDOW 2": policy(PackingMode.WINDOW, window_turns=2),
    "WINDOW 4": policy(PackingMode.WINDOW, window_turns=4),
    "WINDOW 8": policy(PackingMode.WINDOW, window_turns=8),
    "SESSION": policy(PackingMode.SESSION),
}
CUTOFFS = (5, 10)
BUDGETS = (500, 1000, 2000)
#: Documents asked of the router: enough to fill the largest budget with single turns.
RETURNED = 100
ENCODE_BATCH = 256


@dataclass
class Dialogue:
    """One conversation: its turns in order, the id of each, and questions with gold ids."""

    turns: list[Turn] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    questions: list[tuple[str, list[str]]] = field(default_factory=list)


@dataclass
class Tally:
    """Sums over the questions of one policy."""

    questions: int = 0
    documents: int = 0
    tokens: int = 0
    seconds: float = 0.0
    found: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def read_bank(data: Path, bank: str) -> dict[str, Dialogue]:
    """All conversations of a bank that have questions, by name."""
    dialogues: dict[str, Dialogue] = defaultdict(Dialogue)
    for row in rows(data / f"mem_{bank}_turns.corpus.jsonl.zst"):
        speaker, _, text = row["text"].partition(": ")
        session = row["doc_id"].rsplit(":", 1)[0]
        turn = Turn(Role.USER, text, occurred_at(row["title"]), speaker, session)
        dialogues[row["conv"]].turns.append(turn)
        dialogues[row["conv"]].ids.append(row["doc_id"])
    for row in rows(data / f"mem_{bank}_turns.questions.jsonl.zst"):
        if row["gold_doc_ids"]:
            dialogues[row["conv"]].questions.append((row["question"], row["gold_doc_ids"]))
    return {name: found for name, found in sorted(dialogues.items()) if found.questions}


def memory_of(engine: MsaEngine, documents: list[Conversation]) -> tuple[InMemoryView, list[int]]:
    """The encoded documents, numbered from 1, and the tokens of each."""
    texts = {number: render(document) for number, document in enumerate(documents, start=1)}
    offered = [DocumentText(number, text) for number, text in texts.items()]
    blocks = []
    for start in range(0, len(offered), ENCODE_BATCH):
        encoded = engine.encode(offered[start : start + ENCODE_BATCH])
        assert not encoded.failures
        blocks += encoded.blocks
    blocks.sort(key=lambda block: block.number)
    view = InMemoryView(engine.description.layout, blocks, texts)
    return view, [block.tokens for block in blocks]


def within(ranked: list[RankedDocument], tokens: list[int], budget: int) -> list[RankedDocument]:
    """The best documents that fit into `budget` tokens together; the first in any case."""
    taken: list[RankedDocument] = []
    used = 0
    for document in ranked:
        used += tokens[document.number - 1]
        if taken and used > budget:
            break
        taken.append(document)
    return taken


def measure(engine: MsaEngine, dialogue: Dialogue, packing: Packing, tally: Tally) -> None:
    """Adds one conversation under one policy."""
    documents = pack(dialogue.turns, packing)
    memory, tokens = memory_of(engine, documents)
    place = {id(turn): name for turn, name in zip(dialogue.turns, dialogue.ids, strict=True)}
    holds = [{place[id(turn)] for turn in document.turns} for document in documents]
    tally.documents += len(documents)
    tally.tokens += sum(tokens)
    for question, gold in dialogue.questions:
        ranked = engine.route(question, memory, RETURNED)
        cuts = {f"@{cut}": ranked[:cut] for cut in CUTOFFS}
        cuts |= {f"@{budget} tokens": within(ranked, tokens, budget) for budget in BUDGETS}
        for name, taken in cuts.items():
            turns = set().union(*(holds[document.number - 1] for document in taken))
            tally.found[f"recall{name}"] += len(turns & set(gold)) / len(set(gold))
            tally.found[f"tokens{name}"] += sum(tokens[d.number - 1] for d in taken)
        tally.questions += 1


def report(tally: Tally) -> dict[str, float | int]:
    """Means over questions."""
    means = {
        name: round(total / tally.questions, 1 if name.startswith("tokens") else 4)
        for name, total in tally.found.items()
    }
    return {
        "documents": tally.documents,
        "tokens_per_document": round(tally.tokens / tally.documents, 1),
        "questions": tally.questions,
        **means,
        "seconds": round(tally.seconds, 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Prints the table, or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing")
    parser.add_argument("--bank", choices=("locomo", "realtalk"), required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of the question banks")
    parser.add_argument("--model", default="default")
    parser.add_argument("--data-dir", type=Path, default=Path(".data"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--conversations", type=int, default=0, help="the first N; 0 for all")
    parser.add_argument("--policy", choices=POLICIES, action="append", help="default: all")
    parser.add_argument("--pool-tokens", type=int, default=0, help="instead of the model's own")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    model = load_engine_source(arguments.model, DataFolder(arguments.data_dir))
    if arguments.pool_tokens:
        config = model.config.with_msa(pool_tokens=arguments.pool_tokens)
        model = replace(model, config=config)
    engine = MsaEngine(model, arguments.device)
    bank = read_bank(arguments.data, arguments.bank)
    chosen = list(bank.values())[: arguments.conversations or None]
    results = {}
    for name in arguments.policy or POLICIES:
        tally, started = Tally(), time.perf_counter()
        for dialogue in chosen:
            measure(engine, dialogue, POLICIES[name], tally)
        tally.seconds = time.perf_counter() - started
        results[name] = report(tally)
        if not arguments.json:
            print(f"{name:10}", results[name], flush=True)
    if arguments.json:
        head = {"bank": arguments.bank, "model": model.model_id, "device": arguments.device}
        layout = {"pool_tokens": model.config.msa.pool_tokens, "conversations": len(chosen)}
        print(json.dumps({**head, **layout, "policies": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
