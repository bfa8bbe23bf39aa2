"""The catalog as callers use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from sqlalchemy import text

from storage.catalog.api_keys import ApiKeys
from storage.catalog.attachments import Attachments
from storage.catalog.audit import Audit
from storage.catalog.base import CatalogPart, reads, wall_clock_us
from storage.catalog.connections import Database
from storage.catalog.database import database_url
from storage.catalog.documents import Documents
from storage.catalog.encodings import Encodings
from storage.catalog.forks import Forks
from storage.catalog.imports import Imports
from storage.catalog.leases import Leases
from storage.catalog.memories import Memories
from storage.catalog.models import Models
from storage.catalog.overview import Overview
from storage.catalog.quotas import Quotas
from storage.catalog.revisions import Revisions
from storage.catalog.schema import require_head
from storage.catalog.tenants import Tenants
from storage.catalog.usage import Usage


class Catalog(
    Tenants,
    ApiKeys,
    Memories,
    Overview,
    Documents,
    Revisions,
    Forks,
    Imports,
    Models,
    Attachments,
    Encodings,
    Usage,
    Quotas,
    Leases,
    Audit,
    CatalogPart,
):
    """The SQL catalog, on SQLite or PostgreSQL, for one event loop.

    Every method is one transaction: all of it is durable when it returns, or none
    of it happened. Every method may raise CatalogUnavailableError.
    """

    @classmethod
    async def open(cls, url: str, *, clock_us: Callable[[], int] = wall_clock_us) -> Self:
        """Opens the database at `url` ("sqlite:///FILE" or "postgresql://...").

        Raises SchemaError unless it has been migrated to this code's revision,
        CatalogError for a URL of another kind, CatalogUnavailableError.
        """
        catalog = cls(Database(database_url(url)), clock_us)
        try:
            await catalog._require_head()
        except BaseException:
            await catalog.close()
            raise
        return catalog

    @reads
    async def _require_head(self) -> None:
        async with self._database.reading() as connection:
            await connection.run_sync(require_head)

    async def close(self) -> None:
        """Closes every connection."""
        await self._database.close()

    @reads
    async def ping(self) -> None:
        """Returns when the database answers. Raises CatalogUnavailableError."""
        async with self._database.reading() as connection:
            await connection.execute(text("SELECT 1"))
