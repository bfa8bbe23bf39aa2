"""Etags of memories: the row's version, and whose it is."""

from __future__ import annotations

from memsvc import errors
from storage.catalog import MemoryRow


def memory_etag(row: MemoryRow) -> str:
    """Changes with every change of the row; a later memory of the same name has another."""
    return f"{row.uid[:16]}-{row.version:x}"


def expected_version(row: MemoryRow, etag: str, field: str) -> int | None:
    """Version that the caller expects; None without an etag. Raises ETAG_MISMATCH."""
    if not etag:
        return None
    if etag != memory_etag(row):
        raise errors.etag_mismatch(field)
    return row.version
