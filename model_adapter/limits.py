"""Bounds of the scheduler's queues."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of every queue. Sizes in bytes of UTF-8 text.

    waiting_queries counts queries and rankings that are being paged in or wait.
    """

    running_queries: int = 8
    waiting_queries: int = 64
    encode_jobs: int = 32
    encode_bytes: int = 64 * 1024 * 1024
    long_document_patience_s: float = 2.0


@dataclass(frozen=True)
class Load:
    """Queries at a moment, rankings included. draining: nothing new is taken."""

    running: int
    waiting: int
    draining: bool = False
