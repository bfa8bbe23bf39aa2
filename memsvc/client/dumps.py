"""Dumps of other services: read by a mapping, as a whole, before anything is sent.

What cannot be meant is an error that names its place in the JSON. What memsvc has no word for
(images, tool calls, hidden messages) is left out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from memsvc.client.batching import (
    TextBatch,
    TurnBatch,
    conversation_batches,
    text_batches,
)
from memsvc.client.mapping import Conversations, DumpMapping, Texts
from memsvc.client.places import Value, parse
from memsvc.client.types import Role, TextSource, Turn

#: A dump is read into memory as a whole.
MAX_DUMP_BYTES = 512 << 20
#: Limits of the API, in bytes of UTF-8 or entries.
_TURN_BYTES, _TEXT_BYTES = 262_144, 1_048_576
_TITLE_BYTES, _VALUE_BYTES, _SESSION_BYTES = 512, 1024, 128
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Dump:
    """What a dump holds. id: of its bytes and mapping, for request ids that are the same again.

    conversations: turns of each, in order.
    """

    id: str
    conversations: tuple[tuple[Turn, ...], ...]
    texts: tuple[TextSource, ...]

    @property
    def turns(self) -> int:
        """In all conversations."""
        return sum(map(len, self.conversations))

    def batches(self) -> Iterator[TurnBatch | TextBatch]:
        """What goes into one call each, in order, the same for the same dump."""
        yield from map(TurnBatch, conversation_batches(self.conversations))
        yield from map(TextBatch, text_batches(self.texts))

    def request_id(self, memory_uid: str, number: int) -> str:
        """Of one batch: the same whenever this dump goes into this memory."""
        made = hashlib.sha256(f"{self.id} {memory_uid}".encode()).hexdigest()
        return f"{made[:32]}-{number}"


def read_dump(data: bytes, mapping: DumpMapping) -> Dump:
    """Everything in a dump. Raises ImportFormatError naming the place."""
    root = parse(data)
    if len(data) > MAX_DUMP_BYTES:
        raise root.error(f"holds more than {MAX_DUMP_BYTES} bytes")
    talks = [one for one in mapping.conversations if _applies(root, one)]
    lists = [one for one in mapping.texts if _applies(root, one)]
    if not talks and not lists:
        raise root.error(f"is no dump of {mapping.source or 'this format'}: nothing of it is there")
    found = Dump(
        id=hashlib.sha256(repr(mapping).encode() + data).hexdigest()[:32],
        conversations=tuple(
            turns
            for section in talks
            for one in root.at(section.each)
            if (turns := tuple(_turns(one, section, mapping.source)))
        ),
        texts=tuple(text for one in lists for text in _texts(root, one, mapping.source)),
    )
    if not found.conversations and not found.texts:
        raise root.error("holds nothing to import")
    return found


def _applies(root: Value, section: Conversations | Texts) -> bool:
    if not root.has(section.each):
        return False
    if isinstance(section, Texts) or section.each:
        return True
    # A conversation that is the whole file is known by its messages.
    return root.has(section.messages or (section.tree.nodes if section.tree else ""))


def _turns(conversation: Value, section: Conversations, source: str) -> Iterator[Turn]:
    session = _clipped(_first(conversation, section.session), _SESSION_BYTES)
    metadata = _metadata(conversation, section.metadata, source)
    if section.tree is None:
        messages = conversation.at(section.messages)
    else:
        messages = _path_of(conversation, section)
    for message in messages:
        role = _role(message, section)
        text = "\n\n".join(
            part for part in (_text(message, section.text), *_also(message, section)) if part
        )
        if role is None or not text.strip():
            continue
        time = next((v.time() for path in section.time for v in message.at(path)), None)
        for piece in _pieces(text, _TURN_BYTES):
            yield Turn(role, piece, occurred_at=time, session=session, metadata=metadata)


def _path_of(conversation: Value, section: Conversations) -> Iterator[Value]:
    """Messages from the root of a tree to its leaf."""
    tree = section.tree
    assert tree is not None
    nodes, leaf = conversation.child(tree.nodes), conversation.child(tree.leaf)
    if nodes is None:
        raise conversation.error(f"has no {tree.nodes}")
    if leaf is None:
        return iter(())
    path: list[Value] = []
    seen: set[str] = set()
    at: Value | None = leaf
    while at is not None:
        name = at.text()
        if name in seen:
            raise at.error("goes round in a circle")
        seen.add(name)
        node = nodes.child(name)
        if node is None:
            raise at.error("names no node")
        message = node.child(tree.message)
        if message is not None:
            path.append(message)
        at = node.child(tree.parent)
    return reversed(path)


def _role(message: Value, section: Conversations) -> Role | None:
    found = next(message.at(section.role), None)
    if found is None:
        raise message.error(f"has no {section.role}")
    role = section.roles.get(found.text())
    if role is None:
        raise found.error(f"is no role that is known: {found.text()[:40]!r}")
    return Role(role) if role else None


def _texts(root: Value, section: Texts, source: str) -> Iterator[TextSource]:
    for item in root.at(section.each):
        text = _text(item, section.text)
        if not text.strip():
            continue
        time = next((v.time() for path in section.time for v in item.at(path)), None)
        metadata = _metadata(item, section.metadata, source)
        title = _clipped(_first(item, section.title), _TITLE_BYTES)
        for piece in _pieces(text, _TEXT_BYTES):
            yield TextSource(piece, title=title, occurred_at=time, metadata=metadata)


def _text(value: Value, paths: Sequence[str]) -> str:
    """Of the first path that has one: its texts, joined. Parts of a list that are none go."""
    for path in paths:
        listed = "[]" in path
        if listed and not _is_listed(value, path):
            continue
        found = [v.text() for v in value.at(path) if not listed or isinstance(v.content, str)]
        if any(part.strip() for part in found):
            return _clean("\n\n".join(part for part in found if part.strip()))
    return ""


def _is_listed(value: Value, path: str) -> bool:
    """Whether there is a list where the path goes through one: a dump may have a text there."""
    above, _, _ = path.partition("[]")
    return all(isinstance(found.content, list) for found in value.at(above))


def _also(message: Value, section: Conversations) -> Iterator[str]:
    return (_text(message, [path]) for path in section.also)


def _first(value: Value, paths: Sequence[str]) -> str:
    return next((text for path in paths if (text := _text(value, [path]))), "")


def _metadata(value: Value, paths: Mapping[str, str], source: str) -> dict[str, str]:
    found = {"source": source} if source else {}
    for name, path in paths.items():
        text = _first(value, [path]).replace("\n\n", ", ")
        if text:
            found[name] = _clipped(text, _VALUE_BYTES)
    return found


def _clean(text: str) -> str:
    """Without what the API refuses: each control character becomes U+FFFD."""
    return _CONTROLS.sub("\ufffd", text)


def _clipped(text: str, most: int) -> str:
    return next(_pieces(text, most), "")


def _pieces(text: str, most: int) -> Iterator[str]:
    """The text in pieces of whole characters, each of so many bytes at most."""
    data = text.encode()
    start = 0
    while start < len(data):
        end = min(start + most, len(data))
        while end < len(data) and data[end] & 0xC0 == 0x80:
            end -= 1
        yield data[start:end].decode()
        start = end
