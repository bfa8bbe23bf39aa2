"""How a worker asks the C library for memory.

Encoding allocates and frees activations of megabytes all the time. By default glibc
gives a thread other than the first an arena of its own, returns freed memory to the
system at once, and faults it in again for the next batch; in the engine's thread that
cost 15 to 19 % of the encoding speed (benchmarks.ingest, two cores).
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_MIB = 2**20


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
