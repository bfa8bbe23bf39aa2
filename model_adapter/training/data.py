"""Question sets: what is read from jsonl files, checked line by line.

NAME.corpus.jsonl[.zst]:    {"doc_id", "text", "title"?, "conv"?}
NAME.questions.jsonl[.zst]: {"question", "gold_doc_ids", "answers"?}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from model_adapter.training.errors import DataError
from storage.documents import Source, TextSource, render

MAX_LINE = 16 << 20


@dataclass(frozen=True)
class Document:
    """One passage or turn. text: as a model reads it (`storage.documents.render`). scope: the
    conversation or story it belongs to; a question is asked over its own one alone."""

    id: str
    title: str
    body: str
    text: str
    scope: str = ""

    @classmethod
    def of(
        cls, id_: str, source: Source, body: str, *, title: str = "", scope: str = ""
    ) -> Document:
        """A document rendered as it would be stored."""
        return cls(id_, title, body, render(source), scope)


@dataclass(frozen=True)
class Question:
    """A question with the ids of the documents that answer it; never none."""

    text: str
    gold: tuple[str, ...]
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Query:
    """A question as it is routed: tokens behind the template head, all of which vote. gold:
    places of its documents in the corpus; source: the place of its set; made_up: by `pseudo`."""

    text: str
    ids: tuple[int, ...]
    gold: tuple[int, ...]
    answers: tuple[str, ...]
    source: int
    made_up: bool


@dataclass
class QuestionSet:
    """Documents by id, and questions over them."""

    name: str
    documents: dict[str, Document] = field(default_factory=dict)
    questions: list[Question] = field(default_factory=list)


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a .jsonl or .jsonl.zst file; empty lines are passed over.

    Raises DataError for a missing file, a broken line or a line that is no object.
    """
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _row(line, path, number)
    except (OSError, UnicodeDecodeError, zstandard.ZstdError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _open(path: Path) -> IO[str]:
    if path.suffix == ".zst":
        return cast("IO[str]", zstandard.open(path, "rt", encoding="utf-8"))
    return path.open(encoding="utf-8")


def _row(line: str, path: Path, number: int) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise DataError(f"{path}, line {number}: longer than {MAX_LINE} characters")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: not an object")
    return row


def _text(row: dict[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if not isinstance(value, str) or (default is None and not value.strip()):
        raise DataError(f"{where}: {key} is missing, empty or no text")
    return value


def _texts(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = row.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DataError(f"{where}: {key} is not a list of texts")
    return tuple(value)


def find_file(folder: Path, stem: str) -> Path:
    """STEM.jsonl.zst or STEM.jsonl in a folder. Raises DataError."""
    for suffix in (".jsonl.zst", ".jsonl"):
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise DataError(f"no {stem}.jsonl or {stem}.jsonl.zst in {folder}")


def read_set(folder: Path, name: str) -> QuestionSet:
    """A whole set; every gold id exists. Raises DataError."""
    found = QuestionSet(name)
    path = find_file(folder, f"{name}.corpus")
    for number, row in read_rows(path):
        where = f"{path}, line {number}"
        id_, body = _text(row, "doc_id", where), _text(row, "text", where)
        title = _text(row, "title", where, default="")
        if id_ in found.documents:
            raise DataError(f"{where}: doc_id {id_!r:.80} stands twice")
        scope = _text(row, "conv", where, default="")
        source = TextSource(body, title)
        found.documents[id_] = Document.of(id_, source, body, title=title, scope=scope)
    path = find_file(folder, f"{name}.questions")
    for number, row in read_rows(path):
        where = f"{path}, line {number}"
        gold = _texts(row, "gold_doc_ids", where)
        for id_ in gold:
            if id_ not in found.documents:
                raise DataError(f"{where}: gold document {id_!r:.80} is not in the corpus")
        if gold:
            question = _text(row, "question", where)
            answers = _texts(row, "answers", where)
            found.questions.append(Question(question, tuple(dict.fromkeys(gold)), answers))
    return found
