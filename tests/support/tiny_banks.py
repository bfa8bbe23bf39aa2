"""Small question banks of our own, as files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import zstandard

Row = Mapping[str, Any]


def write_bank(
    prefix: Path, corpus: Iterable[Row], questions: Iterable[Row], *, compressed: bool = False
) -> Path:
    """PREFIX.corpus.jsonl and PREFIX.questions.jsonl, or .zst; returns the prefix."""
    for part, rows in (("corpus", corpus), ("questions", questions)):
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        end = ".jsonl.zst" if compressed else ".jsonl"
        packed = zstandard.ZstdCompressor().compress(data) if compressed else data
        prefix.with_name(f"{prefix.name}.{part}{end}").write_bytes(packed)
    return prefix


def asked(name: str, text: str, answer: str, *gold: str, conv: str | None = None) -> Row:
    """A row of questions; no answer when it is empty."""
    row = {
        "id": name,
        "question": text,
        "answers": [answer] if answer else [],
        "gold_doc_ids": list(gold),
    }
    return row if conv is None else row | {"conv": conv}


#: Every question shares rare words with its gold document alone.
HARBOUR = (
    {"doc_id": "d1", "title": "", "text": "Lighthouse keeper Brundage painted turbines."},
    {"doc_id": "d2", "title": "", "text": "Quillon ferried walnuts towards Skarholm."},
    {"doc_id": "d3", "title": "", "text": "Harpsichord lessons cost eleven florins."},
    {"doc_id": "d4", "title": "", "text": "Vestibule carpets shrank overnight."},
)
HARBOUR_QUESTIONS = (
    asked("q1", "Who painted turbines?", HARBOUR[0]["text"], "d1"),
    asked("q2", "Where did Quillon ferry walnuts?", HARBOUR[1]["text"], "d2"),
    asked("q3", "What cost eleven florins?", "nothing of the kind", "d3"),
)


def harbour(folder: Path) -> Path:
    """The bank of these, in a new file pair."""
    return write_bank(folder / "harbour", HARBOUR, HARBOUR_QUESTIONS)
