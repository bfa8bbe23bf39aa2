"""The limits of the public API, as the comments of protos/memsvc/v1 state them.

Every function takes the path of the field it looks at ("turns[3].text") and
raises ApiError naming it. Messages never repeat a value: it may be private.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from memsvc import errors
from memsvc.v1 import resources_pb2

MAX_REQUEST_BYTES = 4 * 1024 * 1024
MAX_TURNS = 1000
MAX_TURN_TEXT = 262_144
MAX_DOCUMENT_TEXT = 1_048_576
MAX_PUT_DOCUMENTS = 1000
MAX_PUT_BYTES = 64 * 1024 * 1024
MAX_DELETE_NAMES = 1000
MAX_QUESTION = 16_384
MAX_TITLE = 512
MAX_SPEAKER = 128
MAX_SESSION = 128
MAX_DISPLAY_NAME = 256
MAX_LABELS = 64
MAX_LABEL_VALUE = 256
MAX_METADATA = 32
MAX_METADATA_VALUE = 1024
MAX_PAGE = 1000
MAX_FULL_PAGE = 100
DEFAULT_PAGE = 50
MAX_ETAG = 64
MAX_RETENTION_S = 100 * 366 * 86_400

#: Unicode category Cc less tab, line feed and carriage return.
_CONTROL_BYTES = bytes({*range(0x20), 0x7F} - {0x09, 0x0A, 0x0D})
_C1_LEAD = b"\xc2"
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_LABEL_KEY = re.compile(r"[a-z][a-z0-9_.-]{0,62}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MIN_SECONDS, _MAX_SECONDS = -62_135_596_800, 253_402_300_799


def check_clean(field: str, text: str) -> None:
    """Refuses control characters. Unicode is not normalised: what was sent is kept."""
    data = text.encode()
    # Ten times as fast as the pattern, which then only looks where there is reason to.
    plain = len(data.translate(None, _CONTROL_BYTES)) == len(data)
    if plain and _C1_LEAD not in data:
        return
    found = _CONTROL.search(text)
    if found:
        problem = f"holds the control character U+{ord(found[0]):04X} at character {found.start()}"
        raise errors.text_not_clean(field, problem)


def check_length(field: str, text: str, limit: int) -> int:
    """limit in bytes of UTF-8. Returns the bytes."""
    size = len(text) if text.isascii() else len(text.encode())
    if size > limit:
        raise errors.text_too_long(field, limit=limit, actual=size)
    return size


def check_text(field: str, text: str, limit: int) -> int:
    """A required text. Returns its bytes of UTF-8."""
    if not text:
        raise errors.field_required(field)
    size = check_length(field, text, limit)
    check_clean(field, text)
    return size


def check_string(field: str, text: str, limit: int) -> str:
    """An optional short text."""
    check_length(field, text, limit)
    check_clean(field, text)
    return text


def check_map(
    field: str, entries: Mapping[str, str], *, max_entries: int, max_value: int
) -> dict[str, str]:
    """Labels and metadata. Errors name the map, not the key: a key may be private."""
    if len(entries) > max_entries:
        raise errors.too_many_items(field, limit=max_entries, actual=len(entries))
    for key, value in entries.items():
        if not _LABEL_KEY.fullmatch(key):
            raise errors.field_invalid(field, "has a key that is not [a-z][a-z0-9_.-]{0,62}")
        check_string(field, value, max_value)
    return dict(entries)


def check_key(field: str, key: str) -> None:
    """One required key of labels or metadata."""
    if not key:
        raise errors.field_required(field)
    if not _LABEL_KEY.fullmatch(key):
        raise errors.field_invalid(field, "is not [a-z][a-z0-9_.-]{0,62}")


def check_labels(field: str, labels: Mapping[str, str]) -> dict[str, str]:
    """Labels of a memory."""
    return check_map(field, labels, max_entries=MAX_LABELS, max_value=MAX_LABEL_VALUE)


def check_metadata(field: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a turn or a text."""
    return check_map(field, metadata, max_entries=MAX_METADATA, max_value=MAX_METADATA_VALUE)


def check_display_name(field: str, text: str) -> str:
    """display_name of any resource."""
    return check_string(field, text, MAX_DISPLAY_NAME)


def check_request_id(request_id: str, field: str = "request_id") -> str:
    """Empty means none."""
    if request_id and not _REQUEST_ID.fullmatch(request_id):
        raise errors.field_invalid(field, "must be at most 64 characters of [A-Za-z0-9._-]")
    return request_id


def check_page_size(page_size: int, limit: int = MAX_PAGE) -> int:
    """Returns the size to use; 0 means the default."""
    if not 0 <= page_size <= limit:
        raise errors.field_invalid("page_size", f"must be between 0 and {limit}")
    return page_size or DEFAULT_PAGE


def check_count(field: str, count: int, *, low: int, high: int) -> None:
    """Number of items of a repeated field."""
    if count < low:
        raise errors.field_required(field)
    if count > high:
        raise errors.too_many_items(field, limit=high, actual=count)


def check_range(
    field: str, value: float, *, low: float, high: float, default: float | None = None
) -> float:
    """A number; 0 means default when there is one."""
    if default is not None and value == 0:
        return default
    # Written so that NaN fails.
    if not low <= value <= high:
        raise errors.field_invalid(field, f"must be between {low} and {high}")
    return value


def check_time(field: str, moment: Timestamp) -> datetime:
    """Aware UTC; nanoseconds are cut to microseconds."""
    in_range = _MIN_SECONDS <= moment.seconds <= _MAX_SECONDS
    if not in_range or not 0 <= moment.nanos <= 999_999_999:
        raise errors.field_invalid(field, "must lie in the years 0001 to 9999")
    return _EPOCH + timedelta(seconds=moment.seconds, microseconds=moment.nanos // 1000)


def check_retention(field: str, wanted: Duration) -> int:
    """Whole seconds; 0 for none."""
    if wanted.nanos or not (wanted.seconds == 0 or 60 <= wanted.seconds <= MAX_RETENTION_S):
        raise errors.field_invalid(field, "must be whole seconds, 1 minute to 100 years, or unset")
    return wanted.seconds


def check_role(field: str, role: int) -> None:
    """Refuses the zero value and numbers that this version does not know."""
    if role == resources_pb2.ROLE_UNSPECIFIED:
        raise errors.field_required(field)
    if role not in resources_pb2.Role.values():
        raise errors.field_invalid(field, "is not a role")


def check_question(question: str) -> None:
    """1 to 16384 bytes; the model's own limit in tokens is the worker's to check."""
    check_text("question", question, MAX_QUESTION)


def check_mask(field: str, paths: Sequence[str], allowed: Sequence[str]) -> None:
    """An update mask. "*" is refused: a client that knows fewer fields would clear the rest."""
    for path in paths:
        if path not in allowed:
            raise errors.field_invalid(field, f"may name {' and '.join(allowed)} only")
