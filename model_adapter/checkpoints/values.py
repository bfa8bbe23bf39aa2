"""Reading small files of a checkpoint: bounded, and JSON without surprises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from model_adapter.checkpoints.errors import (
    CheckpointNotFoundError,
    CorruptFileError,
    InvalidConfigError,
)

#: A config.json is a few kilobytes; a sharded index of a large model a few hundred.
MAX_JSON_BYTES = 8 << 20

Object = dict[str, Any]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> Object:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def read_bytes(path: Path, limit: int) -> bytes:
    """A whole regular file of at most `limit` bytes.

    Raises CheckpointNotFoundError, CorruptFileError.
    """
    if not path.is_file():
        raise CheckpointNotFoundError(f"no file {path.name} in {path.parent}")
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise CorruptFileError(f"{path.name} cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise CorruptFileError(f"{path.name} is larger than {limit} bytes")
    return content


def parse_object(content: bytes, name: str) -> Object:
    """A JSON object with unique keys and no NaN. Keys whose value is null are left out.

    Raises CorruptFileError.
    """
    try:
        value = json.loads(content, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{name} is not a JSON object")
    return {key: item for key, item in value.items() if item is not None}


def read_object(path: Path) -> Object:
    """The JSON object in a file. Raises CheckpointNotFoundError, CorruptFileError."""
    return parse_object(read_bytes(path, MAX_JSON_BYTES), path.name)


def token_ids(value: object, key: str, vocab_size: int) -> tuple[int, ...]:
    """One token id or a short list of them, as generation_config.json gives them.

    Raises InvalidConfigError unless each is an id within the vocabulary.
    """
    items = value if isinstance(value, list) else [value]
    if len(items) > 64:
        raise InvalidConfigError(f"{key} has more than 64 entries")
    for item in items:
        if type(item) is not int or not 0 <= item < vocab_size:
            raise InvalidConfigError(f"{key}: {item!r:.60} is not a token id below {vocab_size}")
    return tuple(items)
