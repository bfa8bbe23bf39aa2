"""What the demo remembers and asks."""

from __future__ import annotations

from pathlib import Path

from memsvc.cli.turns import Defaults, Form, parse_turns
from memsvc.client import Turn

CONVERSATION = Path(__file__).with_name("conversation.jsonl")

QUESTIONS = ("What does Marta's brother Tiago do?",)


def read_conversation() -> dict[str, list[Turn]]:
    """The sample's turns by session, in order."""
    sessions: dict[str, list[Turn]] = {}
    with CONVERSATION.open(encoding="utf-8") as lines:
        for turn in parse_turns(lines, Form.JSONL, Defaults()):
            sessions.setdefault(turn.session, []).append(turn)
    return sessions
