"""A request's filter, checked on the way in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Literal

from model_adapter.errors import FieldError, TooManyItemsError
from model_adapter.v1 import model_adapter_pb2 as pb
from storage.documents import Role
from storage.filters import DocumentFilter, MetadataCondition

MAX_FILTER_VALUES = 64
MAX_FILTER_KEYS = 16

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ROLES = {
    pb.DocumentFilter.USER: Role.USER,
    pb.DocumentFilter.ASSISTANT: Role.ASSISTANT,
    pb.DocumentFilter.SYSTEM: Role.SYSTEM,
    pb.DocumentFilter.TOOL: Role.TOOL,
}


def document_filter(request: pb.QueryRequest | pb.RouteRequest) -> DocumentFilter | None:
    """None for the whole memory. Raises FieldError, TooManyItemsError."""
    if not request.HasField("filter"):
        return None
    wanted = request.filter
    _check_count("filter.speakers", len(wanted.speakers), MAX_FILTER_VALUES)
    _check_count("filter.metadata", len(wanted.metadata), MAX_FILTER_KEYS)
    for condition in wanted.metadata:
        _check_count("filter.metadata.values", len(condition.values), MAX_FILTER_VALUES)
        if not condition.key:
            raise FieldError("a condition without a key", field="filter.metadata.key")
    unknown = set(wanted.roles) - _ROLES.keys()
    if unknown:
        raise FieldError("no role", field="filter.roles")
    return DocumentFilter(
        occurred_from=_moment(wanted, "occurred_from_us"),
        occurred_before=_moment(wanted, "occurred_before_us"),
        roles=frozenset(_ROLES[role] for role in wanted.roles),
        speakers=frozenset(wanted.speakers),
        metadata=tuple(MetadataCondition(c.key, frozenset(c.values)) for c in wanted.metadata),
    )


def _moment(
    wanted: pb.DocumentFilter, name: Literal["occurred_from_us", "occurred_before_us"]
) -> datetime | None:
    if not wanted.HasField(name):
        return None
    try:
        return _EPOCH + timedelta(microseconds=getattr(wanted, name))
    except OverflowError:
        raise FieldError("no time", field=f"filter.{name}") from None


def _check_count(field: str, count: int, limit: int) -> None:
    if count > limit:
        raise TooManyItemsError("too many", field=field, limit=str(limit), actual=str(count))
