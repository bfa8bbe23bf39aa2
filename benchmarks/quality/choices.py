"""What to choose for an adapter, on questions that are in no table of results.

    python -m benchmarks.quality.choices --bank friendsqa_dev --adapter FILE --limit 100 \
        --weights 0.2,0.4,0.6 --put-in 3:128,5:256 --declines 0.3,0.5 --json

For each share of the question's words (`lexical_weight`), recall of routing and words. For each
N:T, at most N documents and none behind T tokens of them, and each probability from which the
model declines: F1 of answers over what routing and words rank, with the model's own share,
beside F1 over the gold documents. Questions are drawn with a seed of their own, and those that
`--besides N` answers of a table would draw are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import banks, rankers, sampling
from benchmarks.quality.answers import Asked, answer_all
from benchmarks.quality.banks import Question, Scope
from benchmarks.quality.encoded import BlockCache, Encoded, EncodedView
from benchmarks.quality.evaluate import choose
from benchmarks.quality.metrics import CUTOFFS
from benchmarks.quality.rankers import Ranking
from benchmarks.quality.tally import Tally
from model_adapter.checkpoints import CheckpointError, load_engine_source
from model_adapter.engines import choose_device
from model_adapter.msa.config import LoadedModel
from model_adapter.msa.engine import MsaEngine
from storage.paths import DataFolder

ANSWER_TOKENS = 24
DRAWN_BY = 7


@dataclass(frozen=True)
class Reading:
    """How many documents are put in, behind how many tokens none, and when to decline."""

    documents: int
    enough_tokens: int
    unknown_share: float

    def __str__(self) -> str:
        return f"{self.documents}:{self.enough_tokens}:{self.unknown_share}"


class Choices:
    """One model over one bank."""

    def __init__(self, model: LoadedModel, device: torch.device, cache: Path, batch: int) -> None:
        self._model, self._device, self._batch = model, device, batch
        self._engine = self._start(model)
        self._blocks = BlockCache(cache / "blocks", self._engine)

    def measure(
        self, bank: banks.Bank, weights: Sequence[float], readings: Sequence[Reading]
    ) -> dict[str, Any]:
        """Recall by weight, and F1, declines and gold documents put in by reading."""
        by_weight = {weight: Tally() for weight in weights}
        by_reading: dict[str, Tally] = {}
        shares = sorted({reading.unknown_share for reading in readings})
        engines = {reading: self._reader(reading) for reading in readings}
        for scope in bank.scopes.values():
            encoded = self._blocks.encode(scope.texts())
            best = self._rank(scope, encoded, by_weight)
            for reading, engine in engines.items():
                self._answer(
                    engine, scope, encoded, best, by_reading.setdefault(str(reading), Tally())
                )
            for share in shares:
                engine = next(engines[r] for r in readings if r.unknown_share == share)
                gold = by_reading.setdefault(f"gold:{share}", Tally())
                self._answer(engine, scope, encoded, None, gold)
        return {
            "bank": bank.name,
            "questions": len(bank.questions),
            "weights": {str(weight): tally.recalls_only() for weight, tally in by_weight.items()},
            "readings": {
                name: {key: tally.figures()[key] for key in ("f1", "declines", "cites_gold")}
                for name, tally in by_reading.items()
            },
        }

    def _reader(self, reading: Reading) -> MsaEngine:
        template = replace(
            self._model.template,
            documents=reading.documents,
            enough_tokens=reading.enough_tokens,
            unknown_share=reading.unknown_share,
        )
        return self._start(replace(self._model, template=template))

    def _start(self, model: LoadedModel) -> MsaEngine:
        """An engine lets go of the weights it was given: it gets a map of its own."""
        return MsaEngine(replace(model, weights=dict(model.weights)), str(self._device))

    def _rank(
        self, scope: Scope, encoded: Encoded, by_weight: dict[float, Tally]
    ) -> dict[str, Ranking]:
        """Adds to the tallies; the ranking at the model's own share."""
        texts, numbers = scope.texts(), scope.numbers()
        routing = rankers.Routing(self._engine, EncodedView(encoded, texts, self._device))
        hybrid, own = rankers.Hybrid(routing, texts), routing.weight
        found: dict[str, Ranking] = {}
        for question in scope.questions:
            gold = {numbers[name] for name in question.gold}
            for weight, tally in by_weight.items():
                routing.weight = weight
                ranking = hybrid.rank(question.text, CUTOFFS[-1])
                tally.ranked([number for number, _ in ranking], gold, 0.0)
            routing.weight = own
            found[question.id] = hybrid.rank(question.text, CUTOFFS[-1])
        return found

    def _answer(
        self,
        engine: MsaEngine,
        scope: Scope,
        encoded: Encoded,
        ranked: dict[str, Ranking] | None,
        tally: Tally,
    ) -> None:
        texts, numbers = scope.texts(), scope.numbers()
        asked = [question for question in scope.questions if question.answers]

        def each() -> Iterator[Asked]:
            for question in asked:
                gold = sorted(numbers[name] for name in question.gold)
                order = gold if ranked is None else [n for n, _ in ranked[question.id]]
                part = EncodedView(encoded.take(order), texts, self._device)
                count = len(gold) if ranked is None else 0
                yield Asked(question.text, part, count, () if ranked is None else order)

        answers = answer_all(engine, each(), tokens=ANSWER_TOKENS, batch=self._batch)
        for question, (answer, seconds) in zip(asked, answers, strict=True):
            tally.answered(question, {numbers[name] for name in question.gold}, answer, seconds)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.choices")
    parser.add_argument("--bank", required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="default")
    parser.add_argument("--adapter", default="auto")
    parser.add_argument("--data-dir", type=Path, default=Path(".data"))
    parser.add_argument("--cache", type=Path, default=Path(".data/quality"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--only", default="", help="conversations that alone take part: A,B")
    parser.add_argument("--besides", type=int, default=0)
    parser.add_argument("--weights", default="0.2,0.3,0.4,0.5,0.6")
    parser.add_argument("--put-in", default="3:128,3:256,5:256", metavar="N:T,..")
    parser.add_argument("--declines", default="0.3")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def _drawn(arguments: argparse.Namespace) -> banks.Bank:
    bank = banks.read(arguments.bank, arguments.data)
    only = set(arguments.only.split(",")) if arguments.only else bank.scopes.keys()
    used: frozenset[str] = frozenset()
    if arguments.besides:
        used = choose([q for q in bank.questions if q.answers], arguments.besides, 0)
    kept: dict[str, Scope] = {}
    for name, scope in bank.scopes.items():
        asked: list[Question] = [q for q in scope.questions if q.id not in used]
        if name in only and asked:
            kept[name] = Scope(scope.documents, asked)
    whole = banks.Bank(bank.name, kept)
    return sampling.draw(whole, questions=arguments.limit, characters=0, seed=DRAWN_BY)


def main(argv: list[str] | None = None) -> int:
    """Prints one JSON object, or a line a figure; 2 with a message for what cannot be run."""
    a = _parse(argv)
    try:
        bank, device = _drawn(a), choose_device(a.device)
        model = load_engine_source(a.model, DataFolder(a.data_dir), "auto", a.adapter)
        readings = [
            Reading(int(count), int(tokens), float(share))
            for count, _, tokens in (pair.partition(":") for pair in a.put_in.split(","))
            for share in a.declines.split(",")
        ]
        weights = [float(weight) for weight in a.weights.split(",")]
        found = Choices(model, device, a.cache, a.batch).measure(bank, weights, readings)
    except (banks.BankError, CheckpointError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    if a.json:
        print(json.dumps(found))
        return 0
    print(f"{found['bank']}: {found['questions']} questions")
    for kind in ("weights", "readings"):
        for name, figures in found[kind].items():
            told = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
            print(f"  {name}: {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
