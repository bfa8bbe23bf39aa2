"""A memory's full-text index: to make it, to add to it, to ask it, and its bytes.

    python -m benchmarks.lexical --json

Documents of 60 words drawn from a Zipf distribution over 50,000 made-up words; questions of
eight words, half of them frequent. The index is the one that the worker keeps per memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import numpy as np

from model_adapter.lexical import LexicalIndex

WORDS, DOCUMENT_WORDS, QUESTION_WORDS = 50_000, 60, 8
APPENDED, QUESTIONS = 10, 50
SIZES = (1_000, 10_000, 100_000)


def documents(count: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    weights = 1 / np.arange(1, WORDS + 1)
    picked = draw.choice(WORDS, (count, DOCUMENT_WORDS), p=weights / weights.sum())
    return [" ".join(f"word{word}" for word in row) for row in picked]


def questions(seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    frequent = draw.integers(0, 30, (QUESTIONS, QUESTION_WORDS // 2))
    rare = draw.integers(30, WORDS, (QUESTIONS, QUESTION_WORDS // 2))
    return [" ".join(f"word{word}" for word in row) for row in np.hstack([frequent, rare])]


def measure(size: int) -> dict[str, float | int]:
    texts = documents(size + APPENDED, seed=size)
    index = LexicalIndex()
    began = time.perf_counter()
    index.add(enumerate(texts[:size], start=1))
    built = time.perf_counter() - began
    began = time.perf_counter()
    index.add(enumerate(texts[size:], start=size + 1))
    appended = time.perf_counter() - began
    took = []
    for question in questions(seed=1):
        began = time.perf_counter()
        index.search(question, 50)
        took.append((time.perf_counter() - began) * 1000)
    report = {
        "documents": size,
        "build_s": round(built, 3),
        f"append_{APPENDED}_ms": round(appended * 1000, 2),
        "search_ms_median": round(statistics.median(took), 2),
        "search_ms_worst": round(max(took), 2),
        "bytes_per_document": index.bytes // (size + APPENDED),
    }
    index.wipe()
    return report


def main(argv: list[str] | None = None) -> int:
    """Prints one line per size, or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lexical")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    reports = [measure(size) for size in SIZES]
    if arguments.json:
        print(json.dumps({"sizes": reports}))
    else:
        for report in reports:
            print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
