"""Question banks: documents, and questions with the documents that answer them.

A bank is two files, PREFIX.corpus.jsonl and PREFIX.questions.jsonl, each plain or
compressed as .zst, one JSON object a line:

  corpus     {"doc_id", "text", "title"?, "conv"?}
  questions  {"id", "question", "answers", "gold_doc_ids", "conv"?}

A question with "conv" is asked over the documents of that conversation alone.
"""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import zstandard

from storage.documents import Conversation, Role, Source, TextSource, Turn, render

#: Before a bank's own name, where a folder of banks is searched for it.
PREFIXES = ("", "eval_", "mem_")

_DATES = (
    (re.compile(r"\d{1,2}:\d{2} [ap]m on \d{1,2} \w+, \d{4}"), "%I:%M %p on %d %B, %Y"),
    (re.compile(r"\d{1,2}\.\d{1,2}\.\d{4}, \d{2}:\d{2}:\d{2}"), "%d.%m.%Y, %H:%M:%S"),
    (re.compile(r"[A-Z][a-z]+-\d{1,2}-\d{4}"), "%B-%d-%Y"),
)
#: "Name: what was said", in one line: a turn.
_TURN = re.compile(r"(?P<speaker>\w[\w .'\-]{0,39}): (?P<text>[^\n]+)")


class BankError(ValueError):
    """A bank that is not there or not as its format says; names the file and the line."""


@dataclass(frozen=True)
class Document:
    """One document of a bank as a memory holds it."""

    id: str
    source: Source

    @property
    def text(self) -> str:
        """What a model, and every other ranking, reads of it."""
        return render(self.source)


@dataclass(frozen=True)
class Question:
    """gold: ids of the documents that answer it. No answers: it has none in the bank."""

    id: str
    text: str
    answers: tuple[str, ...]
    gold: frozenset[str]
    scope: str


@dataclass
class Scope:
    """Documents that are searched together, in the bank's order."""

    documents: list[Document] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    def numbers(self) -> dict[str, int]:
        """Document ids by number, from 1."""
        return {document.id: n for n, document in enumerate(self.documents, start=1)}

    def texts(self) -> dict[int, str]:
        """Rendered texts by number, from 1."""
        return {n: document.text for n, document in enumerate(self.documents, start=1)}


@dataclass
class Bank:
    """Scopes by name; a bank without conversations has one, named ""."""

    name: str
    scopes: dict[str, Scope]

    @property
    def documents(self) -> int:
        """Documents of all scopes."""
        return sum(len(scope.documents) for scope in self.scopes.values())

    @property
    def questions(self) -> list[Question]:
        """Questions of all scopes."""
        return [question for scope in self.scopes.values() for question in scope.questions]


def occurred_at(title: str) -> datetime | None:
    """The date in a document's title, in any bank's spelling."""
    for pattern, spelling in _DATES:
        if match := pattern.search(title):
            return datetime.strptime(match[0], spelling).replace(tzinfo=UTC)
    return None


def find(spec: str, data: Path) -> tuple[Path, Path]:
    """Corpus and questions of a bank: a folder, a path prefix, or a name in `data`.

    Raises BankError.
    """
    prefixes = [Path(spec) / "", Path(spec), *(data / f"{before}{spec}" for before in PREFIXES)]
    for prefix in prefixes:
        found = [_file(prefix, part) for part in ("corpus", "questions")]
        if found[0] and found[1]:
            return found[0], found[1]
    raise BankError(f"no bank {spec!r}: no {spec}.corpus.jsonl and .questions.jsonl, nor in {data}")


def _file(prefix: Path, part: str) -> Path | None:
    stems = [prefix / part] if prefix.is_dir() else [prefix.with_name(f"{prefix.name}.{part}")]
    names = (stem.with_name(stem.name + end) for stem in stems for end in (".jsonl", ".jsonl.zst"))
    return next((name for name in names if name.is_file()), None)


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl or .jsonl.zst file. Raises BankError."""
    with path.open("rb") as file:
        raw = zstandard.ZstdDecompressor().stream_reader(file) if path.suffix == ".zst" else file
        for place, line in enumerate(io.TextIOWrapper(raw, encoding="utf-8"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise BankError(f"{path.name}:{place}: {error}") from None
            if not isinstance(row, dict):
                raise BankError(f"{path.name}:{place}: not an object")
            yield row


def source_of(row: dict[str, Any], *, dates: bool) -> Source:
    """A corpus row as an application would put it in.

    A line of a conversation becomes a turn, with its speaker; anything else a text. The date
    in a conversation's title becomes occurred_at; dates: False leaves it out.
    """
    title = str(row.get("title") or "")
    if "conv" not in row:
        return TextSource(row["text"], title)
    moment = occurred_at(title) if dates else None
    if match := _TURN.fullmatch(row["text"]):
        return Conversation((Turn(Role.USER, match["text"], moment, match["speaker"]),))
    return TextSource(row["text"], occurred_at=moment)


def read(
    spec: str, data: Path, *, limit: int = 0, scopes: int = 0, seed: int = 0, dates: bool = True
) -> Bank:
    """Reads a bank.

    limit: so many questions, drawn with `seed` and kept in order; 0 for all. scopes: the first
    so many conversations; 0 for all. Questions without gold documents and scopes without
    questions are left out. Raises BankError.
    """
    corpus, questions = find(spec, data)
    found: dict[str, Scope] = {}
    for place, row in enumerate(rows(corpus), start=1):
        _check(corpus, place, row, "doc_id", "text")
        scope = found.setdefault(str(row.get("conv", "")), Scope())
        scope.documents.append(Document(row["doc_id"], source_of(row, dates=dates)))
    kept = [question for question in _questions(questions) if question.gold]
    names = sorted({question.scope for question in kept})[: scopes or None]
    kept = [question for question in kept if question.scope in names]
    if limit and limit < len(kept):
        chosen = set(random.Random(seed).sample(range(len(kept)), limit))
        kept = [question for place, question in enumerate(kept) if place in chosen]
    for question in kept:
        if question.scope not in found:
            raise BankError(f"question {question.id}: no document of {question.scope!r}")
        found[question.scope].questions.append(question)
    _check_gold(found)
    name = corpus.name.removesuffix(".zst").removesuffix("corpus.jsonl").rstrip(".")
    used = {scope: found[scope] for scope in sorted(found) if found[scope].questions}
    return Bank(name or corpus.parent.name, used)


def _questions(path: Path) -> Iterator[Question]:
    for place, row in enumerate(rows(path), start=1):
        _check(path, place, row, "id", "question")
        yield Question(
            row["id"],
            row["question"],
            tuple(str(answer) for answer in row.get("answers") or ()),
            frozenset(row.get("gold_doc_ids") or ()),
            str(row.get("conv", "")),
        )


def _check(path: Path, place: int, row: dict[str, Any], *keys: str) -> None:
    for key in keys:
        if not isinstance(row.get(key), str) or not row[key]:
            raise BankError(f"{path.name}: row {place} has no text in {key!r}")


def _check_gold(scopes: dict[str, Scope]) -> None:
    for scope in scopes.values():
        ids = [document.id for document in scope.documents]
        known = set(ids)
        if len(known) < len(ids):
            raise BankError(f"a doc_id stands twice: {max(ids, key=ids.count)}")
        for question in scope.questions:
            if missing := question.gold - known:
                raise BankError(f"question {question.id}: no document {min(missing)!r}")
