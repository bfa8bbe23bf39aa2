"""One tenant's limits. A quota has the name of the setting that gives its default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from memsvc import errors
from memsvc.api_error import ApiError
from memsvc.config import Config
from storage.catalog import LimitReachedError


@dataclass(frozen=True)
class Quotas:
    """0 stands for no limit. The fields are settings, fields of TenantQuotas and rows."""

    requests_per_minute: int
    tokens_per_minute: int
    bytes_per_minute: int
    concurrent_calls: int
    concurrent_queries: int
    stream_seconds: int
    max_memories_per_tenant: int
    max_documents_per_memory: int
    max_text_bytes_per_memory: int

    @classmethod
    def resolve(cls, config: Config, own: Mapping[str, int]) -> Self:
        """The tenant's own where it has them, else the server's settings."""
        return cls(**{name: own.get(name) or getattr(config, name) for name in QUOTAS})

    def check_memories(self, held: int) -> None:
        """Before one more is made. Raises QUOTA_EXCEEDED."""
        _check("max_memories_per_tenant", self.max_memories_per_tenant, held + 1)

    def check_memory(self, documents: int, text_bytes: int) -> None:
        """What a memory would hold after a write. Raises QUOTA_EXCEEDED."""
        _check("max_documents_per_memory", self.max_documents_per_memory, documents)
        _check("max_text_bytes_per_memory", self.max_text_bytes_per_memory, text_bytes)


def memories_exceeded(error: LimitReachedError) -> ApiError:
    """As `Quotas.check_memories`, where the catalog counted: of calls at once some are too many."""
    return errors.quota_exceeded("max_memories_per_tenant", error.limit)


def _check(name: str, limit: int, wanted: int) -> None:
    if limit and wanted > limit:
        raise errors.quota_exceeded(name, limit)


#: Every quota's name.
QUOTAS = tuple(field.name for field in dataclasses.fields(Quotas))
