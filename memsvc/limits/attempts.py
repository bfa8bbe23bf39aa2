"""How often one address may show a credential that is none."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from memsvc.limits.bucket import Bucket

_ADDRESSES_KEPT = 4096


class Attempts:
    """per_minute: failed ones of one address; 0: any number. For one event loop.

    Guessing a key is hopeless; this bounds what the guessing costs. The addresses that
    failed longest ago are forgotten first.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def wait_s(self, peer: str) -> float:
        """Seconds until the address may try again; 0: now. peer: as gRPC names it."""
        bucket = self._buckets.get(address(peer))
        return bucket.wait_s(self._clock()) if bucket is not None else 0.0

    def failed(self, peer: str) -> None:
        """One more failure of the address."""
        if not self._per_minute:
            return
        name, now = address(peer), self._clock()
        bucket = self._buckets.setdefault(name, Bucket(self._per_minute, now))
        self._buckets.move_to_end(name)
        bucket.spend(1, now)
        if len(self._buckets) > _ADDRESSES_KEPT:
            self._buckets.popitem(last=False)


def address(peer: str) -> str:
    """The peer without its port: "ipv4:127.0.0.1:50000", "ipv6:%5B::1%5D:50000", "unix:"."""
    kind, _, rest = peer.partition(":")
    return f"{kind}:{rest.rpartition(':')[0]}" if kind in {"ipv4", "ipv6"} else peer
