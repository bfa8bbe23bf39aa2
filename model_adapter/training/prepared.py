"""What preparing makes, kept in files: a second start reads, and makes nothing again.

One safetensors file holds the cleaned and tokenised sets, another the teacher's vectors, so
that a run that is cut off while the teacher works has lost that work alone. Their names are
hashes over everything that shapes them, this package's code included: what is there is
never stale, and the folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from model_adapter.training.data import Document, Query, find_file
from model_adapter.training.settings import Settings

Arrays = dict[str, npt.NDArray[Any]]

#: Fields of a document, in order.
_DOCUMENT = tuple(item.name for item in fields(Document))
#: Settings that shape what is prepared; the sets' own are among them.
_SHAPING = (
    "sources",
    "evaluation",
    "sets_seed",
    "max_document",
    "max_question",
    "held_out",
    "dialogues",
    "dialogue_weight",
    "sessions",
    "session_weight",
    "max_session",
)
#: Modules and data of this package by which sets become a corpus.
_CODE = (
    "corpus.py",
    "data.py",
    "dialogue.py",
    "dialogue.toml",
    "hygiene.py",
    "prepared.py",
    "pseudo.py",
)


@dataclass(frozen=True)
class Prepared:
    """Documents by place, with their tokens, numbers and the set that each is of; queries to
    train on, and held out."""

    documents: list[Document] = field(default_factory=list)
    tokens: list[tuple[int, ...]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    placed: list[int] = field(default_factory=list)
    queries: list[Query] = field(default_factory=list)
    held_out: list[Query] = field(default_factory=list)


def file_of(settings: Settings, evaluation: Iterable[Path], base_sha256: str) -> Path:
    """Where the prepared sets lie: named by settings, data, code and the base's tokenizer.

    Reads the data files once. Raises DataError for one that is missing.
    """
    digest = hashlib.sha256(base_sha256.encode())
    held = asdict(settings)
    for key in _SHAPING:
        digest.update(f"{key}={held[key]!r}\n".encode())
    here = Path(__file__).parent
    files = [here / name for name in _CODE]
    for source in settings.sources:
        for part in ("corpus", "questions"):
            files.append(find_file(settings.data, f"{source.name}.{part}"))
    for path in (*files, *evaluation):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return folder_of(settings) / f"sets-{digest.hexdigest()[:32]}.safetensors"


def folder_of(settings: Settings) -> Path:
    """Shared by all runs on a machine."""
    return settings.cache / "training"


def named(settings: Settings, kind: str, texts: Sequence[str], more: bytes = b"") -> Path:
    """Where what was made of these texts lies."""
    digest = hashlib.sha256("\0".join(texts).encode())
    digest.update(more)
    return folder_of(settings) / f"{kind}-{digest.hexdigest()[:32]}.safetensors"


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial)
    partial.replace(path)


def write(path: Path, prepared: Prepared) -> None:
    """Writes what `read` reads."""
    documents = prepared.documents
    arrays: Arrays = {
        "numbers": np.array(prepared.numbers, dtype=np.int64),
        "placed": np.array(prepared.placed, dtype=np.int64),
    }
    for name in _DOCUMENT:
        _put_texts(arrays, name, [getattr(document, name) for document in documents])
    _put_rows(arrays, "tokens", prepared.tokens)
    for kind, queries in (("asked", prepared.queries), ("held", prepared.held_out)):
        _put_texts(arrays, f"{kind}.text", [query.text for query in queries])
        _put_rows(arrays, f"{kind}.ids", [query.ids for query in queries])
        _put_rows(arrays, f"{kind}.gold", [query.gold for query in queries])
        answers = [answer for query in queries for answer in query.answers]
        _put_texts(arrays, f"{kind}.answers", answers)
        arrays[f"{kind}.answer_counts"] = np.array([len(q.answers) for q in queries], np.int64)
        arrays[f"{kind}.source"] = np.array([query.source for query in queries], np.int64)
        arrays[f"{kind}.made_up"] = np.array([query.made_up for query in queries], np.uint8)
    write_arrays(path, arrays)


def read(path: Path) -> Prepared:
    """A file that `write` wrote."""
    arrays: Arrays = load_file(path)
    columns = (_texts(arrays, name) for name in _DOCUMENT)
    return Prepared(
        documents=[Document(*row) for row in zip(*columns, strict=True)],
        tokens=_rows(arrays, "tokens"),
        numbers=arrays["numbers"].tolist(),
        placed=arrays["placed"].tolist(),
        queries=_queries(arrays, "asked"),
        held_out=_queries(arrays, "held"),
    )


def _queries(arrays: Arrays, kind: str) -> list[Query]:
    answers = _texts(arrays, f"{kind}.answers")
    ends = np.cumsum(arrays[f"{kind}.answer_counts"]).tolist()
    starts = [0, *ends][: len(ends)]
    return [
        Query(text, ids, gold, tuple(answers[start:end]), source, bool(made_up))
        for text, ids, gold, start, end, source, made_up in zip(
            _texts(arrays, f"{kind}.text"),
            _rows(arrays, f"{kind}.ids"),
            _rows(arrays, f"{kind}.gold"),
            starts,
            ends,
            arrays[f"{kind}.source"].tolist(),
            arrays[f"{kind}.made_up"].tolist(),
            strict=True,
        )
    ]


def _put_texts(arrays: Arrays, name: str, texts: Sequence[str]) -> None:
    encoded = [text.encode() for text in texts]
    arrays[name] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    arrays[f"{name}.ends"] = np.cumsum([len(text) for text in encoded], dtype=np.int64)


def _texts(arrays: Arrays, name: str) -> list[str]:
    whole, ends = arrays[name].tobytes(), arrays[f"{name}.ends"].tolist()
    return [whole[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]


def _put_rows(arrays: Arrays, name: str, rows: Sequence[Sequence[int]]) -> None:
    flat = np.fromiter((number for row in rows for number in row), dtype=np.int32)
    arrays[name] = flat
    arrays[f"{name}.ends"] = np.cumsum([len(row) for row in rows], dtype=np.int64)


def _rows(arrays: Arrays, name: str) -> list[tuple[int, ...]]:
    flat, ends = arrays[name].tolist(), arrays[f"{name}.ends"].tolist()
    return [tuple(flat[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
