"""Damages a stopped server's store, so that the steps that mend it are come by."""

from __future__ import annotations

import random
from pathlib import Path

import lmdb

from storage.failpoints import Failpoint
from storage.keys import Kind, parse_key, related_keys

#: Points behind the mending of damage, which no crash makes.
MENDING = (Failpoint.RECONCILE_REWOUND, Failpoint.REBUILD_REWOUND, Failpoint.REBUILD_DELETED)


def spoil(folder: Path, point: Failpoint, rng: random.Random) -> None:
    """Loses a memory's first block, for reconcile to notice, or flips a bit in every
    content, for a question to notice.

    Texts are left alone: nothing could bring them back.
    """
    for tenant in (folder / "tenants").iterdir():
        environment = lmdb.open(str(tenant), map_size=2**30)
        with environment.begin(write=True) as transaction:
            contents = [
                key for key, _ in transaction.cursor() if parse_key(key).kind is Kind.CONTENT
            ]
            if contents and point is Failpoint.RECONCILE_REWOUND:
                for key in related_keys(parse_key(contents[0]))[2:]:
                    transaction.delete(key)
            else:
                for key in contents:
                    value = bytearray(transaction.get(key, b""))
                    value[rng.randrange(len(value))] ^= 1 << rng.randrange(8)
                    transaction.put(key, bytes(value))
        environment.close()
