"""A request's filter: checked on the way in, and as a worker is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from memsvc import errors, validation
from memsvc.convert import ROLES
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2
from model_adapter.v1 import model_adapter_pb2 as worker_pb
from storage.documents import Role
from storage.filters import DocumentFilter, MetadataCondition

MAX_VALUES = 64
MAX_METADATA = 16

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_WORKER_ROLES = {
    Role.USER: worker_pb.DocumentFilter.USER,
    Role.ASSISTANT: worker_pb.DocumentFilter.ASSISTANT,
    Role.SYSTEM: worker_pb.DocumentFilter.SYSTEM,
    Role.TOOL: worker_pb.DocumentFilter.TOOL,
}


def requested_filter(
    request: pb.QueryRequest | pb.RetrieveRequest | pb.ListDocumentsRequest,
) -> DocumentFilter | None:
    """None for all documents. Checks every limit; errors name the field in "filter"."""
    if not request.HasField("filter"):
        return None
    wire = request.filter
    first, end = _range(wire)
    wanted = DocumentFilter(
        occurred_from=first,
        occurred_before=end,
        roles=_roles(wire),
        speakers=frozenset(_values("filter.speakers", wire.speakers, validation.MAX_SPEAKER)),
        metadata=_metadata(wire),
    )
    return None if wanted == DocumentFilter() else wanted


def _range(wire: resources_pb2.DocumentFilter) -> tuple[datetime | None, datetime | None]:
    first = end = None
    if wire.HasField("occurred_from"):
        first = validation.check_time("filter.occurred_from", wire.occurred_from)
    if wire.HasField("occurred_before"):
        end = validation.check_time("filter.occurred_before", wire.occurred_before)
    if first is not None and end is not None and end <= first:
        raise errors.field_invalid("filter.occurred_before", "must lie after occurred_from")
    return first, end


def _roles(wire: resources_pb2.DocumentFilter) -> frozenset[Role]:
    roles: set[Role] = set()
    for index, role in enumerate(wire.roles):
        field = f"filter.roles[{index}]"
        validation.check_role(field, role)
        if ROLES[role] in roles:
            raise errors.field_invalid(field, "names a role a second time")
        roles.add(ROLES[role])
    return frozenset(roles)


def _metadata(wire: resources_pb2.DocumentFilter) -> tuple[MetadataCondition, ...]:
    validation.check_count("filter.metadata", len(wire.metadata), low=0, high=MAX_METADATA)
    conditions = []
    for index, condition in enumerate(wire.metadata):
        field = f"filter.metadata[{index}]"
        validation.check_key(f"{field}.key", condition.key)
        limit = validation.MAX_METADATA_VALUE
        values = _values(f"{field}.values", condition.values, limit, empty=True)
        conditions.append(MetadataCondition(condition.key, frozenset(values)))
    return tuple(conditions)


def _values(field: str, values: Sequence[str], limit: int, *, empty: bool = False) -> list[str]:
    """empty: whether a value may be."""
    validation.check_count(field, len(values), low=0, high=MAX_VALUES)
    check = validation.check_string if empty else validation.check_text
    for index, value in enumerate(values):
        check(f"{field}[{index}]", value, limit)
    return list(values)


def worker_filter(wanted: DocumentFilter | None) -> worker_pb.DocumentFilter | None:
    """As a worker is told; what has no order comes sorted."""
    if wanted is None:
        return None
    return worker_pb.DocumentFilter(
        occurred_from_us=_microseconds(wanted.occurred_from),
        occurred_before_us=_microseconds(wanted.occurred_before),
        roles=[_WORKER_ROLES[role] for role in sorted(wanted.roles)],
        speakers=sorted(wanted.speakers),
        metadata=[
            worker_pb.DocumentFilter.Metadata(key=condition.key, values=sorted(condition.values))
            for condition in wanted.metadata
        ],
    )


def _microseconds(moment: datetime | None) -> int | None:
    return None if moment is None else (moment - _EPOCH) // _MICROSECOND
