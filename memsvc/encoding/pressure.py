"""How much waits to be encoded, how fast it goes, and when to refuse more."""

from __future__ import annotations

import time
from dataclasses import dataclass

from memsvc import errors

#: Weight of the newest measurement in the rate.
_NEWEST = 0.3
#: Before anything was measured: a small model on two cores reads about this.
_FIRST_GUESS_BYTES_PER_S = 4_000.0
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
#: A refused writer is asked back when the backlog will have fallen to this share of its bound.
_LOW_WATER = 0.9


@dataclass
class Rate:
    """Encoded text bytes per second of one model, smoothed."""

    bytes_per_s: float = _FIRST_GUESS_BYTES_PER_S
    _since: float | None = None
    _bytes: int = 0

    def resume(self) -> None:
        """Work starts after a pause: time from here on counts."""
        self._since = time.monotonic()
        self._bytes = 0

    def add(self, text_bytes: int) -> None:
        """A batch is done."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            return
        self._bytes += text_bytes
        elapsed = now - self._since
        # Shorter stretches measure the pipeline's burstiness instead of its rate.
        if elapsed < 0.25:
            return
        measured = self._bytes / elapsed
        self.bytes_per_s += _NEWEST * (measured - self.bytes_per_s)
        self._since, self._bytes = now, 0


@dataclass
class Backlog:
    """What waits under one model: as last counted, and what was let in since."""

    documents: int = 0
    text_bytes: int = 0
    admitted_documents: int = 0
    admitted_bytes: int = 0

    def counted(self, documents: int, text_bytes: int) -> None:
        """A fresh count from the catalog."""
        self.documents, self.text_bytes = documents, text_bytes
        self.admitted_documents = self.admitted_bytes = 0

    def admit(self, documents: int, text_bytes: int) -> None:
        """New documents are about to be written."""
        self.admitted_documents += documents
        self.admitted_bytes += text_bytes


@dataclass(frozen=True)
class Bounds:
    """Most that may wait under one model."""

    documents: int
    text_bytes: int

    def check(self, backlog: Backlog, rate: Rate, documents: int, text_bytes: int) -> None:
        """Raises ENCODING_BACKLOG_FULL with the time the excess needs.

        A write that alone is larger than the bound is let in when nothing waits;
        it could never be otherwise.
        """
        waiting = backlog.documents + backlog.admitted_documents
        waiting_bytes = backlog.text_bytes + backlog.admitted_bytes
        if waiting == 0:
            return
        over = waiting + documents > self.documents
        over_bytes = waiting_bytes + text_bytes > self.text_bytes
        if not (over or over_bytes):
            return
        share = max(
            (waiting + documents) / self.documents, (waiting_bytes + text_bytes) / self.text_bytes
        )
        excess_bytes = waiting_bytes * max(0.0, share - _LOW_WATER) / share
        retry_s = excess_bytes / rate.bytes_per_s
        raise errors.encoding_backlog_full(min(max(retry_s, _MIN_RETRY_S), _MAX_RETRY_S))
