"""How much waits to be encoded, how fast it goes, and when to refuse more."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from memsvc import errors

#: Weight of the newest measurement in the rate.
_NEWEST = 0.3
#: Before anything was measured: a small model on two cores reads about this.
_FIRST_GUESS_BYTES_PER_S = 4_000.0
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
#: A refused writer is asked back when the backlog will have fallen to this share of its bound.
_LOW_WATER = 0.9
#: A tenant may have so many times waiting what is still free.
_SHARE = 4


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
class Waiting:
    """How much waits."""

    documents: int = 0
    text_bytes: int = 0


class Backlog:
    """What waits under one model, as last counted, and what was let in since."""

    def __init__(self) -> None:
        self.total = Waiting()
        self._by_tenant: dict[str, Waiting] = {}
        self._meanwhile: list[tuple[str, int, int]] | None = None

    def of(self, tenant_uid: str) -> Waiting:
        """The tenant's part of it."""
        return self._by_tenant.get(tenant_uid, Waiting())

    def counting(self) -> None:
        """A count begins. Whether it will see what is let in until it ends is not known."""
        self._meanwhile = []

    def counted(self, by_tenant: Mapping[str, tuple[int, int]]) -> None:
        """A fresh count from the catalog: documents and bytes of text. What was let in since it
        began comes on top: rather twice, until the next count, than not at all."""
        meanwhile, self._meanwhile = self._meanwhile or (), None
        self._by_tenant = {tenant: Waiting(*counts) for tenant, counts in by_tenant.items()}
        self.total = Waiting(
            sum(one.documents for one in self._by_tenant.values()),
            sum(one.text_bytes for one in self._by_tenant.values()),
        )
        for admitted in meanwhile:
            self.admit(*admitted)

    def admit(self, tenant_uid: str, documents: int, text_bytes: int) -> None:
        """New documents are about to be written."""
        for part in (self.total, self._by_tenant.setdefault(tenant_uid, Waiting())):
            part.documents += documents
            part.text_bytes += text_bytes
        if self._meanwhile is not None:
            self._meanwhile.append((tenant_uid, documents, text_bytes))


@dataclass(frozen=True)
class Bounds:
    """Most that may wait under one model. No tenant may take all of it.

    As in `limits.pool`: a tenant may have _SHARE times as much waiting as is still
    free, and one that has nothing waiting whatever is free.
    """

    documents: int
    text_bytes: int

    def check(
        self, backlog: Backlog, rate: Rate, tenant_uid: str, documents: int, text_bytes: int
    ) -> None:
        """Raises ENCODING_BACKLOG_FULL with the time the excess needs.

        A write that alone is larger than the bound is let in when nothing waits;
        it could never be otherwise.
        """
        total, mine = backlog.total, backlog.of(tenant_uid)
        if total.documents == 0:
            return
        share = max(
            _used(self.documents, total.documents, mine.documents, documents),
            _used(self.text_bytes, total.text_bytes, mine.text_bytes, text_bytes),
        )
        if share <= 1:
            return
        excess_bytes = total.text_bytes * max(0.0, share - _LOW_WATER) / share
        retry_s = excess_bytes / rate.bytes_per_s
        raise errors.encoding_backlog_full(min(max(retry_s, _MIN_RETRY_S), _MAX_RETRY_S))


def _used(bound: int, total: int, mine: int, new: int) -> float:
    """How full it would be for this tenant: above 1, too full."""
    of_all = (total + new) / bound
    if not mine:
        return of_all
    # mine + new <= _SHARE * (bound - total), solved for the share of what is allowed.
    return max(of_all, (mine + new + _SHARE * total) / (_SHARE * bound))
