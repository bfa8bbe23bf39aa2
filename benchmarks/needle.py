"""Needles in a memory: facts hidden among generated turns, from 4K to 1M tokens.

    python -m benchmarks.needle --sizes 4K,16K,64K,256K,1M --json

The four forms are those of RULER (arXiv 2404.06654), the text is ours. A needle is a turn
that tells a code; its number among the other turns is drawn.

  single       one needle
  multi_key    the needle among others with other keys
  multi_value  one key with several codes, each in a turn of its own, all asked for
  multi_query  several keys, all asked for

The turns around are encoded once, for the largest size; a smaller memory is the first of
them. `found` is the share of the wanted turns among the best `--documents`, `answered` the
share of the wanted codes in the answer, with that many documents put in.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks import sizes, workload
from benchmarks.ingest import as_source
from benchmarks.machine import machine
from benchmarks.progress import bar
from benchmarks.quality import metrics
from benchmarks.quality.answers import Asked, answer_all
from benchmarks.quality.encoded import BlockCache, Encoded, EncodedView, join, of_blocks
from model_adapter.engine import DocumentText, Engine
from model_adapter.engines import UnusableModelError, choose_device, load_engine
from storage.documents import Conversation, Role, Turn, render
from storage.paths import DataFolder

FORMS = ("single", "multi_key", "multi_value", "multi_query")
#: Needles of a form that has several.
SEVERAL = 4
#: Every so many numbers are kept free for needles.
FREE = 8
SEED = 5
#: Turns of which the first tell how many tokens a turn has.
PROBE = 50

_LOOKS = ("amber", "brass", "crooked", "faded", "golden", "hollow", "ivory", "jagged", "mossy")
_THINGS = ("kayak", "lantern", "accordion", "wardrobe", "trunk", "sledge", "cabinet", "toolbox")


@dataclass(frozen=True)
class Needles:
    """What one trial hides and asks. texts: by number; wanted: numbers; codes: as asked for."""

    question: str
    texts: Mapping[int, str]
    wanted: frozenset[int]
    codes: tuple[str, ...]


def number_of(place: int) -> int:
    """Of the turn at a place, from 0, around the needles: no multiple of FREE."""
    return place + place // (FREE - 1) + 1


def needles(form: str, draw: random.Random, last: int) -> Needles:
    """A trial in a memory whose last number is `last`, which leaves room for SEVERAL."""
    free = draw.sample(range(FREE, last + 1, FREE), 1 if form == "single" else SEVERAL)
    pairs = [f"{look} {thing}" for look in _LOOKS for thing in _THINGS]
    keys = draw.sample(pairs, len(free))
    if form == "multi_value":
        keys = [keys[0]] * len(free)
    codes = [str(code) for code in draw.sample(range(100_000, 1_000_000), len(free))]
    texts = {
        number: _turn(draw, f"Write it down: the locker code for the {key} is {code}.")
        for number, key, code in zip(free, keys, codes, strict=True)
    }
    wanted = free[:1] if form in ("single", "multi_key") else free
    return Needles(_question(form, keys), texts, frozenset(wanted), tuple(codes[: len(wanted)]))


def _turn(draw: random.Random, text: str) -> str:
    moment = datetime(2024, 1, 3, 9, tzinfo=UTC) + timedelta(minutes=draw.randrange(500_000))
    return render(Conversation((Turn(Role.USER, text, moment, draw.choice(workload.PEOPLE)),)))


def _question(form: str, keys: list[str]) -> str:
    if form == "multi_value":
        return f"What are all the locker codes for the {keys[0]}?"
    if form == "multi_query":
        listed = ", the ".join(keys[:-1])
        return f"What are the locker codes for the {listed} and the {keys[-1]}?"
    return f"What is the locker code for the {keys[0]}?"


class Haystack:
    """Generated turns, encoded once, of at least `tokens` tokens."""

    def __init__(self, engine: Engine, tokens: int, cache: Path, *, content: bool) -> None:
        """content: also what answering may read."""
        blocks = BlockCache(cache / "blocks", engine, content=content)
        probe = blocks.encode(_turns(PROBE))
        # A tenth more than the first turns foretell, and the cut below makes it exact.
        self.texts = _turns(max(PROBE, int(1.1 * tokens / (probe.tokens / PROBE)) + 1))
        with bar("encode", len(self.texts)) as advance:
            self._encoded = blocks.encode(self.texts, advance)
        if self._encoded.tokens < tokens:
            raise ValueError(f"{len(self.texts)} turns have {self._encoded.tokens} tokens")

    def of(self, tokens: int) -> Encoded:
        """The first turns that have so many tokens together, and at least room for needles."""
        turns = int((self._encoded.tokens_N.cumsum() < tokens).sum()) + 1
        return self._encoded.first(max(turns, SEVERAL * FREE))


def _turns(count: int) -> dict[int, str]:
    lines = islice(workload.conversation(SEED, count), count)
    return {number_of(place): render(as_source(line)) for place, line in enumerate(lines)}


@dataclass(frozen=True)
class Plan:
    """trials: per form and size, of which `answers` are answered too, in so many tokens."""

    forms: tuple[str, ...] = FORMS
    trials: int = 20
    answers: int = 0
    documents: int = 10
    answer_tokens: int = 64
    seed: int = 0


def measure(
    engine: Engine, haystack: Haystack, size: Mapping[str, int], plan: Plan
) -> dict[str, dict[str, Any]]:
    """Figures by size and form."""
    results: dict[str, dict[str, Any]] = {}
    for name, tokens in size.items():
        around = haystack.of(tokens)
        results[name] = {"tokens": around.tokens, "documents": len(around.numbers_N)}
        for form in plan.forms:
            with bar(f"{name} {form}", plan.trials) as advance:
                found, answered = [], []
                for trial in range(plan.trials):
                    # The same needles' text at every size; only their places differ.
                    hidden = needles(
                        form, random.Random(f"{plan.seed} {trial}"), int(around.numbers_N[-1])
                    )
                    memory = _memory(engine, haystack, around, hidden)
                    ranked = engine.route(hidden.question, memory, plan.documents)
                    numbers = [document.number for document in ranked]
                    found.append(metrics.recall(numbers, hidden.wanted, plan.documents))
                    if trial < plan.answers:
                        answered.append(_answered(engine, hidden, memory, plan))
                    advance(1)
            figures = {"found": metrics.mean(found), "answered": metrics.mean(answered)}
            results[name][form] = figures
    return results


def _memory(engine: Engine, haystack: Haystack, around: Encoded, hidden: Needles) -> EncodedView:
    texts = [DocumentText(number, text) for number, text in hidden.texts.items()]
    blocks = sorted(engine.encode(texts).blocks, key=lambda block: block.number)
    inside = of_blocks(blocks, around.layout)
    if "value" not in around.arrays:
        inside = inside.routing_only()
    return EncodedView(
        join([around, inside]), {**haystack.texts, **hidden.texts}, engine.description.device
    )


def _answered(engine: Engine, hidden: Needles, memory: EncodedView, plan: Plan) -> float:
    asked = [Asked(hidden.question, memory, plan.documents)]
    ((answer, _),) = answer_all(engine, asked, tokens=plan.answer_tokens)
    return sum(code in answer.text for code in hidden.codes) / len(hidden.codes)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.needle")
    parser.add_argument("--sizes", type=sizes.parse, default=sizes.parse("4K,16K,64K,256K,1M"))
    parser.add_argument("--form", choices=FORMS, action="append", help="default: all")
    parser.add_argument("--trials", type=int, default=20, help="per form and size")
    parser.add_argument("--answers", type=int, default=0, help="of the trials, also answered")
    parser.add_argument("--documents", type=int, default=10, help="routed to, and put in")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="default")
    parser.add_argument("--adapter", default="auto", help="a file, none, or auto: the model's own")
    parser.add_argument("--data-dir", type=Path, default=Path(".data"), help="where models are")
    parser.add_argument("--cache", type=Path, default=Path(".data/quality"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Prints a line per size, or one JSON object; 2 with a message for an unusable model."""
    arguments = _arguments(argv)
    plan = Plan(
        tuple(arguments.form or FORMS),
        arguments.trials,
        min(arguments.answers, arguments.trials),
        arguments.documents,
        arguments.answer_tokens,
        arguments.seed,
    )
    data, device = DataFolder(arguments.data_dir), choose_device(arguments.device)
    try:
        engine = load_engine(arguments.model, data, device, arguments.dtype, arguments.adapter)
    except UnusableModelError as error:
        sys.stderr.write(f"UnusableModelError: {error}\n")
        return 2
    largest = max(arguments.sizes.values())
    haystack = Haystack(engine, largest, arguments.cache, content=bool(plan.answers))
    results = measure(engine, haystack, arguments.sizes, plan)
    described = engine.description
    head = {"model": described.display_name, "identity": described.identity, "machine": machine()}
    settings = {"trials": plan.trials, "documents": plan.documents, "sizes": results}
    if arguments.json:
        print(json.dumps({**head, **settings}))
    else:
        for name, figures in results.items():
            print(name, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
