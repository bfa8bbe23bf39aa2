"""What the catalog raises.

    CatalogError
    ├── NotFoundError              no such row, or not visible to this caller
    │   └── ModelNotFoundError     no such model, where something else could be meant
    ├── AlreadyExistsError         the name is taken
    ├── ConflictError              revision, etag or state moved on
    │   └── RequestRepeatedError   the same call has already committed; carries its reply
    ├── LimitReachedError          the tenant holds as much as it may
    ├── LeaseLostError             another server leads the tenant: nothing was written
    ├── RequestIdReusedError       the same request id with another method or payload
    ├── SchemaError                the database's schema is not the one this code needs
    └── CatalogUnavailableError    the database cannot be reached, is busy or shut down
        └── CatalogFullError       no room: nothing of the call was written

After CatalogUnavailableError from a write the outcome is unknown: the database
may have committed before the connection broke. Repeating the call with the same
request id is safe and finds out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from storage.catalog.rows import RequestRecord


class CatalogError(Exception):
    """Root of what the catalog raises on its own account."""


class NotFoundError(CatalogError):
    """No such row. `numbers` names the missing documents when documents are meant."""

    def __init__(self, message: str, numbers: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.numbers = numbers


class ModelNotFoundError(NotFoundError):
    """No such model, where a memory or a tenant could be meant as well."""


class AlreadyExistsError(CatalogError):
    """The id is taken."""


class ConflictError(CatalogError):
    """The row is not in the state the caller expected; read it again."""


class LimitReachedError(CatalogError):
    """The tenant holds as many as the caller lets it; nothing was added. limit: that many."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the limit of {limit} is reached")
        self.limit = limit


class RequestRepeatedError(ConflictError):
    """The same call has committed before; answer with `record.reply`."""

    def __init__(self, record: RequestRecord) -> None:
        super().__init__(f"request {record.request_id} has already been served")
        self.record = record


class RequestIdReusedError(CatalogError):
    """The request id belongs to a call with another method or payload."""


class LeaseLostError(CatalogError):
    """Another server leads the tenant, or may; the transaction was rolled back."""


class SchemaError(CatalogError):
    """The database holds another schema revision than this code; migrate first."""


class CatalogUnavailableError(CatalogError):
    """The database cannot be reached, is locked for too long, or was shut down."""


class CatalogFullError(CatalogUnavailableError):
    """The disk or the database is full; the transaction was rolled back."""
