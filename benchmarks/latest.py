"""Whether the newest of the documents that answer a question is found first.

    python -m benchmarks.latest --bank beam_100K --category knowledge_update --user-only --json

Ranks every question of a category with and without `prefer_latest`, and counts how often the
newest gold document is among the first k. Rows: words (BM25 alone, no model), routing, and both
as the model weighs them. The bank's order is taken for the order of time, as not every document
is dated.

--user-only: of an exchange ("user: ..., assistant: ...") what the user said, which is what a
filter by role leaves where turns are documents.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality import banks
from benchmarks.quality.encoded import BlockCache, EncodedView
from model_adapter.blending import DEPTH
from model_adapter.engine import Engine, LexicalPrior, RankedDocument
from model_adapter.engines import UnusableModelError, choose_device, load_engine
from model_adapter.lexical import LexicalIndex
from model_adapter.superseding import LatestFirst, Statement
from storage.paths import DataFolder

CUTOFFS = (1, 3, 5, 10)
_REPLY = "\nassistant:"

#: Ranks the documents of one scope: question, limit.
Rank = Callable[[str, int], Sequence[RankedDocument]]


@dataclass(frozen=True)
class Asked:
    """A question, and the numbers of the documents that answer it, oldest first."""

    text: str
    gold: tuple[int, ...]


def by_words(texts: Mapping[int, str]) -> Rank:
    """BM25 alone."""
    index = LexicalIndex()
    index.add(sorted(texts.items()))

    def rank(question: str, limit: int) -> list[RankedDocument]:
        return [RankedDocument(n, score, ()) for n, score in index.search(question, limit).items()]

    return rank


def by_model(engine: Engine, view: EncodedView, texts: Mapping[int, str], weight: float) -> Rank:
    """Routing, with the words' share."""
    index = LexicalIndex()
    index.add(sorted(texts.items()))

    def rank(question: str, limit: int) -> list[RankedDocument]:
        prior = LexicalPrior(weight, index.search(question, max(limit, DEPTH))) if weight else None
        return engine.route(question, view, limit, prior)

    return rank


def places(rank: Rank, texts: Mapping[int, str], asked: Asked, *, latest: bool) -> list[int | None]:
    """Where each gold document stands, from 1; None: not among the first fifty."""

    def said(numbers: Sequence[int]) -> dict[int, Statement]:
        return {n: Statement(texts[n], n) for n in numbers}

    def own(limit: int) -> Sequence[RankedDocument]:
        return rank(asked.text, limit)

    found = [d.number for d in (LatestFirst(said)(own, DEPTH) if latest else own(DEPTH))]
    return [found.index(n) + 1 if n in found else None for n in asked.gold]


def figures(found: Sequence[Sequence[int | None]]) -> dict[str, float | int]:
    """newest@k: share of questions whose newest gold document is among the first k. all@k:
    recall of all gold documents. before_older: questions of several gold documents where the
    newest comes before every older one, as a share of those."""
    several = [gold for gold in found if len(gold) > 1]

    def first(gold: Sequence[int | None]) -> bool:
        *older, newest = gold
        return newest is not None and all(o is None or newest < o for o in older)

    report: dict[str, float | int] = {"questions": len(found), "with_older": len(several)}
    for k in CUTOFFS:
        report[f"newest@{k}"] = _mean([_within(gold[-1], k) for gold in found])
        report[f"all@{k}"] = _mean([_mean([_within(p, k) for p in gold]) for gold in found])
    report["before_older"] = _mean([first(gold) for gold in several])
    return report


def _within(place: int | None, k: int) -> bool:
    return place is not None and place <= k


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0


def questions(spec: str, data: Path, category: str) -> dict[str, list[tuple[banks.Scope, Asked]]]:
    """Of one category, by scope. Raises BankError."""
    _, file = banks.find(spec, data)
    wanted = {row["id"] for row in banks.rows(file) if str(row.get("category")) == category}
    found: dict[str, list[tuple[banks.Scope, Asked]]] = {}
    for name, scope in banks.read(spec, data).scopes.items():
        numbers = scope.numbers()
        for question in scope.questions:
            if question.id in wanted:
                gold = tuple(sorted(numbers[document] for document in question.gold))
                found.setdefault(name, []).append((scope, Asked(question.text, gold)))
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Raises BankError, UnusableModelError."""
    asked = questions(arguments.bank, arguments.data, arguments.category)
    if not asked:
        raise banks.BankError(f"{arguments.bank} has no questions of category {arguments.category}")
    engine = None
    if arguments.model != "none":
        device, data = choose_device(arguments.device), DataFolder(arguments.data_dir)
        engine = load_engine(arguments.model, data, device, "auto", arguments.adapter)
    found: dict[str, list[list[int | None]]] = {}
    for name in sorted(asked):
        texts = asked[name][0][0].texts()
        if arguments.user_only:
            texts = {number: text.split(_REPLY)[0] for number, text in texts.items()}
        ranks = {"words": by_words(texts)}
        if engine is not None:
            cache = BlockCache(arguments.cache, engine, content=False)
            view = EncodedView(cache.encode(texts), texts)
            ranks["routing"] = by_model(engine, view, texts, 0.0)
            ranks["both"] = by_model(engine, view, texts, engine.description.lexical_weight)
        for row, rank in ranks.items():
            for _, one in asked[name]:
                for latest, key in ((False, row), (True, f"{row}, latest")):
                    found.setdefault(key, []).append(places(rank, texts, one, latest=latest))
    rows = {row: figures(places) for row, places in found.items()}
    return {"bank": arguments.bank, "category": arguments.category, "rows": rows}


def main(argv: list[str] | None = None) -> int:
    """Prints one line per row, or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latest")
    parser.add_argument("--bank", required=True, help="as of benchmarks.quality")
    parser.add_argument("--category", required=True, help="of the bank's questions")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--user-only", action="store_true", help="without assistants' replies")
    parser.add_argument("--model", default="none", help="none: by words alone; default, a path")
    parser.add_argument("--adapter", default="auto")
    parser.add_argument("--data-dir", type=Path, default=Path(".data"))
    parser.add_argument("--cache", type=Path, default=Path(".data/quality"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        result = run(arguments)
    except (banks.BankError, UnusableModelError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    if arguments.json:
        print(json.dumps(result))
    else:
        for row, own in result["rows"].items():
            print(row, own)
    return 0


if __name__ == "__main__":
    sys.exit(main())
