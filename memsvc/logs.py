"""How the server logs: one line per event, as key=value text or as JSON.

What users wrote never reaches a log. Code logs ids, counts and times only, and
since an exception's words may quote a value, both formats print an exception's
type and the lines it passed, and leave its words out.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from types import TracebackType

_OURS = ("memsvc", "storage")

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure_logging(level: str, log_format: str) -> None:
    """level: debug to error. log_format: "text" or "json". Goes to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level="WARNING", handlers=[handler], force=True)
    # Others stay at WARNING: at DEBUG the database driver logs the values it binds.
    for name in _OURS:
        logging.getLogger(name).setLevel(level.upper())


def _fields(record: logging.LogRecord) -> dict[str, object]:
    moment = datetime.fromtimestamp(record.created, UTC)
    fields: dict[str, object] = {
        "time": moment.isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": record.getMessage(),
    }
    fields.update((k, v) for k, v in vars(record).items() if k not in _STANDARD)
    if record.exc_info and record.exc_info[1] is not None:
        fields["fault"] = fault_chain(record.exc_info[1])
    return fields


def fault_chain(error: BaseException) -> str:
    """Types and lines of an exception and its causes, without their words."""
    parts = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        parts.append(f"{type(current).__name__} at {_lines(current.__traceback__)}")
        current = current.__cause__ or current.__context__
    return " from ".join(parts)


def _lines(trace: TracebackType | None) -> str:
    lines = []
    while trace is not None:
        code = trace.tb_frame.f_code
        lines.append(f"{code.co_filename}:{trace.tb_lineno}({code.co_name})")
        trace = trace.tb_next
    return " > ".join(lines)


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """See the module."""
        return json.dumps(_fields(record), default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """time level logger "message" key=value ..."""

    def format(self, record: logging.LogRecord) -> str:
        """See the module."""
        fields = _fields(record)
        head = [str(fields.pop(key)) for key in ("time", "level", "logger")]
        message = json.dumps(fields.pop("message"), ensure_ascii=False)
        rest = [f"{key}={_quoted(value)}" for key, value in fields.items()]
        return " ".join([*head, message, *rest])


def _quoted(value: object) -> str:
    text = str(value)
    plain = text and not any(c.isspace() or c in "\"'=" for c in text)
    return text if plain else json.dumps(text, ensure_ascii=False)
