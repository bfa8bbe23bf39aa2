"""Small training sets of our own, and settings for runs of a few steps on a tiny base."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from model_adapter.training.settings import Settings, read_settings
from tests.support.tiny_checkpoints import write_gguf

PLACES = ("harbour", "mill", "garden", "tower", "bridge", "market", "library", "station")
THINGS = ("lamp", "clock", "boat", "piano", "statue", "well", "map", "bell")

CONFIG = """
data = "{data}"
run = "{run}"
cache = "{cache}"
base = "{base}"
name = "Tiny with memory"
steps = 6
warm_up_steps = 2
routed_layers = [1, 2]
pool_tokens = 8
top_k = 2
rank = 4
document_tokens = 600
query_tokens = 500
answer_tokens = 900
max_document = 120
max_answer_row = 400
dialogues = 2
teacher = false
held_out = 4
checkpoint_every = 2
evaluate_every = 3
device = "cpu"

[[sources]]
name = "train_places"
licence = "CC-BY-4.0"
attribution = "made for tests"
weight = 1.0
pseudo_weight = 0.5
answers = 1.0
"""


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_places(folder: Path) -> None:
    """train_places: 64 documents, a question for each; eval_other: something else."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(place, thing) for place in PLACES for thing in THINGS]
    write_rows(
        folder / "train_places.corpus.jsonl",
        (
            {
                "doc_id": f"{place}-{thing}",
                "title": f"The {thing}",
                "text": f"Behind the {place} stands a {thing}. It was put there in {1800 + n} "
                f"by the people who lived beside the {place}.",
            }
            for n, (place, thing) in enumerate(pairs)
        ),
    )
    write_rows(
        folder / "train_places.questions.jsonl",
        (
            {
                "question": f"In which year was the {thing} behind the {place} put up?",
                "answers": [str(1800 + n)],
                "gold_doc_ids": [f"{place}-{thing}"],
            }
            for n, (place, thing) in enumerate(pairs)
        ),
    )
    write_rows(folder / "eval_other.corpus.jsonl", [{"doc_id": "e", "text": "Snow fell."}])
    write_rows(folder / "eval_other.questions.jsonl", [{"question": "Did snow fall?"}])


def tiny_settings(folder: Path, **overrides: str) -> Settings:
    """Settings over a fresh data folder and base, unless they are there."""
    if not (folder / "data").is_dir():
        write_places(folder / "data")
        write_gguf(folder / "Tiny.gguf")
    config = folder / "config.toml"
    config.write_text(
        CONFIG.format(
            data=folder / "data",
            run=folder / "run",
            cache=folder / "cache",
            base=folder / "Tiny.gguf",
        )
    )
    return read_settings(config, overrides)
