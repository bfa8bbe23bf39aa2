"""The SQL catalog: who owns what, what is visible, how far encoding has come."""

from storage.catalog.audit_chain import BrokenChainError, follow
from storage.catalog.catalog import Catalog
from storage.catalog.database import sqlite_url
from storage.catalog.errors import (
    AlreadyExistsError,
    CatalogError,
    CatalogFullError,
    CatalogUnavailableError,
    ConflictError,
    ModelNotFoundError,
    NotFoundError,
    RequestIdReusedError,
    RequestRepeatedError,
    SchemaError,
)
from storage.catalog.rows import (
    ApiKeyRow,
    AuditRow,
    Cursor,
    DocumentRow,
    EncodingRow,
    EncodingState,
    MemoryRow,
    MemoryState,
    ModelRow,
    Packing,
    PackingMode,
    RequestRecord,
    Scope,
    TenantRow,
    UsageRow,
)
from storage.catalog.schema import current_revision, migrate

__all__ = [
    "AlreadyExistsError",
    "ApiKeyRow",
    "AuditRow",
    "BrokenChainError",
    "Catalog",
    "CatalogError",
    "CatalogFullError",
    "CatalogUnavailableError",
    "ConflictError",
    "Cursor",
    "DocumentRow",
    "EncodingRow",
    "EncodingState",
    "MemoryRow",
    "MemoryState",
    "ModelNotFoundError",
    "ModelRow",
    "NotFoundError",
    "Packing",
    "PackingMode",
    "RequestIdReusedError",
    "RequestRecord",
    "RequestRepeatedError",
    "SchemaError",
    "Scope",
    "TenantRow",
    "UsageRow",
    "current_revision",
    "follow",
    "migrate",
    "sqlite_url",
]
