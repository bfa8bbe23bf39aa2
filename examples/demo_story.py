"""What the demo remembers and asks."""

from __future__ import annotations

from pathlib import Path

from memsvc.cli.turns import Defaults, Form, parse_turns
from memsvc.client import Turn

CONVERSATION = Path(__file__).with_name("conversation.jsonl")

#: The last of them is asked again after the memory has moved.
QUESTIONS = (
    "What can Marta not eat?",
    "Who is the librarian in charge?",
    "How much is the rent a month?",
    "What did Marta find pressed in ledger number seven?",
    "What did the clerk's aunt run in Coimbra?",
    "How old is Mr Hayashi?",
    "For how many yen was the fog bowl sold?",
)


def read_conversation() -> dict[str, list[Turn]]:
    """The sample's turns by session, in order."""
    sessions: dict[str, list[Turn]] = {}
    with CONVERSATION.open(encoding="utf-8") as lines:
        for turn in parse_turns(lines, Form.JSONL, Defaults()):
            sessions.setdefault(turn.session, []).append(turn)
    return sessions
