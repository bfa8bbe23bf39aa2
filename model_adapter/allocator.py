"""How a worker asks the C library for memory.

Encoding allocates and frees activations of megabytes all the time. By default glibc
gives a thread other than the first an arena of its own, returns freed memory to the
system at once, and faults it in again for the next batch; in the engine's thread that
cost 15 to 19 % of the encoding speed (benchmarks.ingest, two cores).

What is kept grows: every batch has a length of its own, its activations fit no hole that the
last one left, and small things that stay lie between them. So it is given back now and then,
from between what is in use too.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_MIB = 2**20

#: Freed memory that a worker keeps for its next batches, about.
KEPT_BYTES = 256 * _MIB
#: Kernels that oneDNN keeps, 0.7 MiB each: one for each weight's shape and length of batch.
#: Its own bound is 1,024. A batch has 5, and uses each in up to 30 layers.
_KERNELS_KEPT = 64


def keep_freed_memory() -> bool:
    """One arena, and up to 512 MiB kept for reuse; before any thread is started.

    False where the C library is not glibc: then nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_THRESHOLD, 32 * _MIB),
        (_M_TRIM_THRESHOLD, 512 * _MIB),
        (_M_TOP_PAD, 16 * _MIB),
    )
    accepted = [mallopt(name, value) == 1 for name, value in settings]
    return all(accepted)


class FreedMemory:
    """What the process holds of memory that it freed: kept up to a bound.

    Held memory is compared with what was held when all was last given back, because glibc
    counts what it has freed the same before it is given back and after.
    """

    def __init__(self, kept: int = KEPT_BYTES) -> None:
        """Gives back what is freed now. kept: bytes."""
        self._kept = kept
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._least = 0
        self.give_back()

    def bound(self) -> bool:
        """Gives back when more than `kept` came on top since; whether it did."""
        if self._trim is None:
            return False
        held = private_bytes()
        self._least = min(self._least, held)
        if held - self._least <= self._kept:
            return False
        self.give_back()
        return True

    def give_back(self) -> None:
        """All of it, to the system; nothing where the C library is not glibc."""
        if self._trim is not None:
            self._trim(0)
            self._least = private_bytes()


def private_bytes() -> int:
    """Resident memory of this process that is of no file. Linux alone tells it."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * mmap.PAGESIZE


def keep_few_kernels() -> None:
    """Bounds what oneDNN keeps, unless the environment says how much; before torch's first
    product."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_KERNELS_KEPT))
