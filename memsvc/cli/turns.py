"""Turns from text: JSON lines or plain lines. No I/O here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from memsvc.client import Role, Turn

_FIELDS = {"role", "text", "occurred_at", "speaker", "session", "metadata"}


class TurnsError(ValueError):
    """A line that is no turn; the message names it."""


class Form(StrEnum):
    """How lines are read. auto: JSON when the first line opens an object."""

    AUTO = "auto"
    JSONL = "jsonl"
    TEXT = "text"


@dataclass(frozen=True)
class Defaults:
    """What a line leaves open."""

    role: Role = Role.USER
    speaker: str = ""
    session: str = ""


def parse_turns(lines: Iterable[str], form: Form, defaults: Defaults) -> list[Turn]:
    """Every line a turn; blank lines are passed over. Raises TurnsError."""
    turns: list[Turn] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        if form is Form.AUTO:
            form = Form.JSONL if text.startswith("{") else Form.TEXT
        try:
            turns.append(
                _from_json(text, defaults) if form is Form.JSONL else _from_text(text, defaults)
            )
        except ValueError as error:
            raise TurnsError(f"line {number}: {error}") from error
    return turns


def _from_text(text: str, defaults: Defaults) -> Turn:
    return Turn(defaults.role, text, speaker=defaults.speaker, session=defaults.session)


def _from_json(line: str, defaults: Defaults) -> Turn:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if unknown := sorted(set(value) - _FIELDS):
        raise ValueError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(_FIELDS))}")
    metadata = value.pop("metadata", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("metadata is no object of strings")
    for name, content in value.items():
        if not isinstance(content, str):
            raise ValueError(f"{name} is no string")
    if not value.get("text"):
        raise ValueError("text is missing or empty")
    return Turn(
        role=Role(value.get("role", defaults.role)),
        text=value["text"],
        occurred_at=_time(value.get("occurred_at", "")),
        speaker=value.get("speaker", defaults.speaker),
        session=value.get("session", defaults.session),
        metadata=metadata,
    )


def _time(text: str) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
