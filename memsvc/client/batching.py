"""Turns and texts in groups that fit one request each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from memsvc.client.types import TextSource, Turn


@dataclass(frozen=True)
class TurnBatch:
    """Turns for one AppendTurns call."""

    items: Sequence[Turn]


@dataclass(frozen=True)
class TextBatch:
    """Texts for one PutDocuments call."""

    items: Sequence[TextSource]


Item = TypeVar("Item", Turn, TextSource)

#: Limits of one AppendTurns request, kept a little below the wire's.
BATCH_TURNS = 500
BATCH_BYTES = 2 << 20
#: Of one PutDocuments stream.
_PUT_TEXTS, _PUT_BYTES = 500, 16 << 20


def _metadata_bytes(metadata: Mapping[str, str]) -> int:
    return sum(len(k.encode()) + len(v.encode()) for k, v in metadata.items())


def _grouped(items: Iterable[Item], most: int, most_bytes: int) -> Iterator[list[Item]]:
    batch: list[Item] = []
    held = 0
    for item in items:
        weight = len(item.text.encode()) + _metadata_bytes(item.metadata)
        if batch and (len(batch) == most or held + weight > most_bytes):
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += weight
    if batch:
        yield batch


def batches(turns: Iterable[Turn]) -> Iterator[list[Turn]]:
    """Groups that fit one request each, in order."""
    return _grouped(turns, BATCH_TURNS, BATCH_BYTES)


def text_batches(texts: Iterable[TextSource]) -> Iterator[list[TextSource]]:
    """Groups of texts that fit one stream each, in order."""
    return _grouped(texts, _PUT_TEXTS, _PUT_BYTES)


def conversation_batches(conversations: Iterable[Sequence[Turn]]) -> Iterator[list[Turn]]:
    """As `batches`, but a conversation that fits one request is not parted.

    A document never spans two requests, so parting would part documents.
    """
    waiting: list[Turn] = []
    for turns in conversations:
        if waiting and len(list(batches([*waiting, *turns]))) > 1:
            yield from batches(waiting)
            waiting = []
        waiting += turns
        if len(waiting) >= BATCH_TURNS:
            yield from batches(waiting)
            waiting = []
    yield from batches(waiting)
