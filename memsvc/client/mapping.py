"""Mapping files: where a foreign dump keeps what memsvc calls turns and texts.

A mapping is TOML; those that are known are in memsvc/client/mappings, one's own is given by its
path. docs/moving.md explains every key. Mapping files choose and rename; they run nothing.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from memsvc.client.errors import ConfigurationError
from memsvc.client.types import Role

T = TypeVar("T")

_FOLDER = resources.files("memsvc.client") / "mappings"


@dataclass(frozen=True)
class Tree:
    """Messages as a tree: by id, from a leaf up. Each a path or name in the conversation."""

    nodes: str
    leaf: str
    parent: str
    message: str


@dataclass(frozen=True)
class Conversations:
    """Turns: each conversation, its messages in order, and what of a message is what.

    Of several paths the first that has something counts. also: put behind the text.
    roles: by the dump's name; empty: such messages are left out.
    """

    each: str
    role: str
    text: tuple[str, ...]
    roles: Mapping[str, str]
    messages: str = ""
    tree: Tree | None = None
    session: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    time: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Texts:
    """Texts, each a document of its own."""

    each: str
    text: tuple[str, ...]
    title: tuple[str, ...] = ()
    time: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DumpMapping:
    """A whole mapping. source: goes into every document's metadata."""

    source: str
    conversations: tuple[Conversations, ...] = ()
    texts: tuple[Texts, ...] = ()


def known() -> list[str]:
    """Names of the mappings that are part of memsvc."""
    return sorted(one.name.removesuffix(".toml") for one in _FOLDER.iterdir())


def load(name: str) -> DumpMapping:
    """By name, or a file's path. Raises ConfigurationError saying what is wrong with it."""
    try:
        if name in known():
            text = (_FOLDER / f"{name}.toml").read_text(encoding="utf-8")
        elif name.endswith(".toml"):
            text = Path(name).read_text(encoding="utf-8")
        else:
            raise ConfigurationError(
                f"No format {name!r}; known are {', '.join(known())}, and mapping files (.toml)."
            )
        return _mapping(tomllib.loads(text))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"The mapping {name} cannot be used: {error}") from error


def _mapping(read: dict[str, Any]) -> DumpMapping:
    values = dict(read)
    found = DumpMapping(
        source=_string("source", values.pop("source", "")),
        conversations=tuple(_conversations(one) for one in values.pop("conversations", ())),
        texts=tuple(_section(Texts, one) for one in values.pop("texts", ())),
    )
    if values:
        raise ValueError(f"unknown key {min(values)!r}")
    if not found.conversations and not found.texts:
        raise ValueError("it maps neither conversations nor texts")
    return found


def _conversations(read: dict[str, Any]) -> Conversations:
    found = _section(Conversations, read)
    if bool(found.messages) == (found.tree is not None):
        raise ValueError("conversations have either messages or a tree")
    for role in found.roles.values():
        if role and role not in set(Role):
            raise ValueError(f"no role {role!r}")
    return found


def _section(kind: type[T], read: dict[str, Any]) -> T:
    """Builds a section's dataclass, each value by its field's type."""
    known_fields = {one.name: str(one.type) for one in fields(kind)}  # type: ignore[arg-type]  # one of ours
    values: dict[str, object] = {}
    for name, value in read.items():
        declared = known_fields.get(name)
        if declared is None:
            raise ValueError(f"unknown key {name!r}")
        if declared.startswith("tuple"):
            values[name] = tuple(_strings(name, [value] if isinstance(value, str) else value))
        elif declared.startswith("Mapping"):
            _strings(name, [*value, *value.values()])
            values[name] = value
        elif declared.startswith("Tree"):
            values[name] = Tree(**value)
        else:
            values[name] = _string(name, value)
    return kind(**values)


def _string(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is no string")
    return value


def _strings(name: str, values: Iterable[object]) -> list[str]:
    return [_string(name, value) for value in values]
