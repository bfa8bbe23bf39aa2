"""Every error a caller of memsvc can see: one constructor for each reason.

Handlers raise the `ApiError` made here. The gate (`memsvc.gate`) turns it into a
google.rpc.Status once, at the edge; anything else that escapes a handler becomes
INTERNAL_FAULT with an incident id.
"""

from __future__ import annotations

from memsvc.api_error import ApiError
from memsvc.v1.errors_pb2 import ErrorReason
from storage.catalog import EncodingRow

# --- the request is wrong -----------------------------------------------------------


def field_required(field: str) -> ApiError:
    """A required field is missing or empty."""
    return ApiError(ErrorReason.FIELD_REQUIRED, f"{field} is required", field=field)


def field_invalid(field: str, problem: str) -> ApiError:
    """problem: what the value must be, without repeating the value."""
    return ApiError(ErrorReason.FIELD_INVALID, f"{field} {problem}", field=field)


def text_too_long(field: str, *, limit: int, actual: int) -> ApiError:
    """limit and actual in bytes of UTF-8."""
    message = f"{field} has {actual} bytes of UTF-8; at most {limit} are allowed"
    return ApiError(ErrorReason.TEXT_TOO_LONG, message, field=field, limit=limit, actual=actual)


def text_not_clean(field: str, problem: str) -> ApiError:
    """problem: what was found, e.g. "holds the control character U+0007 at character 3"."""
    return ApiError(ErrorReason.TEXT_NOT_CLEAN, f"{field} {problem}", field=field)


def too_many_items(field: str, *, limit: int, actual: int) -> ApiError:
    """More items than a request may carry."""
    message = f"{field} has {actual} items; at most {limit} are allowed"
    return ApiError(ErrorReason.TOO_MANY_ITEMS, message, field=field, limit=limit, actual=actual)


def page_token_invalid() -> ApiError:
    """The token was not issued for this call, or is altered."""
    message = "page_token was not issued for this call"
    return ApiError(ErrorReason.PAGE_TOKEN_INVALID, message, field="page_token")


def question_too_long(*, limit: int, actual: int) -> ApiError:
    """limit and actual in the model's tokens."""
    message = f"question has {actual} tokens; the model takes {limit}"
    return ApiError(
        ErrorReason.QUESTION_TOO_LONG, message, field="question", limit=limit, actual=actual
    )


def stream_protocol(problem: str) -> ApiError:
    """Messages of a client stream came in the wrong order."""
    return ApiError(ErrorReason.STREAM_PROTOCOL, problem, field="message")


# --- who calls ----------------------------------------------------------------------


def credential_invalid() -> ApiError:
    """One message for none, unknown, expired and revoked: it tells a guesser nothing."""
    return ApiError(
        ErrorReason.CREDENTIAL_INVALID,
        "no valid API key; send metadata 'authorization: Bearer <API key>'",
    )


def credential_attempts(retry_after_s: float) -> ApiError:
    """Too many credentials from the caller's address were none; this one was not looked at."""
    return ApiError(
        ErrorReason.CREDENTIAL_ATTEMPTS,
        "too many calls from this address had no valid credential",
        retry_after_s=retry_after_s,
        limit="failed_credentials_per_minute",
    )


def scope_insufficient(needed: str) -> ApiError:
    """needed: the scope's name."""
    return ApiError(
        ErrorReason.SCOPE_INSUFFICIENT, f"this call needs a key of scope {needed}", scope=needed
    )


def key_of_some_memories() -> ApiError:
    """The key is limited to some memories, and the call is about the tenant as a whole."""
    return ApiError(
        ErrorReason.SCOPE_INSUFFICIENT,
        "this call needs a key that is not limited to some memories",
        scope="ALL_MEMORIES",
    )


# --- what it names ------------------------------------------------------------------


def memory_not_found(field: str = "name") -> ApiError:
    """Also for another tenant's memory and for one being deleted."""
    return ApiError(ErrorReason.MEMORY_NOT_FOUND, "no such memory", field=field)


def document_not_found(field: str = "name") -> ApiError:
    """No such document in this memory."""
    return ApiError(ErrorReason.DOCUMENT_NOT_FOUND, "no such document", field=field)


def model_not_found(field: str = "model") -> ApiError:
    """No worker has ever served such a model; with an empty name, none at all."""
    return ApiError(ErrorReason.MODEL_NOT_FOUND, "no such model", field=field)


def tenant_not_found(field: str = "name") -> ApiError:
    """Also for a tenant that the caller may not see."""
    return ApiError(ErrorReason.TENANT_NOT_FOUND, "no such tenant", field=field)


def api_key_not_found(field: str = "name") -> ApiError:
    """No such key in this tenant."""
    return ApiError(ErrorReason.API_KEY_NOT_FOUND, "no such API key", field=field)


def receipt_not_found(field: str = "name") -> ApiError:
    """No such deletion receipt in this tenant."""
    return ApiError(ErrorReason.RECEIPT_NOT_FOUND, "no such deletion receipt", field=field)


def api_key_not_active(field: str = "name") -> ApiError:
    """The key is revoked or has expired; there is nothing to rotate."""
    message = "the API key is revoked or has expired; make a new one"
    return ApiError(ErrorReason.API_KEY_NOT_ACTIVE, message, field=field)


def already_exists(field: str) -> ApiError:
    """The chosen identifier is taken."""
    return ApiError(ErrorReason.ALREADY_EXISTS, f"{field} is taken", field=field)


def etag_mismatch(field: str) -> ApiError:
    """The etag sent is not the resource's etag."""
    return ApiError(ErrorReason.ETAG_MISMATCH, "the resource was changed meanwhile", field=field)


def request_id_reused(field: str = "request_id") -> ApiError:
    """The request_id was used before with another payload."""
    message = f"{field} was used before with another payload"
    return ApiError(ErrorReason.REQUEST_ID_REUSED, message, field=field)


def memory_not_active(state: str, field: str = "memory") -> ApiError:
    """state: name of the memory's state."""
    message = f"the memory is {state}; this call needs an ACTIVE one"
    return ApiError(ErrorReason.MEMORY_NOT_ACTIVE, message, field=field, state=state)


def revision_not_reached(revision: int, field: str = "at_least_revision") -> ApiError:
    """revision: the one the memory has."""
    message = f"{field} lies ahead of the memory, which has revision {revision}"
    return ApiError(ErrorReason.REVISION_NOT_REACHED, message, field=field, revision=revision)


def model_not_attached(model: str, field: str = "model") -> ApiError:
    """model: its id. The memory is not encoded under it."""
    message = "the memory is not attached to this model; AttachModel has it encoded"
    return ApiError(ErrorReason.MODEL_NOT_ATTACHED, message, field=field, model=model)


def model_in_use(model: str, field: str = "model") -> ApiError:
    """model: the id of the one that answers for the memory."""
    message = "the model answers for the memory; make another one its default first"
    return ApiError(ErrorReason.MODEL_IN_USE, message, field=field, model=model)


def filter_unsupported(model: str, field: str = "filter") -> ApiError:
    """model: its id. Its worker would answer from documents that do not match."""
    text = "the model's worker knows no filters"
    return ApiError(ErrorReason.FILTER_UNSUPPORTED, text, field=field, model=model)


# --- what the server cannot do now --------------------------------------------------


def encoding_backlog_full(retry_after_s: float) -> ApiError:
    """The encoding queue is full; nothing was written."""
    return ApiError(
        ErrorReason.ENCODING_BACKLOG_FULL,
        "too much text waits to be encoded; nothing was written",
        retry_after_s=retry_after_s,
    )


def storage_full() -> ApiError:
    """Disk or map is full; nothing was written."""
    return ApiError(ErrorReason.STORAGE_FULL, "storage is full; nothing was written")


def overloaded(retry_after_s: float = 1.0, limit: str = "") -> ApiError:
    """Too many calls at once. limit: the server's setting that was reached, if it is a rate."""
    metadata = {"limit": limit} if limit else {}
    return ApiError(
        ErrorReason.OVERLOADED, "too many calls at once", retry_after_s=retry_after_s, **metadata
    )


def quota_exceeded(quota: str, limit: int, retry_after_s: float | None = None) -> ApiError:
    """quota: name of the setting that limits it. retry_after_s: for a quota that refills."""
    return ApiError(
        ErrorReason.QUOTA_EXCEEDED,
        f"the quota {quota} of {limit} is used up; nothing was written",
        retry_after_s=retry_after_s,
        quota=quota,
        limit=limit,
    )


def stream_timeout(limit: str, seconds: float) -> ApiError:
    """limit: the setting or quota that bounds the stream's time."""
    return ApiError(
        ErrorReason.STREAM_TIMEOUT,
        f"the stream stood still, or lasted, for longer than {limit} allows",
        retry_after_s=1.0,
        quota=limit,
        limit=f"{seconds:g}",
    )


def encoding_not_ready(row: EncodingRow, revision: int) -> ApiError:
    """Encoding did not reach the revision within the call's deadline, or a model that was
    attached has not caught up."""
    documents = row.encoded_documents + row.quarantined_documents + row.pending_documents
    return ApiError(
        ErrorReason.ENCODING_NOT_READY,
        f"revision {revision} is not encoded yet; revision {row.encoded_revision} is, "
        f"{row.encoded_documents} of {documents} documents",
        retry_after_s=1.0,
        model=row.model_id,
        revision=revision,
        encoded_revision=row.encoded_revision,
        encoded_documents=row.encoded_documents,
        documents=documents,
    )


def worker_unavailable(model: str, retry_after_s: float = 1.0) -> ApiError:
    """model: the model's id."""
    return ApiError(
        ErrorReason.WORKER_UNAVAILABLE,
        "no worker serves the model right now",
        retry_after_s=retry_after_s,
        model=model,
    )


def served_elsewhere(retry_after_s: float = 0.2) -> ApiError:
    """Another server leads the tenant; nothing was done."""
    return ApiError(
        ErrorReason.SERVED_ELSEWHERE,
        "another server has this tenant's data now; nothing was done",
        retry_after_s=retry_after_s,
    )


def deletion_unfinished(retry_after_s: float = 1.0) -> ApiError:
    """Deleted for everybody who asks; not yet destroyed on the disk."""
    return ApiError(
        ErrorReason.DELETION_UNFINISHED,
        "what was to be deleted is shown no more, and could not be removed from the disk yet",
        retry_after_s=retry_after_s,
    )


def draining(retry_after_s: float = 5.0) -> ApiError:
    """The server is shutting down."""
    return ApiError(
        ErrorReason.DRAINING, "the server is shutting down", retry_after_s=retry_after_s
    )


# --- what is broken -----------------------------------------------------------------


def store_unavailable(retry_after_s: float = 1.0) -> ApiError:
    """The store's disk does not work."""
    return ApiError(
        ErrorReason.STORE_UNAVAILABLE,
        "the store cannot be read or written now",
        retry_after_s=retry_after_s,
    )


def record_corrupt(what: str) -> ApiError:
    """what: the kind of record, e.g. "document 12"."""
    return ApiError(ErrorReason.RECORD_CORRUPT, f"{what} failed its checksum")


def catalog_unavailable(retry_after_s: float = 1.0) -> ApiError:
    """The catalog's database does not answer."""
    return ApiError(
        ErrorReason.CATALOG_UNAVAILABLE,
        "the catalog does not answer now",
        retry_after_s=retry_after_s,
    )


def internal_fault(incident: str) -> ApiError:
    """incident: id under which the log holds the fault."""
    message = f"a fault of the server; quote incident {incident} to its operator"
    return ApiError(ErrorReason.INTERNAL_FAULT, message, incident=incident)
