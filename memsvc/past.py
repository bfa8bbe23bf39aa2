"""A memory as it was: at_revision and at_time of a request."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

from memsvc import errors, validation
from memsvc.application import Application
from memsvc.v1 import memory_service_pb2 as pb
from storage.catalog import MemoryRow

#: Requests that may ask for the past.
AsOf: TypeAlias = (
    pb.QueryRequest | pb.RetrieveRequest | pb.ListDocumentsRequest | pb.ForkMemoryRequest
)


def check_as_of(request: AsOf) -> None:
    """Raises FIELD_INVALID. Asks for nothing but the request."""
    if request.at_revision < 0:
        raise errors.field_invalid("at_revision", "must not be negative")
    if request.HasField("at_time"):
        validation.check_time("at_time", request.at_time)
        if request.at_revision:
            raise errors.field_invalid("at_time", "has no meaning beside at_revision")


def check_past(memory: MemoryRow, field: str, revision: int) -> None:
    """Raises REVISION_NOT_REACHED, and FIELD_INVALID before a fork's own past begins."""
    if revision > memory.revision:
        raise errors.revision_not_reached(memory.revision, field)
    if revision < memory.forked_revision:
        raise errors.field_invalid(
            field, f"lies before revision {memory.forked_revision}, at which the memory was forked"
        )


async def as_of(application: Application, memory: MemoryRow, request: AsOf) -> MemoryRow:
    """The memory's row with the revision and last number that it had then.

    Everything else, deletions above all, is as of now. Raises REVISION_NOT_REACHED, and
    FIELD_INVALID for a revision from before the memory was forked.
    """
    if request.at_revision:
        check_past(memory, "at_revision", request.at_revision)
        then = await application.catalog.revision_at(memory.uid, revision=request.at_revision)
        # A write before revisions were written down may have none: its number counts.
        return replace(memory, revision=request.at_revision, last_number=then.last_number)
    if request.HasField("at_time"):
        at_us = request.at_time.ToMicroseconds()
        then = await application.catalog.revision_at(memory.uid, at_us=at_us)
        return replace(memory, revision=then.revision, last_number=then.last_number)
    return memory
