"""How the turns of one append become documents. Pure; see docs/packing.md for the choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from storage.catalog import Packing, PackingMode
from storage.documents import Conversation, Turn

DEFAULT_WINDOW_TURNS = 4
DEFAULT_DOCUMENT_BYTES = 8192
WINDOW_TURNS = (2, 64)
DOCUMENT_BYTES = (512, 65_536)


def policy(mode: PackingMode, window_turns: int = 0, max_document_bytes: int = 0) -> Packing:
    """A policy with defaults put in for zeros; what its mode does not use stays 0."""
    uses_window = mode is PackingMode.WINDOW
    uses_bytes = mode is not PackingMode.TURN
    return Packing(
        mode=mode,
        window_turns=(window_turns or DEFAULT_WINDOW_TURNS) if uses_window else 0,
        max_document_bytes=(max_document_bytes or DEFAULT_DOCUMENT_BYTES) if uses_bytes else 0,
    )


@dataclass
class _Group:
    """A document being filled."""

    first: int
    turns: list[Turn] = field(default_factory=list)
    text_bytes: int = 0

    def takes(self, size: int, packing: Packing) -> bool:
        """Whether one more turn of `size` bytes fits."""
        if packing.mode is PackingMode.WINDOW and len(self.turns) >= packing.window_turns:
            return False
        return self.text_bytes + size <= packing.max_document_bytes


def pack(turns: Sequence[Turn], packing: Packing) -> list[Conversation]:
    """Documents in the order of their first turns; every turn is in exactly one.

    WINDOW and SESSION never mix sessions, also when a request interleaves them.
    A single turn longer than max_document_bytes is a document of its own.
    """
    if packing.mode is PackingMode.TURN:
        return [Conversation((turn,)) for turn in turns]
    groups: list[_Group] = []
    filling: dict[str, _Group] = {}
    for position, turn in enumerate(turns):
        size = len(turn.text.encode())
        group = filling.get(turn.session)
        if group is None or not group.takes(size, packing):
            group = filling[turn.session] = _Group(first=position)
            groups.append(group)
        group.turns.append(turn)
        group.text_bytes += size
    return [Conversation(tuple(group.turns)) for group in groups]
