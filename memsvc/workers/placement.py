"""Which of several workers of one model a memory goes to.

Rendezvous hashing: every (memory, worker) pair has a weight, and the memory goes to
the heaviest. A worker that leaves moves its own memories and no others; one that
comes takes an equal share from each. Nothing is stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def place(memory_uid: str, workers: Iterable[str]) -> str | None:
    """The worker, by its address, that a memory belongs to; None without workers."""
    return max(workers, key=lambda address: _weight(memory_uid, address), default=None)


def _weight(memory_uid: str, address: str) -> bytes:
    return hashlib.blake2b(f"{memory_uid} {address}".encode(), digest_size=16).digest()
