"""What makes the audit trail tell when somebody altered it: a keyed hash chain per tenant.

Each entry's digest covers the digest of the one before, so an entry that was changed,
taken out, put in or moved breaks the chain there. The key is not in the database: who
holds the database alone cannot make the chain again. What a chain cannot show is that
its newest entries were cut off; for that, compare it with a head noted elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable

from storage.catalog.rows import AuditRow

#: Stands for the digest before the first entry.
GENESIS = bytes(32)


class BrokenChainError(Exception):
    """An entry does not follow from the one before. sequence: where."""

    def __init__(self, sequence: int, detail: str) -> None:
        super().__init__(f"entry {sequence} {detail}")
        self.sequence = sequence


def chain_digest(key: bytes, previous: bytes, row: AuditRow) -> bytes:
    """32 bytes: HMAC-SHA-256 over the digest before and every field of the row."""
    fields = [
        row.tenant_uid,
        row.sequence,
        row.at_us,
        row.actor,
        row.action,
        row.resource,
        row.outcome,
    ]
    return hmac.digest(key, previous + json.dumps(fields).encode(), hashlib.sha256)


def follow(key: bytes, previous: AuditRow | None, rows: Iterable[AuditRow]) -> AuditRow | None:
    """Goes along entries by ascending sequence. Returns the last one; raises BrokenChainError.

    previous: the entry before the first one, None at the start of the chain.
    """
    for row in rows:
        sequence, digest = (previous.sequence, previous.digest) if previous else (0, GENESIS)
        if row.sequence != sequence + 1:
            raise BrokenChainError(row.sequence, f"follows entry {sequence}")
        if not hmac.compare_digest(row.digest, chain_digest(key, digest, row)):
            raise BrokenChainError(row.sequence, "is not as it was written")
        previous = row
    return previous
