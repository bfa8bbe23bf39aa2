"""Walks along a range of keys inside a transaction."""

from __future__ import annotations

from collections.abc import Iterator

import lmdb

from storage.keys import KeyRange


def records_in(transaction: lmdb.Transaction, span: KeyRange) -> Iterator[tuple[bytes, memoryview]]:
    """Keys, and values as views that end with the transaction."""
    cursor = transaction.cursor()
    if not cursor.set_range(span.first):
        return
    for view, value in cursor.iternext():
        key = bytes(view)
        if key > span.last:
            return
        yield key, memoryview(value)


def keys_in(transaction: lmdb.Transaction, span: KeyRange) -> Iterator[bytes]:
    """Keys alone; touches one page of a value at most."""
    cursor = transaction.cursor()
    if not cursor.set_range(span.first):
        return
    for view in cursor.iternext(keys=True, values=False):
        key = bytes(view)
        if key > span.last:
            return
        yield key


def has_any(transaction: lmdb.Transaction, span: KeyRange) -> bool:
    """Whether a range holds a record."""
    return next(keys_in(transaction, span), None) is not None
