"""Recall as a bank is diluted with other documents, from 16K to 1M tokens and beyond.

    python -m benchmarks.scale --bank squad_v11_dev --data DIR --json --svg recall.svg

Questions are put in groups, so that the gold documents of a group fill half of the smallest
size; the rest, and all of what larger sizes add, are passages of --distractors, in an order
drawn once. A smaller memory is the beginning of a larger one, so each passage is encoded
once and kept. A passage that has the title or the beginning of one of the bank's documents is
left out: it could answer a question as well.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import plot, sizes
from benchmarks.machine import machine
from benchmarks.progress import bar
from benchmarks.quality import banks, rankers
from benchmarks.quality.banks import Bank, BankError, Document, Question
from benchmarks.quality.encoded import BlockCache, Encoded, EncodedView, join
from benchmarks.quality.evaluate import BM25, HYBRID, OURS
from benchmarks.quality.rankers import Bm25, MissingPackageError, Ranker
from benchmarks.quality.tally import Tally
from model_adapter.engine import Engine
from model_adapter.engines import UnusableModelError, choose_device, load_engine
from storage.documents import TextSource
from storage.paths import DataFolder

ROWS = (OURS, BM25, HYBRID)
#: Characters of a document's beginning that tell a copy.
BEGINNING = 80
#: Returned by a ranking.
DEPTH = 10
#: Passages that tell how many tokens a passage has.
PROBE = 100


@dataclass(frozen=True)
class Group:
    """Questions that are asked over one memory. gold: numbers by question."""

    questions: tuple[Question, ...]
    gold: Mapping[str, frozenset[int]]

    @property
    def numbers(self) -> list[int]:
        """Of all gold documents."""
        return sorted(set().union(*self.gold.values()))


def passages(pattern: str, data: Path, own: Sequence[Document], seed: int) -> list[str]:
    """Texts of all corpora in `data` whose names begin with `pattern`, shuffled, without those
    that resemble the bank's `own`. Raises BankError when there are none."""
    files = sorted(data.glob(f"{pattern}*.corpus.jsonl*"))
    titles, beginnings = set(), set()
    for document in own:
        if isinstance(document.source, TextSource):
            titles.add(document.source.title.lower())
            beginnings.add(_beginning(document.source.text))
    titles.discard("")
    found = [
        banks.Document(row["doc_id"], banks.source_of(row, dates=True)).text
        for row in _rows(files)
        if str(row.get("title", "")).lower() not in titles
        and _beginning(row["text"]) not in beginnings
    ]
    if not found:
        raise BankError(f"no passages: no {pattern}*.corpus.jsonl in {data}")
    random.Random(seed).shuffle(found)
    return found


def _rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for file in files:
        yield from banks.rows(file)


def _beginning(text: str) -> str:
    return "".join(text.lower().split())[:BEGINNING]


def grouped(bank: Bank, gold: Encoded, numbers: Mapping[str, int], tokens: int) -> list[Group]:
    """Questions in the bank's order, cut where their gold documents would pass `tokens`."""
    sizes_of = dict(zip(gold.numbers_N.tolist(), gold.tokens_N.tolist(), strict=True))
    groups: list[Group] = []
    questions: list[Question] = []
    held: set[int] = set()
    for question in bank.questions:
        wanted = {numbers[name] for name in question.gold}
        if questions and sum(sizes_of.get(n, 0) for n in held | wanted) > tokens:
            groups.append(_group(questions, numbers))
            questions, held = [], set()
        questions.append(question)
        held |= wanted
    return [*groups, _group(questions, numbers)]


def _group(questions: Sequence[Question], numbers: Mapping[str, int]) -> Group:
    gold = {q.id: frozenset(numbers[name] for name in q.gold) for q in questions}
    return Group(tuple(questions), gold)


class Dilution:
    """Gold documents and passages of one bank, encoded. Gold documents have the numbers from
    1, passages those behind them."""

    def __init__(
        self,
        engine: Engine,
        bank: Bank,
        others: Sequence[str],
        cache: Path,
        size: Mapping[str, int],
    ) -> None:
        """Raises BankError when there are too few passages, or the bank has conversations."""
        if len(bank.scopes) != 1:
            raise BankError(f"{bank.name}: a bank of conversations cannot be diluted")
        self._engine, self._sizes = engine, size
        self._blocks = BlockCache(cache / "blocks", engine, content=False)
        (scope,) = bank.scopes.values()
        wanted = set().union(*(question.gold for question in bank.questions))
        golds = [document for document in scope.documents if document.id in wanted]
        numbers = {document.id: n for n, document in enumerate(golds, start=1)}
        self._texts = {numbers[document.id]: document.text for document in golds}
        with bar("encode gold", len(golds)) as advance:
            self._gold = self._blocks.encode(self._texts, advance)
        self.groups = grouped(bank, self._gold, numbers, min(size.values()) // 2)
        self._others = self._encode(others, max(size.values()))

    def _encode(self, others: Sequence[str], tokens: int) -> Encoded:
        """As many passages as have so many tokens together."""
        first = len(self._texts) + 1
        probe = self._blocks.encode(dict(enumerate(others[:PROBE], start=first)))
        enough = int(1.1 * tokens * len(probe.numbers_N) / probe.tokens) + PROBE
        texts = dict(enumerate(others[:enough], start=first))
        with bar("encode passages", len(texts)) as advance:
            encoded = self._blocks.encode(texts, advance)
        if encoded.tokens < tokens:
            raise BankError(f"all passages have {encoded.tokens} tokens, not {tokens}")
        self._texts |= texts
        return encoded

    def memory(self, group: Group, tokens: int) -> Encoded:
        """The group's gold documents, and passages up to so many tokens in all."""
        gold = self._gold.take(group.numbers)
        passages = int((self._others.tokens_N.cumsum() <= tokens - gold.tokens).sum())
        return join([gold, self._others.first(passages)])

    def measure(self, rows: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Figures by size and row."""
        results: dict[str, dict[str, Any]] = {}
        for name, tokens in self._sizes.items():
            tallies = {row: Tally() for row in rows}
            encoded: Encoded | None = None
            with bar(name, sum(len(group.questions) for group in self.groups)) as advance:
                for group in self.groups:
                    encoded = self.memory(group, tokens)
                    self._ask(group, encoded, tallies)
                    advance(len(group.questions))
            assert encoded is not None
            results[name] = {"tokens": tokens, "documents": len(encoded.numbers_N)}
            results[name] |= {row: tally.recalls_only() for row, tally in tallies.items()}
        return results

    def _ask(self, group: Group, encoded: Encoded, tallies: Mapping[str, Tally]) -> None:
        texts = {int(number): self._texts[int(number)] for number in encoded.numbers_N}
        memory = EncodedView(encoded, texts, self._engine.description.device)
        routing = rankers.Routing(self._engine, memory)
        made: dict[str, Ranker] = {OURS: routing}
        if BM25 in tallies:
            made[BM25] = Bm25(texts)
        if HYBRID in tallies:
            made[HYBRID] = rankers.Hybrid(routing, texts)
        for row, tally in tallies.items():
            for question in group.questions:
                ranking = made[row].rank(question.text, DEPTH)
                tally.ranked([number for number, _ in ranking], group.gold[question.id], 0.0)


def chart(title: str, results: Mapping[str, Mapping[str, Any]], rows: Sequence[str]) -> str:
    """Recall@5 by size, as SVG."""
    ticks = {name: float(figures["tokens"]) for name, figures in results.items()}
    lines = {
        row: [(ticks[name], float(figures[row]["recall@5"])) for name, figures in results.items()]
        for row in rows
    }
    return plot.shares(title, "tokens in the memory", ticks, lines)


def fall(results: Mapping[str, Mapping[str, Any]], row: str) -> float | None:
    """Share of recall@5 that is lost between the first size and the last."""
    recalls = [figures[row]["recall@5"] for figures in results.values()]
    return round(1 - recalls[-1] / recalls[0], 4) if recalls[0] else None


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale")
    parser.add_argument("--bank", default="squad_v11_dev")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--distractors", default="bank_wiki_passages", help="corpora in --data")
    parser.add_argument("--sizes", type=sizes.parse, default=sizes.parse("16K,64K,256K,1M"))
    parser.add_argument("--limit", type=int, default=300, help="questions, drawn; 0 for all")
    parser.add_argument("--rows", default="ours,bm25,hybrid", help="of " + ", ".join(ROWS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="default")
    parser.add_argument("--adapter", default="auto", help="a file, none, or auto: the model's own")
    parser.add_argument("--data-dir", type=Path, default=Path(".data"), help="where models are")
    parser.add_argument("--cache", type=Path, default=Path(".data/quality"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--svg", type=Path, help="where to draw recall@5")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.rows.split(",")) - set(ROWS):
        parser.error(f"--rows: {', '.join(sorted(unknown))} is none of {', '.join(ROWS)}")
    return arguments


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Raises BankError, MissingPackageError, UnusableModelError."""
    rows = arguments.rows.split(",")
    if BM25 in rows:
        rankers.require("bm25s", BM25)
        rankers.require("Stemmer", BM25)
    bank = banks.read(arguments.bank, arguments.data, limit=arguments.limit, seed=arguments.seed)
    own = [document for scope in bank.scopes.values() for document in scope.documents]
    others = passages(arguments.distractors, arguments.data, own, arguments.seed)
    device, data = choose_device(arguments.device), DataFolder(arguments.data_dir)
    engine = load_engine(arguments.model, data, device, arguments.dtype, arguments.adapter)
    dilution = Dilution(engine, bank, others, arguments.cache, arguments.sizes)
    results = dilution.measure(rows)
    if arguments.svg:
        arguments.svg.write_text(chart(f"Recall@5, {bank.name}", results, rows))
    return {
        "bank": bank.name,
        "questions": len(bank.questions),
        "groups": len(dilution.groups),
        "model": engine.description.display_name,
        "identity": engine.description.identity,
        "machine": machine(),
        "sizes": results,
        "fall_of_recall@5": {row: fall(results, row) for row in rows},
    }


def main(argv: list[str] | None = None) -> int:
    """Prints a line per size, or one JSON object; 2 with a message for what cannot be run."""
    arguments = _arguments(argv)
    try:
        result = run(arguments)
    except (BankError, MissingPackageError, UnusableModelError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    if arguments.json:
        print(json.dumps(result))
    else:
        for name, figures in result["sizes"].items():
            print(name, figures)
        print("fall of recall@5", result["fall_of_recall@5"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
