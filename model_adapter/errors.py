"""What a worker refuses or fails with, besides what its engine does.

EngineError                  engine.py; `reason` is a memsvc.v1.ErrorReason name
  DocumentTooLongError         engine.py
  QuestionTooLongError         engine.py
  ModelMismatchError           engine.py; identity, layout or stored block of another model
  FieldError                   a request field is malformed
  TooManyItemsError            more documents than a request may carry
  OverloadedError              a bounded queue is full
  DeadlineError                the caller's deadline passed first
  DrainingError                the worker is going down
  InterruptedQueryError        the memory was evicted or deleted from under the query
    MemoryChangedError           the store no longer holds what was paged in
    UnwantedError                the caller went away
  MemoryInUseError             an eviction's readers did not stop in time
  CorruptRecordError           a stored record fails its checks
  InternalFaultError           anything else; logged under its incident id

What did not fail by its own doing says so in its metadata: `cause`, "evicted", "draining" or
"full". A caller that looks for what harms a worker need not look there.
"""

from __future__ import annotations

import logging
import secrets
import traceback

from model_adapter.engine import EngineError

log = logging.getLogger(__name__)


class FieldError(EngineError):
    """A request field is malformed. metadata: field."""

    reason = "FIELD_INVALID"


class TooManyItemsError(EngineError):
    """More items than a request may carry. metadata: field, limit, actual."""

    reason = "TOO_MANY_ITEMS"


class OverloadedError(EngineError):
    """A bounded queue is full; the same call may succeed soon."""

    reason = "OVERLOADED"


class MemoryInUseError(OverloadedError):
    """A memory could not be evicted because somebody kept reading it."""


class DeadlineError(EngineError):
    """The caller's deadline passed before the work was done."""

    reason = "OVERLOADED"


class DrainingError(EngineError):
    """The worker is going down."""

    reason = "DRAINING"


class InterruptedQueryError(EngineError):
    """The memory was evicted under its reader. Asking again reads it afresh."""

    reason = "WORKER_UNAVAILABLE"


class MemoryChangedError(InterruptedQueryError):
    """Records went away under a reader. Asking again reads the memory afresh."""


class UnwantedError(InterruptedQueryError):
    """The caller went away. Nothing is wrong with the memory; what was read of it stays."""


class CorruptRecordError(EngineError):
    """A stored record fails its checks. metadata: number, record ("block" or "text").

    A block is made again from its text; text cannot be.
    """

    reason = "RECORD_CORRUPT"


class InternalFaultError(EngineError):
    """A fault of the worker. metadata: incident, under which it was logged."""


def internal_fault(error: BaseException) -> InternalFaultError:
    """Logs where an unforeseen error came from, without its message: that may hold user text."""
    incident = secrets.token_hex(8)
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))
    log.error("incident %s: %s at %s", incident, type(error).__name__, where)
    return InternalFaultError("the worker failed inside", incident=incident)
